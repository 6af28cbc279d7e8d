r"""Every pair of `table.txt`, and laws of mathematics: what is equal to a gold answer is paid, and nothing else.

Each answer stands in the last box of a completion.
"""

import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from tinylora_jax.rewards import load_reward

TABLE = Path(__file__).with_name("table.txt")
# Gold answer, answers that are equal to it, and answers that are not.
HOSTILE = [
    (
        "2",
        ["2"],
        [
            *("9^{9^{9^9}}", "2^{2^{2^{2^{2^2}}}}", "3" + "!" * 30, "1e999999999", "10^{400}", "1" + "0" * 400),
            *("{" * 200 + "2" + "}" * 199, r"\frac{" * 50, r"\sqrt{" * 300 + "4" + "}" * 300, "((((2", "x" * 500),
            r"\boxed",
        ],
    ),
    (
        "10^{400}",
        ["10^{400}", "1" + "0" * 400, "100^{200}"],
        ["10^{401}", "10^{399}", "1" + "0" * 399 + "1", "10", "400"],
    ),
]


def read_table():
    """Yields the class, an answer, the gold answer and the grade that is due."""
    kind = gold = ""
    for line in TABLE.read_text(encoding="utf-8").split("\n")[3:]:
        word, _, rest = line.partition(" ")
        if word == "#":
            kind = rest
        elif word == "gold":
            gold = rest.strip()
        elif word:
            for answer in rest.split("¦"):
                yield kind, answer.strip(), gold, {"is": 1.0, "isn't": 0.0}[word]


PAIRS = [*read_table()]
PAIRS += [("hostile", found, gold, 1.0) for gold, right, _ in HOSTILE for found in right]
PAIRS += [("hostile", found, gold, 0.0) for gold, _, wrong in HOSTILE for found in wrong]
KINDS = [*dict.fromkeys(pair[0] for pair in PAIRS)]


def grades(name, pairs):
    """The strict grades of answers, each in a box, against gold answers."""
    texts, golds = [f"Therefore it is $\\boxed{{{found}}}$." for found, _ in pairs], [gold for _, gold in pairs]
    reward = load_reward(name)
    found = reward.grade_all(texts, golds) if hasattr(reward, "grade_all") else [*map(reward, texts, golds)]
    assert all(each.lenient >= each.strict for each in found)
    return [each.strict for each in found]


def test_the_table_is_long_and_says_nothing_twice():
    assert len(PAIRS) == len({pair[1:3] for pair in PAIRS}) >= 400
    assert min(sum(pair[3] == paid for pair in PAIRS) for paid in (0.0, 1.0)) >= 150


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_equal_is_paid_and_nothing_else(kind):
    rows = [pair for pair in PAIRS if pair[0] == kind]
    found = grades("math", [(text, gold) for _, text, gold, _ in rows])
    assert [row for row, grade in zip(rows, found, strict=True) if grade != row[3]] == []


def test_texts_and_numbers_are_graded_alike():
    """`boxed` knows no algebra: what it pays, `math` pays; and of plain numbers it pays what the table pays."""
    reward = load_reward("boxed")
    paid = [bool(reward(rf"\boxed{{{found}}}", gold, "").strict) for _, found, gold, _ in PAIRS]
    assert [
        pair for pair, grade in zip(PAIRS, paid, strict=True) if grade and not pair[3] and "cm" not in pair[2]
    ] == []
    plain = re.compile(r"[-+]?[0-9., ]+(?:/[0-9]+)?")
    known = [
        (p, grade) for p, grade in zip(PAIRS, paid, strict=True) if p[0] == "numbers" and plain.fullmatch(p[1] + p[2])
    ]
    assert len(known) > 60 and [pair for pair, grade in known if grade != pair[3]] == []


@pytest.mark.parametrize(
    ("completion", "gold", "paid"),
    [
        ("#### 10 000", "10", False),
        ("#### 1 2", "1", False),
        ("#### 32, 349", "32349", False),
        ("#### 32, 349", "32", False),
        ("#### 32,349", "32349", True),
        ("#### 9", "9 (apples)", True),
        ("#### 9 apples", "9 (apples)", True),
        ("#### 5", r"5\%", True),
        ("#### 500", r"5\%", False),
        ("#### 5\n10 more", "5", True),
    ],
)
def test_the_format_of_four_hashes(completion, gold, paid):
    assert bool(load_reward("hash")(completion, gold, "").strict) is paid


def laws(pairs, paid):
    found = grades("math", pairs)
    assert [pair for pair, grade in zip(pairs, found, strict=True) if grade != paid] == []


def terms(rng):
    """Different atoms of a set, none equal to another."""
    pool = ["1", "-2", "7/3", r"\sqrt{2}", r"\pi", "x", "x^2", "2y", "0.25", r"\frac{a}{b}", "100", "e", "3i", "2^{10}"]
    return rng.sample(pool, rng.randint(2, 6))


def test_the_order_of_a_set_does_not_count_and_that_of_a_tuple_does():
    rng = random.Random(1)
    sets, tuples = [], []
    for _ in range(25):
        atoms = terms(rng)
        others = rng.sample(atoms, len(atoms))
        sets.append((r"\{" + ", ".join(others) + r"\}", r"\{" + ", ".join(atoms) + r"\}"))
        if others != atoms:
            tuples.append((f"({', '.join(others)})", f"({', '.join(atoms)})"))
    laws(sets, 1.0)
    laws(tuples, 0.0)


def test_a_set_with_one_element_more_fewer_or_other_is_another_set():
    rng = random.Random(2)
    pairs = []
    for _ in range(15):
        atoms = terms(rng)
        gold = ", ".join(atoms)
        pairs += [(", ".join([*atoms, "77"]), gold), (", ".join(["77", *atoms[1:]]), gold)]
        pairs += [(", ".join(atoms[1:]), gold)] if len(atoms) > 2 else []
    laws(pairs, 0.0)


def test_a_scaled_fraction_is_the_same_and_a_changed_one_is_not():
    rng = random.Random(3)
    same, other = [], []
    for _ in range(40):
        above, below, factor = rng.randint(-99, 99), rng.randint(2, 99), rng.randint(2, 9)
        gold = rf"\frac{{{above}}}{{{below}}}"
        same += [
            (rf"\frac{{{factor * above}}}{{{factor * below}}}", gold),
            (f"{factor * above}/{factor * below}", gold),
        ]
        other += [(rf"\frac{{{above + 1}}}{{{below}}}", gold)]
        other += [(rf"\frac{{{below}}}{{{above}}}", gold)] if above and abs(Fraction(above, below)) != 1 else []
        other += [(f"{above}/{below + 1}", gold)] if above else []
    laws(same, 1.0)
    laws(other, 0.0)


@pytest.mark.slow
def test_one_other_digit_is_another_number():
    rng = random.Random(4)
    pairs = []
    for _ in range(60):
        digits = str(rng.randint(10 ** rng.randint(0, 9), 10**10))
        place = rng.randrange(len(digits))
        changed = digits[:place] + rng.choice([d for d in "123456789" if d != digits[place]]) + digits[place + 1 :]
        pairs += [(changed, digits), (f"{int(changed):,}", digits), (f"-{digits}", digits), (digits + "0", digits)]
        pairs += [(digits[:place] + ", " + digits[place:], digits), (f"{changed}x", f"{digits}x")] if place else []
    laws(pairs, 0.0)


def test_a_letter_of_the_other_case_is_another_letter():
    golds = [
        r"\frac{ab}{c}",
        "2x+3y",
        "m^2-n^2",
        r"\sqrt{pq}",
        "ab+bc+ca",
        r"k\pi r^2",
        "a^2b",
        r"\frac{m+n}{m-n}",
        "3t-2s",
    ]
    pairs = [
        (gold[:place] + letter.swapcase() + gold[place + 1 :], gold)
        for gold in golds
        for place, letter in enumerate(gold)
        if letter.isalpha() and not re.search(r"\\[a-z]*$", gold[:place])
    ]
    laws(pairs, 0.0)
    laws(
        [
            (gold.swapcase().replace("\\FRAC", "\\frac").replace("\\SQRT", "\\sqrt").replace("\\PI", "\\pi"), gold)
            for gold in golds
        ],
        0.0,
    )


@pytest.mark.slow
def test_grading_is_symmetric_where_neither_side_is_said_to_be_the_gold_one():
    rows = [pair for pair in PAIRS if pair[0] in ("numbers", "tuples", "intervals", "algebra", "equations")]
    backwards = grades("math", [(gold, found) for _, found, gold, _ in rows])
    assert [row for row, grade in zip(rows, backwards, strict=True) if grade != row[3]] == []


@pytest.mark.parametrize("name", ["boxed", "math", "minerva"])
def test_a_hostile_answer_takes_no_more_than_its_limit(name):
    reward = load_reward(name)
    reward(r"\boxed{x+x}", "2x", "")  # workers have started
    for _, found, gold, paid in [pair for pair in PAIRS if pair[0] == "hostile"]:
        started = time.monotonic()
        grade = reward(rf"\boxed{{{found}}}", gold, "")
        assert (
            grade.strict <= (1.0 if name == "minerva" else paid) and time.monotonic() - started < 10
        )  # of a busy machine
