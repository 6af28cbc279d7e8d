"""The folder of a run: its config, metrics, samples and results, all safe to interrupt.

config.json     the config; another one is refused
metrics.jsonl   one line a step
tensorboard/    the same, for TensorBoard
samples/        a readable page a step
checkpoints/    see `checkpoint`
adapter/        see `adapter_file`
summary.json    the result
lock            held by the process that writes here
run.png         all of it, drawn at the end
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import logging

from tinylora_jax.files import append, check_own, open_regular, parse_json, read_json, write_atomically, write_rows

_MAX_JSON_BYTES = 2**26  # of a result; the summary of a sweep of a thousand members has 2 MB
_MAX_LINE_BYTES = 2**20  # of a step's metrics
_MOST_TOLD = 100  # of the fields that differ
_FOLDERS = ("samples", "checkpoints", "tensorboard", "adapter")


class WorkdirError(ValueError):
    """A workdir that cannot be used for this run."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a config by their dotted names, groups within groups included."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return fields


def _is_of_devices(name: str) -> bool:
    """Whether a field says how a run lies on its devices, not what it computes: it may go on elsewhere."""
    return name == "slots" or name.startswith("mesh.")


class RunLog:
    """Opens a run's folder, or refuses one that another config made.

    Args:
      workdir: created if absent.
      config: JSON-serializable settings of the run.
      claim: whether to write the config at once. A caller that may still fail before anything is trained calls
        `claim` later, so that a corrected config finds the folder free.

    Raises:
      WorkdirError: the folder was made by another config (the fields are named), another process has it, or it cannot
        be written.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any], claim: bool = True):
        self.workdir, self._config = workdir, json.loads(json.dumps(config))
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            check_own(workdir, ["lock", *_FOLDERS])
            self._lock()
            if os.path.lexists(workdir / "config.json"):
                self._compare()
            elif claim:
                self.claim()
        except OSError as error:
            raise WorkdirError(f"cannot write to workdir {workdir}: {error}; choose another --workdir") from error
        self._board: Any = None

    def check(self) -> None:
        """Refuses to go on in a workdir that was deleted or exchanged: what is written there would count as complete.

        Raises:
          WorkdirError: the lock that this process holds is no longer the file of that name.
        """
        held = os.fstat(self._held)
        try:
            found = os.lstat(self.workdir / "lock")
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise WorkdirError(
                f"workdir {self.workdir} was deleted or replaced while the run was writing there; what it held is lost."
                " Run the same command again to train anew"
            )

    def claim(self) -> None:
        """Makes the folder this config's own."""
        with self._writing():
            write_atomically(self.workdir / "config.json", json.dumps(self._config, indent=1) + "\n")

    def _lock(self) -> None:
        file = os.open(self.workdir / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        weakref.finalize(self, os.close, file)  # which gives the folder up, as the end of the process does
        self._held = file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # others: a file system without locks
                raise WorkdirError(
                    f"another process works in {self.workdir}; wait until it ends, or choose another --workdir"
                ) from error

    def _compare(self) -> None:
        path = self.workdir / "config.json"
        try:
            before = read_json(path, _MAX_JSON_BYTES)
            if not isinstance(before, dict):
                raise ValueError("not a JSON object")
        except (OSError, ValueError) as error:
            raise WorkdirError(f"{path} is damaged ({error}); choose another --workdir or remove this one") from error
        try:
            before, now, missing = flat(before), flat(self._config), object()
        except RecursionError:
            raise WorkdirError(f"{path} is damaged (nested too deeply); choose another --workdir") from None
        differ = [
            f"config.{name:.200}: {before.get(name, '(absent)')!r:.200} there, {now.get(name, '(absent)')!r:.200} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name, missing) != now.get(name, missing) and not _is_of_devices(name)
        ]
        if differ:
            raise WorkdirError(
                f"workdir {self.workdir} belongs to a run with another config:\n  "
                + "\n  ".join(differ[:_MOST_TOLD])
                + "\nChoose another --workdir, or give the same config to continue that run."
            )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        self.check()
        try:
            yield
        except OSError as error:
            raise WorkdirError(
                f"cannot write to workdir {self.workdir}: {error}. Free space or fix permissions and run the same"
                " command again: it continues after the last step that was saved."
            ) from error

    def start(self, step: int) -> None:
        """Forgets what was logged from `step` on, which is about to be done (again)."""
        with self._writing():
            write_atomically(self.workdir / "metrics.jsonl", "".join(self._logged_before(step)))
            from tinylora_jax.io._tensorboard import Board  # here, since it may import torch

            self._board = Board(self.workdir / "tensorboard", step)

    def _logged_before(self, step: int) -> Iterator[str]:
        """The lines of metrics.jsonl of the steps before one; a damaged line is named and left out, the others stay.

        Of the last line nothing is said if it has no end: a crash cut it short, and its step is done again.
        """
        path = self.workdir / "metrics.jsonl"
        if not os.path.lexists(path):
            return
        with open_regular(path) as file:
            number = 0
            while line := file.readline(_MAX_LINE_BYTES):
                number += 1
                try:
                    row = parse_json(line)
                    if row["step"] < step:
                        yield json.dumps(row) + "\n"
                except (ValueError, TypeError, KeyError) as error:
                    if line.endswith(b"\n") or len(line) == _MAX_LINE_BYTES:
                        what = f"{type(error).__name__}: {error}"
                        logging.warning("%s, line %d is damaged and left out (%.200s)", path, number, what)

    def metrics(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        """Appends one step's metrics; TensorBoard gets the numbers of a sequence one by one, as `name/0`, ….

        A number that is not finite, such as a mean over nothing, becomes null: JSON has no other word for it.
        """
        defined = {
            name: value if isinstance(value, Sequence) or math.isfinite(value) else None
            for name, value in values.items()
        }
        with self._writing():
            append(self.workdir / "metrics.jsonl", (json.dumps({"step": step, **defined}) + "\n").encode())
            scalars: dict[str, float] = {}
            for name, value in ((name, value) for name, value in defined.items() if value is not None):
                several = isinstance(value, Sequence)
                scalars |= {f"{name}/{i}": x for i, x in enumerate(value)} if several else {name: value}
            self._board.write(step, scalars)

    def samples(self, step: int, text: str) -> None:
        """Keeps a page of readable completions."""
        with self._writing():
            (self.workdir / "samples").mkdir(exist_ok=True)
            check_own(self.workdir, ["samples"])
            # A model's completion may hold what UTF-8 cannot.
            page = text.encode("utf-8", "replace")
            write_atomically(self.workdir / "samples" / f"{step:06d}.txt", page, durable=False)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a result, all or nothing."""
        with self._writing():
            write_atomically(self.workdir / name, json.dumps(value, indent=1) + "\n")

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes JSON lines, all or nothing."""
        with self._writing():
            write_rows(self.workdir / name, rows)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a result; None if it was not written yet."""
        path = self.workdir / name
        if not os.path.lexists(path):
            return None
        try:
            found = read_json(path, _MAX_JSON_BYTES)
            if not isinstance(found, dict):
                raise ValueError(f"expected a JSON object, found {type(found).__name__}")
        except (OSError, ValueError) as error:
            raise WorkdirError(f"{path} is damaged ({error}); delete it and run again") from error
        return found

    def close(self) -> None:
        """Closes the TensorBoard file; closing again does nothing."""
        board, self._board = self._board, None
        if board is not None:
            with self._writing():
                board.close()
