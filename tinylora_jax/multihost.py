"""What the processes of one run tell each other, and arrays of devices as arrays of every host.

All devices form one mesh. What a process learns alone, the others learn from it: `on_first` for what the first one
read or wrote, `collect` for what each computed of its share. With a single process nothing is exchanged.
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
    """Whether this process is the one that writes."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def share(count: int) -> range:
    """Which of `count` things are this process's: as many as the others', within one."""
    processes, index = (jax.process_count(), jax.process_index()) if several() else (1, 0)
    return range(count * index // processes, count * (index + 1) // processes)


def collect(items: Sequence[Any]) -> list[Any]:
    """All processes' items, in the order of the processes. What they are, JSON can hold."""
    if not several():
        return list(items)
    data = np.frombuffer(json.dumps(list(items)).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size)).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [item for row, size in zip(rows, sizes, strict=True) for item in json.loads(row[:size].tobytes())]


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` in the first process; every one gets its result, which JSON can hold, or its error.

    Raises:
      HostError: elsewhere than in the first process, whatever it raised there.
    """
    if not several():
        return work()
    error, outcome = None, []
    if is_first():
        try:
            outcome = [{"value": work()}]
        except Exception as raised:  # raised again below, when the others know of it
            error, outcome = raised, [{"error": f"{type(raised).__name__}: {raised}"}]
    outcome = collect(outcome)[0]
    if error is not None:
        raise error
    if "error" in outcome:
        raise HostError(f"process 0 failed: {outcome['error']}")
    return outcome["value"]


def to_host(tree: Any) -> Any:
    """NumPy copies of a tree's arrays, in every process alike, also of those that lie on other processes' devices."""
    elsewhere = lambda x: isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    gather = lambda x: multihost_utils.process_allgather(x, tiled=True) if elsewhere(x) else x
    return jax.device_get(jax.tree.map(gather, tree))
