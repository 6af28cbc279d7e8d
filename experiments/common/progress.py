"""Says how far a command is: one line that is redrawn on a terminal, plain lines in a log.

    with phase("compiling") as work:
        work.count(2, 5)
    tell("a message, which does not break the line")

Everything goes to standard error, so that standard output holds only results. Only the first process of a run prints.
"""

from __future__ import annotations

import logging
import os
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from types import TracebackType

from experiments.common.wording import WIDTH, duration, sparkline

_REDRAW_S = 0.5  # seconds between two states of a running phase
_LOG_S = 10.0  # seconds between two lines of a log
_BARS = 16  # columns of the rewards' curve
_RECENT = 10  # number of steps from which the remaining time is estimated
_LOCK = threading.RLock()
_shown = ""  # the text of the line that can be redrawn
_names: dict[str, str] = {}  # local folders that messages call by a URL


def name_folder(folder: object, name: str) -> None:
    """Lets messages call a local folder by another name, such as the URL whose copy it is."""
    _names[str(folder)] = name


def with_names(text: object) -> str:
    """A text in which local folders have the names given by `name_folder`."""
    shown = str(text)
    for folder, name in _names.items():
        shown = shown.replace(folder, name)
    return shown


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr.isatty()


def columns() -> int:
    """Width of a line: that of the terminal, at most 80."""
    try:
        return min(WIDTH, os.get_terminal_size(sys.stderr.fileno()).columns or WIDTH)
    except (OSError, ValueError):
        return WIDTH


def _speaks() -> bool:
    """Whether this process prints; only the first process of a run does."""
    module = sys.modules.get("tinylora_jax.multihost")  # slow to import, and not needed before a run is connected
    return module is None or module.is_first()


def _write(text: str) -> None:
    """Writes text, with `?` for characters that the terminal cannot show."""
    encoding = sys.stderr.encoding or "utf-8"
    sys.stderr.write(text.encode(encoding, "replace").decode(encoding))
    sys.stderr.flush()


def clear() -> None:
    """Removes the line that can be redrawn."""
    global _shown
    with _LOCK:
        if _shown:
            _write("\r" + " " * len(_shown) + "\r")
            _shown = ""


def show(text: str) -> None:
    """Draws the line, in place of its last state; does nothing in a log."""
    global _shown
    if not (is_terminal() and _speaks()):
        return
    text = text[: columns() - 1]  # in the last column a terminal would begin a new line
    with _LOCK:
        if text == _shown:
            return
        _write("\r" + text.ljust(len(_shown)))
        _shown = text


def tell(message: str) -> None:
    """Prints a message in the first process; the line that can be redrawn moves below it."""
    if not _speaks():
        return
    with _LOCK:
        again = _shown
        clear()
        _write(with_names(message) + "\n")
        if again:
            show(again)


class Phase:
    """A part of a command that takes seconds, with its elapsed time and how much of it is done.

    Args:
      name: name of the part, such as `compiling`.
      leaves_line: whether a line with the time remains at the end.
    """

    def __init__(self, name: str, leaves_line: bool = True):
        self.name, self.ending, self.started, self._leaves_line = name, "", time.perf_counter(), leaves_line
        self._done, self._total, self._note = 0, 0, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._redraw, daemon=True)

    def count(self, done: int, total: int, note: str = "") -> None:
        """Says that `done` of `total` parts are finished."""
        self._done, self._total, self._note = done, total, note

    def end(self, text: str) -> None:
        """Replaces the line that remains at the end."""
        self.ending = text

    @property
    def seconds(self) -> float:
        """Elapsed time."""
        return time.perf_counter() - self.started

    def _redraw(self) -> None:
        while not self._over.wait(_REDRAW_S):
            show(self._state())

    def _state(self) -> str:
        part = f" {self._done} of {self._total}" if self._total else ""
        return f"{self.name}{part}{self._note}  {self.seconds:.0f} s"

    def __enter__(self) -> Phase:
        if is_terminal():
            show(self._state())
            self._thread.start()
        else:
            tell(self.name)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        clear()
        if error is None and self._leaves_line:
            part = f" {self._total}" if self._total else ""
            tell(self.ending or f"{self.name}{part}: {self.seconds:.1f} s")


def phase(name: str, leaves_line: bool = True) -> Phase:
    """Starts a part of a command, which ends with its `with` block; see `Phase`."""
    return Phase(name, leaves_line)


class Steps:
    """The progress of training: one line with the reward and its curve, the length, |v| and the remaining time.

    Args:
      total: number of steps of the run.
      first: number of steps that are already done.
    """

    def __init__(self, total: int, first: int = 0):
        self._total, self._count, self._done = total, 0, first
        self._rewards: list[float] = []
        self._seconds: list[float] = []
        self._began, self._told = time.perf_counter(), 0.0

    def step(self, metrics: Mapping[str, float]) -> None:
        """Shows a finished step.

        Args:
          metrics: metrics of the step; `reward` or `loss`, `length` and `v_norm` are shown.
        """
        now = time.perf_counter()
        self._seconds, self._began = [*self._seconds[1 - _RECENT :], now - self._began], now
        self._done, self._count = self._done + 1, self._count + 1
        text = self._line(metrics)
        if is_terminal():
            show(text)
        elif self._count == 1 or self._done == self._total or now - self._told >= _LOG_S:
            self._told = now
            tell(text)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leaves the time of the block out of the time of a step, such as that of an evaluation."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._began += time.perf_counter() - started

    def _line(self, metrics: Mapping[str, float]) -> str:
        main = "reward" if "reward" in metrics else "loss"
        parts = [f"step {self._done}/{self._total}"]
        if main in metrics:
            self._rewards.append(metrics[main])
            parts.append(f"{main} {metrics[main]:.2f} {sparkline(self._rewards, _BARS)}")
        parts += [f"length {metrics['length']:.0f}"] if "length" in metrics else []
        parts += [f"|v| {metrics['v_norm']:.2g}"] if "v_norm" in metrics else []
        parts.append(f"{self._seconds[-1]:.1f} s")
        usual = self._seconds[1:] or self._seconds  # the first step may have compiled something
        left = (self._total - self._done) * median(usual)
        parts += [f"left {duration(left)}"] if self._done < self._total else []
        line = "  ".join(parts)
        return line if len(line) < columns() else "  ".join(parts[:2] + parts[-2:])

    def __enter__(self) -> Steps:
        if self._done < self._total:
            show(f"step {self._done + 1}/{self._total}  running")
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the last state on the screen."""
        global _shown
        with _LOCK:
            if _shown:
                _write("\n")
                _shown = ""


def folded(text: str) -> str:
    """Folds lines that are wider than a terminal, at spaces; files and pipes get them whole, for programs to search."""
    if not sys.stderr.isatty():
        return text
    fold = partial(textwrap.fill, width=WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(fold(line) if len(line) > WIDTH else line for line in text.split("\n"))


def tell_error(problem: str) -> None:
    """Prints an error below the progress line."""
    clear()
    print(folded(f"error: {problem}"), file=sys.stderr)


class _Messages(logging.Handler):
    """Prints log records as `warning: message`, each text once, without breaking the progress line."""

    def __init__(self):
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Prints a record."""
        text = record.getMessage()
        if record.name == "py.warnings":  # `file:line: Category: message`, then the line of code
            text = text.partition("\n")[0].partition("Warning: ")[2] or text
        if text not in self._said:
            self._said.add(text)
            tell(f"{record.levelname.lower()}: {text}")


def log_plainly() -> None:
    """Prints warnings, of loggers and of `warnings`, as plain messages, without those that say nothing to a user."""
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = [_Messages()]
    root.setLevel(logging.WARNING)
    # The progress line already says what the last one repeats every ten seconds.
    for name in ("orbax", "huggingface_hub", "datasets", "httpx", "filelock", "tinylora_jax.adapters.svd_host"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Holds back what libraries write directly to the error stream, and shows it only if the block fails.

    Searching for devices, libtpu writes about settings of the cloud on every machine that is not in it.
    """
    import tempfile

    try:
        target = sys.stderr.fileno()
    except (OSError, ValueError, AttributeError):  # replaced by an object that is no file
        yield
        return
    sys.stderr.flush()
    usual, kept = sys.stderr, os.dup(target)
    with tempfile.TemporaryFile() as held, os.fdopen(kept, "w", encoding=usual.encoding, errors="replace") as aside:
        os.dup2(held.fileno(), target)
        sys.stderr = aside  # messages of this program are not held back
        try:
            yield
        except BaseException:  # raised again: what was held back may explain any failure
            held.seek(0)
            aside.write(held.read().decode("utf-8", "replace"))
            raise
        finally:
            sys.stderr = usual
            aside.flush()
            os.dup2(kept, target)
