"""Keeps a copy of a run's folder in an object store, so that the run survives the loss of its machine.

A run works in a local folder as ever. `Mirror.bring` fills a fresh one from the store, and a thread uploads what
changes. The order of the uploads makes every state of the store one from which the run continues to the same bits:

1. the owner, which names the process that writes there; another process that starts later replaces it, unless the
   store has changed since that process read it
2. config.json, then logs, pages, answers and adapters
3. the newest checkpoint as one object, `checkpoints/<step>.zip`: a step is there as a whole or not at all
4. removal of checkpoints other than the newest two
5. results that say that something is complete, such as summary.json

What stands later in this list is looked up first on the disk. So what it refers to is on the disk too by then.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from tinylora_jax.files import parse_json, write_atomically
from tinylora_jax.io._run_objects import (
    CONFIG,
    STEPS,
    Stat,
    is_mark,
    is_result,
    newest_step,
    pack,
    scan,
    step_name,
    steps_in,
    unpack,
)
from tinylora_jax.stores import WRITE_TEST, Store, Stored, StoreError, in_parallel

_OWNER = "owner.json"
_GROWING = ("metrics.jsonl",)  # appended to, as the files in tensorboard/ are
_KEPT = 2  # newest checkpoints in the store, as on the disk
_POLL_S = 1.0  # seconds between two looks at the folder; GCS allows one write of an object per second
_LONGEST_WAIT_S = 30.0  # longest pause between two attempts to reach a store
_MOST_OWNER_BYTES = 2**16


class Mirror:
    """The copy of one run's folder in a store.

    Args:
      store: place of the copy.
      folder: local folder of the run.
      say: function that tells the user one line.
      on_taken: function that stops the run when another process has begun to write to the store; it gets a sentence.
      clock: function that returns the time, in seconds.
      sleep: function that waits for a number of seconds.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        say: Callable[[str], None],
        on_taken: Callable[[str], None] = lambda why: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.store, self.folder = store, folder
        self._say, self._on_taken, self._clock, self._sleep = say, on_taken, clock, sleep
        self._token = secrets.token_hex(16)
        self._sent: dict[str, Stat] = {}  # what each file was when it was last copied
        self._sent_step: int | None = None
        self._seen: object = None
        self._owns, self._taken = False, ""  # the latter says who has taken the store, if another process has
        self._brought = ""  # digest of the store when the folder was filled
        self._down_since: float | None = None
        self._failures, self._lock = 0, threading.Lock()
        self._closing, self._thread = threading.Event(), threading.Thread(target=self._follow, daemon=True)
        self._deadline, self._complete = 0.0, False  # for the uploads of `close`, and whether these are done
        self._outbox = folder.with_name(f"{folder.name}.outbox")
        self._unsent = folder.with_name(f"{folder.name}.unsent")

    def bring(self) -> None:
        """Fills a fresh local folder with what the run needs to continue: results, logs and the newest checkpoint.

        An older local folder is removed, because the store may be newer. Only if an earlier process could not upload
        everything, and no other process has written since, is the rest uploaded first.

        Raises:
          StoreError: the store cannot be read, or the checkpoint is damaged.
        """
        owner = self._read_owner()
        if owner is not None:
            self._say(
                f"the last process that wrote to {self.store.url} did not record that it ended; it began on"
                f" {owner.get('started')} on the machine {owner.get('host')}. If it still runs, one of the two stops"
            )
        self._send_unsent(owner)
        for folder in (self.folder, self._outbox):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        found = self.store.objects()
        self._brought = _digest(found)
        self.store.get_all({name: each for name, each in found.items() if is_result(name)}, self.folder)
        steps = steps_in(found)
        if steps:
            self._bring_step(max(steps), found)
        self._sent = {name: stat for name, stat in scan(self.folder).items() if name in found}
        self._sent_step = max(steps, default=None)
        self._token, self._owns = secrets.token_hex(16), False
        self._unsent.unlink(missing_ok=True)

    def _send_unsent(self, owner: Mapping[str, str] | None) -> None:
        """Uploads what an earlier process on this machine could not, if the store is as that process left it."""
        left = self._unsent.read_text() if self._unsent.is_file() else None
        if left is None or left != (owner["token"] if owner and "token" in owner else _digest(self.store.objects())):
            return
        self._say("an earlier process could not upload everything; uploading the rest")
        self._outbox.mkdir(parents=True, exist_ok=True)
        self._token, self._owns = left, owner is not None
        self.sync()
        self._unsent.unlink()

    def _bring_step(self, step: int, found: dict[str, Stored]) -> None:
        name, archive = step_name(step), self._outbox / f"{step}.zip"
        self.store.get(name, archive, found[name].size)
        try:
            unpack(archive, self.folder / STEPS / str(step))
        except ValueError as error:
            raise StoreError(
                f"{self.store.url}/{name} is damaged ({error}); delete that object to continue from the step before it"
            ) from error
        archive.unlink()

    def start(self) -> None:
        """Starts the thread that uploads what changes."""
        self._thread.start()

    def _follow(self) -> None:
        while not self._closing.wait(self._pause()):
            # Directories change when a file in them gets its name. That is cheaper to see than every file.
            if (seen := self._glance()) != self._seen and self.attempt():
                self._seen = seen
        while not self._taken:
            self._complete = self.attempt()
            left_s = self._deadline - self._clock()
            if self._complete or left_s <= 0:
                return
            self._sleep(min(self._pause(), left_s))

    def _glance(self) -> object:
        try:
            folders = [self.folder, *(self.folder / "members").glob("*")]
            return newest_step(self.folder), [os.stat(folder).st_mtime_ns for folder in folders]
        except OSError:  # something was replaced at this moment
            return object()

    def _pause(self) -> float:
        return min(_POLL_S * 2.0 ** min(self._failures, 10), _LONGEST_WAIT_S)

    def attempt(self) -> bool:
        """Calls `sync` once, and says when the store begins and ceases to fail; returns whether all is uploaded."""
        if self._taken:
            return False
        try:
            self.sync()
        except (StoreError, OSError) as error:
            self._failures += 1
            if self._down_since is None and not self._taken:
                self._down_since = self._clock()
                self._say(f"warning: cannot upload ({error}); the run goes on, and this is tried again")
            return False
        self._failures = 0
        if self._down_since is not None:
            self._say(f"{self.store.url} is up to date again, after {self._clock() - self._down_since:.0f} s")
            self._down_since = None
        return True

    def sync(self) -> None:
        """Uploads what changed since the last call, in the order that this module describes.

        Nothing is uploaded before this run has claimed the folder by writing its config.

        Raises:
          StoreError: the store cannot be reached, or another process writes to it.
        """
        with self._lock:
            step = newest_step(self.folder)
            # Two looks, the marks first: what a mark refers to was complete before it, so the second look finds it.
            marks = {name: stat for name, stat in self._changed().items() if is_mark(name)}
            files = {name: stat for name, stat in self._changed().items() if not is_mark(name)}
            if not self._owns and CONFIG not in files:
                return
            if not files and not marks and step == self._sent_step:
                return
            self._own()
            if CONFIG in files:
                self._send(CONFIG, files.pop(CONFIG))
            in_parallel(lambda item: self._send(*item), list(files.items()))
            if step is not None and step != self._sent_step:
                self._send_step(step)
            for name in sorted(marks, key=lambda name: (-name.count("/"), name)):  # members before their sweep
                self._send(name, marks[name])

    def _own(self) -> None:
        """Makes this process the owner, or checks that it still is.

        Raises:
          StoreError: another process has replaced it or wrote while it started, or the store was emptied.
        """
        if not self._owns:
            # Starting takes minutes. What another process wrote then would be removed as steps of a replaced one.
            if self._brought and _digest(self.store.objects()) != self._brought:
                who = (self._read_owner() or {}).get("host")
                self._give_up(
                    f"another process{f' ({who})' if who else ''} wrote to {self.store.url} while this one started;"
                    " this one stops, so that nothing is lost. Stop the other one if it still runs; then the same"
                    " command continues the run"
                )
            owner = {"token": self._token, "host": f"{socket.gethostname()}, process {os.getpid()}"}
            owner["started"] = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
            self.store.write(_OWNER, json.dumps(owner).encode())
            self._owns = True
            return
        owner = self._read_owner() or {}
        if owner.get("token") != self._token:
            who, url = owner.get("host"), self.store.url
            what = f"another process has begun to write to {url} ({who})" if who else f"{url} was removed"
            self._give_up(f"{what}; this one stops, so that they do not mix. What it computed is in {self.folder}")

    def _give_up(self, why: str) -> NoReturn:
        """Leaves the store to another process, and stops this run.

        Raises:
          StoreError: always, with the reason.
        """
        self._taken = why
        self._on_taken(why)
        raise StoreError(why)

    def _read_owner(self) -> dict[str, Any] | None:
        data = self.store.read(_OWNER)
        try:
            owner = None if data is None else parse_json(data[:_MOST_OWNER_BYTES])
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) or owner is None else {}

    def _changed(self) -> dict[str, Stat]:
        return {name: stat for name, stat in scan(self.folder).items() if self._sent.get(name) != stat}

    def _send(self, name: str, stat: Stat) -> None:
        """Uploads a file that was `stat` when it was seen; a later change is uploaded by the next call."""
        path = self.folder / name
        try:
            if path.name in _GROWING or "tensorboard" in name.split("/"):
                copy = self._outbox / name.replace("/", "__")  # a file must not grow while it is uploaded
                shutil.copyfile(path, copy)
                path = copy
            self.store.put(path, name)
        except FileNotFoundError:
            return
        self._sent[name] = stat

    def _send_step(self, step: int) -> None:
        """Uploads a checkpoint, then removes those that it makes superfluous.

        Orbax removes a step only when a newer one is complete. If this one is still the newest after it was packed, it
        was packed as a whole.
        """
        archive = self._outbox / f"{step}.zip"
        try:
            pack(self.folder / STEPS / str(step), archive)
            if newest_step(self.folder) != step:
                return  # the newer one is uploaded by the next call
            self.store.put(archive, step_name(step))
        except FileNotFoundError:
            return
        finally:
            archive.unlink(missing_ok=True)
        steps = steps_in(self.store.objects())
        before = sorted(each for each in steps if each < step)
        kept = {step, *before[1 - _KEPT :]}
        for each in steps - kept:  # newer ones come from a process that this one has replaced
            self.store.remove(step_name(each))
        self._sent_step = step

    def close(self, patience_s: float) -> str:
        """Uploads the rest and gives up the store; repeated calls have no effect.

        Args:
          patience_s: longest time for all of this, in seconds, also if a transfer neither ends nor fails.

        Returns:
          What could not be uploaded and where it is, in one sentence; empty if all is uploaded.
        """
        self._deadline = self._clock() + patience_s
        self._closing.set()
        if self._thread.ident is None:  # it was never started
            self._thread.start()
        self._thread.join(patience_s)
        if self._taken:
            return self._taken
        if not self._complete:
            write_atomically(self._unsent, self._token if self._owns else self._brought)
            return (
                f"not everything could be uploaded to {self.store.url}; the rest is in {self.folder}. The same command"
                " uploads it and continues, if it runs on this machine"
            )
        if self._owns:
            with suppress(StoreError):  # only the next start would mention it
                self.store.remove(_OWNER)
            self._owns = False
        shutil.rmtree(self._outbox, ignore_errors=True)
        return ""


def _digest(objects: Mapping[str, Stored]) -> str:
    """A text that differs between two contents of a store, but not between two owners of the same content."""
    kept = {name: each for name, each in objects.items() if name != _OWNER and not name.startswith(WRITE_TEST)}
    return hashlib.sha256(repr(sorted(kept.items(), key=lambda item: item[0])).encode()).hexdigest()
