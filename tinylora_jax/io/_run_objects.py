"""What a run's folder becomes in an object store: the same files, and each checkpoint as one ZIP file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path

from tinylora_jax.stores import fetch_objects

CONFIG = "config.json"
STEPS = "checkpoints"
MARKS = ("eval_before.json", "summary.json")
"""Files written after what they refer to."""

Stat = tuple[int, int, int]
"""Time of change in nanoseconds, size in bytes and inode of a file."""

_NOT_MIRRORED = ("lock", "error.log")
_RESULTS = (CONFIG, "metrics.jsonl", "dashboards.json", "answers_before.jsonl", "answers_after.jsonl", *MARKS)


def is_result(name: str) -> bool:
    """Whether an object of a run's store is a log or a result of the run, or of a member of a sweep."""
    *folders, file = name.split("/")
    return file in _RESULTS and (not folders or (len(folders) == 2 and folders[0] == "members"))


def is_mark(name: str) -> bool:
    """Whether a file says that others are complete."""
    return name.rpartition("/")[2] in MARKS


def scan(folder: Path) -> dict[str, Stat]:
    """Finds the files of a run to upload, except checkpoints; a file that changes has another `Stat`."""
    found: dict[str, Stat] = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.endswith((".tmp", ".unfinished")) and name != STEPS]
        for name in names:
            path = Path(root, name)
            if name.endswith(".tmp") or name in _NOT_MIRRORED or path.is_symlink():
                continue
            try:
                stat = path.stat()
            except FileNotFoundError:  # replaced at this moment
                continue
            found[path.relative_to(folder).as_posix()] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    return found


def fetch_run(url: str) -> Path:
    """Copies the logs and results of a run or a sweep into the local cache, without checkpoints and pages.

    Args:
      url: URL of the workdir.

    Returns:
      The local folder.

    Raises:
      StoreError: the store cannot be read, or contains no run.
    """
    return fetch_objects(url, is_result)


def fetch_adapter(url: str) -> Path:
    """Copies an adapter into the local cache, and the config and the summary of its run beside it if they exist.

    Args:
      url: URL of the adapter's folder.

    Returns:
      The local folder of the adapter.

    Raises:
      StoreError: the store cannot be read, or there is no such folder.
    """
    return fetch_objects(url, beside=(CONFIG, "summary.json"))


def newest_step(folder: Path) -> int | None:
    """The newest complete checkpoint in a run's folder; Orbax names a step when it is complete."""
    steps = folder / STEPS
    found = [int(name) for name in os.listdir(steps) if name.isdigit()] if steps.is_dir() else []
    return max(found, default=None)


def pack(folder: Path, target: Path) -> None:
    """Writes a folder as one uncompressed ZIP file, which has a checksum of every file."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED, strict_timestamps=False) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder).as_posix())


def unpack(archive: Path, target: Path) -> None:
    """Writes the files of an archive of `pack` into a new folder.

    Raises:
      ValueError: the archive is damaged, or is not one of `pack`.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            for (
                info
            ) in opened.infolist():  # compressed files could fill the disk; links and `..` could leave the folder
                parts = info.filename.rstrip("/").split("/")
                if info.compress_type != zipfile.ZIP_STORED or any(part in ("", ".", "..") for part in parts):
                    raise ValueError(f"it contains {info.filename!r:.100}, which no checkpoint has")
            opened.extractall(target)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def step_name(step: int) -> str:
    """The name of a checkpoint's object."""
    return f"{STEPS}/{step}.zip"


def steps_in(names: Iterable[str]) -> set[int]:
    """The steps of which there is a checkpoint among the names of objects."""
    ends = [name.removeprefix(f"{STEPS}/").removesuffix(".zip") for name in names if name.startswith(f"{STEPS}/")]
    return {int(end) for end in ends if end.isdigit()}
