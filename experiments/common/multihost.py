"""One run on several hosts: all run the same program, and the first one owns the workdir.

--multihost                                  on every host of a TPU pod, which says who is who
--multihost --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0        anywhere else
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import jax
from absl import flags

from tinylora_jax.multihost import HostError, several

_HEARTBEAT_S = 60  # a host that was silent for so long is lost
_GOODBYE_S = 15  # and for so long the others are waited for at the end


def define_flags() -> None:
    """Defines the flags of a run on several hosts."""
    flags.DEFINE_bool("multihost", False, "This process is one of several; the same command runs on every host.")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no TPU pod or cluster says so.")
    flags.DEFINE_integer("num_processes", None, "Of the run, with --coordinator.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Of this process, with --coordinator.", lower_bound=0)
    flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait at the start for the other processes.", lower_bound=1)


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
            initialization_timeout=values.connect_timeout,
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


def leave(code: int) -> NoReturn:
    """Ends this process; with others about, without waiting for them: they may be waiting for it."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
