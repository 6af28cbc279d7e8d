"""Finds adapters on the Hugging Face hub, by `hub:owner/name`, and uploads their folders."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from tinylora_jax.hub import HUB_ID, HubError, bounded_requests, explain
from tinylora_jax.io.hf._hub import Get, fetch_snapshot

HUB = "hub:"
"""Begins the name of an adapter on the hub, as in `hub:owner/name@revision`."""

OWN_FOLDER = "tinylora"
"""Folder of a repository that holds the adapter in this project's format; PEFT's files are at the top."""

# The files of both formats; others, such as pickles, are never fetched.
_FILES = ("adapter.json", "vector.bin", "factors.safetensors", "training.json")
_PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adapter_folder(place: Path | str, download: bool = True) -> Path:
    """Finds the folder of an adapter: the given one, or a snapshot of `hub:owner/name` or `hub:owner/name@revision`.

    A repository may hold an adapter in this project's format, in the folder `tinylora` or at the top, and in PEFT's
    at the top. This project's format is preferred, because it has the trained numbers themselves.

    Args:
      place: folder, or name on the hub.
      download: whether files that are not in the hub's cache may be downloaded.

    Returns:
      The folder, which is not checked further.

    Raises:
      FileNotFoundError: the name is not a hub id, or its files cannot be downloaded now.
      ValueError: the hash of a cached file is not the hub's.
    """
    text = str(place)
    if not text.startswith(HUB):
        return Path(place)
    source = text.removeprefix(HUB)
    if not HUB_ID.fullmatch(source) or "/" not in source.partition("@")[0] or ".." in source:
        raise FileNotFoundError(
            f"{text!r} is not an adapter on the hub; expected hub:owner/name or hub:owner/name@main"
        )
    snapshot = fetch_snapshot(source, "adapter", "name a local folder", download, _adapter_files)
    folder = snapshot / OWN_FOLDER
    found = folder if (folder / _FILES[0]).is_file() else snapshot
    if not any((found / name).is_file() for name in (_FILES[0], _PEFT_FILES[0])):
        raise FileNotFoundError(
            f"{text!r} holds no adapter: expected {OWN_FOLDER}/{_FILES[0]}, {_FILES[0]} or {_PEFT_FILES[0]} in it"
        )
    return found


def _adapter_files(get: Get) -> Path:
    return get([*_FILES, *_PEFT_FILES, *(f"{OWN_FOLDER}/{name}" for name in _FILES)])


def check_push(repo: str) -> None:
    """Checks what an upload needs, without asking the hub.

    Args:
      repo: id of the repository, `owner/name`.

    Raises:
      HubError: the id is malformed, or there is no token.
    """
    _check_id(repo)
    if get_token() is None:
        raise HubError(f"no token to push to {repo!r} is known; log in with `hf auth login`, or set HF_TOKEN")


def _check_id(repo: str) -> None:
    problem = "" if HUB_ID.fullmatch(repo) and repo.count("/") == 1 and "@" not in repo else "expected <user>/<name>"
    try:
        validate_repo_id(repo)
    except HFValidationError:
        rule = "at most 96 letters, digits, '-', '_' and '.', without '--', '..', .git or a '-' or '.' at either end"
        problem = problem or f"expected {rule}"
    if problem:
        raise HubError(f"{repo!r} is not the id of a repository; {problem}")


def push_folder(folder: Path, repo: str, message: str, private: bool = False) -> str:
    """Uploads a folder to a model repository in one commit; the repository is created if it is absent.

    Either all files arrive or none. The token is the one of `hf auth login` or HF_TOKEN; it is never stored or shown.

    Args:
      folder: folder to upload.
      repo: id of the repository, `owner/name`.
      message: title of the commit.
      private: whether only the owner may see the repository.

    Returns:
      The commit's hash.

    Raises:
      HubError: the files were not uploaded, or a private upload was asked for and the repository is public.
    """
    _check_id(repo)
    api, stage = HfApi(), "nothing was uploaded"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    try:
        with bounded_requests():
            api.create_repo(repo, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise HubError(
                    "it exists and is public, so --private would not hide the files; choose another name, or make it"
                    " private on its settings page"
                )
            stage = "the repository exists, and its files are unchanged"
            commit = api.create_commit(repo, additions, commit_message=message)
    except (OSError, HTTPError, ValueError) as error:
        if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError) and stage.startswith("the repo"):
            stage = f"whether the files arrived is not known: see {api.endpoint}/{repo}"
        why = explain(error, "repository", "the id and the token")
        raise HubError(f"cannot push to {repo!r}: {why}. So far {stage}") from error
    return commit.oid
