"""Estimates run times from the compiler's output, and the lower bounds set by the hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from experiments.aot.chips import Chip
from experiments.aot.hlo import Collective, Kernel
from experiments.aot.programs import Case, Compiled, decoding_state
from experiments.common import fitting
from tinylora_jax.models import heads_axes

_KERNEL_SHARE = 0.5  # share of the peak rate that a Pallas kernel is assumed to reach
_GRID_STEP_S = 0.35e-6  # minimum time of one grid step of a Pallas kernel
# Products of [queries, keys] by [keys or queries, head_dim] in each of splash attention's kernels.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dkv": 4, "splash_mha_dq": 3}
_CAUSAL = 0.6  # share of blocks that are computed: half of them, and the diagonal


@dataclass(frozen=True)
class Seconds:
    """Time estimates of one program.

    Attributes:
      xla: seconds from XLA's cycles and the clock rate, with loops multiplied out, without communication.
      kernels: seconds of kernels without an XLA estimate, at half the chip's limits.
      exchange: seconds of collectives at the links' bandwidth.
      overlapped: whether communication overlaps computation. It does in an update, where a layer's weights are fetched
        during other computation; a decoding step waits for each exchange.
    """

    xla: float
    kernels: float
    exchange: float
    overlapped: bool

    @property
    def total(self) -> float:
        """The total time in seconds."""
        own = self.xla + self.kernels
        return max(own, self.exchange) if self.overlapped else own + self.exchange


def kernel_seconds(kernel: Kernel, chip: Chip) -> float:
    """Estimates the seconds of all rounds of a kernel from its shapes."""
    moved = 2 * kernel.result_bytes / (chip.bandwidth * _KERNEL_SHARE)
    for name, products in _PRODUCTS.items():
        if kernel.name.startswith(name):
            rows, heads, length, head_dim = max((s for s in kernel.shapes if len(s) == 4), key=math.prod)
            flops = 2 * products * rows * heads * length**2 * head_dim * _CAUSAL
            return kernel.rounds * max(flops / (chip.flops * _KERNEL_SHARE), moved)
    if kernel.name.startswith("write_entry"):  # its result is the cache, but it touches only one tile per row
        return kernel.rounds * kernel.shapes[0][0] * _GRID_STEP_S
    return kernel.rounds * moved


def exchange_seconds(collective: Collective, chip: Chip) -> float:
    """Estimates the seconds of a collective around a ring."""
    return (2 if collective.kind == "all-reduce" else 1) * collective.num_bytes / chip.ici


def seconds(compiled: Compiled, chip: Chip) -> Seconds:
    """Estimates the run time of a compiled program."""
    cost = compiled.cost
    return Seconds(
        xla=cost.cycles / chip.clock,
        kernels=sum(kernel_seconds(k, chip) for k in cost.kernels),
        exchange=sum(exchange_seconds(c, chip) for c in cost.collectives),
        overlapped=compiled.name.startswith("update"),
    )


def _bytes_here(tree) -> float:
    """Bytes per device of a tree of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    return float(sum(math.prod(x.sharding.shard_shape(x.shape)) * fitting.num_bytes(x.dtype) for x in leaves))


def weight_bytes(case: Case) -> float:
    """Bytes of weights and factors that a device reads per token: all except the embedding table."""
    policy = case.policy()
    params = policy.params if case.model.tie_embeddings else {**policy.params, "embed_tokens": ()}
    return _bytes_here((params, policy.factors))


def cache_bytes(case: Case, positions: int) -> float:
    """Bytes per device of keys and values for a number of positions in every slot."""
    head = fitting.head_bytes(case.model, case.dtype, case.config.quantize_cache)
    return fitting.cache_bytes(case.model, case.mesh, case.slots, positions, head)


def decode_floor(case: Case, chip: Chip) -> float:
    """Seconds to read the weights and the whole cache once, as a decoding step of plain XLA does."""
    positions = case.config.max_prompt_tokens + case.config.max_new_tokens
    return (weight_bytes(case) + cache_bytes(case, positions)) / chip.bandwidth


def wide_copies(compiled: Compiled, case: Case) -> list[tuple[int, ...]]:
    """The floating-point arrays of the size of a layer's whole int8 cache that a program writes.

    Returns:
      Their shapes, without axes of size 1; none if the cache is not quantized.
    """
    if case.config.quantize_cache == "none":
        return []
    rows, capacity, kv_heads, head_dim = decoding_state(case).slots.cache.keys[0].shape
    split = heads_axes(case.mesh, rows, kv_heads)
    here = rows * capacity * head_dim // math.prod(case.mesh.shape[axis] for axes in split for axis in axes)
    sizes = {here * kv_heads, here * case.model.num_heads}  # as stored, or repeated for every query head
    return sorted(shape for _, shape in compiled.cost.written if math.prod(shape) in sizes)


def weights_gathered(compiled: Compiled, case: Case) -> int:
    """Bytes of all-gathers whose result has the shape of a kernel or an embedding."""
    sizes = {tuple(leaf.shape) for leaf in jax.tree.leaves(case.policy().params) if len(leaf.shape) == 2}
    sizes |= {shape[::-1] for shape in sizes}

    def is_weight(shape: str) -> bool:
        dims = [int(d) for d in shape[shape.index("[") + 1 : -1].split(",") if d]
        return tuple(d for d in dims if d != 1) in sizes

    gathers = (c for c in compiled.cost.collectives if c.kind == "all-gather")
    return sum(c.num_bytes for c in gathers if any(is_weight(shape) for shape in c.shapes))
