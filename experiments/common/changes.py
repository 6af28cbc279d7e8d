"""What training changed: which questions were fixed or broken, and how that is shown."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.common.eval_metrics import GRADES
from experiments.common.wording import WIDTH, counted, cut, p_value, paragraph, percent, points, table
from tinylora_jax.data import DataError, read_jsonl
from tinylora_jax.metrics import Difference, compare_paired

_LINES = 6  # largest number of lines of an answer in an example


@dataclass(frozen=True)
class Example:
    """A question that was answered before and after training.

    Attributes:
      question: text of the question.
      answer: gold answer.
      before: completion before training.
      after: completion after training.
    """

    question: str
    answer: str
    before: str
    after: str


@dataclass(frozen=True)
class Change:
    """The difference between two evaluations of the same questions.

    Attributes:
      questions: number of questions.
      before: mean grades before training: `strict` and `lenient` of the greedy answers, and `sampled`, the strict grade
        of the sampled answers, if there are any.
      after: mean grades after training, by the same names.
      differences: after minus before, by name.
      fixed: questions whose strict grade rose, shortest first.
      broken: questions whose strict grade fell, shortest first.
    """

    questions: int
    before: dict[str, float]
    after: dict[str, float]
    differences: dict[str, Difference]
    fixed: tuple[Example, ...]
    broken: tuple[Example, ...]


def change(before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]]) -> Change | None:
    """Compares two evaluations; None if the questions differ.

    Args:
      before: rows of an evaluation of the untrained model.
      after: rows of an evaluation of the trained model.
    """
    before, after = list(before), list(after)
    key = lambda row: (row.get("set"), row["id"])
    first, second = ({key(row): row for row in rows if row["mode"] == "greedy"} for rows in (before, after))
    if not first or first.keys() != second.keys():
        return None
    pairs = [(first[name], second[name]) for name in first]
    grades = {name: ([a[name] for a, _ in pairs], [b[name] for _, b in pairs]) for name in GRADES}
    sampled = tuple(map(_sampled, (before, after)))
    if sampled[0] and sampled[0].keys() == sampled[1].keys():
        grades["sampled"] = ([*sampled[0].values()], [sampled[1][name] for name in sampled[0]])
    mean = lambda values: sum(values) / len(values)
    example = lambda a, b: Example(a["question"], a["answer"], a["completion"], b["completion"])
    length = lambda each: (len(each.question) + max(len(each.before), len(each.after)), each.question)
    moved = lambda sign: tuple(
        sorted((example(a, b) for a, b in pairs if sign * (b["strict"] - a["strict"]) > 0), key=length)
    )
    return Change(
        len(pairs),
        {name: mean(old) for name, (old, _) in grades.items()},
        {name: mean(new) for name, (_, new) in grades.items()},
        {name: compare_paired(*(list(map(float, each)) for each in both)) for name, both in grades.items()},
        moved(1),
        moved(-1),
    )


def _sampled(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str | None, int], float]:
    """The mean strict grade of each question's sampled answers, by set and id."""
    found: dict[tuple[str | None, int], list[float]] = {}
    for row in rows:
        if row["mode"] == "sampled":
            found.setdefault((row.get("set"), row["id"]), []).append(row["strict"])
    return {name: math.fsum(grades) / len(grades) for name, grades in found.items()}


def as_json(found: Change | None, most: int) -> dict[str, Any]:
    """Converts a change to JSON-serializable values, with at most `most` questions that were fixed."""
    if found is None:
        return {"fixed": []}
    scores = {"questions": found.questions, "before": found.before, "after": found.after}
    differences = {name: asdict(each) for name, each in found.differences.items()}
    counts = {"num_fixed": len(found.fixed), "num_broken": len(found.broken)}
    return {**scores, "differences": differences, **counts, "fixed": [asdict(each) for each in found.fixed[:most]]}


def showcase_lines(found: Mapping[str, Any] | None) -> list[str]:
    """Formats the result of `as_json`: the change from the base model, and questions that were fixed."""
    if not found or "before" not in found:
        return []
    examples = tuple(Example(**each) for each in found["fixed"])
    differences = {name: Difference(**each) for name, each in found["differences"].items()}
    known = Change(found["questions"], found["before"], found["after"], differences, examples, ())
    lines = ["from the base model to the adapter:", *change_lines(known, found["num_fixed"], found["num_broken"])]
    for number, each in enumerate(examples, 1):
        lines += [
            "",
            f"fixed {number} of {found['num_fixed']}:",
            *example_lines(each, "base model", "with the adapter"),
        ]
    return lines


def read_change(before: Path, after: Path) -> Change | None:
    """`change` of two files of answers; None if one is missing or damaged, because a report must not fail a run."""
    try:
        return change(*([*read_jsonl(path)] for path in (before, after)))
    except (OSError, ValueError, DataError, KeyError, TypeError):
        return None


def change_lines(found: Change, fixed: int | None = None, broken: int | None = None) -> list[str]:
    """Formats a change: accuracies before and after, the difference with its interval and p, and the counts.

    Args:
      found: change to format.
      fixed: number of questions that were fixed; None if `found` holds all of them.
      broken: number of questions that were broken; None if `found` holds all of them.
    """
    fixed = len(found.fixed) if fixed is None else fixed
    broken = len(found.broken) if broken is None else broken
    rows = []
    for name, each in found.differences.items():
        old, new, shares = found.before[name], found.after[name], 0 <= min(found.before[name], found.after[name])
        shares = shares and max(old, new) <= 1
        show = percent if shares else lambda x: f"{x:.3g}"
        moved = f"{points(each.value)} points" if shares else f"{each.value:+.3g}"
        rows.append(
            [f"  {name}", f"{show(old)} → {show(new)}", moved, interval(each.low, each.high, shares), p_value(each.p)]
        )
    lines = table(rows, left=(0, 4))
    counts = f"{counted(found.questions, 'question')}, greedy: {fixed} fixed, {broken} broken"
    return [*lines, f"  {counts} (strict)"]


def interval(low: float | None, high: float | None, shares: bool = True) -> str:
    """Formats the 95 % interval of a difference, in percentage points for shares; empty if there is none."""
    if low is None or high is None:
        return ""
    show = points if shares else lambda x: f"{x:+.3g}"
    return f"[{show(low)}, {show(high)}]"


def example_lines(each: Example, before: str = "before", after: str = "after") -> list[str]:
    """Formats a question with two answers side by side."""
    question = paragraph(cut(each.question, 3 * WIDTH), "  ")
    gold = paragraph(f"expected: {cut(each.answer, WIDTH)}", "  ")
    return [question, gold, *side_by_side([before, after], [each.before, each.after], _LINES)]


def side_by_side(heads: Sequence[str], texts: Sequence[str], most: int | None = None, indent: str = "  ") -> list[str]:
    """Formats texts as columns that together fill a terminal.

    Args:
      heads: head of each column.
      texts: text of each column.
      most: largest number of lines; longer texts end in `…`. None for no limit.
      indent: text before every line.
    """
    width = (WIDTH - 1 - len(indent) - 3 * (len(texts) - 1)) // len(texts)
    columns = []
    for head, text in zip(heads, texts, strict=True):
        lines = [part for line in printable(text).splitlines() for part in textwrap.wrap(line, width) or [""]]
        while lines and not lines[-1]:
            lines.pop()
        if most is not None and len(lines) > most:
            lines = [*lines[: most - 1], "…"]
        columns.append([cut(head, width), *(lines or ["(empty)"])])
    height = max(map(len, columns))
    cells = [[*lines, *[""] * (height - len(lines))] for lines in columns]
    rows = [" │ ".join(cell.ljust(width) for cell in row).rstrip() for row in zip(*cells, strict=True)]
    return [indent + row for row in rows]


def printable(text: str) -> str:
    """Replaces control codes, with which a model's text could drive the terminal."""
    return "".join(c if c in "\n" or c.isprintable() else " " if c == "\t" else f"\\x{ord(c):02x}" for c in text)
