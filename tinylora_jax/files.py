"""Reads untrusted files within limits, writes files atomically, and locks them."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISLNK, "a link"),
)
_VARIABLE = re.compile(r"\$(?:\w+|\{[^}]*\})")


def expand(text: str | os.PathLike[str]) -> Path:
    """Expands `~` and `$NAME` in a path, as the shell would.

    The shell does not expand them after `--flag=`, and nobody wants a folder named `~`.

    Raises:
      ValueError: a variable is not set, or there is no such user.

    >>> import os
    >>> os.environ["RUNS"] = "/tmp/runs"
    >>> expand("$RUNS/demo").as_posix()
    '/tmp/runs/demo'
    """
    given = os.fspath(text)
    if not given.startswith("~") and os.path.lexists(given):
        return Path(given)  # the dollar sign is part of an existing name
    found = os.path.expandvars(given)
    if unknown := _VARIABLE.search(found):
        raise ValueError(f"{given}: the variable {unknown[0]} is not set; set it, or write the full path")
    found = os.path.expanduser(found)
    if found.startswith("~"):
        raise ValueError(f"{given}: there is no user {found.split(os.sep)[0][1:]!r}; write the full path")
    return Path(found)


def user_cache() -> Path:
    """The folder for files of this project that can be made again, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tinylora_jax"


def kind_of(mode: int) -> str:
    """Describes a file mode in words."""
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "a file")


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; rejects pipes, which would block, and devices, which have no end.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it is not a regular file or cannot be read; the message names it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"{path} is {kind_of(mode)}, expected a file; name another path")
        yield file


def read_at_most(path: Path, most: int) -> bytes:
    """Reads a regular file of at most `most` bytes.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it is not a regular file, or cannot be read.
      ValueError: it is larger.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most} bytes, the limit for such a file")
    return data


def parse_json(data: bytes | str, **options: Any) -> Any:
    """Parses JSON; every error, including too deep nesting, is a `ValueError`.

    Args:
      data: JSON text; bytes must be UTF-8.
      **options: keyword arguments of `json.loads`.

    Raises:
      ValueError: it is not JSON; the message points out a web page, which a proxy or login page may send instead.
    """
    try:
        return json.loads(data.decode("utf-8") if isinstance(data, bytes) else data, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        start = data[:200].lstrip().lower()
        page = start.startswith((b"<!doctype", b"<html") if isinstance(start, bytes) else ("<!doctype", "<html"))
        hint = "it is a web page, perhaps from a proxy or a network's login page: " if page else ""
        raise ValueError(f"{hint}{error}") from error


def read_json(path: Path, most: int) -> Any:
    """Reads the value in a JSON file of at most `most` bytes.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it is not a regular file, or cannot be read.
      ValueError: it is larger, or not JSON.
    """
    return parse_json(read_at_most(path, most))


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number within float64's range: not a boolean, 10^400 or NaN.

    >>> is_number(1), is_number(10**400), is_number(True), is_number(float("nan"))
    (True, False, False, False)
    """
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_own(folder: Path, names: Sequence[str]) -> None:
    """Raises an error for links where a program is about to write: it would overwrite their targets.

    Raises:
      OSError: there is a link; the message names the first one.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise OSError(f"{folder / name} is a link, and writing there would change another file; remove it")


def append(path: Path, data: bytes) -> None:
    """Appends to a regular file, which is created if absent; rejects links and pipes.

    Raises:
      OSError: the file cannot be written; the message names it.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    check_own(path.parent, [path.name])
    descriptor = os.open(path, flags, 0o644)
    with open(descriptor, "ab") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"{path} is {kind_of(mode)}, expected a file; remove it")
        file.write(data)


@contextmanager
def replacing(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Yields a file to write, which replaces `path` at the end of the `with` block unless there is an error.

    A link at the path is replaced, never followed. A device such as /dev/null is written to directly.

    Args:
      path: path of the file.
      durable: whether the file must survive a power failure. Its data then reach the disk before its name does, and
        both are on disk at the end of the block, which takes milliseconds.

    Raises:
      OSError: the file cannot be written; the message names it.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        if _is_device(path):
            with path.open("wb") as file:
                yield file
            return
        with suppress(FileNotFoundError):
            temporary.unlink()  # left by a killed process, or a link that must not be followed
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        with open(descriptor, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(descriptor)
        os.replace(temporary, path)
        if durable:
            sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.strerror:
            raise type(error)(error.errno, f"cannot write {path}: {error.strerror}") from error
        raise


def _is_device(path: Path) -> bool:
    """Whether there is a device at a path; rejects pipes and sockets, which would be replaced by a file."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, expected a file")
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def write_atomically(path: Path, data: str | bytes, durable: bool = True) -> None:
    """Writes a file atomically: a reader sees the old or the new content, even after a crash or power failure.

    Without `durable`, a power failure may leave the file empty; see `replacing`.
    """
    with replacing(path, durable) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Writes values as JSON lines with `write_atomically`."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def check_tree(folder: Path) -> None:
    """Raises an error if a folder contains, at any depth, anything but files and folders.

    Raises:
      OSError: there is a link, pipe or device; the message names it.
    """
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(root, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OSError(f"{os.path.join(root, name)} is {kind_of(mode)}, expected a file; remove it")


def lock_file(path: Path) -> int:
    """Locks a file for this process; the file is created if absent.

    On a file system without locks nothing is locked, because a run must work there too.

    Returns:
      The open file. Closing it releases the lock, as the end of the process does.

    Raises:
      BlockingIOError: another process holds the lock.
      OSError: the file cannot be opened, or is a link.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            os.close(file)
            raise BlockingIOError(error.errno, f"another process holds the lock {path}") from error
    return file


def sync_folder(folder: Path) -> None:
    """Flushes the names in a folder to disk, if the file system supports it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems do not support it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flushes all files and names in a folder to disk.

    Raises:
      OSError: the folder no longer exists, or the disk fails.
    """

    def fail(error: OSError) -> None:
        raise error

    for root, _, names in os.walk(folder, onerror=fail):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(root))
    sync_folder(folder.parent)
