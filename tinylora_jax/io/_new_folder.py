"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill inside the `with` block, which takes its name at the end; after an error nothing is left.

    Args:
      path: absent, or an empty folder.

    Yields:
      The folder to write in, beside the final one.

    Raises:
      FileExistsError: there is something at the path.
      OSError: no folder can be made there.
    """
    path = path.expanduser().resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        what = "not empty" if path.is_dir() else "not a folder"
        raise FileExistsError(f"{path} is {what}; name a new folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    absent = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise OSError(f"cannot make a folder in {path.parent}: {error.strerror}; choose another") from error
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # another process may have begun to use them
            for folder in absent:
                folder.rmdir()
        raise
