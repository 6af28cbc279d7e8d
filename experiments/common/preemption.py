"""Stops a run between two phases of a step, or immediately before the first step."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from experiments.common.progress import clear, tell
from tinylora_jax.multihost import collect, several


class Stopped(Exception):
    """SIGTERM or Ctrl-C requested a stop; all results are on disk."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 0 if number == signal.SIGTERM else 130


class StopRequests:
    """Records the first SIGTERM or Ctrl-C; a second one kills the process as usual.

    Before the first `check` there is nothing to finish, so the process exits immediately instead of waiting for loading
    and compilation. In a multi-process run it does not, because all processes must stop at the same point.
    """

    def __init__(self):
        self._received: int | None = None
        self._loading = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._loading and not several():
            stopped = Stopped(number)
            clear()
            print(f"stopped by {stopped} before the first step; the same command starts it again", flush=True)
            sys.stderr.flush()
            os._exit(stopped.exit_code)  # does not wait for threads that read and compile
        self._received = number
        tell("finishing this phase, then stopping; again to stop now (saved steps are kept)")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises `Stopped` if any process of the run got a signal, so that all stop at the same point."""
        self._loading = False
        received = [number for number in collect([self._received]) if number is not None]
        if received:
            raise Stopped(received[0])
