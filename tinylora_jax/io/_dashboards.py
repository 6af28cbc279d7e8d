"""Shows a run on the dashboards of other projects, each through its own library.

They are Weights & Biases and Trackio. A library is imported only for a run that names it. A dashboard that fails is
left out for the rest of the run, with one warning: it must not stop the training.
"""

from __future__ import annotations

import contextlib
import difflib
import html
import importlib.util
import netrc
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from absl import logging

from tinylora_jax.extras import lacking
from tinylora_jax.files import read_json

TENSORBOARD = "tensorboard"  # written by `_tensorboard.py` into the workdir, as a part of it
_PROJECT = "tinylora_jax"
_FILE, _MOST_BYTES = "dashboards.json", 2**16


class Dashboard(Protocol):
    """A run on one dashboard; any method may raise any exception.

    An attribute `is_new` that is true says that this dashboard has no step of the run, whatever was sent to it before:
    it was kept on another machine.
    """

    def step(self, step: int, values: Mapping[str, float], page: str) -> None:
        """Shows one step's metrics, and its page of completions unless that is empty."""

    def picture(self, path: Path, step: int) -> None:
        """Shows the picture of the whole run, as of a step after the last one."""

    def close(self) -> None:
        """Sends what is left, and ends the run on the dashboard."""


Open = Callable[[str, str, Path, Mapping[str, Any]], Dashboard]


class _Wandb:
    """Weights & Biases, offline where WANDB_MODE says so or no key is at hand, because it would ask for one."""

    def __init__(self, run_id: str, name: str, workdir: Path, config: Mapping[str, Any]):
        import wandb

        self._library = wandb
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        settings = wandb.Settings(silent=True, console="off", save_code=False, init_timeout=30)
        how = {"mode": mode, "resume": "allow", "reinit": "create_new", "settings": settings}
        project = os.environ.get("WANDB_PROJECT", _PROJECT)
        self._run = wandb.init(project=project, id=run_id, name=name, dir=str(workdir), config=dict(config), **how)

    def step(self, step: int, values: Mapping[str, float], page: str) -> None:
        shown = {"samples": self._library.Html(f"<pre>{html.escape(page)}</pre>")} if page else {}
        self._run.log({**values, **shown}, step=step)

    def picture(self, path: Path, step: int) -> None:
        self._run.log({"picture": self._library.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


def _has_wandb_key() -> bool:
    """Whether wandb can log in without a question: a key in the environment, or in the file where it keeps one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False


class _Trackio:
    """Trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL names another place."""

    def __init__(self, run_id: str, name: str, workdir: Path, config: Mapping[str, Any]):
        import trackio

        self._library = trackio
        project, name = os.environ.get("TRACKIO_PROJECT", _PROJECT), f"{name}-{run_id}"
        self.is_new = not self._has(project, name)
        with contextlib.redirect_stdout(sys.stderr):  # standard output holds only results
            self._run = trackio.init(project, name, config=dict(config), resume="allow", embed=False)

    def _has(self, project: str, name: str) -> bool:
        """Whether a run is in the database that will be written; another place than this machine keeps what it got."""
        if os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL"):
            return True
        try:
            return any(run.name == name for run in self._library.Api().runs(project))
        except ValueError:  # there is no such project yet
            return False

    def step(self, step: int, values: Mapping[str, float], page: str) -> None:
        shown = {"samples": self._library.Markdown(f"~~~~\n{page}\n~~~~")} if page else {}
        self._run.log({**values, **shown}, step=step)

    def picture(self, path: Path, step: int) -> None:
        self._run.log({"picture": self._library.Image(str(path))}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._library.finish()


LOGGERS: dict[str, Open] = {"wandb": _Wandb, "trackio": _Trackio}


def parse_loggers(text: str) -> tuple[str, ...]:
    """Parses the names of loggers, separated by commas; `none` stands for no logger besides metrics.jsonl.

    >>> parse_loggers("tensorboard"), parse_loggers("none")
    (('tensorboard',), ())

    Raises:
      ValueError: a name is unknown or given twice, or the library of a logger is not installed.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    known = [*LOGGERS, TENSORBOARD, "none"]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{name!r} is unknown; expected {', '.join(known)}, several separated by commas{hint}")
    if "none" in names and len(names) > 1:
        others = ",".join(name for name in names if name != "none")
        raise ValueError(f"{text!r} names none and others; write none alone{', or only ' * bool(others)}{others}")
    if len(set(names)) < len(names):
        raise ValueError(f"{text!r} names a logger twice; write each name once")
    for name in names:
        if name in LOGGERS and importlib.util.find_spec(name) is None:
            raise ValueError(lacking(name, name))
    if not names:
        raise ValueError(f"{text!r} names no logger; expected {', '.join(known)}")
    return tuple(name for name in names if name != "none")


class Dashboards:
    """The dashboards of one run, each used until it fails.

    A run keeps its id on every dashboard when it continues. Steps that a dashboard has already are not sent again, and
    a dashboard that is new to the run gets all of its earlier steps.

    Args:
      names: names of the dashboards, keys of `LOGGERS`; other names are left to others.
      workdir: folder of the run, in which `dashboards.json` keeps the id.
      config: configuration of the run.
    """

    def __init__(self, names: Sequence[str], workdir: Path, config: Mapping[str, Any]):
        self._workdir, self._config, self._page = workdir, config, ""
        self._open: dict[str, Dashboard] = {}
        self._sent: dict[str, int] = {}
        self._names = [name for name in names if name in LOGGERS]
        self._known = _read(workdir) if self._names else {}
        self.run_id: str = self._known.get("id") or secrets.token_hex(8)

    @property
    def record(self) -> dict[str, Any] | None:
        """The content of `dashboards.json` for the next process; None without dashboards."""
        return (
            {"id": self.run_id, "names": sorted({*self._known.get("names", ()), *self._names})} if self._names else None
        )

    def start(self, earlier: Iterable[tuple[int, Mapping[str, float]]], last: int) -> None:
        """Opens the dashboards.

        Args:
          earlier: numbers and metrics of the steps that are kept.
          last: largest number of a step that was logged before, also if it is about to run again; -1 for none.
        """
        steps = list(earlier) if self._names else []
        for name in list(self._names):
            self._try(name, self._begin)
            has_steps = name in self._known.get("names", ()) and not getattr(self._open.get(name), "is_new", False)
            self._sent[name] = last if has_steps else -1
            for step, values in steps:
                self._send(name, step, values, "")

    def page(self, text: str) -> None:
        """Keeps a page of completions for the metrics of its step."""
        self._page = text

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Shows one step's metrics, and the page that was kept for it."""
        page, self._page = self._page, ""
        for name in list(self._names):
            self._send(name, step, values, page)

    def picture(self, path: Path, step: int) -> None:
        """Shows the picture of a finished run, for which the dashboards are opened once more."""
        for name in list(self._names):
            self._try(name, self._begin)
            self._try(name, lambda name: self._open[name].picture(path, step))
        self.close()

    def close(self) -> None:
        """Closes the dashboards; repeated calls have no effect."""
        for name in list(self._open):
            self._try(name, lambda name: self._open.pop(name).close())

    def _begin(self, name: str) -> None:
        self._open[name] = LOGGERS[name](self.run_id, self._workdir.name, self._workdir, self._config)

    def _send(self, name: str, step: int, values: Mapping[str, float], page: str) -> None:
        if step > self._sent[name] and name in self._open:
            self._try(name, lambda name: self._open[name].step(step, values, page))
            self._sent[name] = step

    def _try(self, name: str, action: Callable[[str], None]) -> None:
        if name not in self._names:
            return
        try:
            action(name)
        except Exception as error:  # anything from another project's library: network, disk, its own checks
            said = (str(error).strip().splitlines() or ["no detail"])[0]
            logging.warning(
                "the dashboard %s failed and is left out from here on (%s: %.300s); the run goes on, and metrics.jsonl"
                " has every step",
                *(name, type(error).__name__, said),
            )
            self._names.remove(name)
            self._open.pop(name, None)


def _read(workdir: Path) -> dict[str, Any]:
    """Reads `dashboards.json`; a damaged one counts as absent, so that the run begins anew on the dashboards."""
    try:
        found = read_json(workdir / _FILE, _MOST_BYTES)
        names = found["names"]
        ok = re.fullmatch(r"[0-9a-f]{16}", found["id"]) and all(isinstance(name, str) for name in names)
        return {"id": found["id"], "names": names} if ok else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def log_picture(workdir: Path, names: Sequence[str], config: Mapping[str, Any], picture: Path, steps: int) -> None:
    """Shows the picture of a finished run on its dashboards.

    Args:
      workdir: folder of the run.
      names: names of the loggers, see `parse_loggers`.
      config: configuration of the run.
      picture: path of the picture.
      steps: number of steps of the run.
    """
    Dashboards(names, workdir, config).picture(picture, steps)
