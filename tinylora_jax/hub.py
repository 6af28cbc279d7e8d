"""Bounds requests to the Hugging Face hub, explains those that fail, and checks what arrived.

The hub's cache stores each file once, as `blobs/<hash>`, and snapshots link to it. The hash is SHA-256 for a large
file, and git's SHA-1 for a small one. Verified files are remembered by size and modification time, because hashing
weights takes seconds.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tinylora_jax.files import open_regular, user_cache, write_atomically

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w][\w./-]*)?")
"""An id such as `owner/name`, with a branch, tag or commit after `@` if one is named."""

_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_CHUNK = 2**22
_STALL_S = 20.0  # time without any response after which a request without a limit of its own fails
_MOST_WAIT_S = 60  # longest total time for which the hub may ask to wait
_MOST_CONFLICTS = 20  # huggingface_hub repeats a request after such an answer at once, and without end


class HubError(OSError):
    """The hub did not do what was asked of it; the message says what it answered and what to do."""


def split_revision(source: str) -> tuple[str, str | None]:
    """Splits a hub id from its revision, which is None unless it is named.

    >>> split_revision("Qwen/Qwen2.5-0.5B@main"), split_revision("Qwen/Qwen2.5-0.5B")
    (('Qwen/Qwen2.5-0.5B', 'main'), ('Qwen/Qwen2.5-0.5B', None))
    """
    name, _, revision = source.partition("@")
    return name, revision or None


def join_revision(name: str, revision: str | None) -> str:
    """The inverse of `split_revision`; the branch `main` is the default, and is left out.

    >>> join_revision("Qwen/Qwen2.5-0.5B", "v1"), join_revision("Qwen/Qwen2.5-0.5B", None)
    ('Qwen/Qwen2.5-0.5B@v1', 'Qwen/Qwen2.5-0.5B')
    """
    return name if revision in (None, "main") or not HUB_ID.fullmatch(f"{name}@{revision}") else f"{name}@{revision}"


@contextmanager
def bounded_requests() -> Iterator[None]:
    """Bounds the time of all requests of huggingface_hub inside the `with` block.

    The library sets no time limit for several requests, and waits as long as a rate limit asks, which may be an hour.

    Raises:
      HubError: the hub asks to wait longer, or answers that another operation is in progress again and again.
    """
    from huggingface_hub import get_session

    session, conflicts = get_session(), 0
    limited_since: float | None = None

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {name: _STALL_S if x is None else x for name, x in limits.items()}

    def judge(response: Any) -> None:
        nonlocal limited_since, conflicts
        if response.status_code == 429:
            now, wait_s = time.monotonic(), _asked_wait_s(response.headers)
            limited_since = now if limited_since is None else limited_since  # threads wait at the same time
            if now + wait_s - limited_since > _MOST_WAIT_S:
                raise HubError(_too_many(wait_s))
        conflicts += response.status_code == 409
        if conflicts > _MOST_CONFLICTS:
            raise HubError("the hub keeps answering that another operation is in progress; try again in a few minutes")

    before = session.event_hooks
    session.event_hooks = {
        "request": [*before.get("request", []), limit],
        "response": [*before.get("response", []), judge],
    }
    try:
        yield
    finally:
        session.event_hooks = before


def _asked_wait_s(headers: Any) -> int:
    """The time for which an answer asks to wait, in seconds; 0 if it names none."""
    asked = re.fullmatch(r"\s*(\d{1,9})\s*", headers.get("Retry-After", ""))
    reset = re.search(r";\s*t\s*=\s*(\d{1,9})", headers.get("RateLimit", ""))
    return max(int(match[1]) if match else 0 for match in (asked, reset))


def _too_many(wait_s: int = 0) -> str:
    when = f"in {wait_s} seconds" if wait_s else "in a few minutes"
    return (
        "the hub limits the rate of requests and answered 429 (too many requests);"
        f" run the same command again {when}, or log in with `hf auth login`, which raises the limit"
    )


def causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, the error itself first."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None and len(found) < 8:
        found.append(cause)
    return found


def explain(error: BaseException, what: str, check: str, instead: str = "") -> str:
    """Says in one clause what the hub answered, and in another what to do.

    Args:
      error: error of huggingface_hub or of a library that uses it.
      what: noun for what was wanted, such as `model`.
      check: nouns for what may be wrong in the request, such as `the id`.
      instead: advice that needs no hub, such as `use a local folder`; empty if there is none.
    """
    from huggingface_hub import errors

    chain, otherwise = causes(error), f", or {instead}" if instead else ""
    first = lambda *kinds: next((each for each in chain if isinstance(each, kinds)), None)
    if (own := first(HubError)) is not None:
        return str(own)
    if first(errors.OfflineModeIsEnabled):
        lacks = ", and the cache lacks it" if instead else ""
        return f"HF_HUB_OFFLINE is set{lacks}; unset it{otherwise}"
    if first(errors.GatedRepoError) or any("is a gated dataset" in str(each) for each in chain):
        return (
            f"it is gated; accept the {what}'s licence on its page at huggingface.co, then log in with `hf auth login`"
            " or set HF_TOKEN to a token of that account"
        )
    if first(errors.RevisionNotFoundError):
        return f"the hub has the {what}, but not this revision; name a branch, a tag or a full commit hash after @"
    if first(errors.RepositoryNotFoundError):
        return (
            f"the hub has no such {what}, or hides it from this account; check the id; for a private {what} log in with"
            " `hf auth login`, or set HF_TOKEN"
        )
    status = next((each.response.status_code for each in chain if isinstance(each, errors.HfHubHTTPError)), None)
    if status is not None:
        return _explain_status(status, check, otherwise)
    if any("Consistency check failed" in str(each) for each in chain):
        return "a file arrived with another size than the hub states; run the same command again to download it again"
    if any(type(each).__name__ == "JSONDecodeError" for each in chain):
        return (
            "the response did not come from the hub but, for example, from a proxy or a network's login page; open"
            f" https://huggingface.co in a browser{otherwise}"
        )
    if first(errors.HTTPError, ConnectionError):
        name = type(first(errors.HTTPError, ConnectionError)).__name__
        broke = "the hub cannot be reached" if name in ("ConnectError", "ConnectTimeout") else "the connection broke"
        return f"{broke} ({name}); check the network and run the same command again{otherwise}"
    said = (str(error).strip().splitlines() or ["no detail"])[0].rstrip(".")
    return f"{said:.500}; check {check}{otherwise}"


def _explain_status(status: int, check: str, otherwise: str) -> str:
    """Says what a status means; `otherwise` begins with a comma, or is empty."""
    if status == 429:
        return _too_many()
    if status == 401:
        return "the hub does not accept this login (401); log in again with `hf auth login`, or set a valid HF_TOKEN"
    if status == 403:
        return "the hub refuses access with this token (403); use a token with the permission that this needs"
    if status >= 500:
        return f"the hub has a problem of its own (status {status}); run the same command again later{otherwise}"
    return f"the hub answered with status {status}; check {check}{otherwise}"


def check_blobs(snapshot: Path) -> None:
    """Raises an error if a file of a snapshot does not have the hash that the hub states.

    Args:
      snapshot: folder in the cache; its subfolders are checked too. A file that is not a link into `blobs` passes.

    Raises:
      ValueError: a hash differs; the message names the file and the blob to delete.
    """
    for path in sorted(snapshot.rglob("*")):
        blob = path.resolve()
        if not path.is_symlink() or blob.parent.name != "blobs" or not _BLOB.fullmatch(blob.name):
            continue
        if not blob.is_file():
            continue  # `check_links` reports broken links
        about = blob.stat()
        stamp = f"{about.st_size} {about.st_mtime_ns}"
        known = user_cache() / "verified" / blob.name
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
