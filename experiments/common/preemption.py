"""Stops a run between two phases of a step instead of inside one; before the first, at once."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from experiments.common.cli import tell
from tinylora_jax.multihost import collect, several


class Stopped(Exception):
    """SIGTERM or Ctrl-C asked the run to stop; everything worth keeping is on disk."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 0 if number == signal.SIGTERM else 130


class StopRequests:
    """Remembers the first SIGTERM or Ctrl-C; a second one kills as usual.

    Until the first `check` there is nothing to finish: the model is loaded and compiled, which would take seconds more,
    and the process ends at once. Of several processes none does, since all must end at the same place.
    """

    def __init__(self):
        self._received: int | None = None
        self._loading = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._loading and not several():
            stopped = Stopped(number)
            print(f"stopped by {stopped} before the first step; the same command begins it again", flush=True)
            sys.stderr.flush()
            os._exit(stopped.exit_code)  # threads that read and compile are not waited for
        self._received = number
        tell("stopping when this phase of the step is done; again to kill (nothing saved is lost)")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises `Stopped` if a signal came, to this process or to any other of the run: all stop at the same place."""
        self._loading = False
        received = [number for number in collect([self._received]) if number is not None]
        if received:
            raise Stopped(received[0])
