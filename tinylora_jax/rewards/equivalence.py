r"""Compares mathematical answers (lists, tuples, intervals, matrices) without evaluating them.

Two answers are equal if their structures are equal and their atoms are equal pair by pair. Most atoms are decided
here: numbers, words, numerals with a base. Pairs that only algebra can decide are left open (`open_pairs`) for the
workers (`tinylora_jax.rewards.workers`).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeAlias

from tinylora_jax.rewards.answers import normalize
from tinylora_jax.rewards.latex import MAX_ATOM_CHARS, clean, value_of
from tinylora_jax.rewards.structure import RELATION, Group, Node, assignment, read
from tinylora_jax.rewards.words import is_word, words_equal

_APPROXIMATION = Fraction(2, 10**6)
"""Relative error allowed for a decimal that truncates or rounds a number without a finite decimal form.

0.333333 is 1/3, 0.3333 is not, and neither is 159449 or 159449.0 the number 159449 1/7.
"""

_BASED = re.compile(
    r"(?P<digits>[0-9A-Fa-f]++(?:\.[0-9A-Fa-f]++)?)\s?_\s?"
    r"(?:\{(?:\\text\{)?(?P<long>[0-9]++|[a-z]++)\}?\}|(?P<short>[0-9]))"
)
_E_NOTATION = re.compile(r"([-+]?[0-9]++(?:\.[0-9]*+)?)[eE]([-+]?[0-9]{1,3})\Z")
_TOLERANCE = re.compile(r"\s*+\(tolerance ([0-9.eE+-]++)\)\Z")
# A time of day is not a ratio: 10:20 is not 11:22.
_CLOCK = re.compile(r"0?((?:[0-9]|1[0-9]|2[0-4]):[0-5][0-9](?::[0-5][0-9])?)")
_WRITTEN_OUT = re.compile(r"-?[0-9]++(?: [0-9]++/[0-9]++| ?\\frac[^%]++)|-?[0-9]*+\.[0-9]*+\\(?:overline|bar)[^%]++")
_BASES = {name: str(n) for n, name in enumerate("two three four five six seven eight nine ten".split(), start=2)}

Known: TypeAlias = Mapping[tuple[str, str], bool]


@dataclass(frozen=True)
class Gold:
    """A parsed gold answer.

    Attributes:
      node: structure of the answer.
      text: answer text with normalized spelling and without units.
      relative: relative tolerance of numbers.
      absolute: absolute tolerance of numbers.
    """

    node: Node
    text: str
    relative: Fraction = Fraction(0)
    absolute: Fraction = Fraction(0)


def read_gold(answer: str, relative: float = 0.0) -> Gold:
    """Parses a gold answer.

    Args:
      answer: answer from the data set, followed by ` (tolerance 0.1)` if the set states an absolute tolerance.
      relative: relative tolerance of all numbers.
    """
    stated = _TOLERANCE.search(answer)
    answer = _TOLERANCE.sub("", answer)
    return Gold(read(answer), clean(answer), Fraction(relative), Fraction(stated[1]) if stated else Fraction(0))


def compare(gold: Gold, found: Node, known: Known | None = None) -> bool | None:
    """Whether an extracted answer equals the gold answer.

    Args:
      gold: gold answer from `read_gold`.
      found: structure of the extracted answer, from `read`.
      known: results of algebra for pairs (gold atom, found atom); pairs without a result count as unequal.

    Returns:
      True or False; None if the result depends on the pairs from `open_pairs`.
    """

    def atoms(left: str, right: str) -> bool | None:
        pair = _values(left, right)
        decided = _atoms_equal(gold, *pair)
        return decided if decided is not None or known is None else known.get(pair, False)

    return _equal(gold.node, found, atoms)


def open_pairs(gold: Gold, found: Node) -> tuple[tuple[str, str], ...]:
    """The pairs (gold atom, found atom) that only algebra can decide and that the result depends on."""
    pairs: dict[tuple[str, str], None] = {}

    def atoms(left: str, right: str) -> bool | None:
        pair = _values(left, right)
        decided = _atoms_equal(gold, *pair)
        if decided is None:
            pairs[pair] = None
        return decided

    return tuple(pairs) if _equal(gold.node, found, atoms) is None else ()


def _equal(gold: Node, found: Node, atoms) -> bool | None:
    if isinstance(gold, str) and isinstance(found, str):
        return atoms(gold, found)
    relations = [side if isinstance(side, str) else side.relation for side in (gold, found)]
    if isinstance(gold, str) or isinstance(found, str):
        return atoms(*relations) if all(relations) and all(map(RELATION.search, relations)) else False
    equal = _groups_equal(gold, found, atoms)
    if all(relations):  # y < x is x > y
        other = atoms(*relations)
        return True if True in (equal, other) else None if None in (equal, other) else False
    return equal


def _groups_equal(gold: Group, found: Group, atoms) -> bool | None:
    if gold.names and found.names and len(gold.parts) == len(found.parts):
        if sorted(gold.names) != sorted(found.names):
            return False
        if len(gold.names) == len(gold.parts):
            found = replace(found, parts=tuple(found.parts[found.names.index(name)] for name in gold.names))
    kinds = {gold.kind, found.kind}
    in_order = kinds == {"()", "list"} and len(gold.names) + len(found.names) == len(gold.parts) > 1
    if len(gold.parts) != len(found.parts) or not (
        len(kinds) == 1 or in_order or kinds <= {"list", "or", "union"} and "or" in kinds
    ):
        return False
    if kinds <= {"list", "union", "or"}:
        table = [[_equal(g, f, atoms) for f in found.parts] for g in gold.parts]
        if _matches(table, lambda cell: cell is True):
            return True
        return None if _matches(table, lambda cell: cell is not False) else False
    cells = [_equal(g, f, atoms) for g, f in zip(gold.parts, found.parts, strict=True)]
    return False if False in cells else None if None in cells else True


def _matches(table: Sequence[Sequence[bool | None]], allowed) -> bool:
    """Whether every row can be matched to its own column (augmenting paths)."""
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, cell in enumerate(table[row]):
            if allowed(cell) and column not in seen:
                seen.add(column)
                if column not in owner or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(table)))


def _values(left: str, right: str) -> tuple[str, str]:
    """The right-hand sides to compare, as for `x = 5` and 5; other equations (`x = 5` and `y = 5`) stay whole."""
    sides = (left, right)
    assigned = [assignment(side) for side in sides]
    names = {each[0] for each in assigned if each}
    relations = [not each and RELATION.search(side) for each, side in zip(assigned, sides, strict=True)]
    if len(names) == 1 and not any(relations):
        sides = tuple(each[1] if each else side for each, side in zip(assigned, sides, strict=True))
    sides = tuple(_written_out(side) for side in sides)
    # SymPy reads a lone e as Euler's number.
    left, right = (_E_NOTATION.sub(r"\1 \\cdot 10^{\2}", side) for side in sides)
    return left, right


def _written_out(atom: str) -> str:
    r"""Writes a mixed number or a repeating decimal, which SymPy cannot read, as a fraction.

    >>> _written_out("1 1/2"), _written_out("x")
    ('\\frac{3}{2}', 'x')
    """
    value = value_of(atom) if _WRITTEN_OUT.fullmatch(atom) else None
    if value is None:
        return atom
    return rf"{'-' * (value < 0)}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _atoms_equal(gold: Gold, left: str, right: str) -> bool | None:
    if not left or not right:
        return False
    if normalize(left) == normalize(right) != "":
        return True
    clocks = _CLOCK.fullmatch(left), _CLOCK.fullmatch(right)
    if any(clocks):
        return all(clocks) and len({m[1] for m in clocks if m}) == 1
    bases = _BASED.fullmatch(left), _BASED.fullmatch(right)
    if any(bases):
        return all(bases) and len({(m["digits"].lower().lstrip("0"), _base(m)) for m in bases if m}) == 1
    if is_word(left):
        return words_equal(left, right)
    values = value_of(left), value_of(right)
    if values[0] is not None and values[1] is not None:
        # 5% equals 0.05 and, because units may be omitted, 5: only the side with the percent sign is divided.
        wanted, found = (
            [value, value / 100] if text.endswith("%") else [value]
            for value, text in zip(values, (left, right), strict=True)
        )
        pairs = zip(wanted, found, strict=True) if len(wanted) == len(found) else itertools.product(wanted, found)
        return any(_close(gold, *pair) for pair in pairs)
    return None if max(len(left), len(right)) <= MAX_ATOM_CHARS else False


def _close(gold: Gold, wanted: Fraction, found: Fraction) -> bool:
    if abs(wanted - found) <= max(abs(wanted) * gold.relative, gold.absolute):
        return True
    decimals = [value for value in (wanted, found) if _terminates(value.denominator)]
    if len(decimals) != 1 or decimals[0].denominator == 1:
        return False
    places = next(n for n in itertools.count(1) if 10**n % decimals[0].denominator == 0)
    exact, gap = wanted + found - decimals[0], abs(wanted - found)
    whole = 1 if abs(decimals[0]) < abs(exact) else 2  # the last digit may be truncated or rounded
    return gap <= min(abs(wanted) * _APPROXIMATION, Fraction(1, whole * 10**places))


def _terminates(denominator: int) -> bool:
    """Whether the fraction has a finite decimal form: its denominator has no prime factors but 2 and 5."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _base(match: re.Match) -> str:
    written = match["long"] or match["short"]
    return _BASES.get(written, written)
