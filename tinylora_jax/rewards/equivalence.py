r"""Mathematical answers: read as lists, tuples, intervals and matrices of atoms, and compared without evaluating any.

Two answers are equal when their structures are and their atoms are, pair by pair. Most atoms are decided here:
numbers, words, numerals of a base. What only algebra can decide is left open (`open_pairs`) for whoever can
(`tinylora_jax.rewards.workers`). Answers and lists that are too long for a gold answer are not looked into.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
_OR = re.compile(
    r",?\s*(?:\\(?:text|mbox|mathrm)\{[\s,]*or\s*\}|\\(?:lor|vee)(?![A-Za-z])|(?<=[^A-Za-z\\])or(?=[^A-Za-z]))\s*"
)
_AND = re.compile(
    r",?\s*(?:\\(?:text|mbox|mathrm)\{[\s,]*and\s*\}|\\(?:land|wedge)(?![A-Za-z])|(?<=[^A-Za-z\\])and(?=[^A-Za-z]))\s*"
)
_INDEX = r"(?:_(?:\w|\{[^{}]*+\}))?"
_NAME = re.compile(
    rf"[A-Za-z]'?{_INDEX}(?:\^\{{-1\}})?(?:\([A-Za-z0-9](?:,\s?[A-Za-z0-9])?\))?|\\[a-z]+{_INDEX}|[A-Z]{{2,3}}"
    r"|(?:m\s?)?\\angle\s?\{?[A-Z]{1,3}\}?|\|[A-Z]{2}\||\\(?:overline|text|mathrm|mbox)\s?\{[A-Za-z ]++\}"
)
_VARIABLE = r"(?P<name>[A-Za-z]'?(?:_(?:\w|\{[^{}]*+\}))?|\\(?!infty|pi|e(?![a-z]))[a-z]+)"
_MEMBER = re.compile(rf"{_VARIABLE}\s?\\in(?![A-Za-z])\s?(?P<values>.+)", re.DOTALL)
_BUILDER = re.compile(
    r"\\\{\s?[A-Za-z](?:\s?\\in\s?\(-\\infty,\\infty\)|\s?\\in\s?\\mathbb\s?\{?R\}?)?\s?(?:\\mid(?![A-Za-z])|:|\|)"
    r"(?P<condition>[^|:{}]*(?:\{[^{}]*\}[^|:{}]*)*)\\\}"
)
_TUPLE = re.compile(
    r"\((?P<names>(?:[A-Za-z]|\\[a-z]+)(?:_\w)?(?:,\s?(?:[A-Za-z]|\\[a-z]+)(?:_\w)?)++)\)\s?(?:=|\\in(?![A-Za-z]))\s?(?P<values>[(\\\[].*)",
    re.DOTALL,
)
_BASED = re.compile(r"(?P<digits>[0-9A-Fa-f]++)_(?:\{(?:\\text\{)?(?P<long>[0-9]++|[a-z]++)\}?\}|(?P<short>[0-9]))")
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbB]?matrix|array)\}(?:\s?\{[clr| ]*+\})?(?P<rows>.*)\\end\{(?P=kind)\}", re.DOTALL
)
_E_NOTATION = re.compile(r"([-+]?[0-9]++(?:\.[0-9]*+)?)[eE]([-+]?[0-9]{1,3})\Z")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|lt|gt)(?![A-Za-z])")
_ORDER = r"(<|>|\\(?:lt|gt|le|ge|ne)(?![A-Za-z]))"
_BOUND = r"([^<>=,\\]*(?:\\(?!lt(?![A-Za-z])|gt(?![A-Za-z])|le(?![A-Za-z])|ge(?![A-Za-z])|ne(?![A-Za-z])|in(?![A-Za-z]))[^<>=,\\]*)*)"
_RAY = re.compile(rf"{_VARIABLE}\s?{_ORDER}\s?{_BOUND}")
_REVERSED_RAY = re.compile(rf"{_BOUND}{_ORDER}\s?{_VARIABLE}")
_BETWEEN = re.compile(rf"{_BOUND}{_ORDER}\s?{_VARIABLE}\s?{_ORDER}\s?{_BOUND}")
_MIRRORED = {"<": ">", ">": "<", "\\lt": ">", "\\gt": "<", "\\le": "\\ge", "\\ge": "\\le", "\\ne": "\\ne"}
_LOW, _HIGH = r"-\infty", r"\infty"
_LABEL = re.compile(
    r"\\(?:text|textbf|textrm|mathbf|mathrm|mbox)\s?\{\s?\(?(?P<wrapped>[A-H])\)?[.:]?\s?\}(?P<after>.*)"
    r"|\((?P<enclosed>[A-Ha-h])\)(?P<behind>(?:\s?\Z|[\s~\\:]).*)|(?P<plain>[A-H])(?P<content>(?:[).:]\s?.*)?)",
    re.DOTALL,
)
_OPERATION = re.compile(r"\s?(?:\\(?:cdot|times|cup|cap|pm|le|ge|in|to)(?![A-Za-z])|[-+*/^=<>_,(!'|&])")
_PLAIN_WORD = re.compile(
    r"(?=[A-Za-z ]*[aeiouyAEIOUY])[A-Za-z]{4,}+(?: [A-Za-z]++)*+|[A-Za-z]{2,}+(?: [A-Za-z]{2,}+)++|[A-Z]{3,}+"
    r"|(?i:yes|no|odd|none)|\\(?:angle|triangle|overline|overrightarrow|widehat)(?![A-Za-z]).*"
)
_WORDS_IN_ANY_CASE = frozenset("yes no true false none never always odd even".split())
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})++(?:\.[0-9]++)?%?")
_TOLERANCE = re.compile(r"\s*+\(tolerance ([0-9.eE+-]++)\)\Z")
_BASES = {name: str(n) for n, name in enumerate("two three four five six seven eight nine ten".split(), start=2)}


@dataclass(frozen=True)
class Group:
    """Parts of an answer.

    Attributes:
      kind: `list`, `union`, or `or` where it may be either, for parts in any order; else the brackets (`()`, `(]`, …) or `matrix` and `row` of parts
        in their order.
      parts: at least one.
      names: what the parts of a tuple are the values of, or the variable that an interval is of; () if it is not said.
      relation: the relation that an interval is written as; "" for one in brackets.
    """

    kind: str
    parts: tuple[Node, ...]
    names: tuple[str, ...] = field(default=(), repr=False, compare=False)
    relation: str = field(default="", repr=False, compare=False)


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
    for read_as in (_read_alternatives, _read_named, _read_relation):
        node = read_as(text, depth)
        if node is not None:
            return node
    text = _CONJUNCTION.sub(", ", text).strip(" ,")
    inside, kind = _enclosed(text)
    items = [item for item in _split(inside, ",", ";") if item.strip()]
    if kind == "{}":
        node = _list(items, depth) if items else r"\emptyset"
        return Group("list", (node,)) if items and node == r"\emptyset" else node
    if kind and 1 < len(items) <= MAX_PARTS:
        return Group(kind, _parts(items, depth))
    if kind == "()" and len(items) == 1:
        return _read(inside.strip(), depth + 1)
    if kind is None and len(items) > 1 and not _THOUSANDS.fullmatch(text):
        return _list(items, depth) if len(items) <= MAX_PARTS else text
    return _list([text], depth) if "\\pm" in text else text


def _read_alternatives(text: str, depth: int) -> Node | None:
    """Intervals and relations joined by "or" or ∪ are a union; tuples joined by "or" may be a list as well."""
    pieces = list(_split(_OR.sub(r"\\lor ", text), "\\cup", "\\lor "))
    if not 1 < len(pieces) <= MAX_PARTS:
        return None
    parts = _parts(pieces, depth)
    if "\\cup" not in text and all(isinstance(part, str) for part in parts):
        return None  # 3 or 4
    parts = tuple(
        p for part in parts for p in (part.parts if isinstance(part, Group) and part.kind == "union" else [part])
    )
    sure = "\\cup" in text or any(isinstance(part, Group) and _is_interval(part) for part in parts)
    return Group("union" if sure else "or", parts)


def _is_interval(group: Group) -> bool:
    """Whether brackets cannot be those of a point."""
    ends = (_LOW, _HIGH)
    return bool(group.relation) or group.kind in ("[)", "(]") or any(part in ends for part in group.parts)


def _read_named(text: str, depth: int) -> Node | None:
    r"""The values of `x \in …`, `(x, y) = …` and `\{x : x > 3\}`, with their names."""
    if match := _BUILDER.fullmatch(text):
        return _read_relation(clean(match["condition"]), depth)
    if match := _TUPLE.fullmatch(text):
        names = tuple(name.strip() for name in match["names"].split(","))
        items = list(_split(match["values"], ","))
        first = _read(clean(items[0]), depth + 1)
        if isinstance(first, Group) and first.kind == "()" and len(first.parts) == len(names):
            if len(items) == 1:
                return _named(first, names)
            others = _parts(items[1:], depth)
            return Group("list", (_named(first, names), *others)) if len(items) <= MAX_PARTS else None
        if len(items) == 1 and isinstance(first, Group) and first.kind == "list":
            return first
    if match := _MEMBER.fullmatch(text):
        node = _read(clean(match["values"]), depth + 1)
        return replace(node, names=(match["name"],)) if isinstance(node, Group) else node
    return None


def _named(group: Group, names: tuple[str, ...]) -> Group:
    """A tuple of named values; in the order of the alphabet where the names are letters that follow each other."""
    letters = "".join(sorted(names))
    if len(letters) == len(names) == len(set(names)) and letters in "abcdefghijklmnopqrstuvwxyz":
        ordered = sorted(zip(names, group.parts, strict=True), key=lambda pair: pair[0])
        return Group("()", tuple(part for _, part in ordered), tuple(sorted(names)))
    return Group("()", group.parts, names)


def _read_relation(text: str, depth: int) -> Node | None:
    r"""The interval of `x \ge 3`, `1 < x \le 2` or `x > 1 and x < 3`."""
    if _RELATION.search(text) is None:
        return None
    sides = _AND.split(text)
    if len(sides) == 2:
        low, high = (_read_relation(side.strip(), depth) for side in sides)
        if (
            isinstance(low, Group)
            and isinstance(high, Group)
            and low.names == high.names
            and "union" not in (low.kind, high.kind)
        ):
            low, high = (high, low) if low.parts[0] == _LOW else (low, high)
            if (low.parts[1], high.parts[0]) == (_HIGH, _LOW):
                return Group(low.kind[0] + high.kind[1], (low.parts[0], high.parts[1]), low.names, text)
        return None
    if between := _BETWEEN.fullmatch(text):
        low, left, name, right, high = between.groups()
        if right in _MIRRORED and left in _MIRRORED and "\\ne" not in (left, right):
            if _is_less(left) != _is_less(right):
                return None
            if not _is_less(left):
                low, left, right, high = high, right, left, low
            kind = ("[" if "e" in left else "(") + ("]" if "e" in right else ")")
            return Group(kind, _parts((low, high), depth), (name,), text)
        return None
    if ray := _RAY.fullmatch(text):
        name, order, bound = ray.groups()
    elif ray := _REVERSED_RAY.fullmatch(text):
        bound, order, name = ray.groups()
        order = _MIRRORED[order]
    else:
        return None
    (bound,) = _parts((bound,), depth)
    if not isinstance(bound, str) or not bound:
        return None
    if order == "\\ne":
        return Group("union", (Group("()", (_LOW, bound)), Group("()", (bound, _HIGH))), (name,), text)
    if _is_less(order):
        return Group("(" + ("]" if "e" in order else ")"), (_LOW, bound), (name,), text)
    return Group(("[" if "e" in order else "(") + ")", (bound, _HIGH), (name,), text)


def _is_less(order: str) -> bool:
    return order in ("<", "\\lt", "\\le")


def _list(items: Sequence[str], depth: int) -> Node:
    signs = lambda item: (
        [item.replace("\\pm", "+").replace("\\mp", "-"), item.replace("\\pm", "-").replace("\\mp", "+")]
        if "\\pm" in item
        else [item]
    )
    parts = _parts([re.sub(r"\s?([-+])\s?", r"\1", each) for item in items for each in signs(item)], depth)
    assigned = [_assignment(part) if isinstance(part, str) else None for part in parts]
    names = tuple(each[0] for each in assigned if each)
    if len(parts) == len(set(names)) > 1:  # x = 3, y = 2
        return _named(Group("()", tuple(each[1] for each in assigned if each)), names)
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
    relations = [side if isinstance(side, str) else side.relation for side in (gold, found)]
    if isinstance(gold, str) or isinstance(found, str):
        return atoms(*relations) if all(relations) and all(map(_RELATION.search, relations)) else False
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


def _assignment(text: str) -> tuple[str, str] | None:
    """The name and the value of `x = 5` or `x = 2 + 3 = 5`; None if a text is no such."""
    name, equals, _ = text.partition("=")
    value = text.rpartition("=")[2].strip()
    if not equals or not value or "<" in text or ">" in text or not _NAME.fullmatch(name.strip()):
        return None
    return name.replace(" ", ""), value


def _values(left: str, right: str) -> tuple[str, str]:
    """What is assigned, of `x = 5` and 5 or `x = 5`; of `x = 5` and `y = 5`, or of other equations, the whole."""
    sides = (left, right)
    assigned = [_assignment(side) for side in sides]
    names = {each[0] for each in assigned if each}
    relations = [not each and _RELATION.search(side) for each, side in zip(assigned, sides, strict=True)]
    if len(names) == 1 and not any(relations):
        sides = tuple(each[1] if each else side for each, side in zip(assigned, sides, strict=True))
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
    if _WRAPPED.fullmatch(left) or _PLAIN_WORD.fullmatch(left):
        return _words_equal(left, right)
    values = value_of(left), value_of(right)
    if values[0] is not None and values[1] is not None:
        # 5% is 0.05 and, as units may be left out, 5: the side that carries the sign is divided, never the other.
        wanted, found = (
            [value, value / 100] if text.endswith("%") else [value]
            for value, text in zip(values, (left, right), strict=True)
        )
        pairs = zip(wanted, found, strict=True) if len(wanted) == len(found) else itertools.product(wanted, found)
        return any(_close(gold, *pair) for pair in pairs)
    return None if max(len(left), len(right)) <= MAX_ATOM_CHARS else False


def _words_equal(left: str, right: str) -> bool:
    """Whether words are the same, in whatever case if they are words and no products of letters."""
    words = _word(left), _word(right)
    if not _WRAPPED.fullmatch(left) and _unwrapped(left).isupper() != _unwrapped(right).isupper():
        return words[0] == words[1] and words[0].casefold() in _WORDS_IN_ANY_CASE
    return words[0] == words[1] != ""


def choices_equal(gold: str, found: str) -> bool:
    r"""Whether both name one choice, at most one of them with what the choice is: `B` and `\textbf{(B)}\ 12`.

    >>> choices_equal("B", r"\textbf{(B)}\ 12"), choices_equal("B", "(b)"), choices_equal("B", "b")
    (True, True, False)
    """
    labels = _label(gold), _label(found)
    return None not in labels and labels[0][0] == labels[1][0] and not (labels[0][1] and labels[1][1])


def _label(answer: str) -> tuple[str, str] | None:
    """The letter of a choice and what stands behind it."""
    match = _LABEL.fullmatch(answer.strip()) if len(answer) <= MAX_ANSWER_CHARS else None
    if not match:
        return None
    letter = match["wrapped"] or match["enclosed"] or match["plain"]
    content = (match["after"] or match["behind"] or match["content"] or "").strip()
    return None if _OPERATION.match(content) else (letter.upper(), content.lstrip(").: \\~"))


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


def _unwrapped(text: str) -> str:
    return _WRAPPED.sub(r"\1", text).strip(" .,;()")


def _word(text: str) -> str:
    """A word without wrapping; the letter of a choice without parentheses, in its case; other words in lower case."""
    inside = _unwrapped(text)
    return inside if len(inside) == 1 else " ".join(inside.casefold().split())
