"""The files of a run. The first process owns them, and shares what it reads with the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinylora_jax.io import TENSORBOARD, CheckpointError, Checkpoints, RunLog
from tinylora_jax.multihost import on_first, several
from tinylora_jax.training import TrainState

_VECTOR_NUMBERS = 64  # for a longer v only the norm is logged


def logged_vector(v: Any) -> dict[str, Any]:
    """The fields of v in the log of a step: a short vector in full, nothing for a longer one."""
    short = isinstance(v, jax.Array) and v.size <= _VECTOR_NUMBERS
    return {"v": np.asarray(v).ravel().tolist()} if short else {}


def discard(workdir: Path) -> None:
    """Removes a folder that was created for a run of which nothing was computed."""

    def remove() -> None:
        (workdir / "lock").unlink()
        workdir.rmdir()

    on_first(remove)


class Workdir:
    """A run's log, results and checkpoints; all processes must call every method together.

    Args:
      path: folder of the run, see `RunLog`.
      config: run configuration.
      loggers: names of the loggers besides metrics.jsonl, see `parse_loggers`.
    """

    _log: RunLog
    _checkpoints: Checkpoints

    def __init__(self, path: Path, config: Mapping[str, Any], loggers: Sequence[str] = (TENSORBOARD,)):
        self.path = path

        def open_log() -> None:
            self._log = RunLog(path, config, claim=False, loggers=loggers)

        on_first(open_log)

    def claim(self) -> None:
        """Reserves the folder for this config; call it before reading or writing checkpoints."""

        def open_checkpoints() -> None:
            self._log.claim()
            self._checkpoints = Checkpoints(self.path / "checkpoints")

        on_first(open_checkpoints)

    def saved_steps(self) -> int:
        """Number of finished steps in the newest checkpoint; 0 without one."""

        def look() -> int:
            path = self.path / "checkpoints"
            if not path.is_dir():
                return 0
            with closing(Checkpoints(path)) as checkpoints:
                return checkpoints.latest_step() or 0

        return on_first(look)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Reads a result; None if it does not exist yet."""
        return on_first(lambda: self._log.read_json(name))

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a result atomically."""
        on_first(lambda: self._log.write_json(name, value))

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes JSON lines atomically."""
        on_first(lambda: self._log.write_rows(name, rows))

    def check(self) -> None:
        """Raises an error if the workdir was deleted or replaced."""
        on_first(lambda: self._log.check())

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Reads the newest checkpoint: its state as host arrays, and its record; None without a checkpoint.

        Raises:
          CheckpointError: the checkpoint is damaged, or belongs to another run.
        """

        def read() -> list[Any] | None:
            if self._checkpoints.latest_step() is None:
                return None
            state, record = self._checkpoints.restore(like)
            if not {"data", "totals"} <= record.keys():
                raise CheckpointError(
                    f"the checkpoint in {self._checkpoints.directory} has no data position; start a new run"
                )
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            # The other processes get it as JSON, which preserves float32.
            return [[leaf.tolist() for leaf in leaves] if several() else leaves, record]

        found = on_first(read)
        if found is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        typed = [np.asarray(new, old.dtype) for new, old in zip(found[0], leaves, strict=True)]
        return jax.tree.unflatten(structure, typed), found[1]

    def start(self, step: int) -> None:
        """Discards log entries from `step` on, because these steps are about to run (again)."""
        on_first(lambda: self._log.start(step))

    def keep(
        self, step: int, state: TrainState, record: dict[str, Any] | None, metrics: Mapping[str, float], page: str
    ) -> None:
        """Saves a finished step, and last of all its checkpoint: `state` and everything else the next step needs.

        The checkpoint is written while the next step runs; an error of writing it is raised by the next call.
        Without a `record` no checkpoint is written, so an interrupted run repeats the step.
        """

        def write() -> None:
            self._log.samples(step, page)
            self._log.metrics(step, {**metrics, **logged_vector(state.v)})
            if record is not None:
                self._checkpoints.save(step + 1, state, record)

        on_first(write)

    def flush(self) -> None:
        """Returns when the last checkpoint is complete on disk.

        Raises:
          CheckpointError: it cannot be written.
        """
        on_first(lambda: self._checkpoints.wait())

    def close(self) -> None:
        """Closes the files; repeated calls have no effect."""
        try:
            if hasattr(self, "_log"):
                self._log.close()
        finally:  # also on a full disk: a thread may still be writing the last checkpoint
            if hasattr(self, "_checkpoints"):
                self._checkpoints.close()
