"""Creates folders atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a folder to fill, which gets its name at the end of the `with` block; an error leaves nothing.

    Args:
      path: path of the folder, which must be absent or empty.

    Yields:
      The temporary folder to write in, next to the final one.

    Raises:
      FileExistsError: the path exists and is not an empty folder.
      OSError: no folder can be created there.
    """
    path = path.expanduser().resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        what = "not empty" if path.is_dir() else "not a folder"
        raise FileExistsError(f"{path} is {what}; choose a new folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    absent = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise OSError(f"cannot create a folder in {path.parent}: {error.strerror}; choose another") from error
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # another process may have started to use them
            for folder in absent:
                folder.rmdir()
        raise
