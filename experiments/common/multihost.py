"""One run on several hosts: every process runs the same program, the first one alone reads and writes the workdir.

    --multihost                                  on every host of a TPU pod, which says who is who
    --multihost --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0        anywhere else

All devices form one mesh. What a process learns alone, the others learn from it: `on_first` for what the first one
read or wrote, `collect` for what each computed of its share.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

T = TypeVar("T")
_HEARTBEAT_S = 60  # a host that was silent for so long is lost
_GOODBYE_S = 15  # and for so long the others are waited for at the end


class HostError(RuntimeError):
    """Another process of the run failed."""


def define_flags() -> None:
    """Defines the flags of a run on several hosts."""
    flags.DEFINE_bool("multihost", False, "This process is one of several; the same command runs on every host.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no TPU pod or cluster says so.")
    flags.DEFINE_integer("num_processes", None, "Of the run, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Of this process, with --coordinator.", lower_bound=0)


def connect(values: flags.FlagValues) -> None:
    """Joins the other processes, if the flags say that there are any. Before anything is computed.

    Args:
      values: those of `define_flags`.

    Raises:
      ValueError: the flags contradict each other.
      HostError: the others cannot be found.
    """
    where = {name: getattr(values, name) for name in ("num_processes", "process_id")}
    given = [f"--{name}" for name in ("coordinator", *where) if getattr(values, name) is not None]
    if not values.multihost:
        if given:
            raise ValueError(f"{', '.join(given)} without --multihost; add it, or leave them out")
        return
    if given and len(given) < 3:
        raise ValueError(f"only {', '.join(given)}: expected all of --coordinator, --num_processes and --process_id")
    if given and not where["process_id"] < where["num_processes"]:
        raise ValueError(f"--process_id={values.process_id}: expected 0 to --num_processes - 1")
    host, _, port = (values.coordinator or "").rpartition(":")
    if given and not (host and port.isdigit()):
        raise ValueError(f"--coordinator={values.coordinator}: expected HOST:PORT")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM away from `StopRequests`
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            values.coordinator,
            **where,
            initialization_timeout=300,
            heartbeat_timeout_seconds=_HEARTBEAT_S,
            shutdown_timeout_seconds=_GOODBYE_S,
        )
    except (RuntimeError, ValueError) as error:
        if not given:
            raise HostError(
                f"--multihost: no TPU pod or cluster says who the others are ({error}). Give --coordinator,"
                " --num_processes and --process_id, or leave --multihost out"
            ) from error
        raise HostError(f"cannot join the other processes at {values.coordinator}: {error}") from error


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


def leave(code: int) -> NoReturn:
    """Ends this process; with others about, without waiting for them: they may be waiting for it."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
