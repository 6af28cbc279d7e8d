"""Turns what a flag names, a local path or the URL of a store, into a local folder."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.common.cli import fail
from experiments.common.preemption import Stopped
from experiments.common.progress import name_folder, tell
from experiments.common.wording import nearest_path
from tinylora_jax.files import expand, lock_file
from tinylora_jax.io import Mirror, WorkdirError, fetch_adapter, fetch_run
from tinylora_jax.io.hf import HUB
from tinylora_jax.multihost import on_first
from tinylora_jax.stores import (
    Store,
    StoreError,
    cache_folder,
    is_url,
    local_name,
    run_folder,
    send_folder,
)

_PATIENCE_S = 600.0  # for a store that fails when a run is finished
_GRACE_S = 20.0  # for a store that fails when a run is stopped: a preempted machine has about 30 seconds


def workdir_of(text: str) -> Path:
    """The folder in which a run works: the folder itself, or a local copy that messages call by its URL."""
    if not is_url(text):
        return Path(text)
    return _called(run_folder(text), text)


def run_of(text: str) -> Path:
    """The folder of a run to read: the folder itself, or a local copy of the logs and results.

    Raises:
      StoreError: the store cannot be read, or contains no run.
    """
    return _called(fetch_run(text), text) if is_url(text) else expand(text)


def adapter_of(text: str) -> Path:
    """The folder of the adapter that --adapter names, or a local copy of it; a workdir stands for its adapter.

    Ends the command with a message if there is none; the message names the nearest one.
    """
    if text.startswith(HUB):
        return Path(text)  # looked up when the adapter is read
    if is_url(text):
        try:
            url = _adapter_in(text.rstrip("/"), Store(text).objects())
            return _called(fetch_adapter(url), url)
        except StoreError as error:
            fail(f"--adapter: {error}")
    path = Path(text)
    if not path.exists():
        fail(f"--adapter={path}: no such folder{nearest_path(path)}")
    found = [*path.glob("*"), *path.glob("members/*/adapter")]
    names = [f"{each.relative_to(path).as_posix()}{'/' if each.is_dir() else ''}" for each in found]
    return Path(_adapter_in(str(path), names))


def _adapter_in(place: str, names: Iterable[str]) -> str:
    """The folder or URL of an adapter: the given one, or the one in the workdir of its run.

    Args:
      place: folder or URL.
      names: paths of everything below it, relative to it; a folder may stand for its files if its path ends in `/`.
    """
    names = sorted(names)
    if {"adapter.json", "vector.bin", "adapter_config.json"} & set(names):
        return place
    inner = [name.split("/") for name in names if "/" in name]
    if any(folder == "adapter" for folder, *_ in inner):
        tell(f"using the adapter {place}/adapter")
        return f"{place}/adapter"
    if member := next((name[1] for name in inner if name[0] == "members" and name[2:3] == ["adapter"]), None):
        example = f"{place}/members/{member}/adapter"
        fail(f"--adapter={place} is the workdir of a sweep; name the adapter of a member, such as {example}")
    if any(folder == "checkpoints" for folder, *_ in inner):
        fail(f"--adapter={place} is the workdir of a run without an adapter; continue the run to its end")
    return place


def _called(folder: Path, url: str) -> Path:
    name_folder(folder, url.rstrip("/"))
    return folder


@contextmanager
def mirrored(text: str, workdir: Path, dry_run: bool = False) -> Iterator[None]:
    """Keeps a run's store up to date inside the `with` block, if the workdir is a URL; all processes must call it.

    The first process fills the local folder from the store, and uploads what changes.

    Args:
      text: value of --workdir.
      workdir: local folder of the run, see `workdir_of`.
      dry_run: whether nothing may be written to the store.

    Raises:
      StoreError: the store cannot be used, or not everything could be uploaded at the end.
      WorkdirError: another process on this machine uses the same URL, or the run was stopped with a rest to upload.
    """
    if not is_url(text):
        yield
        return
    opened: list[tuple[Mirror, int]] = []
    on_first(lambda: opened.append(_open(text, workdir, dry_run)))
    try:
        yield
        on_first(lambda: _finish(opened))  # the others wait, because none may leave before the first one
    except BaseException as error:  # raised again: whatever ends the run, its steps are uploaded
        for mirror, lock in opened:
            left = mirror.close(_GRACE_S)
            os.close(lock)
            if left and isinstance(error, Stopped):
                raise WorkdirError(left) from None
            if left:
                tell(f"warning: {left}")
        raise


def _open(text: str, workdir: Path, dry_run: bool) -> tuple[Mirror, int]:
    """Fills the local folder and starts the uploads; returns the mirror, and a lock on the local folder."""
    lock = _lock(text, workdir)
    mirror = Mirror(Store(text), workdir, tell, _stop)
    if not dry_run:
        mirror.store.check_writable()
    mirror.bring()
    if not dry_run:
        mirror.start()
    return mirror, lock


def _lock(text: str, workdir: Path) -> int:
    """Locks the local folder of a URL for this process, and returns the open file of the lock."""
    path = workdir.with_name(f"{workdir.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return lock_file(path)
    except BlockingIOError as error:
        raise WorkdirError(
            f"another process on this machine is using {text}; wait until it ends, or choose another --workdir"
        ) from error


def _stop(why: str) -> None:
    """Stops this run, and with it the other processes of the run, as a SIGTERM does."""
    tell(f"warning: {why}")
    os.kill(os.getpid(), signal.SIGTERM)


def _finish(opened: list[tuple[Mirror, int]]) -> None:
    mirror, lock = opened.pop()
    left = mirror.close(_PATIENCE_S)
    os.close(lock)
    if left:
        raise StoreError(left)


@contextmanager
def new_folder_of(text: str) -> Iterator[Path]:
    """Yields the folder to create for a flag; for a URL, a temporary one that is uploaded at the end.

    Raises:
      StoreError: the store cannot be written, or is not empty at this URL.
    """
    if not is_url(text):
        yield Path(text)
        return
    Store(text).check_writable()
    folder = cache_folder() / "sent" / f"{local_name(text)}.{os.getpid()}"
    try:
        yield folder
        send_folder(folder, text)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
