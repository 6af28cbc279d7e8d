"""Rendering of prompts with real, tiny tokenizers."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tinylora_jax.data import TEMPLATES, PromptTemplate, get_template, render

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template=None):
    """A byte-level tokenizer that puts <s> first, as Llama's does."""
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", additional_special_tokens=specials[1:])
    fast.chat_template = chat_template
    return fast


def test_chat_template_is_used_with_one_beginning_token():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    ids = render(PromptTemplate("Be brief.", "Q: {question}"), "1 + 1?", tokenizer)
    assert ids.count(0) == 1 and ids[0] == 0
    assert tokenizer.decode(ids) == (
        "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nQ: 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_system_message_adds_none():
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    assert "system" not in tokenizer.decode(render(PromptTemplate(None, "{question}"), "1?", tokenizer))


def test_tokenizer_without_chat_template_gets_plain_text():
    tokenizer = make_tokenizer()
    ids = render(PromptTemplate("Be brief.", "Q: {question}"), "1 + 1?", tokenizer)
    assert tokenizer.decode(ids) == "<s>Be brief.\n\nQ: 1 + 1?"
    assert tokenizer.decode(render(TEMPLATES["plain"], "1 + 1?", tokenizer)) == "<s>1 + 1?"


@pytest.mark.parametrize("question", ["{x}", "{", "}}{{", "{question}", "{0.__class__}", "{{ bos_token }}", "%s \\1 é"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_questions_are_plain_text(question, name):
    tokenizer = make_tokenizer(CHAT_TEMPLATE)
    text = tokenizer.decode(render(TEMPLATES[name], question, tokenizer))
    assert TEMPLATES[name].user.replace("{question}", question) in text


def test_boxed_is_the_wording_of_the_paper():
    boxed = get_template("boxed")
    assert boxed.system == "You are a helpful assistant."
    assert boxed.user == "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


def test_unknown_template_and_template_without_question():
    with pytest.raises(ValueError, match="did you mean gsm8k"):
        get_template("gsm8")
    with pytest.raises(ValueError, match="needs {question}"):
        PromptTemplate(None, "What?")
