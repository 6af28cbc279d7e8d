r"""Answers that graders stumble over: each in the last box of a completion, against a gold answer."""

import time

import pytest

from tinylora_jax.data import Question
from tinylora_jax.rewards import MathReward, grade_batch, load_reward
from tinylora_jax.rewards.equivalence import compare, open_pairs, read_gold
from tinylora_jax.rewards.structure import read

RIGHT = [
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", r"\frac12"),
    ("1/2", r"\frac{1}{2}"),
    (r"50\%", "0.5"),
    ("0.5", r"50\%"),
    (r"50\%", "50"),
    ("50", r"50\%"),
    ("[0,1)", "[0,1)"),
    (r"[0,\frac{2}{2})", "[0,1)"),
    ("(1,2)", "(1,2)"),
    ("2,1", "1,2"),
    (r"\{1,2\}", "2,1"),
    (r"\{2,1\}", r"\{1,2\}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}"),
    (r"\begin{pmatrix} -\frac{1}{3} \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}"),
    ("x=3", "3"),
    ("3", "x=3"),
    ("x = 3", "x=3"),
    (r"x=3 \text{ or } x=4", "3,4"),
    ("x=3, x=4", "4,3"),
    (r"\text{Evelyn}", "Evelyn"),
    ("evelyn", r"\text{Evelyn}"),
    (r"\text{(C)}", "C"),
    ("C", r"\text{(C)}"),
    ("(C)", r"\text{(C)}"),
    ("10,080", "10080"),
    (r"10,\!080", "10080"),
    ("10 080", "10080"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    ("-0", "0"),
    ("-0.0", "0"),
    ("007", "7"),
    ("7.0", "7"),
    (r"1\frac{4}{5}", r"\frac{9}{5}"),
    (r"1\frac45", "1.8"),
    ("90", r"90^\circ"),
    (r"90^{\circ}", "90"),
    ("90°", "90"),
    ("3.141593", r"\pi"),
    (r"2\pi", r"\pi+\pi"),
    ("π", r"\pi"),
    ("(x+1)(x+2)", "x^2+3x+2"),
    ("x^2+3x+2", "(x+2)(x+1)"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    ("√2", r"\sqrt{2}"),
    ("−3", "-3"),
    ("$3$", "3"),
    (r"\(3\)", "3"),
    ("3.", "3"),
    ("=3", "3"),
    (r"\approx 3", "3"),
    (r"\boxed{3}", "3"),
    ("2^{1009}", "2^{1009}"),
    (r"2 \cdot 2^{1008}", "2^{1009}"),
    ("52_8", "52_{8}"),
    (r"52_{\text{eight}}", "52_8"),
    ("052_8", "52_8"),
    ("1+274i", "1+274 i"),
    ("274i+1", "1+274i"),
    (r"1 \pm \sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}"),
    (r"\pm 3", "3,-3"),
    (r"\{1\pm\sqrt{5},-2\}", r"-2, 1-\sqrt{5}, 1+\sqrt5"),
    (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
    (r"x \in [-2,7]", "[-2,7]"),
    ("[-2,7]", r"x \in [-2,7]"),
    (r"-2 \le x \le 7", "[-2,7]"),
    (r"15\text{ cm}^2", "15"),
    ("15", r"15\mbox{ cm}^2"),
    (r"\$32,348", r"\$32,\!348"),
    (r"5.4 \text{ cents}", "5.4"),
    ("5.4 cents", r"5.4 \text{ cents}"),
    ("18 dollars", "18"),
    ("4.5e33", r"4.5 \times 10^{33}"),
    (r"4.5 \times 10^{33}", "4.5e33"),
    ("10^{-5}", "1e-5"),
    (r"\frac{1}{10^8}", "1e-8"),
    ("0.333333", r"\frac{1}{3}"),
    ("y = 2x + 3", "2x+3"),
    ("2x+3", "y=2x+3"),
    ("y-2x=3", "y=2x+3"),
    ("f(x)=2x", "2x"),
    ("2x", "f(x)=2x"),
    ("5x-7y+11z+4=0", "5x - 7y + 11z + 4 = 0"),
    ("10x-14y+22z+8=0", "5x - 7y + 11z + 4 = 0"),
    (r"k\ge2", r"k \geqslant 2"),
    ("1:4", "1:4"),
    (r"\frac{100!}{2^{50}}", r"\frac{100!}{2^{50}}"),
    (r"\binom{2n}{n}", r"\frac{(2n)!}{n!n!}"),
    (r"\sin^2 x+\cos^2 x", "1"),
    ("4.25", "4.2 (tolerance 0.1)"),
    (r"\arcsin(10/13)", "np.arcsin(10/13)"),
    (r"\sin^{-1}(10/13)", "np.arcsin(10/13)"),
    ("-1/3", "-1./3"),
    (r"\frac{1}{2}, \frac{1}{3}", "1/3, 1/2"),
    ("(4,-1),(0,2)", "(0,2),(4,-1)"),
    ("8,221", "221,8"),
    (r"a=2, a=-6-4\sqrt{2}", r"-6-4\sqrt2, 2"),
    (r"90^\circ, 60^\circ", "60,90"),
    (r"2, 3, \text{ and } 4", "2,3,4"),
    ("2 and 3", "3,2"),
    ("[-2,7]", r"-2 \le x \le 7"),
    ("8,221", "8221"),
    ("x+1", "x + 1"),
    ("E_1/3+2E_2/3", r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}"),
    ("5000", "5,000"),
]
WRONG = [
    ("2k", "2K"),
    ("5", r"50\%"),
    ("(0,1)", "[0,1)"),
    ("[0,1]", "[0,1)"),
    ("(2,1)", "(1,2)"),
    ("1,2", "(1,2)"),
    ("1,2,2", "1,2"),
    ("1,2", "1,2,2"),
    (r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    ("y=3", "x=3"),
    ("x=4", "x=3"),
    (r"\text{Eve}", r"\text{Evelyn}"),
    ("D", r"\text{(C)}"),
    ("c", r"\text{(C)}"),
    ("10,08", "1008"),
    (r"1\frac{4}{5}", r"\frac{4}{5}"),
    (r"\frac{\pi}{2}", r"90^\circ"),
    ("3.1416", r"\pi"),
    ("(x+1)(x+3)", "x^2+3x+2"),
    (r"2\sqrt2", r"\sqrt{7}"),
    ("3", "-3"),
    ("", "3"),
    (" ", "3"),
    ("9^{9^{9^9}}", "2"),
    ("1e999999999", "2"),
    ("1" + "0" * 50000, "2"),
    ("{" * 3000 + "}" * 3000, "2"),
    ("2^{1008}", "2^{1009}"),
    ("52", "52_8"),
    ("42", "52_8"),
    ("52_{10}", "52_8"),
    ("1-274i", "1+274i"),
    (r"1+\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"(-\infty,2]\cup(3,\infty)", r"(3,\infty) \cup (-\infty, 2)"),
    ("2x", "2"),
    (r"4.6 \times 10^{33}", "4.5e33"),
    ("2e-8", "1e-8"),
    (r"\frac{2}{10^8}", "1e-8"),
    ("0.333", r"\frac13"),
    ("0.6667", r"\frac23"),
    ("1000001", "1000000"),
    ("y=2x-3", "y=2x+3"),
    ("f(x)=3x", "f(x)=2x"),
    ("5x-7y+11z=4", "5x - 7y + 11z + 4 = 0"),
    (r"n \ge 2", r"k \geqslant 2"),
    ("k>2", r"k \geqslant 2"),
    ("4:1", "1:4"),
    ("4.35", "4.2 (tolerance 0.1)"),
    ("-1", "-1./3"),
    ("(4,-1),(0,3)", "(0,2),(4,-1)"),
    ("-2", "-2,-2"),
    (r"\frac{a+b}{c", r"\frac{a+b}{c}"),
    (r"-2<x\le7", "[-2,7]"),
    ("0", "0.0000001"),
]
# Text, gold answer, whether it is right in the required format, whether at all.
WITHIN_TEXT = [
    (r"\boxed{3} or rather \boxed{4}", "4", True, True),
    (r"\boxed{4} or rather \boxed{3}", "4", False, False),
    (r"\boxed{\boxed{4}}", "4", True, True),
    (r"\boxed{}", "4", False, False),
    (r"\boxed{4} and then \boxed{5", "4", True, True),
    (r"The final answer is $\frac{8}{2}$.", "4", False, True),
    ("The answer is 4.", "4", False, True),
    ("The answer is 5.", "4", False, False),
    (r"so the area is $2\sqrt{2}$", r"\sqrt{8}", False, True),
    (r"so the area is $2\sqrt{3}$", r"\sqrt{8}", False, False),
    (r"\boxed{(1,2)}", "1,2", False, True),
    (r"$\boxed{\text{east}}$", r"\text{east}", True, True),
    ("", "4", False, False),
    ("4" * 100_000, "4", False, False),
    (r"\boxed{" * 5000, "4", False, False),
    ("$" * 5000, "4", False, False),
    ("answer: " * 2000, "4", False, False),
]
MINERVA = [
    ("41.8", "41.8", True),
    ("42", "41.8", True),
    ("43", "41.8", False),
    (r"4.51 \times 10^{33} \text{ erg/s}", "4.5e33", True),
    (r"4.5 \times 10^{32}", "4.5e33", False),
    (r"\frac{1}{3}", "0.33", False),
    (r"\frac{1}{3}", "0.333", True),
    ("-41.8", "41.8", False),
    ("0", "1e-8", False),
    (r"\sqrt{2}", "1.41", True),
    (r"2 \sqrt{2}", "1.41", False),
]


def strict(name, pairs):
    grades = load_reward(name).grade_all(
        [f"Therefore $\\boxed{{{text}}}$." for text, _ in pairs], [g for _, g in pairs]
    )
    assert all(grade.lenient >= grade.strict for grade in grades)
    return [grade.strict for grade in grades]


def test_equal_answers_are_right():
    wrong = [pair for pair, grade in zip(RIGHT, strict("math", RIGHT), strict=True) if not grade]
    assert not wrong


def test_other_answers_are_wrong():
    right = [pair for pair, grade in zip(WRONG, strict("math", WRONG), strict=True) if grade]
    assert not right


def test_format_and_value_are_told_apart():
    grades = load_reward("math").grade_all([case[0] for case in WITHIN_TEXT], [case[1] for case in WITHIN_TEXT])
    found = [
        (text, gold, bool(g.strict), bool(g.lenient)) for (text, gold, *_), g in zip(WITHIN_TEXT, grades, strict=True)
    ]
    assert found == WITHIN_TEXT


def test_minerva_s_numbers_have_a_tolerance():
    assert strict("minerva", [case[:2] for case in MINERVA]) == [float(case[2]) for case in MINERVA]


@pytest.mark.parametrize("name", ["math", "minerva"])
def test_one_by_one_is_as_all_at_once(name):
    reward = load_reward(name)
    pairs = [(r"\boxed{2\sqrt{2}}", r"\sqrt{8}"), (r"\boxed{7}", "7"), ("no answer", "x+1")]
    assert reward.grade_all(*zip(*pairs, strict=True)) == tuple(reward(*pair) for pair in pairs)


def test_a_batch_of_training_is_asked_for_at_once(monkeypatch):
    calls = []
    ask = MathReward._ask
    monkeypatch.setattr(MathReward, "_ask", lambda self, requests: calls.append(len(requests)) or ask(self, requests))
    prompts = [Question(i, f"{i}?", gold) for i, gold in enumerate([r"\sqrt{8}", "7", "x+1", r"\sqrt{8}"])]
    texts = [r"\boxed{2\sqrt{2}}", r"\boxed{7}", r"\boxed{1+x}", r"\boxed{3\sqrt{2}}"]
    grades = grade_batch(load_reward("math"), texts, prompts)
    assert [grade.strict for grade in grades] == [1, 1, 1, 0] and [each for each in calls if each] == [3, 1]
    with pytest.raises(ValueError, match="2 completions for 4 prompts"):
        grade_batch(load_reward("math"), texts[:2], prompts)


HOSTILE = (
    r"\le x ",
    r"\lor ",
    r"\{x:",
    r"x \in ",
    "(x,y)=(",
    "x>1 or ",
    "1 000 ",
    "1,000, ",
    "(B) ",
    "5 million ",
    "{",
    "(",
    r"\boxed{",
    r"\text{a",
    "1,",
    r"\cup ",
    "-",
    r"\pm ",
    r"\begin{pmatrix}",
    r"\left",
    " ",
    "0.",
    r"\frac",
)


@pytest.mark.parametrize("length", [3900, 100_000])
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_answers_are_read_quickly(piece, length):
    text = piece * (length // len(piece)) + "<"
    started = time.process_time()
    gold = read_gold(r"x \le 3, 5")
    found = read(text)
    assert compare(gold, found) is not True and open_pairs(gold, found) is not None
    assert time.process_time() - started < 1.0
