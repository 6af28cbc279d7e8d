"""Finds settings that fit the devices' memory: the most completions at once, and the smallest split.

Nothing is compiled. The prediction adds the sizes of weights, caches and scores, and leaves a tenth of the memory for
everything else.
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
from tinylora_jax.models import KVCache, MeshSpec, ModelConfig, heads_axes, param_shardings

ROOM = 0.9  # share of memory that a prediction may fill
_TRAINED_BYTES = 16  # bytes per trained parameter: value, gradient and Adam's two moments in float32
_CPU_SLOTS = 32  # enough to keep a CPU busy; more slots wait for the longest completion without being faster


@dataclass(frozen=True)
class Fit:
    """The placement of a run on its devices.

    Attributes:
      mesh: sizes of the mesh, all positive.
      slots: number of completions decoded at once; 0 for the whole batch.
      num_bytes: predicted memory per device during decoding, in bytes; None if device memory is unknown.
    """

    mesh: MeshSpec
    slots: int
    num_bytes: float | None = None


@lru_cache(maxsize=2)  # a model and its teacher
def open_model(source: str, dtype: str, quantize: str) -> OpenedModel:
    """Cached `open_pretrained`, used for the choice of a mesh and for the run."""
    return open_pretrained(source, jnp.dtype(dtype), quantize=quantize)


def with_storage(config: ConfigDict, quantize: str) -> ConfigDict:
    """A copy of a run configuration with the storage that its model really has, which a quantized file determines."""
    config = config.copy_and_resolve_references()
    config.quantize = quantize
    return config


def rollout_bytes(
    model: ModelConfig,
    config: ConfigDict,
    mesh: Mesh,
    slots: int,
    joined: bool,
    num_prompts: int | None = None,
    refilled: bool = False,
) -> float:
    """Predicts the bytes per device during decoding.

    Args:
      model: architecture of the model.
      config: run configuration.
      mesh: device mesh, of real or hypothetical devices.
      slots: number of completions decoded at once.
      joined: whether decoding joins unsplit kernels of the blocks, which copies them; not on a TPU.
      num_prompts: number of prompts of the batch; None for those of a training step.
      refilled: whether completions wait for a slot.
    """
    weights, blocks = _weight_bytes(model, config.dtype, config.quantize, mesh)
    copies = blocks if joined and mesh.size == mesh.shape["data"] else 0.0
    trained = _TRAINED_BYTES * _num_trained(model, config)
    head = head_bytes(model, jnp.dtype(config.dtype), config.quantize_cache)
    cache = cache_bytes(model, mesh, slots, config.max_prompt_tokens + config.max_new_tokens, head)
    prompts = cache_bytes(model, mesh, num_prompts or config.batch_size, config.max_prompt_tokens, head)
    # XLA's TPU compiler lays int8 out differently for refilling and for decoding, and so keeps a second copy: with 32
    # slots for 64 completions, rollouts of Llama-3.1-8B and Qwen3-8B took 3.3 and 3.7 GB more.
    cache *= 2 if refilled and config.quantize_cache != "none" and not joined else 1
    scores = 8.0 * slots * model.vocab_size / mesh.size
    return weights + _teacher_bytes(config, mesh) + copies + trained + cache + 2 * prompts + scores


@lru_cache(maxsize=32)  # the choice of slots asks for the same weights many times
def _weight_bytes(model: ModelConfig, dtype: str, quantize: str, mesh: Mesh) -> tuple[float, float]:
    """Bytes per device of all weights of a model, and of those of its blocks."""
    shapes = param_shapes(model, jnp.dtype(dtype), quantize)
    places = param_shardings(mesh, shapes)
    return placed_bytes(shapes, places), placed_bytes(shapes["layers"], places["layers"])


def _teacher_bytes(config: ConfigDict, mesh: Mesh) -> float:
    """Bytes per device of the weights of `config.teacher`, which stay in memory during rollouts; 0 without one."""
    if not config.teacher:
        return 0.0
    teacher = open_model(config.teacher, config.dtype, config.quantize).abstract.config
    return _weight_bytes(teacher, config.dtype, config.quantize, mesh)[0]


def _num_trained(model: ModelConfig, config: ConfigDict) -> int:
    """Number of trained parameters in full fine-tuning; 0 for other methods, which train few."""
    if config.method != "full":
        return 0
    shapes = param_shapes(model, jnp.dtype(config.dtype), config.quantize)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def placed_bytes(shapes: Any, places: Any) -> float:
    """Bytes per device of a tree of shapes."""
    own = lambda x, place: math.prod(place.shard_shape(x.shape)) * num_bytes(x.dtype)
    return float(sum(jax.tree.leaves(jax.tree.map(own, shapes, places))))


def num_bytes(dtype: jnp.dtype) -> float:
    """Bytes per number on an accelerator, where two int4 share one."""
    return 0.5 if dtype == jnp.int4 else float(dtype.itemsize)


def head_bytes(model: ModelConfig, dtype: jnp.dtype, quantize_cache: str) -> int:
    """Bytes of one head of a cached key or value, with its scale if it is quantized."""
    cache = jax.eval_shape(lambda: KVCache.empty(replace(model, num_layers=1), 1, 1, dtype, quantize_cache))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache)) // (2 * model.num_kv_heads)


def cache_bytes(model: ModelConfig, mesh: Mesh, rows: int, positions: int, head: int) -> float:
    """Bytes per device of cached keys and values for a number of rows and positions, of which a head takes `head`."""
    whole = 2 * model.num_layers * rows * positions * model.num_kv_heads * head
    split = heads_axes(mesh, rows, model.num_kv_heads)
    return whole / math.prod(mesh.shape[axis] for axes in split for axis in axes)


def fit(
    model: ModelConfig,
    config: ConfigDict,
    spec: MeshSpec,
    devices: Sequence[Any],
    memory: float | None,
    joined: bool = False,
    members: int = 1,
) -> Fit:
    """Chooses the mesh and the slots of a run: the config's values, or the best fit for `auto` (0).

    The best fit is the smallest split of the weights with which all completions of a training step fit at once; if
    there is none, it is the split with which the most completions fit. The slots also fit the batches of evaluations.

    Args:
      model: architecture of the model.
      config: run configuration.
      spec: mesh sizes from the config.
      devices: devices of the run, real or hypothetical.
      memory: memory of a device in bytes; None if unknown.
      joined: whether decoding joins kernels, see `rollout_bytes`.
      members: number of members of a sweep, whose batches are decoded together.
    """
    if memory is None:
        return Fit(spec.resolve(len(devices)), config.slots or _CPU_SLOTS)

    def slots_on(mesh: Mesh, prompts: int, samples: int) -> tuple[bool, int, float]:
        """Whether a batch fits, with the most slots (else with the fewest), and the bytes it takes."""
        rows, found = prompts * samples, []
        for slots in [min(config.slots, rows)] if config.slots else _halves(rows, mesh.size // mesh.shape["tensor"]):
            num_bytes = rollout_bytes(model, config, mesh, slots, joined, prompts, slots < rows)
            found.append((num_bytes <= ROOM * memory, slots, num_bytes))
        fitting = [way for way in found if way[0]]
        return max(fitting) if fitting else min(found, key=lambda way: way[2])

    prompts, ways = config.batch_size * members, []
    for tensor in _splits(spec, len(devices)):
        resolved = replace(spec, tensor=tensor).resolve(len(devices))
        fits, slots, num_bytes = slots_on(resolved.make(devices), prompts, config.samples)
        ways.append((fits, slots, -tensor, -num_bytes, resolved))
    # Prefer the most slots that fit, then the smallest split. If nothing is predicted to fit, the choice with the least
    # memory has the best chance, and the device reports what is missing.
    fitting = [way for way in ways if way[0]]
    _, slots, _, negative, resolved = max(fitting) if fitting else max(ways, key=lambda way: way[3])
    limits = [slots] if slots < prompts * config.samples else []
    asked = max(1, config.eval_samples)
    _, others, _ = slots_on(resolved.make(devices), config.eval_batch_size, asked)
    limits += [others] if others < config.eval_batch_size * asked else []
    return Fit(resolved, config.slots or min(limits, default=0), -negative)


def _splits(spec: MeshSpec, devices: int) -> list[int]:
    """The possible sizes of `tensor`, smallest first."""
    if spec.tensor or spec.data:
        return [spec.resolve(devices).tensor]
    spare = devices // spec.fsdp
    return [n for n in range(1, spare + 1) if spare % n == 0] or [1]


def _halves(rows: int, least: int) -> Iterator[int]:
    """All rows, half of them, a quarter, …, but at least one per device that shares them."""
    yield rows
    while rows % 2 == 0 and rows // 2 >= max(1, least):
        rows //= 2
        yield rows
