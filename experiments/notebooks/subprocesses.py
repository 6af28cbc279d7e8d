"""Runs a command as a monitored subprocess, and explains its failures."""

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

ROOT = Path(__file__).parents[2]  # the paths of configs are relative to it
_KEPT = 30  # number of last output lines kept to explain a failure


class CommandError(RuntimeError):
    """A command failed; a notebook shows the message without a traceback."""

    def _render_traceback_(self) -> list[str]:  # called by IPython
        return [f"error: {self}"]


class Command:
    """A running `python -m experiments.<name>`, which ends with its `with` block.

    Inside the block an interrupt (Ctrl-C or a notebook's button) requests a stop, and a second one stops it
    immediately. It is not in the process group of the terminal or the kernel, so it gets each interrupt only once.

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
        if threading.current_thread() is threading.main_thread():  # the only thread that gets signals
            self._handler = signal.signal(signal.SIGINT, lambda *_: self.stop())
        return self

    def __exit__(self, *_: object) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        if self._process.poll() is None:  # an error occurred while watching it
            self._process.terminate()
            self._process.wait()

    def lines(self, wait_s: float | None = None) -> Iterator[str | None]:
        """Yields its output lines until it ends.

        Args:
          wait_s: time in seconds without output after which None is yielded; None waits without limit.
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
            if line.strip():
                self.last = [*self.last[1 - _KEPT :], line]
            yield line

    def _read(self, found: queue.Queue[str | None]) -> None:
        with self._process.stdout as written:
            for raw in written:
                line = raw.decode("utf-8", "replace").rstrip("\n").split("\r")[-1]  # for a progress bar, its last state
                found.put(line)
        found.put(None)

    def stop(self) -> None:
        """Requests a stop: `experiments.grpo` saves and stops after its phase, or immediately if asked again."""
        self.stopped = True
        self._process.send_signal(signal.SIGTERM)

    def check(self) -> None:
        """Raises `CommandError` if it failed; a requested stop is not a failure."""
        if self._process.returncode and not (self.stopped and self._process.returncode == -signal.SIGTERM):
            raise CommandError(why(self._process.returncode, self.last))


def why(code: int, lines: Sequence[str]) -> str:
    """Explains the failure of a process.

    Args:
      code: exit code; negative for a signal.
      lines: last lines of its output.
    """
    text = "\n".join(lines)
    if code == -signal.SIGKILL:
        return (
            "the machine killed the process, usually because it ran out of memory. Choose a runtime with more memory or"
            " a smaller model; saved steps are not lost, and the same cell continues the run"
        )
    if "RESOURCE_EXHAUSTED" in text:
        return (
            "the accelerator's memory is full. Lower --config.slots or --config.grpo.stream_tokens, in a new workdir;"
            " `python -m experiments.compile` estimates in advance what fits"
        )
    if "already in use" in text or "Unable to initialize backend" in text:
        return (
            "JAX cannot open the accelerator: another process holds it, or the installed JAX does not support this"
            f" runtime's accelerator. Restart the session and run all cells from the top ({lines[-1]})"
        )
    first = max((place for place, line in enumerate(lines) if line.startswith("error: ")), default=None)
    if first is not None:
        return "\n".join(lines[first:]).removeprefix("error: ")
    return lines[-1] if lines else f"the process exited with code {code} and no output"
