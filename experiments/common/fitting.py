"""Finds what fits the devices' memory: the most completions at once, and the smallest split.

Nothing is compiled for it. The prediction is the arithmetic of weights, caches and scores, of which a tenth of the
memory is left to all that is small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from tinylora_jax.io import OpenedModel, open_pretrained
from tinylora_jax.io.hf import param_shapes
from tinylora_jax.models import MeshSpec, ModelConfig, heads_axes, param_shardings

ROOM = 0.9  # of the memory: what a prediction may fill
_TRAINED_BYTES = 16  # of a number with its gradient and Adam's two moments, all float32
_CPU_SLOTS = 32  # a CPU is busy with so many: more of them wait for the longest without being any faster


@dataclass(frozen=True)
class Fit:
    """How a run lies on its devices.

    Attributes:
      mesh: sizes of the mesh, all of them positive.
      slots: completions decoded at once; 0 is all of a batch.
      num_bytes: predicted memory of one device while it decodes; None where the memory is not known.
    """

    mesh: MeshSpec
    slots: int
    num_bytes: float | None = None


@lru_cache(maxsize=1)
def open_model(source: str, dtype: str) -> OpenedModel:
    """`open_pretrained`, once for the choice of a mesh and for the run."""
    return open_pretrained(source, jnp.dtype(dtype))


def rollout_bytes(model: ModelConfig, config: ConfigDict, mesh: Mesh, slots: int, joined: bool) -> float:
    """Bytes of one device while it decodes.

    Args:
      model: architecture.
      config: run configuration.
      mesh: devices, existing or not.
      slots: completions decoded at once.
      joined: whether the blocks' kernels are joined for decoding where they are whole, which copies them.
    """
    size = jnp.dtype(config.dtype).itemsize
    shapes = param_shapes(model, jnp.dtype(config.dtype))
    weights = placed_bytes(shapes, param_shardings(mesh, shapes))
    whole = mesh.size == mesh.shape["data"]
    copies = placed_bytes(shapes["layers"], param_shardings(mesh, shapes)["layers"]) if joined and whole else 0.0
    trained = _TRAINED_BYTES * _num_trained(config, shapes)
    cache = cache_bytes(model, mesh, slots, config.max_prompt_tokens + config.max_new_tokens, size)
    prompts = cache_bytes(model, mesh, config.batch_size, config.max_prompt_tokens, size)
    scores = 8.0 * slots * model.vocab_size / mesh.size
    return weights + copies + trained + cache + 2 * prompts + scores


def _num_trained(config: ConfigDict, shapes: Any) -> int:
    """Numbers trained, as far as they are many: those of full fine-tuning."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) if config.method == "full" else 0


def placed_bytes(shapes: Any, places: Any) -> float:
    """Bytes of a tree of shapes on one device."""
    own = lambda x, place: math.prod(place.shard_shape(x.shape)) * x.dtype.itemsize
    return float(sum(jax.tree.leaves(jax.tree.map(own, shapes, places))))


def cache_bytes(model: ModelConfig, mesh: Mesh, rows: int, positions: int, itemsize: int) -> float:
    """Bytes on one device of the keys and values of so many rows and positions."""
    whole = 2 * model.num_layers * rows * positions * model.num_kv_heads * model.head_dim * itemsize
    split = heads_axes(mesh, rows, model.num_kv_heads)
    return whole / math.prod(mesh.shape[axis] for axes in split for axis in axes)


def fit(
    model: ModelConfig,
    config: ConfigDict,
    spec: MeshSpec,
    devices: Sequence[Any],
    memory: float | None,
    joined: bool = False,
) -> Fit:
    """The mesh and the slots of a run: what its config says, and what fits best where it says `auto` (0).

    The smallest split of the weights with which all completions of a batch fit at once; if none is enough, the one
    with which the most do.

    Args:
      model: architecture.
      config: run configuration.
      spec: sizes of its mesh.
      devices: those of the run, existing or not.
      memory: bytes of one of them; None: not known.
      joined: see `rollout_bytes`.
    """
    if memory is None:
        return Fit(spec.resolve(len(devices)), config.slots or _CPU_SLOTS)
    rows, found = config.batch_size * config.samples, []
    for tensor in _splits(spec, len(devices)):
        resolved = replace(spec, tensor=tensor).resolve(len(devices))
        mesh = resolved.make(devices)
        for slots in [min(config.slots, rows)] if config.slots else _halves(rows, mesh.size // tensor):
            num_bytes = rollout_bytes(model, config, mesh, slots, joined)
            found.append((num_bytes <= ROOM * memory, slots, -tensor, -num_bytes, resolved))
    # Of what fits the most slots, then the smallest split. If nothing is predicted to fit, the least memory has the
    # best chance, and the device says what is missing.
    fitting = [way for way in found if way[0]]
    _, slots, _, negative, resolved = max(fitting) if fitting else max(found, key=lambda way: way[3])
    return Fit(resolved, config.slots or (slots if slots < rows else 0), -negative)


def _splits(spec: MeshSpec, devices: int) -> list[int]:
    """The sizes of `tensor` to choose from, the smallest first."""
    if spec.tensor or spec.data:
        return [spec.resolve(devices).tensor]
    spare = devices // spec.fsdp
    return [n for n in range(1, spare + 1) if spare % n == 0] or [1]


def _halves(rows: int, least: int) -> Iterator[int]:
    """All rows, a half, a quarter, …, but not fewer than there are devices to share them."""
    yield rows
    while rows % 2 == 0 and rows // 2 >= max(1, least):
        rows //= 2
        yield rows
