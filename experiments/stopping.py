"""Stopping a run between two phases of a step instead of in the middle of one."""

from __future__ import annotations

import signal
from types import FrameType

from experiments.cli import tell
from experiments.hosts import collect


class Stopped(Exception):
    """SIGTERM or Ctrl-C asked the run to stop; everything worth keeping is on disk."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.exit_code = 0 if number == signal.SIGTERM else 130


class StopRequests:
    """Remembers the first SIGTERM or Ctrl-C; a second one kills as usual."""

    def __init__(self):
        self._received: int | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        tell("stopping when this phase of the step is done; again to kill (nothing saved is lost)")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raises `Stopped` if a signal came, to this process or to any other of the run: all stop at the same place."""
        received = [number for number in collect([self._received]) if number is not None]
        if received:
            raise Stopped(received[0])
