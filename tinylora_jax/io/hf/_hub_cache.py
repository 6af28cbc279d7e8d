"""The hub's cache, checked: every file there is named by the hash that the hub states of it.

A cache keeps a file once, as `blobs/<hash>`, and snapshots link to it. The hash is SHA-256 of a large file, and git's
SHA-1 of a small one. What was found right is remembered by size and time of change, since weights take seconds to hash.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path

from tinylora_jax.files import open_regular, write_atomically

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 2**22


def check_blobs(snapshot: Path) -> None:
    """Refuses a snapshot with a file whose bytes are not those that the hub states.

    Args:
      snapshot: folder of the cache; a folder without links into `blobs` says nothing of hashes and passes.

    Raises:
      ValueError: names the file, and the one to delete.
    """
    for path in sorted(snapshot.iterdir()):
        blob = path.resolve()
        if not path.is_symlink() or blob.parent.name != "blobs" or not _BLOB.fullmatch(blob.name):
            continue
        if not blob.is_file():
            continue  # a link to nothing is for `check_links`
        about = blob.stat()
        stamp = f"{about.st_size} {about.st_mtime_ns}"
        known = _known_folder() / blob.name
        if _read_stamp(known) == stamp:
            continue
        if _hash(blob) != blob.name:
            raise ValueError(
                f"{path} is not the file that the Hugging Face hub states: its {about.st_size} bytes have another hash,"
                f" as a proxy or a bad disk leaves them. Delete {blob} and run the same command again to fetch it anew"
            )
        with suppress(OSError):  # without the note it is hashed again the next time
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(known, stamp, durable=False)


def _known_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "tinylora_jax" / "verified"


def _read_stamp(path: Path) -> str:
    try:
        with open_regular(path) as file:
            return file.read(100).decode("ascii", "replace")
    except OSError:
        return ""


def _hash(blob: Path) -> str:
    """The hash that the name of a blob must be: SHA-256 where that has 64 digits, else git's."""
    found = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    with open_regular(blob) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
