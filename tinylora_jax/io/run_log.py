"""The folder of a run: its config, metrics, samples and results, all safe to interrupt.

    config.json     the config; another one is refused
    metrics.jsonl   one line a step
    tensorboard/    the same, for TensorBoard
    samples/        a readable page a step
    checkpoints/    see `checkpoint`
    adapter/        see `adapter_file`
    summary.json    the result
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class WorkdirError(ValueError):
    """A workdir that cannot be used for this run."""


def write_atomically(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a process after a crash, sees all of it or the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


class RunLog:
    """Opens a run's folder, or refuses one that another config made.

    Args:
      workdir: created if absent.
      config: JSON-serializable settings of the run.

    Raises:
      WorkdirError: the folder was made by another config (the fields are named), or cannot be written.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        self.workdir = workdir
        try:
            (workdir / "samples").mkdir(parents=True, exist_ok=True)
            self._claim(json.loads(json.dumps(config)))
        except OSError as error:
            raise WorkdirError(f"cannot write to workdir {workdir}: {error}; choose another --workdir") from error
        self._board: SummaryWriter | None = None

    def _claim(self, config: dict[str, Any]) -> None:
        path = self.workdir / "config.json"
        if not path.exists():
            write_atomically(path, json.dumps(config, indent=1) + "\n")
            return
        try:
            before, now = _flat(json.loads(path.read_text())), _flat(config)
        except (ValueError, AttributeError) as error:
            raise WorkdirError(f"{path} is damaged ({error}); choose another --workdir or remove this one") from error
        missing = object()
        differ = [
            f"config.{name}: {before.get(name, '(absent)')!r} there, {now.get(name, '(absent)')!r} now"
            for name in sorted(before.keys() | now.keys())
            if before.get(name, missing) != now.get(name, missing)
        ]
        if differ:
            raise WorkdirError(
                f"workdir {self.workdir} belongs to a run with another config:\n  "
                + "\n  ".join(differ)
                + "\nChoose another --workdir, or give the same config to continue that run."
            )

    def start(self, step: int) -> None:
        """Forgets what was logged from `step` on, which is about to be done (again)."""
        path = self.workdir / "metrics.jsonl"
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break  # a line cut short by a crash; the step it belongs to is done again
            if row["step"] < step:
                kept.append(line + "\n")
        write_atomically(path, "".join(kept))
        self._board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=step, flush_secs=10)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one step's metrics."""
        with (self.workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def samples(self, step: int, text: str) -> None:
        """Keeps a page of readable completions."""
        (self.workdir / "samples" / f"{step:06d}.txt").write_text(text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a result, all or nothing."""
        write_atomically(self.workdir / name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a result; None if it was not written yet."""
        path = self.workdir / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise WorkdirError(f"{path} is damaged ({error}); delete it and run again") from error

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._board is not None:
            self._board.close()
