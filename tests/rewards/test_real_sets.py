"""Every gold answer of the real sets, as it is, spelled otherwise, and changed. Skipped without the files.

TINYLORA_EVAL_DATA=<folder of <set>.jsonl.gz with question and answer> pytest -s tests/rewards/test_real_sets.py
"""

import os
import random
import re
from pathlib import Path

import pytest

from tinylora_jax.data.sources import read_jsonl
from tinylora_jax.rewards import load_reward
from tinylora_jax.rewards.latex import value_of
from tinylora_jax.rewards.structure import Group, read

FOLDER = os.environ.get("TINYLORA_EVAL_DATA")
SETS = ("gsm8k_test", "math500", "aime24", "amc23", "minerva_math", "olympiadbench")

pytestmark = pytest.mark.skipif(not FOLDER, reason="TINYLORA_EVAL_DATA names no folder of evaluation sets")


@pytest.fixture(scope="module", params=SETS)
def answers(request):
    """The name of a set and its gold answers."""
    return request.param, [str(row["answer"]) for row in read_jsonl(Path(FOLDER) / f"{request.param}.jsonl.gz")]


def grade(name, boxed, golds):
    reward = load_reward("minerva" if name == "minerva_math" else "math")
    grades = reward.grade_all([f"Therefore it is $\\boxed{{{text}}}$." for text in boxed], golds)
    right = [each.strict for each in grades]
    print(f"\n{name}: {sum(right):.0f} of {len(right)} right", end=" ")
    return right


def test_a_gold_answer_is_right(answers):
    name, golds = answers
    right = grade(name, golds, golds)
    assert sum(right) == len(golds), [gold for gold, each in zip(golds, right, strict=True) if not each]


def spelled_otherwise(gold):
    r"""The same answer: other fractions, spaces, sizes of brackets, an order of a list turned round."""
    node = read(gold)
    if isinstance(node, Group) and node.kind == "list" and "pm" not in gold:
        plain = [
            part if isinstance(part, str) else part.kind[0] + ",".join(part.parts) + part.kind[1] for part in node.parts
        ]
        return " , ".join(reversed(plain))
    text = re.sub(r"\\[dt]?frac\{(?!d[ A-Za-z])([^{}]+)\}\{([^{}]+)\}", r"{(\1)/(\2)}", gold)  # no derivative
    text = re.sub(r"\\sqrt\{([^{}]+)\}", r"{(\1)^{1/2}}", text)
    text = text.replace("(", r"\left( ").replace(")", r" \right)") if "]" not in text and "[" not in text else text
    return text if text != gold else f"\\displaystyle {gold} "


def test_a_gold_answer_spelled_otherwise_is_right(answers):
    name, golds = answers
    spelled = [spelled_otherwise(gold) for gold in golds]
    right = grade(name, spelled, golds)
    wrong = [(gold, text) for gold, text, each in zip(golds, spelled, right, strict=True) if not each]
    assert not wrong, wrong


def changed(gold, rng):
    """Another answer: one of its numbers is another one, beyond any tolerance, or it has one thing more."""
    value = re.split(r"(?<=[0-9} ])\\(?:mbox|text)\{", gold)[0]  # without its unit, which does not count
    numbers = [
        each for each in re.finditer(r"[0-9]+", value) if "e" not in value[max(0, each.start() - 2) : each.start()]
    ]
    if not numbers:
        return gold + " + 1"
    number = numbers[0] if re.fullmatch(r"[-+0-9.e]+", gold) else rng.choice(numbers)
    return gold[: number.start()] + str(3 * int(number[0]) + 1) + gold[number.end() :]


def test_a_changed_gold_answer_is_wrong(answers):
    name, golds = answers
    rng = random.Random(0)
    other = [changed(gold, rng) for gold in golds]
    right = grade(name, other, golds)
    assert sum(right) == 0, [pair[:2] for pair in zip(golds, other, right, strict=True) if pair[2]]


def test_the_gold_answer_of_another_question_is_wrong(answers):
    name, golds = answers
    rng = random.Random(1)
    distinct = [*dict.fromkeys(golds)]
    pairs = [tuple(rng.sample(distinct, 2)) for _ in range(300)]
    pairs = [pair for pair in pairs if None in map(value_of, pair) or value_of(pair[0]) != value_of(pair[1])]
    right = grade("math500", *zip(*pairs, strict=True))  # minerva's tolerance would pay near ones
    assert sum(right) == 0, [pair for pair, each in zip(pairs, right, strict=True) if each]
