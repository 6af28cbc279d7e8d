"""A command as a process of its own, watched while it runs; what it fails of is said in words."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # where the configs' paths begin
_KEPT = 30  # lines, to say why it failed


class CommandError(RuntimeError):
    """A command failed; a notebook shows the message without a traceback."""

    def _render_traceback_(self) -> list[str]:  # IPython asks for it
        return [f"error: {self}"]


class Command:
    """`python -m experiments.<name>`, started; in a `with`, which it does not outlive.

    There an interrupt (Ctrl-C, a notebook's button) asks it to stop, and a second one stops it at once: it is not in
    the group of the terminal or the kernel, which would tell it twice.

    Args:
      name: name of the module.
      flags: flags of the command.
    """

    def __init__(self, name: str, flags: Sequence[str]):
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"experiments.{name}", *flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        self.last: list[str] = []
        self.stopped = False
        self._handler: Any = None

    def __enter__(self) -> Command:
        if threading.current_thread() is threading.main_thread():  # the only one that signals interrupt
            self._handler = signal.signal(signal.SIGINT, lambda *_: self.stop())
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._process.poll() is None:  # whoever watched it failed
            self._process.terminate()
            self._process.wait()

    def lines(self, wait_s: float | None = None) -> Iterator[str | None]:
        """The lines that it writes, until it ends.

        Args:
          wait_s: None stands for a line whenever so many seconds have passed without one.
        """
        found: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(found,), daemon=True).start()
        while True:
            try:
                line = found.get(timeout=wait_s)
            except queue.Empty:
                yield None
                continue
            if line is None:
                self._process.wait()
                return
            self.last = [*self.last[1 - _KEPT :], line]
            yield line

    def _read(self, found: queue.Queue[str | None]) -> None:
        with self._process.stdout as written:
            for raw in written:
                line = raw.decode("utf-8", "replace").rstrip("\n").split("\r")[-1]  # of a progress bar its last state
                if line.strip():
                    found.put(line)
        found.put(None)

    def stop(self) -> None:
        """Asks it to end: `experiments.grpo` saves, and ends when its phase is done; asked again, at once."""
        self.stopped = True
        self._process.send_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raises `CommandError` if it failed; to have been stopped is no failure."""
        if self._process.returncode and not (self.stopped and self._process.returncode == -signal.SIGTERM):
            raise CommandError(why(self._process.returncode, self.last))


def why(code: int, lines: Sequence[str]) -> str:
    """A failed process in words.

    Args:
      code: that it ended with; negative is a signal.
      lines: the last that it wrote.
    """
    text = "\n".join(lines)
    if code == -signal.SIGKILL:
        return (
            "the machine ended the process, most often for want of memory. Choose a runtime with more of it, or a"
            " smaller model; what was saved is not lost, and the same cell continues it"
        )
    if "RESOURCE_EXHAUSTED" in text:
        return (
            "the accelerator's memory is full. Lower --config.slots or --config.grpo.stream_tokens, in a new workdir;"
            " `python -m experiments.compile` says beforehand what fits"
        )
    if "already in use" in text or "Unable to initialize backend" in text:
        return (
            "JAX cannot open the accelerator: another process holds it, or this runtime has another one than the"
            f" installed JAX is for. Restart the session and run the cells from the top ({lines[-1]})"
        )
    first = max((place for place, line in enumerate(lines) if line.startswith("error: ")), default=None)
    if first is not None:
        return "\n".join(lines[first:]).removeprefix("error: ")
    return lines[-1] if lines else f"the process ended with code {code} and no word"
