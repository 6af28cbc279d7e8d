"""A chat template is a program from elsewhere: it renders, or it is one error within seconds."""

import sys
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinylora_jax.data import DataError, get_template, render

LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "division": "{{ 1 / 0 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "loops": LOOP,
    "loops for some questions": "{% if 'hello' in messages[-1].content %}" + LOOP + "{% endif %}",
    "power": "{{ (10 ** (10 ** 9)) % 3 }}",
    "product": "{{ 'a' * 10 ** 10 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "width": "{{ '%999999999d' % 1 }}",
    "syntax": "{{",
    "attributes": "{{ messages.__class__.__mro__ }}",
    "type": "{{ messages + 1 }}",
    "too long": "x" * (1 << 21),
}


def tokenizer(template):
    core = Tokenizer(models.WordLevel({"hello": 0, "x": 1}, unk_token="x"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core)
    made.chat_template = template
    return made


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_one_error_in_time(name):
    started, before = time.process_time(), sys.gettrace()  # wall time depends on what else runs
    with pytest.raises(DataError, match="the model's chat template .*fix or remove it"):
        render(get_template("plain"), "hello", tokenizer(HOSTILE[name]))
    assert time.process_time() - started < 8 and sys.gettrace() is before


def test_several_templates_by_name():
    given = {"default": "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}", "tool_use": "{{ tools }}"}
    assert render(get_template("plain"), "hello", tokenizer(given)) == [0]
