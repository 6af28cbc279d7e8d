"""Object stores by URL, such as gs://bucket/run: listing, and copies to and from local files.

A store has no rename and no append, but writing one object is atomic: a reader sees the old or the new content. `Store`
offers only what follows from that. `fetch_objects` and `fetch_object` copy what a command reads into a local cache.
fsspec, with gcsfs or s3fs, speaks to the store; it is imported when a URL is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinylora_jax.extras import lacking
from tinylora_jax.files import user_cache

# Scheme -> (package, extra of this project's setup.py, how to log in).
_SCHEMES = {
    "gs": ("gcsfs", "gcs", "log in with `gcloud auth application-default login`"),
    "s3": ("s3fs", "s3", "run `aws configure`, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
}
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)
_IDENTITIES = ("ETag", "etag", "md5Hash", "generation", "LastModified", "updated", "created", "mtime")
# Codes of S3 for keys that it does not accept; s3fs makes the same error of them as of missing rights.
_REFUSED_KEYS = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired")
_TRANSFERS = 8  # objects copied at once
WRITE_TEST = ".write_test"
"""Start of the names of the small objects that `Store.check_writable` writes and removes."""


class StoreError(ValueError):
    """A store cannot be used, or lacks an object."""


@dataclass(frozen=True)
class Stored:
    """One object of a store.

    Attributes:
      size: size, in bytes.
      identity: text that differs between two contents of the object.
    """

    size: int
    identity: str


def is_url(text: str | os.PathLike[str]) -> bool:
    """Whether a text names a place in a store, and not a local path.

    >>> is_url("gs://bucket/run"), is_url("/tmp/run"), is_url("arithmetic")
    (True, False, False)
    """
    return _URL.fullmatch(os.fspath(text)) is not None


def cache_folder() -> Path:
    """The folder of local copies, in the user's cache; it may be deleted while no command runs."""
    return user_cache() / "stores"


def local_name(url: str) -> str:
    """A file name for a URL: readable, and different for every URL."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", url.rstrip("/"))[-48:].strip("-")
    return f"{readable}-{hashlib.sha256(url.rstrip('/').encode()).hexdigest()[:16]}"


def run_folder(url: str) -> Path:
    """The local folder in which a run works whose workdir is a URL."""
    return cache_folder() / "runs" / local_name(url)


def _filesystem(scheme: str) -> Any:
    """Opens fsspec's file system of a scheme, without its caches: another process may write at any time."""
    import fsspec

    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


class Store:
    """The objects below one URL. Names are relative to it, with `/` between their parts.

    Args:
      url: URL such as `s3://bucket/folder`.

    Raises:
      StoreError: the URL is not one of a supported store, or a package is not installed.
    """

    def __init__(self, url: str):
        match = _URL.fullmatch(url)
        scheme, rest = (match[1], match[2].rstrip("/")) if match else ("", "")
        if scheme not in _SCHEMES:
            expected = " or ".join(f"{name}://bucket/folder" for name in _SCHEMES)
            raise StoreError(f"{url}: expected {expected}, or a local path")
        if not rest or rest.startswith("/") or any(part in ("", ".", "..") for part in rest.split("/")):
            raise StoreError(f"{url}: expected {scheme}://bucket/folder, without empty parts or `..`")
        self.url = f"{scheme}://{rest}"
        self._package, self._extra, self._login = _SCHEMES[scheme]
        self.root, self.bucket = rest, rest.split("/")[0]
        with self._asking():
            self._fs = _filesystem(scheme)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns any error of the store into a `StoreError`."""
        try:
            yield
        except StoreError:
            raise
        except ImportError as error:
            raise StoreError(f"{self.url}: {lacking(self._package, self._extra)} ({error})") from error
        except Exception as error:  # botocore, aiohttp, google-auth and gcsfs have exceptions of their own
            raise StoreError(f"{self.url}: {self._explained(error)}") from error

    def _explained(self, error: Exception) -> str:
        """Says what is wrong and what to do."""
        kind, said = type(error).__name__, " ".join(str(error).split())[:300]
        answer = getattr(error.__cause__, "response", None)  # of botocore, which s3fs translates
        code = answer.get("Error", {}).get("Code") if isinstance(answer, dict) else None
        if code in _REFUSED_KEYS:
            return f"the credentials are not valid ({code}: {said}); {self._login}"
        if "Credential" in kind or "Anonymous caller" in said or "Refresh" in kind:
            return f"there are no valid credentials ({kind}: {said}); {self._login}"
        if isinstance(error, PermissionError) or getattr(error, "code", None) in (401, 403):
            return f"this account may not do that ({said}); ask for the rights to list, read, write and delete objects"
        if isinstance(error, FileNotFoundError):
            return f"there is no such object or bucket ({said}); check the URL"
        return f"the store cannot be reached or refuses ({kind}: {said})"

    def objects(self) -> dict[str, Stored]:
        """Lists all objects below the URL.

        Raises:
          StoreError: the bucket is absent or cannot be listed, or a name could leave a local folder.
        """
        with self._asking():
            self._fs.invalidate_cache()
            found = self._fs.find(self.root, detail=True)
            if not found and not self._fs.exists(self.bucket):
                raise StoreError(f"{self.url}: there is no bucket {self.bucket}; create it, or check the URL")
        start = f"{self.root}/"
        within = {path.lstrip("/"): info for path, info in found.items()}
        named = {path.removeprefix(start): info for path, info in within.items() if path.startswith(start)}
        # Consoles create empty objects that end in a slash, to show folders.
        kept = {name: info for name, info in named.items() if not name.endswith("/") and info.get("type") == "file"}
        for name in kept:
            if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in name.split("/")):
                raise StoreError(f"{self.url} contains an object named {name!r}, which cannot be a file; remove it")
        return {name: _stored(info) for name, info in kept.items()}

    def find(self, name: str) -> Stored | None:
        """Looks for one object; None if it does not exist."""
        with self._asking():
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(f"{self.root}/{name}")
            except FileNotFoundError:
                return None
        return _stored(info) if info.get("type") == "file" else None

    def read(self, name: str) -> bytes | None:
        """Reads a small object; None if it does not exist."""
        with self._asking():
            try:
                return self._fs.cat_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Writes a small object."""
        with self._asking():
            self._fs.pipe_file(f"{self.root}/{name}", data)

    def put(self, path: Path, name: str) -> None:
        """Writes a file as one object, in parts if it is large.

        Raises:
          FileNotFoundError: there is no such file.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        with self._asking():
            self._fs.put_file(os.fspath(path), f"{self.root}/{name}")

    def get(self, name: str, path: Path, size: int) -> None:
        """Copies one object of a known size to a file, which appears when it is complete.

        Raises:
          StoreError: there is no such object, or fewer or more bytes arrive.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        with self._asking():
            self._fs.get_file(f"{self.root}/{name}", os.fspath(part))
        if (found := part.stat().st_size) != size:
            raise StoreError(f"{self.url}/{name}: expected {size} bytes, received {found}; try again")
        os.replace(part, path)

    def get_all(self, objects: Mapping[str, Stored], folder: Path) -> None:
        """Copies several objects into a folder, some at a time."""
        in_parallel(lambda item: self.get(item[0], folder / item[0], item[1].size), list(objects.items()))

    def remove(self, name: str) -> None:
        """Removes one object, if it exists."""
        with self._asking(), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self.root}/{name}")

    def check_writable(self) -> None:
        """Writes and removes a small object.

        Raises:
          StoreError: this account may not write there, or there is no such bucket.
        """
        name = f"{WRITE_TEST}.{os.getpid()}"
        self.write(name, b"written to test the rights of the account")
        self.remove(name)


def _stored(info: Mapping[str, Any]) -> Stored:
    identity = next((str(info[name]) for name in _IDENTITIES if info.get(name)), "")
    return Stored(int(info["size"]), identity)


def in_parallel(work: Callable[[Any], Any], items: Sequence[Any]) -> None:
    """Runs `work` for all items in a few threads; raises the error of the first item that fails."""
    waiting, errors = deque(enumerate(items)), dict[int, BaseException]()

    def drain() -> None:
        while not errors:
            try:
                index, item = waiting.popleft()
            except IndexError:
                return
            try:
                work(item)
            except BaseException as error:  # raised again below, in the thread of the caller
                errors[index] = error

    # Not a ThreadPoolExecutor: the interpreter would wait at its end for a transfer that hangs.
    threads = [threading.Thread(target=drain, daemon=True) for _ in range(min(_TRANSFERS, len(items)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]


def fetch_objects(
    url: str, wanted: Callable[[str], bool] = lambda name: "/" not in name, beside: Sequence[str] = ()
) -> Path:
    """Copies objects of a URL into the local cache, unless the same contents are there already.

    Args:
      url: URL of a folder.
      wanted: function that chooses the objects by name; the default takes those directly in the folder.
      beside: names of objects next to the folder that are copied too, next to the local folder, if they exist.

    Returns:
      The local folder.

    Raises:
      StoreError: the store cannot be read, or has no such objects.
    """
    store = Store(url)
    found = {name: stored for name, stored in store.objects().items() if wanted(name)}
    if not found:
        raise StoreError(f"{url}: there is no such folder, or it has no files that are needed here; check the URL")
    parent, _, leaf = store.url.rpartition("/")
    if not beside or store.root == store.bucket:
        return _cached(store, found)
    around = Store(parent)
    found = {f"{leaf}/{name}": stored for name, stored in found.items()}
    for name in beside:
        try:
            stored = around.find(name)
        except StoreError as error:
            if not isinstance(error.__cause__, PermissionError):  # the account may have rights for the folder alone
                raise
            stored = None
        found |= {name: stored} if stored is not None else {}
    return _cached(around, found) / leaf


def fetch_object(url: str) -> Path:
    """Copies one object into the local cache, unless the same content is there already.

    Args:
      url: URL of an object.

    Returns:
      The local file, which has the object's name.

    Raises:
      StoreError: the store cannot be read, or has no such object.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    store = Store(parent)
    found = store.find(name)
    if found is None:
        raise StoreError(f"{url}: there is no such object; check the URL")
    return _cached(store, {name: found}) / name


def _cached(store: Store, objects: Mapping[str, Stored]) -> Path:
    """The local folder with these contents, which is complete as soon as it has its name."""
    contents = repr(sorted((name, each.size, each.identity) for name, each in objects.items()))
    folder = cache_folder() / "read" / local_name(store.url) / hashlib.sha256(contents.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        store.get_all(objects, temporary)
        with suppress(OSError):  # another process was faster
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not folder.is_dir():
        raise StoreError(f"{store.url}: cannot create {folder}; free space or fix permissions")
    return folder


def send_folder(folder: Path, url: str) -> None:
    """Copies the files of a folder to an empty place in a store.

    Args:
      folder: local folder.
      url: URL of the new folder.

    Raises:
      StoreError: there are objects already, or the store cannot be written.
    """
    store = Store(url)
    if store.objects():
        raise StoreError(f"{url} is not empty; choose a new folder")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    in_parallel(lambda path: store.put(path, path.relative_to(folder).as_posix()), paths)
