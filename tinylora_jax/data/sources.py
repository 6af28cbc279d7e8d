"""Sources of rows: JSON lines, Parquet, the Hugging Face hub, reasoning-gym and arithmetic.

Each reader yields rows (mappings from column to value) in the order of the source, and reports every failure with
external data as a `DataError`.
"""

from __future__ import annotations

import contextlib
import difflib
import gzip
import hashlib
import itertools
import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from tinylora_jax.extras import lacking
from tinylora_jax.files import open_regular, parse_json
from tinylora_jax.hub import HubError, bounded_requests, check_blobs, explain

# A small compressed file can contain many gigabytes, and parsed JSON takes up to 30 times its size.
MAX_LINE_BYTES = 1 << 22
"""Longest accepted line of JSON, in bytes."""

MAX_ROWS = 1 << 20
"""Largest accepted number of rows of one source; set `limit` to read fewer."""

_MAX_BLANK_LINES = 1 << 20
_EXPANSION, _FREE_BYTES = 100, 1 << 26  # a file may expand a hundredfold, and always to 64 MB
_BATCH_ROWS, _MAX_BATCH_BYTES = 256, 1 << 26
_PARQUET_PROGRAM = Path(__file__).with_name("parquet_worker.py")
_DECODING = 4  # number of copies of the data that may be in memory at once
_PROBE_S = 5  # seconds within which the hub must respond

Row: TypeAlias = Mapping[str, object]


class DataError(ValueError):
    """A data set cannot be found, read or used; the message says where and what to do."""


def require_columns(where: str, have: Iterable[str], need: Iterable[str]) -> None:
    """Raises `DataError` if columns are missing, with the missing and the available ones."""
    have = tuple(have)
    missing = [name for name in need if name not in have]
    if missing:
        found = ", ".join(map(repr, have)) or "none"
        raise DataError(
            f"{where} lacks column {', '.join(map(repr, missing))}; it has {found}: "
            "set question_column and answer_column"
        )


def read_jsonl(path: Path) -> Iterator[Row]:
    """Reads JSON lines, gzipped if the name ends in `.gz`; blank lines are skipped and do not count as rows.

    Args:
      path: path of an existing file.

    Yields:
      One object per line.

    Raises:
      DataError: a line is not a JSON object (the message gives its number), the file is truncated or unreadable, or it
        expands to more data than any real file of questions.
    """
    number = blank = size = 0
    try:
        with open_regular(path) as raw:
            most = _FREE_BYTES + _EXPANSION * path.stat().st_size
            file = gzip.open(raw, "rb") if path.suffix == ".gz" else raw
            while line := file.readline(MAX_LINE_BYTES + 1):
                number, size = number + 1, size + len(line)
                blank += not line.strip()
                if blank > _MAX_BLANK_LINES or size > most or number - blank > MAX_ROWS:
                    what = f"{number - blank} rows and {blank} blank lines, {size} bytes"
                    raise DataError(f"{path}: too large for a file of questions ({what}); set limit, or split it")
                if line.strip() or len(line) > MAX_LINE_BYTES:
                    yield _parse_line(line, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        advice = "the file is truncated or not of the type that its name says; download it again"
        raise DataError(f"{path}: cannot be read after line {number} ({error}); {advice}") from error


def _parse_line(line: bytes, where: str) -> Row:
    if len(line) > MAX_LINE_BYTES:
        raise DataError(f"{where}: longer than {MAX_LINE_BYTES} bytes; is this a JSON-lines file of questions?")
    try:
        row = parse_json(line.decode("utf-8-sig"))
    except ValueError as error:  # bad UTF-8, bad JSON, too long an integer, too deep nesting
        raise DataError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}")
    return row


def read_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Reads columns of a Parquet file.

    Args:
      path: path of an existing file.
      columns: names of the columns to read.

    Yields:
      One row at a time.

    Raises:
      DataError: the file is corrupt, lacks a column, or expands to more data than any real file of questions.
    """
    size, number = path.stat().st_size if path.is_file() else 0, 0
    with _parquet_process(path, columns, size) as process:
        for line in process.stdout:
            message = parse_json(line)
            require_columns(str(path), message.get("columns", columns), columns)
            if "refused" in message:
                what = f"{message['refused']}, and the file has {size}"
                raise DataError(f"{path}: too large for a file of questions ({what}); set limit, or split it")
            if "unreadable" in message:
                raise DataError(f"{path}: not a readable Parquet file ({message['unreadable']}); download it again")
            rows = message.get("rows", ())
            number += len(rows)
            yield from rows
        if code := process.wait():
            raise DataError(
                f"{path}: not a readable Parquet file (the reader exited with code {code} after {number} rows);"
                " download it again"
            )


@contextlib.contextmanager
def _parquet_process(path: Path, columns: tuple[str, ...], size: int) -> Iterator[Any]:
    """Runs `parquet_worker.py` on a file of the given size, and stops it at the end of the `with` block."""
    most = _FREE_BYTES + _EXPANSION * size
    bounds = {"columns": columns, "most_bytes": most, "most_rows": MAX_ROWS}
    bounds |= {"batch_rows": _BATCH_ROWS, "batch_bytes": _MAX_BATCH_BYTES}
    # -P: do not import from the program's folder, which contains other modules.
    command = [sys.executable, "-P", str(_PARQUET_PROGRAM), json.dumps(bounds), str(_DECODING * most)]
    environment = os.environ | {"ARROW_DEFAULT_MEMORY_POOL": "system"}  # others reserve unused memory
    try:
        with open_regular(path) as file:
            process = subprocess.Popen(
                command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
            )
    except OSError as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); download it again") from error
    with process:
        try:
            yield process
        finally:
            process.kill()


def read_hub(source: str, split: str, columns: tuple[str, ...], start: int, limit: int | None) -> Iterator[Row]:
    """Reads a data set from the Hugging Face hub through `datasets`, which caches it.

    Args:
      source: hub id, `owner/name` or `owner/name:config`.
      split: name of the split.
      columns: names of the columns to read.
      start: index of the first row.
      limit: largest number of rows; None for all.

    Yields:
      One row at a time, from row `start`.

    Raises:
      DataError: the hub cannot be reached, or has no such data set, config, split or column.
    """
    dataset = _load_hub(source, split)
    require_columns(f"{source}, split {split!r},", dataset.column_names, columns)
    stop = len(dataset) if limit is None else min(len(dataset), start + limit)
    if stop - start > MAX_ROWS:
        raise DataError(f"{source} has {stop - start} rows; expected at most {MAX_ROWS}, set limit to read fewer")
    if start < stop:  # `select` rejects an empty range at the end
        yield from dataset.select_columns(list(columns)).select(range(start, stop))


def _load_hub(source: str, split: str) -> Any:
    import datasets
    from huggingface_hub.errors import HTTPError

    name, _, config = source.partition(":")
    load = lambda: datasets.load_dataset(name, config or None, split=split)
    advice = "check the network and HF_HUB_OFFLINE, or pass a .jsonl, .jsonl.gz or .parquet file"
    try:
        with bounded_requests():
            problem = _hub_problem(name)
            if problem is None:
                found = load()
                _check_hashes(name, found)
                return found
        # The library would retry for most of a minute before using its cache, and after a miss again.
        with _offline():
            try:
                return load()
            except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as error:
                raise DataError(f"the Hugging Face hub {problem}, and its cache lacks it; {advice}") from error
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(f"the Hugging Face hub could not be reached for {source!r} ({error}); {advice}") from error
    except (OSError, ValueError, RuntimeError, HTTPError, datasets.exceptions.DatasetsError) as error:
        check = "the name, its config (owner/name:config) and the split"
        why = explain(error, "data set", check, "pass a .jsonl or .parquet file")
        raise DataError(f"cannot load {source!r}, split {split!r}, from the hub: {why}") from error


def _check_hashes(name: str, dataset: Any) -> None:
    """Raises an error if a file of a data set in the hub's cache is not what the hub states; `datasets` does not look.

    Raises:
      DataError: the message says what to delete: the file, and the table that `datasets` made from it.
    """
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "snapshots"
    try:
        check_blobs(snapshots)
    except ValueError as error:
        tables = sorted({str(Path(file["filename"]).parent) for file in dataset.cache_files})
        raise DataError(f"{error}; delete {', '.join(tables) or 'its tables'} too, which were made from it") from error


def _hub_problem(name: str) -> str | None:
    """Queries the hub for a data set; None if it responds within seconds, or in offline mode, else what is wrong."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        return None
    url = f"{constants.ENDPOINT}/api/datasets/{name}"
    try:
        status = get_session().get(url, timeout=_PROBE_S, headers=build_hf_headers()).status_code
    except HubError:
        status = 429
    except (OSError, HTTPError):
        return f"could not be reached for {name!r} within {_PROBE_S} s"
    if status == 429:
        return f"limits the rate of requests and answered 429 (too many requests) for {name!r}: wait a few minutes"
    return f"answered with status {status} for {name!r}" if status >= 500 else None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Restricts the hub's libraries to their cache inside the `with` block."""
    import datasets
    from huggingface_hub import constants

    holders = (constants, datasets.config)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


def generate_reasoning_gym(task: str, split: str, seed: int, start: int, count: int) -> Iterator[Row]:
    """Generates rows of a reasoning-gym task with its default settings.

    Every (seed, split) gives a separate stream. The library generates row i from seed + i, so without this, adjacent
    seeds would share nearly all rows. The streams of a task with few distinct questions still overlap.

    Args:
      task: registered task name, such as `chain_sum`.
      split: any name; part of the stream's key.
      seed: seed; part of the stream's key.
      start: index of the first row.
      count: number of rows.

    Returns:
      Rows with `question` and `answer`.

    Raises:
      DataError: the package is not installed, or has no such task.
    """
    try:
        from reasoning_gym import factory
    except ModuleNotFoundError as error:
        raise DataError(f"reasoning-gym:{task}: {lacking('reasoning-gym', 'reasoning-gym')}") from error
    if task not in factory.DATASETS:
        close = difflib.get_close_matches(task, factory.DATASETS, n=3) or sorted(factory.DATASETS)[:5] + ["..."]
        raise DataError(f"reasoning-gym has no task {task!r}; did you mean {', '.join(close)}?")
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{split}".encode()).digest()[:4])
    dataset = factory.create_dataset(task, seed=stream, size=start + count)
    return (dataset[index] for index in range(start, start + count))


def generate_arithmetic(split: str, seed: int, below: int, start: int = 0, limit: int | None = None) -> Iterator[Row]:
    """Generates "What is a + b?" for numbers below a bound.

    All below² ordered pairs are ranked by a keyed hash, which is the same on every machine and version. The first four
    fifths are `train`, the rest `test`. So no pair is in both splits, although its mirror image may be in the other.

    Args:
      split: name of the split, `train` or `test`.
      seed: seed of the ranking, and so of the partition.
      below: exclusive upper bound of the numbers, which start at 0.
      start: index of the first row.
      limit: exact number of rows; None for 1024 rows of `train` (or all, if fewer) and all rows of `test`.

    Returns:
      Rows with `question`, `answer` and `solution`.

    Raises:
      DataError: the split is unknown, or more rows are requested than exist.

    >>> next(generate_arithmetic("train", seed=0, below=50))
    {'question': 'What is 44 + 41?', 'answer': '85', 'solution': '44 + 41 = 85\\n#### 85'}
    """
    if split not in ("train", "test"):
        raise DataError(f"arithmetic has the splits train and test, got {split!r}")
    pairs = sorted(
        itertools.product(range(below), repeat=2),
        key=lambda pair: hashlib.sha256(f"{seed}/{pair[0]}/{pair[1]}".encode()).digest(),
    )
    boundary = len(pairs) * 4 // 5
    pairs = pairs[:boundary] if split == "train" else pairs[boundary:]
    if limit is None:
        limit = min(1024, len(pairs) - start) if split == "train" else len(pairs) - start
    if start + limit > len(pairs):
        asked = f"but rows {start} to {start + limit - 1} were requested"
        raise DataError(
            f"arithmetic below {below} has {len(pairs)} {split} questions, {asked}; "
            "lower start or limit, or raise below"
        )
    return (_sum(a, b) for a, b in pairs[start : start + limit])


def _sum(a: int, b: int) -> Row:
    question, answer = f"What is {a} + {b}?", str(a + b)
    return {"question": question, "answer": answer, "solution": f"{a} + {b} = {answer}\n#### {answer}"}
