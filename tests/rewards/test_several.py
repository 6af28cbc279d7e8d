"""Several weighted rewards, and functions that see a group or a batch, plain or async."""

import asyncio
import sys
import time

import pytest

from tinylora_jax import rewards
from tinylora_jax.data import Question
from tinylora_jax.rewards import Grade, RewardError, WeightedRewards, accuracy_name, accuracy_of, grade_batch
from tinylora_jax.rewards import load_reward as load

MODULE = """
import asyncio
from tinylora_jax.rewards import Grade
CALLS = []
RUNNING = [0, 0]  # now, at most
def short(completion, answer, question):
    return -len(completion)
def inf(completion, answer, question):
    return 0.5
def group(completions, answer, question):
    CALLS.append((completions, answer, question))
    return [Grade(float(len(each) == min(map(len, completions))), 1.0, each) for each in completions]
def batch(completions, answers, questions):
    CALLS.append((completions, answers, questions))
    return [len(c) + len(a) + len(q) for c, a, q in zip(completions, answers, questions)]
def any_arguments(*arguments):
    return 2.0
async def judge(completion, answer, question):
    RUNNING[0] += 1
    RUNNING[1] = max(RUNNING)
    await asyncio.sleep(0.03 if completion.startswith("a") else 0)  # later ones finish first
    RUNNING[0] -= 1
    return len(completion)
async def judge_group(completions, answer, question):
    await asyncio.sleep(0)
    return [len(set(completions))] * len(completions)
class Judge:
    async def __call__(self, completions, answers, questions):
        return [1.0] * len(completions)
judge_object = Judge()
async def one_fails(completion, answer, question):
    if completion == "bb":
        raise OSError("no connection")
    await asyncio.sleep(60)
async def cancels(completion, answer, question):
    raise asyncio.CancelledError
async def leaves(completion, answer, question):
    raise SystemExit
def too_few(completions, answer, question):
    return [1.0]
def no_list(completions, answer, question):
    return 1.0
def a_nan(completions, answers, questions):
    return [0.0] * (len(completions) - 1) + [float("nan")]
def forgot_async(completion, answer, question):
    return judge(completion, answer, question)
"""
ASKED = [Question(7, "2?", "2")] * 2 + [Question(9, "11?", "11")] * 2
TEXTS = ["a\n#### 2", "bb", "a #### 11", r"\boxed{11}"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_several.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: f"my_several:{name}"
    sys.modules.pop("my_several", None)


def grades(name, samples=2):
    return grade_batch(load(name), TEXTS, ASKED, samples)


def test_parts_names_and_weights(module):
    text = f"hash, format:.1,{module('short')}:5e-2 , {module('inf')},length:-1"
    found = load(text)
    assert isinstance(found, WeightedRewards)
    names = ["hash", "format", module("short"), module("inf"), "length"]
    assert dict(found.weights) == dict(zip(names, [1, 0.1, 0.05, 1, -1], strict=True)) and list(found.rewards) == names
    assert accuracy_name(text) == "hash" and accuracy_of(found) is load("hash")


@pytest.mark.parametrize("name", ["hash", "boxed", "short", "inf"])
def test_one_reward_is_that_reward(module, name):
    name = name if name in rewards.BUILT_IN else module(name)
    assert load(name) == load(f"{name}:1") == accuracy_of(load(name)) and not isinstance(load(name), WeightedRewards)
    assert accuracy_name(name) == accuracy_name(f"{name}:0.5") == name
    assert dict(load(f"{name}:0.5").weights) == {name: 0.5}
    assert all(grade.parts == () for grade in grades(name))


def test_grades_are_those_of_the_first_with_the_parts_of_all(module):
    alone = [grades(name) for name in ("hash", "format", module("group"))]
    alone[1] = [Grade(1.0, 1.0), Grade(0.0, 0.0), Grade(1.0, 1.0), Grade(0.0, 0.0)]  # in the format of `hash`
    joined = grades(f"hash,format:0.1,{module('group')}:2")
    for index, grade in enumerate(joined):
        first = alone[0][index]
        assert (grade.strict, grade.lenient, grade.answer) == (first.strict, first.lenient, first.answer)
        assert grade.parts == tuple(part[index].strict for part in alone)
    assert load("hash,format")(TEXTS[0], "2", "2?") == Grade(1.0, 1.0, "2", (1.0, 1.0))


@pytest.mark.parametrize(("first", "expected"), [("hash", [1, 0, 1, 0]), ("boxed", [0, 0, 0, 1]), (None, [1, 0, 1, 1])])
def test_the_format_is_that_of_the_first_reward(module, first, expected):
    found = grades(f"{first or module('short')},format")
    assert [grade.parts[1] for grade in found] == expected


def test_length_compares_the_completions_of_a_group():
    assert [grade.strict for grade in grades("length")] == [-0.5, 0.5, 0.5, -0.5]
    assert [grade.strict for grade in grade_batch(load("length"), ["ab", "cd"], ASKED[:2], 2)] == [0, 0]


def test_a_group_and_a_batch_see_all_of_theirs(module):
    found = grades(module("group"))
    assert [(grade.strict, grade.answer) for grade in found] == list(zip([0, 1, 1, 0], TEXTS, strict=True))
    calls = sys.modules["my_several"].CALLS
    assert calls == [(TEXTS[:2], "2", "2?"), (TEXTS[2:], "11", "11?")]
    calls.clear()
    found = grades(module("batch"))
    lengths = [len(text + asked.answer + asked.question) for text, asked in zip(TEXTS, ASKED, strict=True)]
    assert [grade.strict for grade in found] == lengths
    assert calls == [(TEXTS, ["2", "2", "11", "11"], ["2?", "2?", "11?", "11?"])]
    assert grade_batch(load(module("batch")), [], []) == grade_batch(load(module("group")), [], []) == ()
    assert load(module("group"))("abc", "1", "q") == Grade(1.0, 1.0, "abc")
    assert [grade.strict for grade in grades(module("any_arguments"))] == [2.0] * 4


def test_async_calls_run_together_and_keep_their_order(module):
    found = grades(module("judge"))
    assert [grade.strict for grade in found] == [len(text) for text in TEXTS]
    assert sys.modules["my_several"].RUNNING == [0, 4]
    assert [grade.strict for grade in grades(module("judge_group"))] == [2.0] * 4
    assert [grade.strict for grade in grades(module("judge_object"))] == [1.0] * 4


def test_async_rewards_work_where_a_loop_runs_already(module):
    async def in_a_notebook():
        return grades(module("judge"))

    assert [grade.strict for grade in asyncio.run(in_a_notebook())] == [len(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("one_fails", r"completion 1, question id 7: reward my_several:one_fails raised OSError: no connection on"),
        ("leaves", "raised SystemExit"),
        ("cancels", "cancelled its own task"),
        ("too_few", r"question id 7: reward my_several:too_few returned 1 value on question '2\?'; .* of the 2 compl"),
        ("no_list", r"returned 1.0 on question '2\?'; return one number or Grade for each of the 2 completions"),
        ("a_nan", "reward my_several:a_nan returned nan for 4 completions; return a finite float"),
    ],
)
def test_failures_are_one_clear_error(module, name, said):
    started = time.monotonic()
    with pytest.raises(RewardError, match=said):
        grades(f"hash,{module(name)}")
    assert time.monotonic() - started < 20, "the other calls must be cancelled"


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_a_coroutine_of_a_plain_function_is_refused(module):
    with pytest.raises(RewardError, match="returned an object of type coroutine"):
        grades(module("forgot_async"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hash,", "empty part"),
        (",hash", "empty part"),
        (":1", "empty part"),
        ("hash:1,hash:2", "names hash twice"),
        ("hash:0,format:0", "no weight other than 0"),
        ("hash:1e9", "weight of hash is 1e.09, expected at most 1e6"),
        ("hash:1e999", "weight of hash is inf"),
        ("hash:1:2", "unknown reward 'hash:1'"),
        ("hash;format", "unknown reward 'hash;format'"),
        ("hash,fromat:0.1", "unknown reward 'fromat'.*did you mean 'format'"),
        ("hash:one", "if one is meant as a weight, write a finite number, such as hash:0.5"),
        ("hash:nan", "if nan is meant as a weight, write a finite number, such as hash:0.5"),
        ("math:inf", "it is not callable in .*; if inf is meant as a weight"),  # Python's own module has it
        ("length:half", "if half is meant as a weight"),
        ("my_rewards:short:high", "a weight is a finite number, not 'high'"),
    ],
)
def test_what_cannot_be_read_is_refused(text, said):
    with pytest.raises(RewardError, match=said):
        load(text)


def test_gold_answers_are_checked_by_the_first_reward():
    assert rewards.unpayable("hash,format:0.1", ["72", "5/2"]) == rewards.unpayable("hash", ["72", "5/2"]) == (1,)


def test_groups_must_be_whole():
    with pytest.raises(ValueError, match="3 completions for 3 prompts in groups of 2"):
        grade_batch(load("hash"), TEXTS[:3], ASKED[:3], 2)
