"""Questions with gold answers, from any source, checked row by row."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tinylora_jax.data.sources import (
    DataError,
    Row,
    generate_arithmetic,
    generate_reasoning_gym,
    read_hub,
    read_jsonl,
    read_parquet,
    require_columns,
)
from tinylora_jax.files import expand, is_number
from tinylora_jax.stores import fetch_object, is_url

DEFAULT_GENERATED = 1024
MAX_REPORTED = 5
MAX_TEXT = 1 << 20
"""Largest number of characters of a question or an answer; no model can use a longer one."""

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Suffixes of files of questions."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?::[^\s:/]+)?")
_REASONING_GYM = "reasoning-gym:"
_KEEP = re.compile(r"[^=,]*[^=,\s][^=,]*=[^=]+")
_THOUSANDS_COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


@dataclass(frozen=True)
class Question:
    """A question and its gold answer.

    Attributes:
      id: row index in the source, independent of `start` and `limit`. The sampling noise is derived from it.
      question: text of the question, without surrounding whitespace.
      answer: final answer only.
      solution: worked solution, for SFT; None if the source has none.
    """

    id: int
    question: str
    answer: str
    solution: str | None = None


@dataclass(frozen=True)
class DataSpec:
    """A description of the questions to load.

    Attributes:
      source: `arithmetic`; `reasoning-gym:<task>`; a path or the URL of an object ending in .jsonl, .jsonl.gz or
        .parquet; or a hub id, `owner/name` or `owner/name:config`.
      split: name of the split; ignored for files, which contain a single split.
      question_column: column of the question (files and hub).
      answer_column: column of the answer (files and hub). If it is a worked solution that ends in `#### 72`, the answer
        is the part after the marker. A list of strings means several answers.
      solution_column: column of a worked solution, for SFT (files and hub). If empty, an answer column that ends in
        `#### 72` serves as the solution.
      start: index of the first row.
      limit: largest number of rows; 0 or None for all (for generators the exact number; see `sources`).
      seed: seed of the generators.
      below: exclusive upper bound of the numbers (arithmetic only).
      tolerance_column: column of the absolute tolerance of a row's numbers, which may be empty; "" for no such column.
      keep: filter such as `level=3,4,5`, which keeps rows with one of these values in that column (files and hub);
        "" keeps all.
    """

    source: str
    split: str = "train"
    question_column: str = "question"
    answer_column: str = "answer"
    solution_column: str = ""
    start: int = 0
    limit: int | None = None
    seed: int = 0
    below: int = 50
    tolerance_column: str = ""
    keep: str = ""

    def __post_init__(self):
        if self.limit == 0:
            object.__setattr__(self, "limit", None)
        empty = [f for f in ("source", "split", "question_column", "answer_column") if not getattr(self, f)]
        if empty:
            raise DataError(f"data spec needs a non-empty {' and '.join(empty)}")
        if self.start < 0 or self.seed < 0 or (self.limit is not None and self.limit < 0):
            raise DataError(
                f"data spec needs start >= 0, seed >= 0 and limit >= 0 (0 and None take all), "
                f"got start={self.start}, seed={self.seed}, limit={self.limit}"
            )
        if not 2 <= self.below <= 1000:
            raise DataError(f"data spec needs below in 2 … 1000, got {self.below}")
        if self.keep and not _KEEP.fullmatch(self.keep):
            raise DataError(f"data spec needs keep like 'level=3,4,5', got {self.keep!r}")

    @property
    def kept(self) -> tuple[str, frozenset[str]]:
        """The column and the values of `keep`."""
        column, _, values = self.keep.partition("=")
        return column.strip(), frozenset(value.strip() for value in values.split(","))


def load_questions(spec: DataSpec) -> tuple[Question, ...]:
    """Loads and checks questions.

    Args:
      spec: description of the questions to load.

    Returns:
      The questions in the order of the source, at least one.

    Raises:
      DataError: the source cannot be read, lacks a column, has no rows, or has rows without a usable question or
        answer (the message gives their number and the row indices of the first few).

    >>> load_questions(DataSpec("arithmetic", split="test", limit=1))
    (Question(id=0, question='What is 36 + 27?', answer='63', solution='36 + 27 = 63\\n#### 63'),)
    """
    questions: list[Question] = []
    problems: list[str] = []
    unusable = 0
    asked, answered, *solved = _columns(spec)
    for row_index, row in enumerate(_read(spec), start=spec.start):
        kept, values = spec.kept
        require_columns(f"{spec.source}, row {row_index},", row, (asked, answered, *solved, *([kept] if kept else [])))
        if kept and str(row[kept]) not in values:
            continue
        try:
            given = _as_text(answered, _joined(row[answered]))
            answer = final_answer(given) + _tolerance(spec.tolerance_column, row)
            worked = [_as_text(column, row[column]) for column in solved] or ([given] if "####" in given else [None])
            questions.append(Question(row_index, _as_text(asked, row[asked]), answer, worked[0]))
        except DataError as error:
            unusable += 1
            problems += [f"row {row_index}: {error}"] if unusable <= MAX_REPORTED else []
    if unusable:
        shown = "; ".join(problems) + ("; ..." if unusable > MAX_REPORTED else "")
        raise DataError(f"{spec.source} has {unusable} unusable rows: {shown}. Fix or remove them")
    if not questions:
        which = f" with {spec.keep}" if spec.keep else ""
        raise DataError(f"{spec.source} (split {spec.split!r}) has no rows{which} from row {spec.start} on")
    return tuple(questions)


def final_answer(answer: str) -> str:
    """Returns the part after the last `####`, without thousands commas; an answer without it is unchanged.

    Raises:
      DataError: nothing follows the marker.

    >>> final_answer("48 / 2 = 24 and 1,048 + 24 = 1,072\\n#### 1,072"), final_answer("x + 1")
    ('1072', 'x + 1')
    """
    _, marker, tail = answer.rpartition("####")
    if not marker:
        return answer
    if not tail.strip():
        raise DataError("nothing follows '####' in the answer")
    return _THOUSANDS_COMMA.sub("", tail.strip())


def _columns(spec: DataSpec) -> tuple[str, ...]:
    """Columns of the question, the answer and the worked solution, if any."""
    if spec.source == "arithmetic":
        return ("question", "answer", "solution")
    if _is_generated(spec.source):
        return ("question", "answer")
    solution = (spec.solution_column,) if spec.solution_column else ()
    return (spec.question_column, spec.answer_column, *solution)


def _joined(answer: object) -> object:
    """Joins a list of answers into one text; `_as_text` rejects any other list, including an empty one."""
    is_list = isinstance(answer, list) and answer and all(isinstance(each, str) for each in answer)
    return ", ".join(answer) if is_list else answer


def _tolerance(column: str, row: Row) -> str:
    """A row's tolerance as the suffix of the answer that graders read."""
    value = row.get(column) if column else None
    if value is None or value == "":
        return ""
    try:
        number = float(str(value))
    except ValueError:
        number = -1.0
    if not (math.isfinite(number) and number >= 0):
        raise DataError(f"column {column!r} is {str(value)[:40]!r}, expected a number >= 0 or an empty value")
    return f" (tolerance {number})" if number else ""


def _is_generated(source: str) -> bool:
    return source == "arithmetic" or source.startswith(_REASONING_GYM)


def _read(spec: DataSpec) -> Iterator[Row]:
    """Opens the source and yields at most `limit` of its rows, from `start` on."""
    source = spec.source
    columns = _columns(spec) + tuple(filter(None, (spec.tolerance_column, spec.kept[0])))
    if source == "arithmetic":
        return generate_arithmetic(spec.split, spec.seed, spec.below, spec.start, spec.limit)
    if source.startswith(_REASONING_GYM):
        task, count = source.removeprefix(_REASONING_GYM), spec.limit or DEFAULT_GENERATED
        return generate_reasoning_gym(task, spec.split, spec.seed, spec.start, count)
    try:
        stored = is_url(source) and source.endswith(FILE_SUFFIXES)
        path = fetch_object(source) if stored else expand(source)
    except ValueError as error:
        raise DataError(str(error)) from error
    if source.endswith(FILE_SUFFIXES):
        if not path.exists():
            raise DataError(f"{source}: no such file (current folder: {Path.cwd()})")
        rows = read_parquet(path, columns) if source.endswith(".parquet") else read_jsonl(path)
        return itertools.islice(rows, spec.start, None if spec.limit is None else spec.start + spec.limit)
    # `datasets` would read a local folder of that name instead of the hub's data set. It treats bare names such as
    # `json` as file formats, and searches the current folder for such files.
    if path.exists() or not _HUB_ID.fullmatch(source):
        raise DataError(
            f"unknown data source {source!r}; expected arithmetic, reasoning-gym:<task>, a file ending in "
            f"{', '.join(FILE_SUFFIXES)}, or a hub id such as openai/gsm8k:main"
        )
    return read_hub(source, spec.split, columns, spec.start, spec.limit)


def _as_text(column: str, value: object) -> str:
    """Converts a text or a plain number to stripped text that every tokenizer can encode."""
    if not isinstance(value, str) and not is_number(value):
        shown = "null" if value is None else f"of type {type(value).__name__}"
        raise DataError(f"column {column!r} is {shown}, expected a string or a finite number")
    text = str(value).strip()
    if not text:
        raise DataError(f"column {column!r} is empty")
    if len(text) > MAX_TEXT:
        raise DataError(f"column {column!r} has {len(text)} characters, expected at most {MAX_TEXT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"column {column!r} contains a lone surrogate at character {error.start}") from error
    return text
