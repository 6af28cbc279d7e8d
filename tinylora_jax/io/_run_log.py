"""The folder of a run: config, metrics, samples and results, all safe to interrupt.

config.json     the config; a different one is rejected
metrics.jsonl   one line per step
tensorboard/    the same metrics for TensorBoard, unless another logger is chosen
dashboards.json the id of the run on other dashboards, if there are any
samples/        one readable page per step
checkpoints/    see `checkpoint`
adapter/        see `adapter_file`
summary.json    the result
lock            held by the process that writes to the folder
run.png         a summary plot, drawn at the end
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from absl import logging

from tinylora_jax.files import (
    append,
    check_own,
    lock_file,
    open_regular,
    parse_json,
    read_json,
    write_atomically,
    write_rows,
)
from tinylora_jax.io._dashboards import TENSORBOARD, Dashboards

_MAX_JSON_BYTES = 2**26  # size limit of a result; the summary of a sweep with a thousand members has 2 MB
_MAX_LINE_BYTES = 2**20  # size limit of a step's metrics
_MOST_TOLD = 100  # largest number of differing fields to list
# Fields that older runs lack, with the values that they had.
_ADDED = {
    "quantize": "none",
    "quantize_cache": "none",
    "lora.freeze_a": False,
    "refill": 0,
    "min_draw": 1.0,
    "search": "gradient",
    "teacher": None,
    "teacher_adapter": None,
    "grpo.importance_sampling_level": "token",
    "grpo.multi_objective_aggregation": "sum_then_normalize",
    "grpo.tis_mode": "token_truncate",
    "grpo.mask_truncated_completions": False,
    "optimizer.method": "adam",
}
_UNUSED = ("optimizer.kl_radius", "optimizer.damping", "optimizer.fisher_decay", "evolution.")  # by the values above
_FOLDERS = ("samples", "checkpoints", "tensorboard", "adapter")


class WorkdirError(ValueError):
    """A workdir cannot be used for this run."""


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens a config to dotted field names, including nested groups."""
    fields: dict[str, Any] = {}
    for name, value in tree.items():
        fields |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return fields


def _may_change(name: str) -> bool:
    """Whether a field does not affect training: the placement on devices, evaluations during it, or dashboards."""
    return name in ("slots", "evaluate_every", "logger") or name.startswith("mesh.")


def _scalars(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step's metrics by name, without those that are not defined."""
    scalars: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Sequence):
            scalars |= {f"{name}/{i}": x for i, x in enumerate(value)}
        elif value is not None:
            scalars[name] = value
    return scalars


class RunLog:
    """Opens a run's folder; a folder of another config is rejected.

    Args:
      workdir: folder of the run, created if absent.
      config: JSON-serializable settings of the run.
      claim: whether to write the config immediately. A caller that may fail before training starts calls `claim`
        later, so that a corrected config can still use the folder.
      loggers: names of the loggers besides metrics.jsonl, see `parse_loggers`.

    Raises:
      WorkdirError: the folder belongs to another config (the message names the fields), another process uses it, or it
        cannot be written.
    """

    def __init__(
        self,
        workdir: Path,
        config: Mapping[str, Any],
        claim: bool = True,
        loggers: Sequence[str] = (TENSORBOARD,),
    ):
        self.workdir, self._config, self._loggers = workdir, json.loads(json.dumps(config)), loggers
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
        self._dashboards: Dashboards | None = None

    def check(self) -> None:
        """Raises an error if the workdir was deleted or replaced, because new files there would seem complete.

        Raises:
          WorkdirError: the lock held by this process is no longer the file of that name.
        """
        held = os.fstat(self._held)
        try:
            found = os.lstat(self.workdir / "lock")
        except OSError:
            found = None
        if found is None or (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise WorkdirError(
                f"workdir {self.workdir} was deleted or replaced during the run; its contents are lost."
                " Run the same command again to start over"
            )

    def claim(self) -> None:
        """Reserves the folder for this config."""
        with self._writing():
            write_atomically(self.workdir / "config.json", json.dumps(self._config, indent=1) + "\n")

    def _lock(self) -> None:
        try:
            self._held = lock_file(self.workdir / "lock")
        except BlockingIOError as error:
            raise WorkdirError(
                f"another process is using {self.workdir}; wait until it ends, or choose another --workdir"
            ) from error
        weakref.finalize(self, os.close, self._held)  # releases the lock

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
            absent = now.keys() - before.keys()
            before |= {name: value for name, value in _ADDED.items() if name in absent}
            before |= {name: now[name] for name in absent if name.startswith(_UNUSED)}
        except RecursionError:
            raise WorkdirError(f"{path} is damaged (nested too deeply); choose another --workdir") from None
        differ = [
            f"config.{name:.200}: {before.get(name, '(absent)')!r:.200} there, {now.get(name, '(absent)')!r:.200} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name, missing) != now.get(name, missing) and not _may_change(name)
        ]
        if differ:
            raise WorkdirError(
                f"workdir {self.workdir} belongs to a run with another config:\n  "
                + "\n  ".join(differ[:_MOST_TOLD])
                + "\nChoose another --workdir, or use the same config to continue that run."
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
        """Discards log entries from `step` on, because these steps are about to run (again)."""
        with self._writing():
            lines, last = [], -1
            for number, line in self._logged():
                last = max(last, number)
                if number < step:
                    lines.append(line)
            write_atomically(self.workdir / "metrics.jsonl", "".join(lines))
            if TENSORBOARD in self._loggers:
                from tinylora_jax.io._tensorboard import Board  # imported here because it may import torch

                self._board = Board(self.workdir / "tensorboard", step)
            self._dashboards = Dashboards(self._loggers, self.workdir, self._config)
            if (record := self._dashboards.record) is not None:
                write_atomically(self.workdir / "dashboards.json", json.dumps(record) + "\n")
        rows = (json.loads(line) for line in lines)
        self._dashboards.start(((row.pop("step"), _scalars(row)) for row in rows), last)

    def _logged(self) -> Iterator[tuple[int, str]]:
        """Yields the steps and lines of metrics.jsonl; a damaged line is reported and skipped.

        An incomplete last line is skipped silently: a crash cut it short, and its step runs again.
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
                    if row["step"] < math.inf:
                        yield row["step"], json.dumps(row) + "\n"
                except (ValueError, TypeError, KeyError) as error:
                    if line.endswith(b"\n") or len(line) == _MAX_LINE_BYTES:
                        what = f"{type(error).__name__}: {error}"
                        logging.warning("%s, line %d is damaged and was skipped (%.200s)", path, number, what)

    def metrics(self, step: int, values: Mapping[str, float | Sequence[float]]) -> None:
        """Appends one step's metrics; on dashboards the numbers of a sequence appear as `name/0`, ….

        A number that is not finite, such as a mean over nothing, becomes null, because JSON cannot express it.
        """
        defined = {
            name: value if isinstance(value, Sequence) or math.isfinite(value) else None
            for name, value in values.items()
        }
        with self._writing():
            append(self.workdir / "metrics.jsonl", (json.dumps({"step": step, **defined}) + "\n").encode())
            scalars = _scalars(defined)
            if self._board is not None:
                self._board.write(step, scalars)
        if self._dashboards is not None:
            self._dashboards.step(step, scalars)

    def samples(self, step: int, text: str) -> None:
        """Writes a page of readable completions."""
        with self._writing():
            (self.workdir / "samples").mkdir(exist_ok=True)
            check_own(self.workdir, ["samples"])
            # A completion may contain characters that UTF-8 cannot encode.
            page = text.encode("utf-8", "replace")
            write_atomically(self.workdir / "samples" / f"{step:06d}.txt", page, durable=False)
        if self._dashboards is not None:
            self._dashboards.page(page.decode("utf-8"))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a result atomically."""
        with self._writing():
            write_atomically(self.workdir / name, json.dumps(value, indent=1) + "\n")

    def write_rows(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes JSON lines atomically."""
        with self._writing():
            write_rows(self.workdir / name, rows)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a result; None if it does not exist yet."""
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
        """Closes the TensorBoard file and the dashboards; repeated calls have no effect."""
        board, self._board = self._board, None
        try:
            if board is not None:
                with self._writing():
                    board.close()
        finally:
            if self._dashboards is not None:
                self._dashboards.close()
