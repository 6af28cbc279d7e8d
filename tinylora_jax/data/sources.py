"""Where rows come from: JSON lines, Parquet, the Hugging Face hub, reasoning-gym, and built-in arithmetic.

Each reader yields rows (mappings from column to value) in the order of the source, and turns whatever can go
wrong with bytes from outside into one `DataError`.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

MAX_LINE_BYTES = 1 << 24
"""A longer line of JSON is refused: a small gzip file can hold one of many gigabytes."""

Row: TypeAlias = Mapping[str, object]


class DataError(ValueError):
    """A data set that cannot be found, read or used; the message says where and what to do."""


def require_columns(where: str, have: Iterable[str], need: Iterable[str]) -> None:
    """Raises `DataError` naming the columns that `where` lacks and those it has."""
    have = tuple(have)
    missing = [name for name in need if name not in have]
    if missing:
        found = ", ".join(map(repr, have)) or "none"
        raise DataError(
            f"{where} lacks column {', '.join(map(repr, missing))}; it has {found}: "
            "set question_column and answer_column"
        )


def read_jsonl(path: Path) -> Iterator[Row]:
    """Reads JSON lines, gzipped when the name ends in `.gz`; blank lines are skipped and not counted as rows.

    Args:
      path: an existing file.

    Yields:
      One object per line.

    Raises:
      DataError: a line is no JSON object (its number is named), or the file is truncated or unreadable.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if line.strip():
                    yield _parse_line(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        advice = "the file is truncated or not what its name says; fetch it again"
        raise DataError(f"{path}: cannot be read after line {number} ({error}); {advice}") from error


def _parse_line(line: bytes, where: str) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes; is this a file of JSON lines?")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, an endless integer, endless nesting
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Reads columns of a Parquet file.

    Args:
      path: an existing file.
      columns: their names.

    Yields:
      One row at a time.

    Raises:
      DataError: the file is corrupt or lacks a column.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            require_columns(str(path), file.schema_arrow.names, columns)
            for batch in file.iter_batches(columns=list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); fetch it again") from error


def read_hub(source: str, split: str, columns: tuple[str, ...], start: int, limit: int | None) -> Iterator[Row]:
    """Reads a data set of the Hugging Face hub through `datasets`, which caches it.

    Args:
      source: `owner/name` or `owner/name:config`.
      split: the split.
      columns: their names.
      start: first row.
      limit: at most this many rows.

    Yields:
      One row at a time, from row `start`.

    Raises:
      DataError: the hub cannot be reached, or has no such data set, config, split or column.
    """
    import datasets

    name, _, config = source.partition(":")
    try:
        dataset = datasets.load_dataset(name, config or None, split=split)
    except ConnectionError as error:
        advice = "check the network and HF_HUB_OFFLINE, or pass a .jsonl, .jsonl.gz or .parquet file"
        raise DataError(f"the Hugging Face hub could not be reached for {source!r} ({error}); {advice}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        advice = "check the name, its config (owner/name:config) and the split"
        raise DataError(f"cannot load {source!r}, split {split!r}, from the hub: {error}; {advice}") from error
    require_columns(f"{source}, split {split!r},", dataset.column_names, columns)
    stop = len(dataset) if limit is None else min(len(dataset), start + limit)
    if start < stop:  # `select` refuses an empty range at the end
        yield from dataset.select_columns(list(columns)).select(range(start, stop))


def generate_reasoning_gym(task: str, split: str, seed: int, start: int, count: int) -> Iterator[Row]:
    """Generates rows of a reasoning-gym task with its default settings.

    Every (seed, split) is a stream of its own: the library draws row i from seed + i, so neighbouring seeds
    taken as they are would share nearly all rows. Streams of a task with few questions still overlap.

    Args:
      task: a registered name, such as `chain_sum`.
      split: any name; keys the stream.
      seed: keys the stream.
      start: first row.
      count: number of rows.

    Returns:
      Rows with `question` and `answer`.

    Raises:
      DataError: the package is not installed or has no such task.
    """
    try:
        from reasoning_gym import factory
    except ModuleNotFoundError as error:
        raise DataError(f"reasoning-gym:{task} needs a package: pip install 'reasoning-gym>=0.1.19'") from error
    if task not in factory.DATASETS:
        close = difflib.get_close_matches(task, factory.DATASETS, n=3) or sorted(factory.DATASETS)[:5] + ["..."]
        raise DataError(f"reasoning-gym has no task {task!r}; did you mean {', '.join(close)}?")
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:4])
    dataset = factory.create_dataset(task, seed=stream, size=start + count)
    return (dataset[index] for index in range(start, start + count))


def generate_arithmetic(split: str, seed: int, below: int, start: int = 0, limit: int | None = None) -> Iterator[Row]:
    """Generates "What is a + b?" for numbers below a bound.

    All below² ordered pairs are ranked by a keyed hash (the same on every machine and version); the first
    four fifths are `train`, the rest `test`. So no pair is in both, though a mirrored pair may be.

    Args:
      split: `train` or `test`.
      seed: keys the ranking, and with it the partition.
      below: numbers are 0 … below-1.
      start: first row.
      limit: exactly this many rows; None is 1024 (or all there are) of `train`, and all of `test`.

    Returns:
      Rows with `question`, `answer` and `solution`.

    Raises:
      DataError: unknown split, or more rows asked for than exist.

    >>> next(generate_arithmetic("train", seed=0, below=50))
    {'question': 'What is 44 + 41?', 'answer': '85', 'solution': '44 + 41 = 85\\n#### 85'}
    """
    if split not in ("train", "test"):
        raise DataError(f"arithmetic has the splits train and test, not {split!r}")
    pairs = sorted(
        itertools.product(range(below), repeat=2),
        key=lambda pair: hashlib.sha256(f"{seed}/{pair[0]}/{pair[1]}".encode()).digest(),
    )
    boundary = len(pairs) * 4 // 5
    pairs = pairs[:boundary] if split == "train" else pairs[boundary:]
    if limit is None:
        limit = min(1024, len(pairs) - start) if split == "train" else len(pairs) - start
    if start + limit > len(pairs):
        asked = f"rows {start} to {start + limit - 1} were asked for"
        raise DataError(
            f"arithmetic below {below} has {len(pairs)} {split} questions, {asked}; "
            "lower start or limit, or raise below"
        )
    return (_sum(a, b) for a, b in pairs[start : start + limit])


def _sum(a: int, b: int) -> Row:
    question, answer = f"What is {a} + {b}?", str(a + b)
    return {"question": question, "answer": answer, "solution": f"{a} + {b} = {answer}\n#### {answer}"}
