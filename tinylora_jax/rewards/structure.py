r"""Parses the structure of answers: lists, tuples, intervals, unions and matrices of textual atoms.

Nothing is evaluated. Answers and lists that are too long for a gold answer are not parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from tinylora_jax.rewards.latex import clean

MAX_ANSWER_CHARS = 4000
"""Longest answer whose structure is parsed; a longer one is an atom."""

MAX_PARTS = 40
"""Longest list that is parsed; a longer one is an atom. The longest gold answer of the known sets has 14 parts."""

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
_MATRIX = re.compile(
    r"\\begin\{(?P<kind>[pbB]?matrix|array)\}(?:\s?\{[clr| ]*+\})?(?P<rows>.*)\\end\{(?P=kind)\}", re.DOTALL
)
RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne|lt|gt)(?![A-Za-z])")
"""What stands in a relation, of LaTeX that is clean."""

_ORDERS = {"\\lt": "<", "\\gt": ">", "\\le": "≤", "\\ge": "≥", "\\ne": "≠"}
_ORDER_COMMAND = re.compile(r"\\(?:lt|gt|le|ge|ne)(?![A-Za-z])")
_BOUND = "([^<>≤≥≠=,]++)"
_RAY = re.compile(rf"{_VARIABLE}\s?([<>≤≥≠]){_BOUND}")
_REVERSED_RAY = re.compile(rf"{_BOUND}([<>≤≥≠])\s?{_VARIABLE}")
_BETWEEN = re.compile(
    rf"{_BOUND}(?:([<≤])\s?{_VARIABLE}\s?([<≤])|([>≥])\s?{_VARIABLE.replace('name', 'middle')}\s?([>≥])){_BOUND}"
)
_MIRRORED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤", "≠": "≠"}
_LOW, _HIGH = r"-\infty", r"\infty"
_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})++(?:\.[0-9]++)?%?")
_ONE_OR_MORE = re.compile(rf"(?:[^=<>,]++=\s?)?{_THOUSANDS.pattern}")
# A comma without adjacent spaces makes a list without spaces; a bracket opens a nested list.
_RUN_OR_BRACKET = re.compile(
    r"(?P<run>(?<![0-9A-Za-z.,_])(?<!_\{)[1-9][0-9]{0,2}(?:,[0-9]{3})++(?![0-9]|,\S))|(?P<opens>\\\{|[(\[])|\\\}|[)\]]"
)


@dataclass(frozen=True)
class Group:
    """A structured answer with its parts.

    Attributes:
      kind: `list`, `union`, or `or` if it may be either, for unordered parts; for ordered parts the brackets (`()`,
        `(]`, …), `matrix` or `row`.
      parts: parts of the answer, at least one.
      names: variables of the parts of a tuple, or the variable of an interval; () if not stated.
      relation: relation by which an interval is written; "" for an interval in brackets.
    """

    kind: str
    parts: tuple[Node, ...]
    names: tuple[str, ...] = field(default=(), repr=False, compare=False)
    relation: str = field(default="", repr=False, compare=False)


Node: TypeAlias = str | Group


def read(answer: str, lists: bool = False) -> Node:
    r"""Parses the structure of an answer; an answer without structure is an atom, which is a string.

    Args:
      answer: answer text.
      lists: whether an ambiguous text such as 8,221 is read as two numbers, because several are expected.

    >>> read(r"x \in (-\infty, 2] \cup \{5\}")
    Group(kind='union', parts=(Group(kind='(]', parts=('-\\infty', '2')), '5'))
    >>> read(r"1 \pm \sqrt{19}"), read("10,080")
    (Group(kind='list', parts=('1+\\sqrt{19}', '1-\\sqrt{19}')), '10080')
    """
    if len(answer) > MAX_ANSWER_CHARS:
        return answer
    text = clean(answer)
    return _read(text.replace(",", ", ") if lists and _ONE_OR_MORE.fullmatch(text) else text, depth=0)


def join_thousands(text: str) -> str:
    r"""Drops commas that group thousands, except inside the brackets of a list.

    >>> [join_thousands(text) for text in ("x > 1,000", r"\frac{1,000}{3}", "(1,000)", "x,1,000")]
    ['x > 1000', '\\frac{1000}{3}', '(1,000)', 'x,1,000']
    """
    level = 0

    def join(match: re.Match[str]) -> str:
        nonlocal level
        if match["run"]:
            return match[0] if level else match[0].replace(",", "")
        level = max(0, level + (1 if match["opens"] else -1))
        return match[0]

    return _RUN_OR_BRACKET.sub(join, text)


def assignment(text: str) -> tuple[str, str] | None:
    """The name and the value of `x = 5` or `x = 2 + 3 = 5`; None for any other text."""
    name, equals, _ = text.partition("=")
    value = text.rpartition("=")[2].strip()
    if not equals or not value or "<" in text or ">" in text or not _NAME.fullmatch(name.strip()):
        return None
    return name.replace(" ", ""), value


def _read(text: str, depth: int) -> Node:
    if depth > 5 or not text:
        return text
    text = join_thousands(text)
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
    items = [item for item in _grouped(list(_split(inside, ",", ";"))) if item.strip()]
    if kind == "{}":
        node = _list(items, depth) if items else r"\emptyset"
        return Group("list", (node,)) if items and node == r"\emptyset" else node
    if kind and 1 < len(items) <= MAX_PARTS:
        return Group(kind, _parts(items, depth))
    if kind == "()" and len(items) == 1:
        return _read(inside.strip(), depth + 1)
    if kind is None and len(items) > 1:
        return _list(items, depth) if len(items) <= MAX_PARTS else text
    return _list([text], depth) if "\\pm" in text else text


def _grouped(pieces: Sequence[str]) -> Sequence[str]:
    """Joins thousands: if some commas have a space, as in `1,000, 2`, those without one group digits."""
    if not any(piece.startswith(" ") for piece in pieces[1:]):
        return pieces
    runs: list[list[str]] = []
    for piece in pieces:
        if piece.startswith(" ") or not runs:
            runs.append([])
        runs[-1].append(piece)
    return [
        item
        for run in runs
        for item in ([",".join(run)] if len(run) > 1 and _THOUSANDS.fullmatch(",".join(run).strip()) else run)
    ]


def _read_alternatives(text: str, depth: int) -> Node | None:
    """Parses intervals and relations joined by "or" or ∪ as a union; tuples joined by "or" may also be a list."""
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
    """Whether the brackets rule out a point."""
    ends = (_LOW, _HIGH)
    return bool(group.relation) or group.kind in ("[)", "(]") or any(part in ends for part in group.parts)


def _read_named(text: str, depth: int) -> Node | None:
    r"""Parses `x \in …`, `(x, y) = …` and `\{x : x > 3\}` into values with names."""
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
    """Names the values of a tuple, and sorts them if the names are consecutive letters of the alphabet."""
    letters = "".join(sorted(names))
    if len(letters) == len(names) == len(set(names)) and letters in "abcdefghijklmnopqrstuvwxyz":
        ordered = sorted(zip(names, group.parts, strict=True), key=lambda pair: pair[0])
        return Group("()", tuple(part for _, part in ordered), tuple(sorted(names)))
    return Group("()", group.parts, names)


def _read_relation(text: str, depth: int) -> Node | None:
    r"""Parses `x \ge 3`, `1 < x \le 2` or `x > 1 and x < 3` into an interval."""
    if RELATION.search(text) is None:
        return None
    sides = _AND.split(text)
    if len(sides) > 2:
        return None
    if len(sides) == 2:
        return _both(text, [_read_relation(side.strip(), depth) for side in sides])
    written = _ORDER_COMMAND.sub(lambda match: _ORDERS[match[0]], text)
    if between := _BETWEEN.fullmatch(written):
        low, high = _parts((between[1], between[8]), depth)
        if between["middle"]:
            left, right, low, high = between[7], between[5], high, low
        else:
            left, right = between[2], between[4]
        kind = ("[" if left in "≤≥" else "(") + ("]" if right in "≤≥" else ")")
        return Group(kind, (low, high), (between["name"] or between["middle"],), text)
    if ray := _RAY.fullmatch(written):
        name, order, bound = ray.groups()
    elif ray := _REVERSED_RAY.fullmatch(written):
        bound, order, name = ray.groups()
        order = _MIRRORED[order]
    else:
        return None
    (bound,) = _parts((bound,), depth)
    return _ray(name, order, bound, text) if isinstance(bound, str) and bound else None


def _ray(name: str, order: str, bound: str, text: str) -> Group:
    """All values of a variable on one side of a bound, or on both."""
    low, high = (_LOW, bound), (bound, _HIGH)
    match order:
        case "≠":
            return Group("union", (Group("()", low), Group("()", high)), (name,), text)
        case "<" | "≤":
            return Group("()" if order == "<" else "(]", low, (name,), text)
    return Group("()" if order == ">" else "[)", high, (name,), text)


def _both(text: str, sides: Sequence[Node | None]) -> Group | None:
    """The interval between a lower and an upper bound of one variable."""
    rays = [side for side in sides if isinstance(side, Group) and side.kind != "union"]
    if len(rays) != 2 or rays[0].names != rays[1].names:
        return None
    low, high = rays if rays[1].parts[0] == _LOW else rays[::-1]
    if low.parts[1] != _HIGH or high.parts[0] != _LOW:
        return None
    return Group(low.kind[0] + high.kind[1], (low.parts[0], high.parts[1]), low.names, text)


def _list(items: Sequence[str], depth: int) -> Node:
    signs = lambda item: (
        [item.replace("\\pm", "+").replace("\\mp", "-"), item.replace("\\pm", "-").replace("\\mp", "+")]
        if "\\pm" in item
        else [item]
    )
    parts = _parts([re.sub(r"\s?([-+])\s?", r"\1", each) for item in items for each in signs(item)], depth)
    assigned = [assignment(part) if isinstance(part, str) else None for part in parts]
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
    """The content of a pair of brackets that encloses a whole text, and the pair."""
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
