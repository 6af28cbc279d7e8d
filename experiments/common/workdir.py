"""What a run keeps on disk. The first process owns it and shares what it reads with the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tinylora_jax.io import CheckpointError, Checkpoints, RunLog
from tinylora_jax.multihost import on_first, several
from tinylora_jax.training import TrainState

_VECTOR_NUMBERS = 64  # a longer v is logged by its norm alone


def logged_vector(v: Any) -> dict[str, Any]:
    """What the log of a step keeps of v: all of a short vector, nothing of anything longer."""
    short = isinstance(v, jax.Array) and v.size <= _VECTOR_NUMBERS
    return {"v": np.asarray(v).ravel().tolist()} if short else {}


class Workdir:
    """A run's log, results and checkpoints; every method is called by all processes together.

    Args:
      path: see `RunLog`.
      config: run configuration.
    """

    _log: RunLog
    _checkpoints: Checkpoints

    def __init__(self, path: Path, config: Mapping[str, Any]):
        self.path = path

        def open_log() -> None:
            self._log = RunLog(path, config, claim=False)

        on_first(open_log)

    def claim(self) -> None:
        """Makes the folder this config's own; before the first checkpoint is read or written."""

        def open_checkpoints() -> None:
            self._log.claim()
            self._checkpoints = Checkpoints(self.path / "checkpoints")

        on_first(open_checkpoints)

    def saved_steps(self) -> int:
        """How many steps the newest checkpoint is after; 0 without one."""

        def look() -> int:
            path = self.path / "checkpoints"
            if not path.is_dir():
                return 0
            with closing(Checkpoints(path)) as checkpoints:
                return checkpoints.latest_step() or 0

        return on_first(look)

    def read(self, name: str) -> dict[str, Any] | None:
        """A result; None if it was not written yet."""
        return on_first(lambda: self._log.read_json(name))

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a result, all or nothing."""
        on_first(lambda: self._log.write_json(name, value))

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes JSON lines, all or nothing."""
        on_first(lambda: self._log.write_rows(name, rows))

    def check(self) -> None:
        """Refuses to go on in a workdir that was deleted or exchanged."""
        on_first(lambda: self._log.check())

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint's state, as arrays of the host, and its record; None before the first.

        Raises:
          CheckpointError: it is damaged, or another run's.
        """

        def read() -> list[Any] | None:
            if self._checkpoints.latest_step() is None:
                return None
            state, record = self._checkpoints.restore(like)
            if not {"data", "totals"} <= record.keys():
                raise CheckpointError(
                    f"the checkpoint in {self._checkpoints.directory} has no data position; train anew"
                )
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            # What the others are told goes by JSON, which float32 survives.
            return [[leaf.tolist() for leaf in leaves] if several() else leaves, record]

        found = on_first(read)
        if found is None:
            return None
        leaves, structure = jax.tree.flatten(like)
        typed = [np.asarray(new, old.dtype) for new, old in zip(found[0], leaves, strict=True)]
        return jax.tree.unflatten(structure, typed), found[1]

    def start(self, step: int) -> None:
        """Forgets what was logged from `step` on, which is about to be done (again)."""
        on_first(lambda: self._log.start(step))

    def keep(
        self, step: int, state: TrainState, record: dict[str, Any] | None, metrics: Mapping[str, float], page: str
    ) -> None:
        """Keeps a finished step, last of all its checkpoint: `state` and all else that the next step needs.

        Without a `record` there is no checkpoint of it: a run that is interrupted does the step again.
        """

        def write() -> None:
            self._log.samples(step, page)
            self._log.metrics(step, {**metrics, **logged_vector(state.v)})
            if record is not None:
                self._checkpoints.save(step + 1, state, record)

        on_first(write)

    def close(self) -> None:
        """Closes the files of the steps; closing again does nothing."""
        if hasattr(self, "_log"):
            self._log.close()
        if hasattr(self, "_checkpoints"):
            self._checkpoints.close()
