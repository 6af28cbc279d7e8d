"""A tokenizer.json that makes much of little, or never ends, is refused; those of the known models are not."""

import json

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinylora_jax.data import DataError, get_template, render
from tinylora_jax.io._pretrained import _folder_tokenizer
from tinylora_jax.io.hf._tokenizer_growth import check_growth

replace = lambda given, content: {"type": "Replace", "pattern": {"String": given}, "content": content}
sequence = lambda name, steps: {"type": "Sequence", name: steps}
template = lambda count: {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * count}


def write(folder, **parts):
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "1": 2, "</s>": 3}, []))
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | parts))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": sequence("normalizers", [replace("1", "11")] * 40)},
        {"normalizer": replace("1", "1" * 100_000)},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 10_000}},
        {"normalizer": sequence("normalizers", [{"type": "Prepend", "prepend": "x" * 99}] * 9)},
        {"decoder": sequence("decoders", [sequence("decoders", [replace("a", "aa")] * 20)] * 2)},
        {"post_processor": template(5000)},
        {"post_processor": sequence("processors", [template(10)] * 9)},
    ],
)
def test_what_makes_a_text_a_thousand_times_as_long_is_refused(tmp_path, parts):
    write(tmp_path, **parts)
    with pytest.raises(ValueError, match=r"tokenizer\.json: its \w+ could make a text .* times as long"):
        _folder_tokenizer(tmp_path)


def test_what_the_known_models_do_is_not():
    llama2 = sequence("normalizers", [{"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")])
    decoder = sequence("decoders", [replace("▁", " "), {"type": "ByteFallback"}, {"type": "Fuse"}])
    check_growth({"normalizer": llama2, "decoder": decoder, "post_processor": template(3)})
    check_growth({"normalizer": sequence("normalizers", [{"type": "NFKC"}, {"type": "Lowercase"}]), "decoder": None})


def test_a_pattern_that_never_ends_is_one_error():
    core = Tokenizer(models.BPE({"a": 0, "b": 1, "</s>": 2}, []))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa|a+)+$"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    with pytest.raises(DataError, match="the model's tokenizer cannot encode 'aaaa"):
        render(get_template("plain"), "a" * 60 + "b", tokenizer)
