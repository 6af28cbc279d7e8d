"""Reads hostile files within bounds, and writes files so that they exist whole or not at all."""

from __future__ import annotations

import errno
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
    """A path in which `~` and `$NAME` stand for what the shell would put there.

    A shell leaves them as they are behind `--flag=`, and a folder named `~` is never meant.

    Raises:
      ValueError: a variable is not set, or there is no such user.

    >>> import os
    >>> os.environ["RUNS"] = "/tmp/runs"
    >>> expand("$RUNS/demo").as_posix()
    '/tmp/runs/demo'
    """
    given = os.fspath(text)
    if not given.startswith("~") and os.path.lexists(given):
        return Path(given)  # a dollar in the name of what is there is meant
    found = os.path.expandvars(given)
    if unknown := _VARIABLE.search(found):
        raise ValueError(f"{given}: the variable {unknown[0]} is not set; set it, or write the path out")
    found = os.path.expanduser(found)
    if found.startswith("~"):
        raise ValueError(f"{given}: there is no user {found.split(os.sep)[0][1:]!r}; write the path out")
    return Path(found)


def kind_of(mode: int) -> str:
    """What a file mode stands for, in words."""
    return next((words for is_kind, words in _KINDS if is_kind(mode)), "a file")


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; a pipe, which would block, and a device, which has no end, are refused.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it is no regular file, or cannot be read; names it.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(f"{path} is {kind_of(mode)}, expected a file; name another path")
        yield file


def read_at_most(path: Path, most: int) -> bytes:
    """Reads a regular file of at most so many bytes, and no more of a larger one.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it is no regular file, or cannot be read.
      ValueError: it is larger.
    """
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path} is larger than {most} bytes, the most that is read of such a file")
    return data


def parse_json(data: bytes | str, **options: Any) -> Any:
    """Parses JSON; whatever is wrong with it is one `ValueError`, and so is nesting without end.

    Args:
      data: JSON text, in UTF-8 if it is bytes.
      **options: keyword arguments of `json.loads`.

    Raises:
      ValueError: it is not JSON; says so of a web page, which proxies and login pages send in place of a file.
    """
    try:
        return json.loads(data.decode("utf-8") if isinstance(data, bytes) else data, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        start = data[:200].lstrip().lower()
        page = start.startswith((b"<!doctype", b"<html") if isinstance(start, bytes) else ("<!doctype", "<html"))
        hint = "it is a web page, as a proxy or the login page of a network sends: " if page else ""
        raise ValueError(f"{hint}{error}") from error


def read_json(path: Path, most: int) -> Any:
    """The value in a JSON file of at most so many bytes.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: it is no regular file, or cannot be read.
      ValueError: it is larger, or not JSON.
    """
    return parse_json(read_at_most(path, most))


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that float64 holds: no truth value, no 10^400, no NaN.

    >>> is_number(1), is_number(10**400), is_number(True), is_number(float("nan"))
    (True, False, False, False)
    """
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_own(folder: Path, names: Sequence[str]) -> None:
    """Refuses links where a program is about to write: it would overwrite what they point to.

    Raises:
      OSError: names the first one.
    """
    for name in names:
        if (folder / name).is_symlink():
            raise OSError(f"{folder / name} is a link, and writing there would change another file; remove it")


def append(path: Path, data: bytes) -> None:
    """Appends to a regular file, made if absent; a link or a pipe in its place is refused.

    Raises:
      OSError: names the file.
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
    """A file to write inside the `with` block, which takes its name at the end; after an error the old one is there.

    A link at the path is replaced, never followed. A device, such as /dev/null, is written to.

    Args:
      path: name of the file.
      durable: whether it must survive a power cut. Its bytes are then on the disk before its name is, and both are
        there at the end of the block, which takes milliseconds.

    Raises:
      OSError: it cannot be written; names the file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        if _is_device(path):
            with path.open("wb") as file:
                yield file
            return
        with suppress(FileNotFoundError):
            temporary.unlink()  # of a process that was killed, or a link that is not to be followed
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
    """Whether there is a device at a path; a pipe or a socket, which would be exchanged for a file, is refused."""
    try:
        mode = path.lstat().st_mode
    except OSError:
        return False
    if stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
        raise OSError(errno.EINVAL, f"it is {kind_of(mode)}, expected a file")
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def write_atomically(path: Path, data: str | bytes, durable: bool = True) -> None:
    """Writes a file so that a reader, or a process after a crash or a power cut, sees all of it or the old one.

    Without `durable`, a power cut may leave the file empty, see `replacing`.
    """
    with replacing(path, durable) as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Writes values as JSON lines, by `write_atomically`."""
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def check_tree(folder: Path) -> None:
    """Refuses a folder in which, at any depth, there is something else than files and folders.

    Raises:
      OSError: names the link, pipe or device.
    """
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            mode = os.lstat(os.path.join(root, name)).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise OSError(f"{os.path.join(root, name)} is {kind_of(mode)}, expected a file; remove it")


def sync_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):  # some network file systems refuse it for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Brings all files of a folder, and all names in it, to the disk.

    Raises:
      OSError: the folder is gone, or the disk fails.
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
