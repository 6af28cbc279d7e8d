"""Encoding, batching with exact resume, and padding."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tinylora_jax.data import (
    DataError,
    Prompt,
    PromptTemplate,
    Question,
    encode_prompts,
    make_pipeline,
    pad_prompts,
)

PLAIN = PromptTemplate(None, "{question}")


class Letters:
    """One token per character."""

    chat_template = None

    def apply_chat_template(self, conversation, *args, **kwargs):
        raise NotImplementedError

    def encode(self, text, *args, **kwargs):
        return [ord(letter) for letter in text if letter != "0"]


def make_prompts(count):
    return tuple(Prompt(10 * i, tuple(range(1, i + 2)), f"{i}?", str(i)) for i in range(count))


def ids_of(batches):
    return [[prompt.id for prompt in batch] for batch in batches]


def test_encode_keeps_id_question_and_answer():
    prompts = encode_prompts([Question(3, "ab", "1"), Question(5, "c", "2")], PLAIN, Letters(), 2)
    assert prompts == (Prompt(3, (97, 98), "ab", "1"), Prompt(5, (99,), "c", "2"))


def test_long_prompts_are_named_or_dropped(caplog):
    questions = [Question(i, "x" * (i + 1), "1") for i in range(10)]
    with pytest.raises(DataError, match=r"7 of 10 prompts \(ids 3, 4, 5, 6, 7, ...\) .*max_prompt_tokens=3.*10 tokens"):
        encode_prompts(questions, PLAIN, Letters(), 3)
    with caplog.at_level("WARNING", logger="absl"):
        assert [p.id for p in encode_prompts(questions, PLAIN, Letters(), 3, on_too_long="drop")] == [0, 1, 2]
    assert "Dropped: 7 of 10 prompts" in caplog.text
    with pytest.raises(DataError, match="no prompt is left of 9"):
        encode_prompts(questions[1:], PLAIN, Letters(), 1, on_too_long="drop")


@pytest.mark.parametrize("on_too_long", ["error", "drop"])
def test_empty_prompts_are_named(on_too_long):
    questions = [Question(4, "a", "1"), Question(5, "0", "1")]
    with pytest.raises(DataError, match=r"1 of 2 prompts \(ids 5\) have no tokens"):
        encode_prompts(questions, PLAIN, Letters(), 3, on_too_long=on_too_long)


def test_epochs_cover_the_same_prompts_in_another_order():
    prompts = make_prompts(12)
    batches = ids_of(make_pipeline(prompts, 4, seed=1, epochs=2))
    assert len(batches) == 6
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == [p.id for p in prompts]
    assert first != second
    assert batches != ids_of(make_pipeline(prompts, 4, seed=2, epochs=2))


def test_no_batch_holds_a_prompt_twice():
    batches = ids_of(make_pipeline(make_prompts(5), 4, seed=0, epochs=50))
    assert len(batches) == 50
    assert all(len(set(batch)) == 4 for batch in batches)
    assert len(set().union(*batches)) == 5


@pytest.mark.parametrize("consumed", [0, 1, 3, 4, 7])
def test_resume_is_exact(consumed):
    prompts = make_prompts(11)
    whole = list(make_pipeline(prompts, 3, seed=5, epochs=3))
    stream = make_pipeline(prompts, 3, seed=5, epochs=3)
    for _ in range(consumed):
        next(stream)
    resumed = make_pipeline(prompts, 3, seed=5, epochs=3)
    resumed.set_state(json.loads(json.dumps(stream.get_state())))
    assert list(resumed) == whole[consumed:] == list(stream)


def test_resume_in_a_fresh_process():
    prompts = make_prompts(11)
    stream = make_pipeline(prompts, 3, seed=5)
    for _ in range(4):
        next(stream)
    state = json.dumps(stream.get_state())
    code = (
        "import sys, json\nfrom tinylora_jax.data import Prompt, make_pipeline\n"
        "prompts = [Prompt(10 * i, (1,), 'q', 'a') for i in range(11)]\n"
        "stream = make_pipeline(prompts, 3, seed=5)\nstream.set_state(json.loads(sys.argv[1]))\n"
        "print(json.dumps([[p.id for p in next(stream)] for _ in range(5)]))"
    )
    result = subprocess.run([sys.executable, "-c", code, state], check=True, capture_output=True, text=True)
    assert json.loads(result.stdout) == ids_of(next(stream) for _ in range(5))


@pytest.mark.parametrize(
    ("prompts", "fields", "error", "said"),
    [
        (make_prompts(3), {"batch_size": 4}, DataError, "batch_size=4 exceeds the number of prompts, 3"),
        ((), {}, DataError, "exceeds the number of prompts, 0"),
        (make_prompts(3) + make_prompts(1), {}, DataError, r"1 of 4 prompts \(ids 0\) have repeated ids"),
        (make_prompts(3), {"batch_size": 0}, ValueError, "batch_size=0"),
        (make_prompts(3), {"epochs": 0}, ValueError, "epochs=0"),
        (make_prompts(3), {"seed": -1}, ValueError, "seed=-1"),
    ],
)
def test_impossible_pipelines_are_refused(prompts, fields, error, said):
    with pytest.raises(error, match=said):
        make_pipeline(prompts, **{"batch_size": 2, "seed": 0, **fields})


@pytest.mark.parametrize(
    ("count", "length", "width"), [(3, None, 16), (16, None, 16), (17, None, 32), (3, 5, 5), (3, 3, 3)]
)
def test_padding_is_on_the_right(count, length, width):
    prompts = make_prompts(count)
    arrays = pad_prompts(prompts, length, pad_id=99)
    assert arrays.tokens.shape == (count, width)
    assert (arrays.ids.dtype, arrays.tokens.dtype, arrays.lengths.dtype) == (np.uint32, np.int32, np.int32)
    assert arrays.ids.tolist() == [p.id for p in prompts]
    for prompt, row, n in zip(prompts, *arrays[1:], strict=True):
        assert tuple(row[:n].tolist()) == prompt.tokens
        assert (row[n:] == 99).all()


def test_padding_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"2 of 4 prompts \(ids 20, 30\) do not fit length=2 \(longest: 4 tokens\)"):
        pad_prompts(make_prompts(4), 2)
    with pytest.raises(ValueError, match="empty batch"):
        pad_prompts([])
