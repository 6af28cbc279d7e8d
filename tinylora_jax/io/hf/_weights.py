"""The parameter tree: names and shapes, and conversion of external tensors to its leaves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike

from tinylora_jax.adapters.quantized import dense, quantized_shape
from tinylora_jax.io.hf._lazy import LazyTensor as LazyTensor
from tinylora_jax.io.hf._lazy import check_floating
from tinylora_jax.io.hf._quantizing import is_map, quantized_leaf, stored_leaf, warn_of_outliers
from tinylora_jax.models.config import ModelConfig
from tinylora_jax.multihost import to_host

Path = tuple[str | int, ...]
Placement = Callable[[Any], Any]
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_MOST_LISTED = 200
_READERS = max(4, min(8, os.cpu_count() or 1))  # number of threads, each reading one tensor


def parameter_names(config: ModelConfig) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """Maps the Hugging Face name of every parameter to its path and shape in the tree.

    Only this function defines names and shapes. Two-dimensional `kernel`s are transposed relative to torch ([in, out]
    here); all other parameters keep their stored layout.
    """
    width, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    projections = {
        ("self_attn", "q_proj"): (width, q, config.qkv_bias),
        ("self_attn", "k_proj"): (width, kv, config.qkv_bias),
        ("self_attn", "v_proj"): (width, kv, config.qkv_bias),
        ("self_attn", "o_proj"): (q, width, config.o_bias),
        ("mlp", "gate_proj"): (width, inner, config.mlp_bias),
        ("mlp", "up_proj"): (width, inner, config.mlp_bias),
        ("mlp", "down_proj"): (inner, width, config.mlp_bias),
    }
    norms: dict[tuple[str, ...], int] = {("input_layernorm",): width, ("post_attention_layernorm",): width}
    if config.qk_norm:
        norms |= {("self_attn", "q_norm"): config.head_dim, ("self_attn", "k_norm"): config.head_dim}
    names: dict[str, tuple[Path, tuple[int, ...]]] = {
        _EMBEDDING: (("embed_tokens", "embedding"), (config.vocab_size, width)),
        "model.norm.weight": (("norm", "scale"), (width,)),
    }
    for layer in range(config.num_layers):
        for parts, size in norms.items():
            names[_name(layer, parts, "weight")] = (("layers", layer, *parts, "scale"), (size,))
        for parts, (fan_in, fan_out, bias) in projections.items():
            names[_name(layer, parts, "weight")] = (("layers", layer, *parts, "kernel"), (fan_in, fan_out))
            if bias:
                names[_name(layer, parts, "bias")] = (("layers", layer, *parts, "bias"), (fan_out,))
    if not config.tie_embeddings:
        names[_HEAD] = (("lm_head", "kernel"), (width, config.vocab_size))
    return names


def param_shapes(config: ModelConfig, dtype: DTypeLike, quantize: str = "none") -> dict[str, Any]:
    """Builds the parameter tree with a `jax.ShapeDtypeStruct` for every leaf.

    Args:
      config: architecture of the model.
      dtype: floating-point dtype of the weights.
      quantize: `none`, `int8` or `int4`: storage of the seven linear maps of each block. The embedding, the head, norms
        and biases keep their dtype.

    Raises:
      ValueError: the quantization is unknown, or does not fit the sizes.
    """
    make = lambda path, shape: quantized_shape(shape, quantize if is_map(path) else "none", dtype)
    return _nest({path: make(path, shape) for path, shape in parameter_names(config).values()})


def build_tree(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    dtype: DTypeLike,
    place: Placement | None = None,
    quantize: str = "none",
) -> dict[str, Any]:
    """Checks all names and shapes, then reads a parameter tree, a few tensors at a time.

    Host memory holds only the tensors or shards being read, and those parts of the result that are placed on the host:
    never a second copy of the model.

    Args:
      config: architecture that the tensors must match.
      tensors: tensors of a file, by Hugging Face name.
      dtype: floating-point dtype of every leaf.
      place: function from a tree of `jax.ShapeDtypeStruct`s to a tree of shardings; each process sends its devices
        their shards of each tensor as it is read. None uses the default device.
      quantize: storage of the linear maps, see `param_shapes`. Each is rounded to `dtype`, then quantized, alone. Maps
        with `integers` keep them, and must have this storage.

    Returns:
      The nested tree; the keys of `layers` are integers.

    Raises:
      ValueError: tensors are missing, unexpected or of the wrong shape; lists all of them.
    """
    with reading_tree(config, tensors, dtype, place, quantize=quantize) as reading:
        return reading.result()


class Reading:
    """A parameter tree that threads are reading; created by `reading_tree`.

    Args:
      leaves: future of each leaf, by path.
      checked: future that completes when all further checks of the tensors have passed.
      source: name of the file, with which messages begin.
      coarse: number of channels in `coarse_channels`, by name of the quantized tensor; filled while reading.
    """

    def __init__(
        self, leaves: Mapping[Path, Future[Any]], checked: Future[None], source: str, coarse: Mapping[str, int]
    ):
        self._leaves, self._checked, self._source, self._coarse = leaves, checked, source, coarse

    def check(self) -> None:
        """Raises any failure so far, without waiting for the rest."""
        with _naming(self._source):
            for future in (self._checked, *self._leaves.values()):
                if future.done():
                    future.result()

    def result(self) -> dict[str, Any]:
        """Waits for all leaves and returns the tree.

        Raises:
          ValueError: a tensor is not floating-point, or does not match the config.
        """
        with _naming(self._source):
            self._checked.result()
            found = {path: leaf.result() for path, leaf in self._leaves.items()}
        warn_of_outliers(self._coarse, self._source)
        return _nest(found)


@contextmanager
def reading_tree(
    config: ModelConfig,
    tensors: Mapping[str, LazyTensor],
    dtype: DTypeLike,
    place: Placement | None = None,
    source: str = "",
    quantize: str = "none",
) -> Iterator[Reading]:
    """Runs `build_tree` in the background inside the `with` block, and stops when the block is left.

    It takes the arguments of `build_tree` and a file name for messages. It checks all names and shapes before reading.
    """
    names = parameter_names(config)
    with _naming(source):
        _check(names, config, tensors)
    abstract = param_shapes(config, dtype, quantize)
    shardings = place(abstract) if place else jax.tree.map(lambda _: None, abstract)
    coarse: dict[str, int] = {}
    readers = ThreadPoolExecutor(_READERS)
    try:
        # Largest first: an embedding takes as long as many layers, so it should not start last.
        jobs = {path: (name, tensors[name], path, shape, dtype) for name, (path, shape) in names.items()}

        def read(path: Path) -> Any:
            if quantize == "none" or not is_map(path):
                return _leaf(*jobs[path], _at(shardings, path))
            name, tensor, *_ = jobs[path]
            if tensor.integers is not None:
                return stored_leaf(tensor.integers, _at(abstract, path), _at(shardings, path))
            leaf, coarse[name] = quantized_leaf(name, tensor, _at(abstract, path), _at(shardings, path))
            return leaf

        order = sorted(jobs, key=lambda path: -math.prod(jobs[path][3]))
        tied = readers.submit(_check_tied_head, config, tensors)
        found = {path: readers.submit(read, path) for path in order}
        yield Reading({path: found[path] for path in jobs}, tied, source, coarse)
    finally:
        readers.shutdown(cancel_futures=True)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Prefixes the message of a `ValueError` with the name of the file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}" if source else str(error)) from error


def name_tensors(
    config: ModelConfig, params: Any, change: Callable[[str, Any], Any] = lambda path, leaf: leaf
) -> dict[str, LazyTensor]:
    """Converts a parameter tree to tensors with Hugging Face names; the inverse of `build_tree`.

    Args:
      config: architecture of the model.
      params: parameter tree of the model.
      change: function of a path such as `layers/3/mlp/up_proj/kernel` and a leaf, applied when the leaf is read.

    Returns:
      Lazy tensors in torch's layout; a tensor is on the host only while it is used.
    """

    def read(path: Path) -> np.ndarray:
        leaf = to_host(dense(change("/".join(map(str, path)), _at(params, path))))
        return leaf.T if path[-1] == "kernel" else leaf

    return {
        name: LazyTensor(_stored(path, shape), partial(read, path))
        for name, (path, shape) in parameter_names(config).items()
    }


def _nest(leaves: Mapping[Path, Any]) -> dict[str, Any]:
    """Builds nested dictionaries from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def _at(tree: Any, path: Path) -> Any:
    return reduce(lambda node, key: node[key], path, tree)


def _name(layer: int, parts: tuple[str, ...], suffix: str) -> str:
    return ".".join(("model.layers", str(layer), *parts, suffix))


def _stored(path: Path, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf in torch."""
    return shape[::-1] if path[-1] == "kernel" else shape


def _check(
    names: Mapping[str, tuple[Path, tuple[int, ...]]], config: ModelConfig, tensors: Mapping[str, LazyTensor]
) -> None:
    missing, wrong = [], []
    for name, (path, shape) in names.items():
        expected = _stored(path, shape)
        if name not in tensors:
            missing.append(f"{name}: missing, expected {expected}")
        elif tuple(tensors[name].shape) != expected:
            wrong.append(f"{name}: expected {expected}, got {tuple(tensors[name].shape)}")
    unexpected = [
        f"{name}: unexpected, got {tuple(tensors[name].shape)}"
        for name in tensors
        # inv_freq is a buffer in old checkpoints; the config determines it.
        if name not in names
        and not name.endswith("rotary_emb.inv_freq")
        and not (config.tie_embeddings and name == _HEAD)
    ]
    lines = [line for group in (missing, wrong, unexpected) for line in _shorten(group)]
    if lines:
        raise ValueError(
            f"weights do not match the config ({len(missing)} missing, {len(wrong)} of the wrong shape, "
            f"{len(unexpected)} unexpected); check that config and weights belong together:\n  " + "\n  ".join(lines)
        )


def _shorten(lines: list[str]) -> list[str]:
    rest = len(lines) - _MOST_LISTED
    return lines if rest <= 0 else [*lines[:_MOST_LISTED], f"... and {rest} more like these"]


def _check_tied_head(config: ModelConfig, tensors: Mapping[str, LazyTensor]) -> None:
    # Transformers does not tie if a tied checkpoint contains a different head: ignoring that would change the model.
    if not config.tie_embeddings or _HEAD not in tensors:
        return
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    if head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read()):
        raise ValueError(
            f"{_HEAD} differs from {_EMBEDDING}, but the config ties them (tie_word_embeddings=true); "
            "set tie_word_embeddings=false in config.json if the separate head is intended"
        )


def _leaf(
    name: str, tensor: LazyTensor, path: Path, shape: tuple[int, ...], dtype: DTypeLike, sharding: Sharding | None
) -> jax.Array:
    transposed = path[-1] == "kernel"

    def leaf(values: np.ndarray) -> np.ndarray:
        check_floating(name, values)
        if transposed:
            values = values.astype(jnp.dtype(dtype), copy=False).T  # rounding and transposing in one step would be slow
        # Copied to a new contiguous buffer: JAX on CPU may alias its input, and a memory-mapped file can change.
        return np.array(values, dtype=jnp.dtype(dtype), order="C")

    if sharding is None or tensor.read_part is None:
        values = leaf(tensor.read())
        if values.shape != shape:
            raise ValueError(f"{name}: expected {shape} after reading, got {values.shape}")
        place = jax.make_array_from_callback
        return jnp.asarray(values) if sharding is None else place(shape, sharding, values.__getitem__)
    shards: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}  # shards on several devices are read once

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in shards:
            shards[key] = leaf(tensor.read_part(index[::-1] if transposed else index))
        return shards[key]

    return jax.make_array_from_callback(shape, sharding, shard)
