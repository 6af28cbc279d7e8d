"""Checkpoints of the training state after every step: small, atomic and exact.

Orbax writes each step to a temporary folder and renames it when complete, so a process killed at any moment leaves the
last complete step. A step is written while the next one runs, and is on disk before the one after that begins: a killed
run repeats at most two steps, also after a power failure. Small arrays are joined first: Orbax takes 0.8 s to write the
1,176 arrays of LoRA on a 1.5B model one by one, and 0.15 s for one array of the same size.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.options import MultiprocessingOptions

from tinylora_jax.adapters.targets import path_string
from tinylora_jax.files import check_tree, sync_tree

_RECORD, _SHA256, _LAYOUT = "record", "sha256", "layout"  # fields of the JSON next to the state
_SMALL = 2**20  # arrays of fewer bytes are joined; joining large ones would double the host memory
_OLDER = "data"  # older checkpoints contain only the record, which has this field


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read, or does not belong to this run."""


def _named(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a state by path, copied to the host."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {path_string(path).replace("/", "."): np.asarray(leaf) for path, leaf in leaves}


def _join(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Joins the small arrays of a state into one array per dtype; `_split` inverts it.

    Returns:
      The large arrays by name and the joined ones by dtype, and for each dtype the names and shapes of its arrays.
    """
    arrays: dict[str, np.ndarray] = {}
    layout: dict[str, Any] = {}
    for name, array in state.items():
        if array.nbytes >= _SMALL:
            arrays[name] = array
        else:
            layout.setdefault(str(array.dtype), []).append([name, list(array.shape)])
    for dtype, parts in layout.items():
        arrays[f"{_LAYOUT}.{dtype}"] = np.concatenate([state[name].ravel() for name, _ in parts])
    return arrays, layout


def _split(arrays: Mapping[str, np.ndarray], layout: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Splits the joined arrays again.

    Raises:
      KeyError, TypeError or ValueError: the layout is not that of the arrays.
    """
    state = dict(arrays)
    for dtype, parts in layout.items():
        joined = state.pop(f"{_LAYOUT}.{dtype}")
        ends = np.cumsum([math.prod(shape) for _, shape in parts])
        if joined.shape != (ends[-1],):
            raise ValueError(f"expected {ends[-1]} joined numbers, found {list(joined.shape)}")
        for (name, shape), part in zip(parts, np.split(joined, ends[:-1]), strict=True):
            state[name] = part.reshape(shape)
    return state


def _digest(state: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    """SHA-256 of all restored data: names, dtypes, shapes and bytes of the state, and the record."""
    found = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name, array in sorted(state.items()):
        found.update(f"\n{name} {_describe(array)} ".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses terminal output of Orbax's threads and event loops about errors that are also raised here."""
    hook, threading.excepthook = threading.excepthook, lambda _: None
    loop = logging.getLogger("asyncio")
    before, loop.disabled = loop.disabled, True
    try:
        yield
    finally:
        threading.excepthook, loop.disabled = hook, before


class Checkpoints:
    """The checkpoints of one run: the training state, and a JSON record of all other resumable data.

    Every method first waits for the checkpoint that is still being written, and raises its error. In a multi-process
    run, the first process reads and writes them, and shares what it read.

    Args:
      directory: folder of the checkpoints, created if absent.
      keep: number of newest steps to keep.
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
            check_tree(self.directory)
            with _quiet():
                self._manager = ocp.CheckpointManager(self.directory, options=options)
        except OSError as error:
            raise CheckpointError(f"cannot store checkpoints in {self.directory}: {error}") from error
        except Exception as error:  # Orbax inspects each step, and passes on any error of its parsers
            raise CheckpointError(
                f"a checkpoint in {self.directory} is damaged ({_said(error)}). Delete the newest folder there to"
                " continue from the step before it."
            ) from error
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def latest_step(self) -> int | None:
        """The newest complete step; None if there is none."""
        self.wait()
        return self._manager.latest_step()

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Begins to write one step, once the previous one is complete on disk.

        Args:
          step: number of finished steps.
          state: pytree of arrays; its values on the host are taken before this returns.
          record: JSON object; it may be changed afterwards.

        Raises:
          CheckpointError: the previous step could not be written; see `wait`.
        """
        self.wait()
        self._pending = self._writer.submit(self._write, step, _named(state), json.loads(json.dumps(record)))

    def wait(self) -> None:
        """Returns when the last step is complete on disk.

        Raises:
          CheckpointError: the disk is full or the folder cannot be written; earlier steps are intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, named: Mapping[str, np.ndarray], record: dict[str, Any]) -> None:
        arrays, layout = _join(named)
        signed = {_RECORD: record, _SHA256: _digest(named, record), _LAYOUT: layout}
        items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(signed))
        try:
            with _quiet():
                self._manager.save(step, args=items)
                self._manager.wait_until_finished()
            sync_tree(self.directory / str(step))
        except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} to {self.directory}: {error}."
                " Free space or fix permissions and run the same command again; earlier steps are intact."
            ) from error

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the newest step.

        Args:
          like: state with the expected structure, shapes and dtypes.

        Returns:
          The state and its record.

        Raises:
          CheckpointError: the checkpoint is damaged, or has another structure (the message names the leaves).
        """
        step = self.latest_step()
        folder = self.directory / str(step)
        try:
            items = ocp.args.Composite(state=ocp.args.StandardRestore(), record=ocp.args.JsonRestore())
            with _quiet():
                restored = self._manager.restore(step, args=items)
            found, record = _verified(restored["state"], restored["record"])
        except Exception as error:  # Orbax and its parsers may raise anything
            raise CheckpointError(
                f"the checkpoint {folder} is damaged ({_said(error)})."
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
        """Completes the last step and releases the threads; repeated calls have no effect.

        Raises:
          CheckpointError: the disk is full or the folder cannot be written; earlier steps are intact.
        """
        self._writer.shutdown()
        self._manager.close()
        self.wait()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _verified(state: Any, stored: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Checks and returns the state and the record.

    Older checkpoints have no layout, and the oldest no checksum.

    Raises:
      KeyError, TypeError or ValueError: the checksum does not match.
    """
    if not isinstance(state, dict) or not isinstance(stored, dict):
        raise TypeError(f"expected two objects, found {type(state).__name__} and {type(stored).__name__}")
    arrays = {name: np.asarray(leaf) for name, leaf in state.items()}
    if _RECORD not in stored and _SHA256 not in stored and _OLDER in stored:
        return arrays, stored
    record = stored[_RECORD]
    arrays = _split(arrays, stored.get(_LAYOUT, {}))
    if stored.keys() - {_LAYOUT} != {_RECORD, _SHA256} or stored[_SHA256] != _digest(arrays, record):
        raise ValueError("its checksum does not match")
    return arrays, record


def _describe(array: Any) -> str:
    return "nothing" if array is None else f"{np.asarray(array).dtype}{list(np.shape(array))}"
