"""Writes a run's metrics for TensorBoard; a separate module because its writer may import torch."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Board:
    """An event file, written synchronously.

    tensorboardX's SummaryWriter passes events to a thread, and waits forever once a full disk has killed that thread.

    Args:
      folder: output folder, created if absent.
      step: first step to write; events from this step on in earlier files of the folder are hidden.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        restart = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=step, session_log=restart))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one step's metrics."""
        for name, value in values.items():
            self._file.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
