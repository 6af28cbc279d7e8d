r"""Mathematical answers: read as lists, tuples, intervals and matrices of atoms, and compared without evaluating any.

Two answers are equal when their structures are and their atoms are, pair by pair. Most atoms are decided here:
numbers, words, numerals of a base. What only algebra can decide is left open (`open_pairs`) for whoever can
(`tinylora_jax.rewards.workers`). Answers and lists that are too long for a gold answer are not looked into.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from tinylora_jax.rewards.answers import normalize
from tinylora_jax.rewards.latex import MAX_ATOM_CHARS, clean, value_of

MAX_ANSWER_CHARS = 4000
"""Longer answers are atoms, of which the structure is not looked for."""

MAX_PARTS = 40
"""Longer lists are atoms; the longest gold answer of the known sets has 14 parts."""

_APPROXIMATION = Fraction(2, 10**6)
"""What a decimal may miss a number by that no decimal writes: 0.333333 is 1/3, 0.3333 is not."""

_WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf|textrm|mathbf|operatorname)\s?\{([^{}]*+)\}")
_CONJUNCTION = re.compile(
    r",?\s*(?:\\(?:text|mbox|mathrm)\{\s*(?:and|or)\s*\}|(?<=[^A-Za-z])(?:and|or)(?=[^A-Za-z]))\s*"
)
_ASSIGNED = re.compile(
    r"(?P<name>[A-Za-z]'?(?:_(?:\w|\{[^{}]*+\}))?(?:\([A-Za-z]\))?|\\[a-z]+(?:_(?:\w|\{[^{}]*+\}))?)\s?=(?P<value>[^=<>]++)"
)
_BASED = re.compile(r"(?P<digits>[0-9A-Fa-f]++)_(?:\{(?:\\text\{)?(?P<long>[0-9]++|[a-z]++)\}?\}|(?P<short>[0-9]))")
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbB]?matrix|array)\}(?:\s?\{[clr| ]*+\})?(?P<rows>.*)\\end\{(?P=kind)\}", re.DOTALL
)
_E_NOTATION = re.compile(r"([-+]?[0-9]++(?:\.[0-9]*+)?)[eE]([-+]?[0-9]{1,3})\Z")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|lt|gt)(?![A-Za-z])")
_LESS = r"(<|\\lt(?![A-Za-z])|\\le(?![A-Za-z]))"
_BETWEEN = re.compile(rf"([^<>=,]+?)\s?{_LESS}\s?[A-Za-z]\s?{_LESS}\s?([^<>=,]+)")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]++)?%?")
_TOLERANCE = re.compile(r"\s*+\(tolerance ([0-9.eE+-]++)\)\Z")
_BASES = {name: str(n) for n, name in enumerate("two three four five six seven eight nine ten".split(), start=2)}


@dataclass(frozen=True)
class Group:
    """Parts of an answer.

    Attributes:
      kind: `list` and `union` for parts in any order; else the brackets (`()`, `(]`, …) or `matrix` and `row` of parts
        in their order.
      parts: at least one.
    """

    kind: str
    parts: tuple[Node, ...]


Node: TypeAlias = str | Group
Known: TypeAlias = Mapping[tuple[str, str], bool]


@dataclass(frozen=True)
class Gold:
    """A gold answer.

    Attributes:
      node: its structure.
      text: cleaned of spelling and units.
      relative: numbers may miss it by this share of its size.
      absolute: or by so much.
    """

    node: Node
    text: str
    relative: Fraction = Fraction(0)
    absolute: Fraction = Fraction(0)


def read_gold(answer: str, relative: float = 0.0) -> Gold:
    """Reads a gold answer.

    Args:
      answer: as the data set has it, with ` (tolerance 0.1)` behind it where the set states an absolute one.
      relative: tolerance of all numbers.
    """
    stated = _TOLERANCE.search(answer)
    answer = _TOLERANCE.sub("", answer)
    return Gold(read(answer), clean(answer), Fraction(relative), Fraction(stated[1]) if stated else Fraction(0))


def read(answer: str, lists: bool = False) -> Node:
    r"""Reads the structure of an answer; what has none is an atom, a text.

    Args:
      answer: as written.
      lists: 8,221 is two numbers, as two are asked for.

    >>> read(r"x \in (-\infty, 2] \cup \{5\}")
    Group(kind='union', parts=(Group(kind='(]', parts=('-\\infty', '2')), '5'))
    >>> read(r"1 \pm \sqrt{19}"), read("10,080")
    (Group(kind='list', parts=('1+\\sqrt{19}', '1-\\sqrt{19}')), '10,080')
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer
    text = clean(answer)
    return _read(_THOUSANDS.sub(lambda match: match[0].replace(",", ", "), text) if lists else text, depth=0)


def compare(gold: Gold, found: Node, known: Known | None = None) -> bool | None:
    """Whether a found answer is the gold one.

    Args:
      gold: from `read_gold`.
      found: from `read`.
      known: what algebra said of pairs (gold atom, found atom); those it says nothing of then are unequal.

    Returns:
      True or False; None if it depends on pairs that `open_pairs` gives.
    """

    def atoms(left: str, right: str) -> bool | None:
        pair = _values(left, right)
        decided = _atoms_equal(gold, *pair)
        return decided if decided is not None or known is None else known.get(pair, False)

    return _equal(gold.node, found, atoms)


def open_pairs(gold: Gold, found: Node) -> tuple[tuple[str, str], ...]:
    """The pairs (gold atom, found atom) that only algebra can decide, where the answer depends on them."""
    pairs: dict[tuple[str, str], None] = {}

    def atoms(left: str, right: str) -> bool | None:
        pair = _values(left, right)
        decided = _atoms_equal(gold, *pair)
        if decided is None:
            pairs[pair] = None
        return decided

    return tuple(pairs) if _equal(gold.node, found, atoms) is None else ()


def _read(text: str, depth: int) -> Node:
    if depth > 5 or not text:
        return text
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in matrix["rows"].split("\\\\") if row.strip()]
        if 0 < len(rows) <= MAX_PARTS:
            return Group("matrix", tuple(Group("row", _parts(row.split("&"), depth)) for row in rows))
    text = _CONJUNCTION.sub(",", text).strip(" ,")
    united = list(_split(text, "\\cup"))
    if 1 < len(united) <= MAX_PARTS:
        return Group("union", _parts(united, depth))
    if between := _BETWEEN.fullmatch(text):
        low, left, right, high = between.groups()
        return Group("(["["le" in left] + ")]"["le" in right], _parts((low, high), depth))
    inside, kind = _enclosed(text)
    items = [item for item in _split(inside, ",", ";") if item.strip()]
    if kind == "{}":
        return _list(items, depth)
    if kind and 1 < len(items) <= MAX_PARTS:
        return Group(kind, _parts(items, depth))
    if kind == "()" and len(items) == 1:
        return _read(inside.strip(), depth + 1)
    if kind is None and len(items) > 1 and not _THOUSANDS.fullmatch(text):
        return _list(items, depth) if len(items) <= MAX_PARTS else text
    return _list([text], depth) if "\\pm" in text else text


def _list(items: Sequence[str], depth: int) -> Node:
    signs = lambda item: (
        [item.replace("\\pm", "+").replace("\\mp", "-"), item.replace("\\pm", "-").replace("\\mp", "+")]
        if "\\pm" in item
        else [item]
    )
    parts = _parts([re.sub(r"\s?([-+])\s?", r"\1", each) for item in items for each in signs(item)], depth)
    return parts[0] if len(parts) == 1 else Group("list", parts)


def _parts(items: Sequence[str], depth: int) -> tuple[Node, ...]:
    return tuple(_read(clean(item).removeprefix("+"), depth + 1) for item in items)


def _split(text: str, *separators: str) -> Iterator[str]:
    """Splits where no bracket is open; brackets of intervals need not match."""
    level, start, place = 0, 0, 0
    while place < len(text):
        character = text[place]
        if character == "\\" and text[place + 1 : place + 2] in ("{", "}"):
            place, character = place + 1, text[place + 1]
        level = max(0, level + (character in "([{") - (character in ")]}"))
        ends = next((s for s in separators if text.startswith(s, place)), None) if level == 0 else None
        if ends is not None:
            yield text[start:place]
            start = place + len(ends)
            place = start - 1
        place += 1
    yield text[start:]


def _enclosed(text: str) -> tuple[str, str | None]:
    """The inside of one pair of brackets around all of a text, and the pair."""
    start = 2 if text.startswith("\\{") else 1
    end = -2 if text.endswith("\\}") else -1
    if len(text) < 2 or text[start - 1] not in "([{" or text[-1] not in ")]}" or (start == 1 and text[0] == "{"):
        return text, None
    opened, closed = text[start - 1], text[-1]
    if (opened == "{") != (closed == "}"):
        return text, None
    level = 0
    for character in text[start:end]:
        level += (character in "([{") - (character in ")]}")
        if level < 0:
            return text, None
    return (text[start:end], opened + closed) if level == 0 else (text, None)


def _equal(gold: Node, found: Node, atoms) -> bool | None:
    if isinstance(gold, str) and isinstance(found, str):
        return atoms(gold, found)
    if isinstance(gold, str) or isinstance(found, str):
        return False
    if gold.kind != found.kind or len(gold.parts) != len(found.parts):
        return False
    if gold.kind in ("list", "union"):
        table = [[_equal(g, f, atoms) for f in found.parts] for g in gold.parts]
        if _matches(table, lambda cell: cell is True):
            return True
        return None if _matches(table, lambda cell: cell is not False) else False
    cells = [_equal(g, f, atoms) for g, f in zip(gold.parts, found.parts, strict=True)]
    return False if False in cells else None if None in cells else True


def _matches(table: Sequence[Sequence[bool | None]], allowed) -> bool:
    """Whether every row can have a column of its own (augmenting paths)."""
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
    """What is assigned, of `x = 5` and 5 or `x = 5`; of `x = 5` and `y = 5`, or of other equations, the whole."""
    sides = (left, right)
    assigned = [_ASSIGNED.fullmatch(side) for side in sides]
    names = {match["name"].replace(" ", "") for match in assigned if match}
    relations = [not match and _RELATION.search(side) for match, side in zip(assigned, sides, strict=True)]
    if len(names) == 1 and not any(relations):
        sides = tuple(match["value"].strip() if match else side for match, side in zip(assigned, sides, strict=True))
    # An e alone is Euler's number to algebra.
    left, right = (_E_NOTATION.sub(r"\1 \\cdot 10^{\2}", side) for side in sides)
    return left, right


def _atoms_equal(gold: Gold, left: str, right: str) -> bool | None:
    if not left or not right:
        return False
    if normalize(left) == normalize(right) != "":
        return True
    bases = _BASED.fullmatch(left), _BASED.fullmatch(right)
    if any(bases):
        return all(bases) and len({(m["digits"].lower().lstrip("0"), _base(m)) for m in bases if m}) == 1
    if _WRAPPED.fullmatch(left):
        return _word(left) == _word(right)
    values = value_of(left), value_of(right)
    if values[0] is not None and values[1] is not None:
        shifts = (1, 100, Fraction(1, 100)) if left.endswith("%") != right.endswith("%") else (1,)
        return any(_close(gold, values[0], values[1] * shift) for shift in shifts)
    return None if max(len(left), len(right)) <= MAX_ATOM_CHARS else False


def _close(gold: Gold, wanted: Fraction, found: Fraction) -> bool:
    if abs(wanted - found) <= max(abs(wanted) * gold.relative, gold.absolute):
        return True
    if _terminates(wanted.denominator) == _terminates(found.denominator):
        return False
    return abs(wanted - found) <= abs(wanted) * _APPROXIMATION


def _terminates(denominator: int) -> bool:
    """Whether a decimal writes the fraction exactly: 2 and 5 alone divide its denominator."""
    for prime in (2, 5):
        while denominator % prime == 0:
            denominator //= prime
    return denominator == 1


def _base(match: re.Match) -> str:
    written = match["long"] or match["short"]
    return _BASES.get(written, written)


def _word(text: str) -> str:
    """A word without wrapping; the letter of a choice without parentheses, in its case; other words in lower case."""
    inside = _WRAPPED.sub(r"\1", text).strip(" .,;()")
    return inside if len(inside) == 1 else " ".join(inside.casefold().split())
