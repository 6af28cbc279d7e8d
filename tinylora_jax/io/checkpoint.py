"""Checkpoints of the trained state after every step: tiny, atomic, exact.

Orbax writes each step into a temporary folder and renames it when complete, so a process killed at any
moment leaves the last complete step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from tinylora_jax.adapters.targets import path_string


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read, or does not belong to this run."""


def _named(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a state by path, on the host."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {path_string(path).replace("/", "."): np.asarray(leaf) for path, leaf in leaves}


class Checkpoints:
    """The checkpoints of one run: the trained state, and a JSON record of everything else that must resume.

    Of several processes one has them, and tells the others what it read.

    Args:
      directory: where they are kept; created if absent.
      keep: how many of the newest steps stay.
    """

    def __init__(self, directory: Path, keep: int = 2):
        self.directory = directory.absolute()
        alone = MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            create=False,
            multiprocessing_options=alone,
        )
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {self.directory}: {error}") from error

    def latest_step(self) -> int | None:
        """The newest complete step; None before the first."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Writes one step; returns when it is complete on disk.

        Raises:
          CheckpointError: the disk is full or the folder cannot be written; earlier steps are intact.
        """
        items = ocp.args.Composite(state=ocp.args.StandardSave(_named(state)), record=ocp.args.JsonSave(record))
        try:
            self._manager.save(step, args=items)
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.directory}: {error}."
                " Free space or fix permissions and run the same command again; earlier steps are intact."
            ) from error

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the newest step.

        Args:
          like: a state of the expected structure, shapes and dtypes.

        Returns:
          The state, and its record.

        Raises:
          CheckpointError: the checkpoint is damaged, or holds another structure (the leaves are named).
        """
        step = self.latest_step()
        folder = self.directory / str(step)
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            restored = self._manager.restore(step, args=items)
            found, record = restored["state"], restored["record"]
        except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"the checkpoint {folder} is damaged ({type(error).__name__}: {str(error)[:300]})."
                " Delete that folder to continue from the step before it."
            ) from error
        expected = _named(like)
        wrong = [
            f"{name}: expected {_describe(expected.get(name))}, found {_describe(found.get(name))}"
            for name in sorted(expected.keys() | found.keys())
            if _describe(expected.get(name)) != _describe(found.get(name))
        ]
        if wrong:
            raise CheckpointError(f"the checkpoint {folder} belongs to another run:\n  " + "\n  ".join(wrong))
        leaves = [np.asarray(found[name]) for name in expected]
        return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), leaves), record

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._manager.close()


def _describe(array: Any) -> str:
    return "nothing" if array is None else f"{np.asarray(array).dtype}{list(np.shape(array))}"
