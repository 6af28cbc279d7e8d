r"""Answers made from values, so that whether two are equal is known before any grader reads them.

A value is a number, or numbers in a set, a tuple, an interval or a union of intervals, or an expression in letters.
It is written in one of many ways; another value is mostly a near miss of it. A grader must pay for equal values and for
no others, however they are written.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from random import Random
from typing import Any

from tinylora_jax.rewards import load_reward

Value = tuple[str, Any]
_OPENING, _CLOSING = {True: "[", False: "("}, {True: "]", False: ")"}


def number(random: Random) -> Fraction:
    top = random.choice((9, 20, 100, 2000, 10**7))
    below = random.choice((1, 1, 1, 2, 3, 4, 5, 7, 8, 10, 12, 100))
    return Fraction(random.randint(-top, top), below)


def near(random: Random, value: Fraction) -> Fraction:
    """Another number, such as a mistake gives."""
    above, below = value.numerator, value.denominator
    digits = str(abs(above))
    place = random.randrange(len(digits))
    options = [-value, value + 1, value * 100, value / 100, value * 10, Fraction(above + 1, below), value / 2]
    options += [Fraction(below, above)] if above else []
    options += [Fraction(int(digits[:place] + random.choice("123456789") + digits[place + 1 :]), below)]
    options += [Fraction(int(digits[place:]), below), Fraction(int(digits + digits[-1]), below)]
    return random.choice(options)


def written(random: Random, value: Fraction, percent: bool = False, commas: bool = True) -> str:
    """A number in one of its spellings; in lists no commas group thousands."""
    above, below = value.numerator, value.denominator
    if percent and random.random() < 0.15 and (decimal := _decimal(value * 100)):
        return decimal + random.choice((r"\%", "%", r" \%", r"\text{ percent}"))
    factor, size = random.choice((1, 1, 2, 3, 10)), abs(above)
    up, down, sign = factor * size, factor * below, "-" * (above < 0)
    options = [rf"{sign}\frac{{{up}}}{{{down}}}", rf"\frac{{{sign}{up}}}{{{down}}}", f"{sign}{up}/{down}"]
    options += [rf"{sign}\dfrac{{{up}}}{{{down}}}"]
    if decimal := _decimal(value):
        options += [decimal, decimal, decimal.replace("-", "−"), f"${decimal}$"]
    if below == 1:
        groups = [f"{size:,}".replace(",", mark) for mark in ([",", "{,}", r",\!"] if commas else []) + [r"\,", " "]]
        options += [sign + group for group in groups] + [f"{above}.0", f"{sign}{size:04d}", f"{above}"]
    elif size > below:
        whole, rest = divmod(size, below)
        options += [rf"{sign}{whole}\frac{{{rest}}}{{{below}}}", f"{sign}{whole} {rest}/{below}"]
    return random.choice(options)


def _decimal(value: Fraction) -> str | None:
    places = next((n for n in range(9) if (value * 10**n).denominator == 1), None)
    if places is None:
        return None
    digits = str(abs(value) * 10**places).zfill(places + 1)
    return "-" * (value < 0) + (f"{digits[:-places]}.{digits[-places:]}" if places else digits)


def numbers(random: Random, count: int) -> tuple[Fraction, ...]:
    """Different numbers, in any order."""
    found: list[Fraction] = []
    while len(found) < count:
        value = number(random)
        found += [value] if value not in found else []
    return tuple(found)


def make(random: Random) -> Value:
    kind = random.choice(("number", "number", "set", "tuple", "interval", "expression"))
    match kind:
        case "number":
            return kind, number(random)
        case "set":
            return kind, frozenset(numbers(random, random.randint(2, 4)))
        case "tuple":
            return kind, numbers(random, random.randint(2, 3))
        case "interval":
            low, high = sorted(numbers(random, 2))
            return kind, (low, high, random.random() < 0.5, random.random() < 0.5)
    return kind, tree(random, 3)


def other(random: Random, value: Value) -> Value:
    """A value that is mostly another one, but looks alike."""
    kind, content = value
    match kind:
        case "number":
            return kind, near(random, content)
        case "set":
            parts = sorted(content)
            place = random.randrange(len(parts))
            exchanged = [*parts[:place], near(random, parts[place]), *parts[place + 1 :]]
            return kind, frozenset(random.choice((exchanged, parts[1:], [*parts, parts[0] + 1])))
        case "tuple":
            place = random.randrange(len(content))
            exchanged = (*content[:place], near(random, content[place]), *content[place + 1 :])
            return kind, random.choice((content[::-1], exchanged, (*content, Fraction(0))))
        case "interval":
            low, high, left, right = content
            return kind, random.choice(
                ((low, high, not left, right), (low, high, left, not right), (low - 1, high, left, right))
            )
    return kind, changed(random, content)


def show(random: Random, value: Value, percent: bool = False) -> str:
    """A value as text, a number perhaps in percent."""
    kind, content = value
    match kind:
        case "number":
            return random.choice(("", "", "", "x = ", "=")) + written(random, content, percent)
        case "set":
            parts = [written(random, part, commas=False) for part in random.sample(sorted(content), len(content))]
            if len(parts) == 1:
                return parts[0]
            listed = random.choice((", ", ", ", "; ")).join(parts)
            return random.choice((listed, rf"\{{{listed}\}}", rf"\left\{{{listed}\right\}}"))
        case "tuple":
            listed = ", ".join(written(random, part, commas=False) for part in content)
            names = random.choice(("", "", f"({', '.join('xyzw'[: len(content)])}) = "))
            return names + random.choice((f"({listed})", rf"\left({listed}\right)"))
        case "interval":
            low, high, left, right = content
            ends = written(random, low, commas=False), written(random, high, commas=False)
            if random.random() < 0.5:
                return f"{_OPENING[left]}{ends[0]}, {ends[1]}{_CLOSING[right]}"
            signs = [r"\le" if closed else "<" for closed in (left, right)]
            return f"{ends[0]} {signs[0]} x {signs[1]} {ends[1]}"
    return spelled(random, content)


LETTERS = ("x", "y", "n", "N", "a", "R", "r")
Tree = Any  # a whole number, a letter, or (operation, left, right)
_DO: dict[str, Callable[[Fraction, Any], Fraction]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "^": lambda a, b: a ** int(b),
}


def tree(random: Random, depth: int) -> Tree:
    """An expression in which at least one letter stands."""
    if depth == 0:
        return random.choice((*LETTERS, *LETTERS, random.randint(2, 12)))
    operation = random.choice("++--**/^")
    right = random.randint(2, 4) if operation == "^" else tree(random, random.randrange(depth))
    return operation, tree(random, random.randrange(depth)), right


def changed(random: Random, node: Tree) -> Tree:
    """An expression with one difference."""
    if isinstance(node, tuple):
        operation, left, right = node
        match random.randrange(5):
            case 0 if operation != "^":
                return random.choice("+-*/"), left, right
            case 1 if operation in "-/":
                return operation, right, left
            case 2 | 3:
                return operation, changed(random, left), right
        return operation, left, right + 1 if operation == "^" else changed(random, right)
    if isinstance(node, str):
        return random.choice([node.swapcase(), *LETTERS])
    return node + 1


def spelled(random: Random, node: Tree) -> str:
    """LaTeX of an expression, its sums and products in either order."""
    if not isinstance(node, tuple):
        return str(node)
    operation, left, right = node
    if operation in "+*" and random.random() < 0.5:
        left, right = right, left
    sides = [spelled(random, side) for side in (left, right)]
    inside = lambda place: rf"({sides[place]})" if isinstance((left, right)[place], tuple) else sides[place]
    match operation:
        case "+":
            return f"{sides[0]} + {sides[1]}"
        case "-":
            return f"{sides[0]} - {inside(1)}"
        case "*":
            return inside(0) + random.choice((r" \cdot ", r" \times ", "*")) + inside(1)
        case "/":
            return random.choice((rf"\frac{{{sides[0]}}}{{{sides[1]}}}", f"{inside(0)}/{inside(1)}"))
    return f"{inside(0)}^{{{sides[1]}}}"


def at(node: Tree, point: dict[str, Fraction]) -> Fraction:
    """The value of an expression at a point."""
    if isinstance(node, tuple):
        return _DO[node[0]](at(node[1], point), at(node[2], point))
    return point[node] if isinstance(node, str) else Fraction(node)


def equal(left: Value, right: Value) -> bool | None:
    """Whether two values are equal; None of expressions that have a value almost nowhere."""
    if left[0] != "expression":
        return left == right
    random, agreed = Random(7), 0
    for _ in range(4):
        point = {letter: Fraction(random.randint(2, 99), random.randint(2, 99)) for letter in LETTERS}
        point |= {letter.swapcase(): Fraction(random.randint(100, 999), 7) for letter in "xyna"}
        try:
            if at(left[1], point) != at(right[1], point):
                return False
            agreed += 1
        except ZeroDivisionError:
            continue
    return True if agreed else None


def judged(seed: int, number: int) -> str | None:
    """Grades an answer whose grade is known; what is wrong, or None."""
    random = Random(f"{seed}/value/{number}")
    gold = make(random)
    found = gold if random.random() < 0.5 else other(random, gold)
    due, texts = equal(gold, found), (show(random, gold), show(random, found, percent=True))
    if found[0] == "number" and re.search("%|percent", texts[1]):
        due = due or gold[1] == 100 * found[1]  # as units may be left out
    if due is None:
        return None
    completion = rf"So it is \boxed{{{texts[1]}}}."
    how = f"seed {seed}, case {number}: {texts[1]!r} against {texts[0]!r}"
    if load_reward("boxed")(completion, texts[0], "").strict > due:
        return f"boxed, {how}: paid"
    if load_reward("math")(completion, texts[0], "").strict != due:
        return f"math, {how}: {'unpaid' if due else 'paid'}"
    return None
