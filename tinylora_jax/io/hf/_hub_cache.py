"""Checks files in the hub's cache against the hashes that the hub states, which are their names.

The cache stores each file once, as `blobs/<hash>`, and snapshots link to it. The hash is SHA-256 for a large file, and
git's SHA-1 for a small one. Verified files are remembered by size and modification time, because hashing weights takes
seconds.
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
    """Raises an error if a file of a snapshot does not have the hash that the hub states.

    Args:
      snapshot: folder in the cache; a folder without links into `blobs` has no hashes and passes.

    Raises:
      ValueError: a hash differs; the message names the file and the blob to delete.
    """
    for path in sorted(snapshot.iterdir()):
        blob = path.resolve()
        if not path.is_symlink() or blob.parent.name != "blobs" or not _BLOB.fullmatch(blob.name):
            continue
        if not blob.is_file():
            continue  # `check_links` reports broken links
        about = blob.stat()
        stamp = f"{about.st_size} {about.st_mtime_ns}"
        known = _known_folder() / blob.name
        if _read_stamp(known) == stamp:
            continue
        if _hash(blob) != blob.name:
            raise ValueError(
                f"{path} is damaged: the hash of its {about.st_size} bytes is not the one stated by the Hugging Face"
                f" hub. Delete {blob} and run the same command again to download it again"
            )
        with suppress(OSError):  # without this record, it is hashed again next time
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
    """Computes the hash for comparison with a blob's name: SHA-256 if that has 64 digits, else git's."""
    found = hashlib.sha256() if len(blob.name) == 64 else hashlib.sha1(b"blob %d\0" % blob.stat().st_size)
    with open_regular(blob) as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()
