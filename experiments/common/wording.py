"""Formats numbers, commands and paragraphs for a terminal of 80 columns; needs no other package."""

from __future__ import annotations

import difflib
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

WIDTH = 80  # columns of a terminal
_BARS = "▁▂▃▄▅▆▇█"
_NEAR = 0.6  # least similarity of a suggestion, as in difflib


def percent(value: float) -> str:
    """Formats a share in percent with one decimal.

    >>> percent(0.355)
    '35.5 %'
    """
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """Formats the difference of two shares in percentage points, with a sign.

    >>> points(0.074), points(-0.0001)
    ('+7.4', '-0.0')
    """
    return f"{100 * value:+.1f}"


def p_value(p: float) -> str:
    """Formats a p-value with two digits, so that it is never rounded across 0.05.

    >>> p_value(0.0458), p_value(0.2), p_value(0.00001), p_value(1.0)
    ('p = 0.046', 'p = 0.20', 'p < 0.0001', 'p = 1.0')
    """
    return "p < 0.0001" if p < 1e-4 else f"p = {p_digits(p)}"


def p_digits(p: float) -> str:
    """Formats a p-value with two digits, and more where rounding would move it across 0.05.

    >>> p_digits(0.0458), p_digits(0.0496), p_digits(0.2), p_digits(0.00001234), p_digits(1.0)
    ('0.046', '0.0496', '0.20', '<0.0001', '1.0')
    """
    if p < 1e-4:
        return "<0.0001"
    decimals = next(count for count in range(1, 7) if count == 6 or 10 ** (1 - count) <= p)
    while (float(f"{p:.{decimals}f}") < 0.05) != (p < 0.05):
        decimals += 1
    return f"{p:.{decimals}f}"


def duration(seconds: float) -> str:
    """Formats a time as m:ss or h:mm:ss.

    >>> duration(228.4), duration(3725), duration(0.2)
    ('3:48', '1:02:05', '0:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(num_bytes: float) -> str:
    """Formats a number of bytes.

    >>> size(26), size(61_000), size(538_000_000), size(15.2e9)
    ('26 bytes', '61 kB', '538 MB', '15.2 GB')
    """
    for unit, name, digits in ((1e9, "GB", 1), (1e6, "MB", 0), (1e3, "kB", 0)):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.{digits}f} {name}"
    return f"{num_bytes:.0f} bytes"


def counted(count: int, noun: str) -> str:
    """Formats a number with its noun.

    >>> counted(1, "question"), counted(1319, "question")
    ('1 question', '1,319 questions')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def sparkline(values: Sequence[float], width: int) -> str:
    """Draws numbers as bars, with the means of neighbours if there are more numbers than columns.

    >>> sparkline([0, 1, 2, 3], 4), sparkline([0, 0, 3, 3], 2), sparkline([1, 1], 5)
    ('▁▃▆█', '▁█', '▁▁')
    """
    if not values or width < 1:
        return ""
    if len(values) > width:
        edges = [len(values) * place // width for place in range(width + 1)]
        pairs = zip(edges, edges[1:], strict=False)
        values = [sum(values[start:end]) / (end - start) for start, end in pairs]
    low, span = min(values), max(values) - min(values)
    return "".join(_BARS[round((x - low) / span * (len(_BARS) - 1)) if span else 0] for x in values)


def cut(text: str, width: int) -> str:
    """Shortens a text to one line of at most `width` columns.

    >>> cut("one two\\nthree", 10)
    'one two t…'
    """
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1].rstrip() + "…"


def paragraph(text: str, indent: str = "", first: str | None = None) -> str:
    """Wraps a text to the width of a terminal; words longer than a line stay whole."""
    return textwrap.fill(
        " ".join(text.split()),
        WIDTH - 1,
        initial_indent=indent if first is None else first,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def entries(rows: Iterable[tuple[str, str]], indent: str = "  ") -> str:
    """Formats names with wrapped descriptions in two columns."""
    rows = list(rows)
    widest = max((len(name) for name, _ in rows), default=0)
    column = indent + " " * (widest + 2)
    return "\n".join(paragraph(text, column, f"{indent}{name.ljust(widest)}  ") for name, text in rows)


def command_line(words: Sequence[object], indent: str = "  ") -> str:
    r"""Formats a command for copying from a terminal: lines that are too long end in a backslash.

    >>> print(command_line(["python", "-m", "experiments.plot", "--workdir=/tmp/a run"]))
      python -m experiments.plot --workdir='/tmp/a run'
    """
    lines, line = [], indent
    for word in map(str, words):
        flag, equals, value = word.partition("=")
        text = f"{flag}={shlex.quote(value)}" if equals and flag.startswith("-") else shlex.quote(word)
        if line.strip() and len(line) + len(text) + 3 > WIDTH:
            lines.append(line.rstrip() + " \\")
            line = indent + "    "
        line += text + " "
    return "\n".join([*lines, line.rstrip()])


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error message that names the nearest known word; empty without one.

    >>> suggestion("loraxs", ["tinylora", "lora_xs", "lora"])
    '; did you mean lora_xs?'
    """
    near = difflib.get_close_matches(name, list(known), 1, _NEAR)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_path(path: Path) -> str:
    """The end of an error message about a missing path: the nearest name beside it, or the first missing folder."""
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    beside = [each.name for each in missing.parent.iterdir()] if missing.parent.is_dir() else []
    near = difflib.get_close_matches(missing.name, beside, 1, _NEAR)
    if near:
        return f"; did you mean {missing.parent / near[0] / path.relative_to(missing)}?"
    return "" if missing == path else f"; the folder {missing} does not exist"


def table(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,), gap: str = "  ") -> list[str]:
    """Aligns the cells of rows in columns; columns in `left` are aligned to the left, others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = set(left)
    return [
        gap.join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def table_with_sections(
    rows: Sequence[Sequence[str]], sections: Mapping[int, str], left: Iterable[int] = (0,), indent: str = "  "
) -> list[str]:
    """Aligns the cells of rows, and puts the head of a section before its first row.

    Args:
      rows: cells of each row, the head of the table first.
      sections: heads of sections by the index of their first row.
      left: columns that are aligned to the left, as in `table`.
      indent: text before every row, but not before the head of a section.

    >>> table_with_sections([["", "n"], ["a", "1"], ["b", "22"]], {1: "one", 2: "two"})
    ['      n', 'one', '  a   1', 'two', '  b  22']
    """
    lines = []
    for place, line in enumerate(table(rows, left)):
        lines += [sections[place]] if place in sections else []
        lines.append(indent + line)
    return lines


def named(values: Mapping[str, object]) -> str:
    """Formats values as `name=value` words."""
    return " ".join(f"{name}={value}" for name, value in values.items())
