"""Runs on several hosts: all run the same program, and the first one owns the workdir.

--multihost                                  on every host of a TPU pod, where ranks are detected
--multihost --coordinator=10.0.0.1:8476 --num_processes=2 --process_id=0        outside a TPU pod
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import jax
from absl import flags

from tinylora_jax.multihost import HostError, several

_HEARTBEAT_S = 60  # time without a heartbeat after which a host counts as lost
_GOODBYE_S = 15  # time to wait for the other hosts at the end


def connect(values: flags.FlagValues) -> None:
    """Connects to the other processes, if the flags request it; call it before any computation.

    Args:
      values: values of the flags from `opening.define_multihost`.

    Raises:
      ValueError: the flags are inconsistent.
      HostError: the other processes cannot be found.
    """
    where = {name: getattr(values, name) for name in ("num_processes", "process_id")}
    given = [f"--{name}" for name in ("coordinator", *where) if getattr(values, name) is not None]
    if not values.multihost:
        if given:
            raise ValueError(f"{', '.join(given)} without --multihost; add --multihost, or omit these flags")
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
                f"--multihost: no TPU pod or cluster was detected ({error}). Set --coordinator,"
                " --num_processes and --process_id, or omit --multihost"
            ) from error
        raise HostError(f"cannot join the other processes at {values.coordinator}: {error}") from error


def leave(code: int) -> NoReturn:
    """Exits this process, without waiting for any others, because they may be waiting for it."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
