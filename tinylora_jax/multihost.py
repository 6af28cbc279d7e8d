"""Communication between the processes of one run, and copies of distributed arrays on every host.

All devices form one mesh. `on_first` runs work in the first process, such as reading or writing files, and shares its
result. `collect` gathers what each process computed for its share. A single process exchanges nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


class HostError(RuntimeError):
    """Another process of the run failed."""


def is_first() -> bool:
    """Whether this is the first process, which writes all files."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def share(count: int) -> range:
    """This process's share of `count` items; shares differ in size by at most one."""
    processes, index = (jax.process_count(), jax.process_index()) if several() else (1, 0)
    return range(count * index // processes, count * (index + 1) // processes)


def collect(items: Sequence[Any]) -> list[Any]:
    """Gathers the items of all processes, in process order. Items must be JSON-serializable."""
    if not several():
        return list(items)
    data = np.frombuffer(json.dumps(list(items)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [item for row, size in zip(rows, sizes, strict=True) for item in json.loads(row[:size].tobytes())]


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` in the first process; all processes get its JSON-serializable result or its error.

    Raises:
      HostError: `work` failed; raised in all processes but the first, which raises the original error.
    """
    if not several():
        return work()
    error, outcome = None, []
    if is_first():
        try:
            outcome = [{"value": work()}]
        except Exception as raised:  # raised again below, after the others are informed
            error, outcome = raised, [{"error": f"{type(raised).__name__}: {raised}"}]
    outcome = collect(outcome)[0]
    if error is not None:
        raise error
    if "error" in outcome:
        raise HostError(f"process 0 failed: {outcome['error']}")
    return outcome["value"]


def to_host(tree: Any) -> Any:
    """Copies a tree's arrays to NumPy in every process, including arrays on devices of other processes."""
    elsewhere = lambda x: isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    gather = lambda x: multihost_utils.process_allgather(x, tiled=True) if elsewhere(x) else x
    return jax.device_get(jax.tree.map(gather, tree))
