"""Folders in the Hugging Face layout, local or from the hub: JSON and safetensors, no code."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

# The HTTP library of huggingface_hub depends on its major version; its errors module shows which one is in use.
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
)

from tinylora_jax.files import expand, kind_of, open_regular, parse_json
from tinylora_jax.hub import HUB_ID, bounded_requests, check_blobs, explain, split_revision
from tinylora_jax.io.hf._safetensors import open_safetensors
from tinylora_jax.io.hf._weights import LazyTensor

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SMALL = ["*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]  # all files except the weights
MAX_JSON_BYTES = 2**24  # 100 times a large model's index; parsed JSON takes up to 30 times its size
MAX_TOKENIZER_BYTES = 2**26  # the largest known ones have 33 MB


class NotInCacheError(FileNotFoundError):
    """A model is not in the cache, and downloading is not allowed."""


def fetch_folder(source: str, download: bool = True) -> Path:
    """Finds the folder of a model: `source` itself if it is a folder, else a snapshot of that hub id.

    Args:
      source: folder or hub id; a revision follows the id after `@`.
      download: whether files that are not in the hub's cache may be downloaded.

    Raises:
      NotInCacheError: the hub id is not in the cache, and downloading is not allowed.
      FileNotFoundError: the source is neither a folder nor a hub id that can be downloaded now.
      ValueError: the hash of a cached file is not the hub's.
    """
    folder = expand(source)
    if source and folder.is_dir():
        return folder
    if folder.exists() or not HUB_ID.fullmatch(source) or ".." in source:
        raise FileNotFoundError(
            f"{source!r} is not a model: expected a folder with config.json, "
            "a .gguf file or a hub id like 'Qwen/Qwen2.5-0.5B'"
        )
    instead = "use a local folder with config.json and model.safetensors"
    return fetch_snapshot(source, "model", instead, download, _model_files)


Get = Callable[..., Path]


def fetch_snapshot(source: str, what: str, instead: str, download: bool, files: Callable[[Get], Path]) -> Path:
    """Fetches files of a repository into the hub's cache, and compares them with the hashes that the hub states.

    Args:
      source: hub id; a revision follows the id after `@`.
      what: noun for messages, such as `model`.
      instead: advice that needs no hub, such as `use a local folder`.
      download: whether files that are not in the cache may be downloaded.
      files: function that is given `get(patterns, **options)`, calls it at least once and returns the last folder.

    Raises:
      NotInCacheError: a file is not in the cache, and downloading is not allowed.
      FileNotFoundError: the files cannot be downloaded now.
      ValueError: the hash of a cached file is not the hub's.
    """
    name, revision = split_revision(source)

    def get(patterns: Sequence[str], **options: Any) -> Path:
        options = {"revision": revision, "local_files_only": not download} | options
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))

    try:
        with bounded_requests():
            snapshot = files(get)
    except (OSError, EntryNotFoundError, HFValidationError, HTTPError, ValueError) as error:
        if not download and isinstance(error, LocalEntryNotFoundError):
            raise NotInCacheError(f"{source!r} is not in the cache of the Hugging Face hub") from error
        raise FileNotFoundError(
            f"cannot get {source!r} from the Hugging Face hub: {explain(error, what, 'the id', instead)}"
        ) from error
    if not snapshot.is_dir():  # the hub matched no file
        raise FileNotFoundError(
            f"{source!r} on the Hugging Face hub holds none of the files that are read here; {instead}"
        )
    check_blobs(snapshot)
    return snapshot


def _model_files(get: Get) -> Path:
    """Fetches first the small files, then only the weights that `load_pretrained` reads.

    Repositories may hold other formats of the same weights, in subfolders or next to them
    (`consolidated.safetensors`), and pickles, which are never fetched.
    """
    top = {"ignore_patterns": ["*/*"]}
    folder = get([*_SMALL, _SINGLE], **top)
    if (folder / _SINGLE).is_file() or not (folder / _INDEX).is_file():
        return folder
    files = sorted({re.sub(r"([*?[])", r"[\1]", file) for file in _weight_map(folder).values()})
    return get(files, revision=folder.name, **top)  # the folder of a snapshot is named after its commit


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Reads the object in a JSON file of at most `most` bytes.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is too large or not a single JSON object.
    """
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"{path} is missing; expected a folder in the Hugging Face layout (config.json, *.safetensors)"
        ) from error
    if len(data) > most:
        raise ValueError(f"{path}: expected a JSON file of at most {most} bytes, got {path.stat().st_size}")
    try:
        value = parse_json(data)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a JSON object, got a file that does not parse ({error}); download it again"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def open_tensors(folder: Path, integers: bool = False) -> Iterator[dict[str, LazyTensor]]:
    """Opens a folder's safetensors, single or sharded; tensors are readable inside the `with` block.

    Args:
      folder: folder in the Hugging Face layout.
      integers: whether the files may hold integers, as a quantized model does.

    Yields:
      Lazy tensors by name.

    Raises:
      FileNotFoundError: there are no safetensors, or the index names an absent file.
      ValueError: a file is truncated or corrupt, or the index does not match the files.
    """
    shards = _shards(folder)
    with ExitStack() as stack:
        tensors: dict[str, LazyTensor] = {}
        for file, names in shards.items():
            found = stack.enter_context(open_safetensors(folder / file, integers))
            if absent := sorted(set(names or ()) - set(found)):
                raise ValueError(
                    f"{folder / _INDEX} places {', '.join(absent[:8])} in {file}, "
                    f"which lacks {len(absent)} of them; download the model again"
                )
            if twice := sorted(set(tensors) & set(found)):
                raise ValueError(f"{folder / file} repeats tensors of another shard: {', '.join(twice[:8])}")
            tensors |= found
        yield tensors


def check_links(folder: Path) -> None:
    """Raises an error for a model folder with broken links, or with pipes, devices or folders in place of files.

    A broken optional file would count as absent, which may change prompts; reading a pipe would block.

    Raises:
      FileNotFoundError: a link is broken; the message names the links.
      ValueError: a path is not a file; the message names it.
    """
    patterns = [*_SMALL, "*.safetensors"]
    paths = [path for path in folder.iterdir() if any(fnmatch.fnmatch(path.name, each) for each in patterns)]
    for path in sorted(paths):
        if path.exists() and not path.is_file():
            raise ValueError(f"{path} is {kind_of(path.stat().st_mode)}, expected a file; download the model again")
    broken = sorted(path.name for path in paths if not path.exists())
    if broken:
        raise FileNotFoundError(
            f"{folder}: {', '.join(broken[:8])} links to a file that is absent; download the model again, or remove"
            " the link"
        )


def _weight_map(folder: Path) -> dict[str, str]:
    """Reads the index of a sharded model, which maps tensor names to file names.

    Raises:
      ValueError: the index is not such a table.
    """
    weight_map = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / _INDEX}: expected an object 'weight_map' of tensor name to file name")
    for name, file in weight_map.items():
        # Only the name is checked: in the hub's cache every file is a link that leaves the snapshot folder.
        if not isinstance(file, str) or not re.fullmatch(r"[\w.-]+\.safetensors", file):
            raise ValueError(
                f"{folder / _INDEX}: expected the name of a .safetensors file "
                f"in the same folder for {name:.100}, got {file!r:.100}"
            )
    return weight_map


def _shards(folder: Path) -> dict[str, tuple[str, ...] | None]:
    """Maps file names to the tensors listed for them in the index; None without an index."""
    if (folder / _SINGLE).is_file():
        return {_SINGLE: None}
    if not (folder / _INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is never loaded; convert it to safetensors" if pickles else ""
        raise FileNotFoundError(f"{folder} holds no weights: expected {_SINGLE} or {_INDEX}{hint}")
    shards: dict[str, list[str]] = {}
    for name, file in _weight_map(folder).items():
        shards.setdefault(file, []).append(name)
    absent = sorted(file for file in shards if not (folder / file).is_file())
    if absent:
        raise FileNotFoundError(
            f"{folder / _INDEX} names files that are absent: {', '.join(absent)}; download the model again"
        )
    return {file: tuple(names) for file, names in shards.items()}


def token_ids(value: Any) -> tuple[int, ...]:
    """Reads the ids in a config field that holds an id, a list of ids or null.

    >>> token_ids([2, 7]), token_ids(2), token_ids(None)
    ((2, 7), (2,), ())
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    wrong = [item for item in values if not isinstance(item, int) or isinstance(item, bool) or item < 0]
    if wrong:
        raise ValueError(f"expected token ids (non-negative integers), got {wrong!r:.80}")
    return tuple(values)


def stop_ids(folder: Path) -> tuple[int, ...]:
    """Reads the end-of-sequence ids from `generation_config.json` and `config.json`."""
    found: list[int] = []
    for file in ("generation_config.json", "config.json"):
        path = folder / file
        values: Mapping[str, Any] = read_json(path) if path.is_file() else {}
        try:
            found += token_ids(values.get("eos_token_id"))
        except ValueError as error:
            raise ValueError(f"{path}: eos_token_id: {error}") from error
    return tuple(found)
