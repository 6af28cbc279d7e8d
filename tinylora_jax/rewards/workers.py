"""Worker processes that compare answers by algebra, with time and memory limits per request.

A worker is the program `math_worker.py`. It survives when a request is killed; a worker that dies or stops responding
is replaced.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).with_name("math_worker.py")
_START_S = 120.0  # SymPy loads in one or two seconds; a busy machine may need many
_GRACE_S = 10.0  # time beyond the worker's own wall-clock limit
_WALL_FACTOR = 4  # equal to WALL_FACTOR of the program
_ATTEMPTS = 3  # number of attempts to start a worker


class WorkerError(RuntimeError):
    """Workers cannot be started."""


class _Worker:
    """One process and its current request."""

    def __init__(self, arguments: Sequence[str]):
        # -P: do not import from the program's folder, which contains other modules.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches only the run, which closes its workers
        )
        self.ready = False
        self.asked: int | None = None
        self.deadline = time.monotonic() + _START_S
        self.received = b""

    def ask(self, index: int, request: Mapping[str, Any], timeout_s: float) -> None:
        assert self.process.stdin is not None
        self.asked, self.deadline = index, time.monotonic() + timeout_s
        try:
            self.process.stdin.write(json.dumps({"id": index, **request}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it died while idle: the next read finds the end of its output
            pass

    def read(self) -> list[dict[str, Any]] | None:
        """The complete lines received so far; None once the process has ended."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        *lines, self.received = (self.received + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # with any child still at work
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:  # part of a request was never read
                pass
        self.process.wait()


class Workers:
    """A pool of workers, started with the first request.

    Args:
      limit_s: limit of processor time per request, in seconds.
      memory_bytes: memory limit per request, in bytes.
      count: number of workers; 0 for one per core that this process may use, at most 8.
    """

    def __init__(self, limit_s: float = 3.0, memory_bytes: int = 1 << 30, count: int = 0):
        if not (0 < limit_s <= 3600 and memory_bytes >= 1 << 28 and count >= 0):
            got = f"limit_s={limit_s}, memory_bytes={memory_bytes}, count={count}"
            raise ValueError(f"workers need 0 < limit_s <= 3600, at least 256 MiB of memory and count >= 0, got {got}")
        self.limit_s, self.memory_bytes = limit_s, memory_bytes
        self.count = count or min(
            8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        )
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        atexit.register(self.close)

    def run(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Answers requests, see `math_worker.py`.

        Returns:
          The replies in order: each has `equal`, or `failed` with the reason `time`, `memory` or `worker`.

        Raises:
          WorkerError: no worker can be started.
        """
        replies: list[dict[str, Any] | None] = [None] * len(requests)
        waiting = list(range(len(requests)))[::-1]
        try:
            while None in replies:
                while len(self._workers) < min(self.count, len(requests)):
                    self._workers.append(_Worker([str(self.limit_s), str(self.memory_bytes)]))
                for worker in self._workers:
                    if worker.ready and worker.asked is None and waiting:
                        index = waiting.pop()
                        worker.ask(index, requests[index], _WALL_FACTOR * self.limit_s + _GRACE_S)
                self._listen(replies)
        except BaseException:  # after Ctrl-C, a late answer must not be taken for that of another request
            self.close()
            raise
        return [reply for reply in replies if reply is not None]

    def close(self) -> None:
        """Stops the workers; `run` starts new ones."""
        while self._workers:
            self._workers.pop().close()

    def _listen(self, replies: list[dict[str, Any] | None]) -> None:
        """Waits until a worker replies or times out."""
        busy = [worker for worker in self._workers if not worker.ready or worker.asked is not None]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                assert worker.process.stdout is not None
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
            timeout_s = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
            heard = {id(key.data) for key, _ in selector.select(timeout_s)}
        for worker in busy:
            if id(worker) in heard:
                messages = worker.read()
                if messages is None:
                    self._lose(worker, replies)
                for message in messages or ():
                    self._receive(worker, message, replies)
            elif time.monotonic() >= worker.deadline:
                self._lose(worker, replies)

    def _receive(self, worker: _Worker, message: dict[str, Any], replies: list[dict[str, Any] | None]) -> None:
        if "error" in message:
            raise WorkerError(message["error"])
        if "ready" in message:
            worker.ready, self._failed_starts = True, 0
        elif message["id"] == worker.asked:
            replies[worker.asked], worker.asked = message, None

    def _lose(self, worker: _Worker, replies: list[dict[str, Any] | None]) -> None:
        """Discards a worker that ended or stopped responding, and fails its request."""
        self._workers.remove(worker)
        worker.close()
        if worker.asked is not None:
            replies[worker.asked] = {"id": worker.asked, "failed": "worker"}
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= _ATTEMPTS:
                raise WorkerError(
                    f"{sys.executable} {_PROGRAM} exited or gave no output within {_START_S:.0f} s; run it to see why"
                )
