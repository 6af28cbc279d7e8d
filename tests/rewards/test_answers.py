"""Extraction and comparison of answers: tables of cases, and hostile completions under a time limit."""

import gzip
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from tinylora_jax.rewards.answers import (
    extract_boxed,
    extract_hash,
    extract_last_number,
    is_equal,
    normalize,
)

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 72", "72"),
        ("step\n#### 72\n", "72"),
        ("#### -3", "-3"),
        ("#### 1,234,567.50", "1,234,567.50"),
        ("#### 72.", "72"),
        ("#### 18 dollars", "18"),
        ("#### 1\n#### 2", "2"),
        ("#### 2\n#### two", "2"),
        ("x #### 5", "5"),
        ("#### 72 #### 7\x00", "72"),
        ("####72", None),
        ("####  72", None),
        ("##### 72", None),
        ("### 72", None),
        ("#### $72", None),
        ("#### 72/5", None),
        ("#### 72%", None),
        ("#### 7e3", None),
        ("#### 1,23", None),
        ("#### 1.2.3", None),
        ("#### .5", None),
        ("#### ٧٢", None),
        ("#### ", None),
        ("####\n72", None),
        ("the answer is 72", None),
        ("", None),
    ],
)
def test_extract_hash(text, expected):
    assert extract_hash(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{72}", "72"),
        (r"\boxed{ 72 }", "72"),
        (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"{ unbalanced \boxed{3}", "3"),
        (r"} unbalanced \boxed{3}", "3"),
        (r"\\boxed{4}", "4"),
        (r"\boxed {4}", "4"),
        (r"\boxed{}", ""),
        ("\\boxed{a\x00b}", "a\x00b"),
        (r"\boxed{", None),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        ("boxed{5}", None),
        ("", None),
    ],
)
def test_extract_boxed(text, expected):
    assert extract_boxed(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The answer is 72.", "72"),
        ("it costs $1,234.50, then", "1,234.50"),
        ("it costs \\$5", "5"),
        ("-$5", "-5"),
        ("$-5$", "-5"),
        ("(-5)", "-5"),
        ("−5", "-5"),
        ("5-3", "3"),
        ("(5)-3", "3"),
        ("x-3", "3"),
        ("5 - 3", "3"),
        ("= -3", "-3"),
        ("about 50%", "50"),
        (".5", ".5"),
        ("1, 2, 3", "3"),
        ("1,2,3", "3"),
        ("1,2345", "2345"),
        ("1.5e3", "1.5e3"),
        ("9**9**9", "9"),
        ("\\boxed{72}", "72"),
        ("no number: ٧٢ ²", None),
        ("", None),
    ],
)
def test_extract_last_number(text, expected):
    assert extract_last_number(text) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("72", "72"),
        (" 72 ", "72"),
        ("72.0", "72"),
        ("72.", "72"),
        ("+72", "72"),
        ("0072", "72"),
        ("000", "0"),
        ("-0.00", "0"),
        (".50", "0.5"),
        ("-.5", "-0.5"),
        ("1,000,000", "1000000"),
        ("1{,}000", "1000"),
        (r"10,\!000", "10000"),
        (r"\$18.90", "18.9"),
        ("$5$", "5"),
        ("-$5", "-5"),
        ("−5", "-5"),
        (r"50\%", "50"),
        ("18 dollars", "18"),
        ("1 dollar", "1"),
        (r"45^\circ", "45"),
        (r"45^{\circ}", "45"),
        ("7.2e1", "72"),
        ("72e-4", "0.0072"),
        ("1e3", "1000"),
        ("1/2", "0.5"),
        ("-3/6", "-0.5"),
        (r"\dfrac{1}{3}", "1/3"),
        (r"-\frac{2}{6}", "-1/3"),
        (r"\frac{-2}{6}", "-1/3"),
        (r"\frac12", "0.5"),
        ("6/3", "2"),
        ("1/0", "1/0"),
        ("1,23", "1,23"),
        ("3,4", "3,4"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"x \leftarrow y", r"x\leftarrowy"),
        ("x + 1", "x+1"),
        ("1e999999999", "1e999999999"),
        ("٧٢", "٧٢"),
        (".", ""),
        ("$", ""),
        ("", ""),
    ],
)
def test_normalize(answer, expected):
    assert normalize(answer) == expected
    assert normalize(expected) == expected, "normalize must be idempotent"


@pytest.mark.parametrize("numerator", [-7, 0, 1, 3, 10, 125])
@pytest.mark.parametrize("denominator", [1, 2, 3, 7, 8, 40, 375])
def test_equality_of_rationals_is_that_of_fractions(numerator, denominator):
    value = Fraction(numerator, denominator)
    assert is_equal(f"{3 * numerator}/{3 * denominator}", f"{numerator}/{denominator}")
    decimal = f"{numerator / denominator:.12f}"
    assert is_equal(decimal, f"{numerator}/{denominator}") == (Fraction(decimal) == value)


@pytest.mark.parametrize(
    ("predicted", "gold", "equal"),
    [
        ("72", "72", True),
        ("72.00", "72", True),
        ("72.01", "72", False),
        ("1e999999999", "72", False),
        ("1" * 5000, "1" * 5000, True),
        ("1" * 5000, "1" * 4999 + "2", False),
        ("10000000000000000000000001", "10000000000000000000000000", False),
        ("0.1", "0.10000000000000000001", False),
        ("5 cents", "5", False),
        ("3 million", "3", False),
        ("A", "a", False),
        ("", "72", False),
        (".", ".", False),
        (None, "72", False),
    ],
)
def test_is_equal(predicted, gold, equal):
    assert is_equal(predicted, gold) is equal


HOSTILE = {
    "nested boxes": "\\boxed{" * 100_000,
    "closed nested boxes": "\\boxed{" * 12_000 + "}" * 12_000,
    "boxes and spaces": "\\boxed " * 100_000 + " " * 100_000,
    "braces": "{" * 50_000 + "}" * 50_000,
    "hashes": "#" * 400_000,
    "markers": "#### " * 100_000,
    "marked digits": "#### " + "1" * 100_000 + "x",
    "digits": "1" * 100_000,
    "boxed digits": "\\boxed{" + "1" * 99_000 + "}",
    "thousands": "1" + ",111" * 24_000 + "1",
    "marked thousands": "#### 1" + ",111" * 24_000 + "1",
    "decimals": "1." * 100_000,
    "exponents": "1e" * 100_000,
    "power": "\\boxed{9**9**9} #### 9**9**9",
    "exponent": "\\boxed{1e999999999} 1e999999999 #### 1e999999999",
    "unicode digits": "\\boxed{" + "٧" * 50_000 + "} #### ٧٢",
    "nul": "\x00" * 100_000 + "\\boxed{\x00} #### \x00",
    "text": "\\boxed{" + "\\text{" * 10_000 + "}" * 10_000 + "}",
    "minuses": "-" * 100_000 + "$" * 100_000 + "1",
    "fractions": "\\boxed{" + "\\frac{1}" * 10_000 + "}",
    "surrogates": "\ud800" * 100_000,
    "backslashes": "\\" * 100_000,
    "spaces": "\\boxed{" + " " * 99_000 + "}",
    "ten million": "#### 1 \\boxed{1} " * 600_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_completions_are_graded_in_time(text):
    started_s = time.process_time()
    for extract in (extract_hash, extract_boxed, extract_last_number):
        is_equal(extract(text), "72")
    normalize(text[:1_000_000])
    assert time.process_time() - started_s < 1


def test_text_before_the_scanned_tail_is_ignored():
    assert extract_hash("#### 72\n" + "x" * 99_000) == "72"
    assert extract_hash("#### 72\n" + "x" * 100_000) is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_gold_answers_of_gsm8k_are_integers(split):
    path = SHARED_DATA / f"gsm8k_{split}.jsonl.gz"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in file]
    assert all(str(int(normalize(answer))) == normalize(answer) for answer in answers)
    assert all(is_equal(extract_hash(f"so\n#### {answer}"), answer) for answer in answers)
