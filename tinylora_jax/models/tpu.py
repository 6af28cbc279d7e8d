"""Pallas kernels for TPUs, which avoid slow scatters and attention scores in memory.

The platform is taken from the surrounding mesh, so programs can be compiled for a TPU on a machine without one.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from tinylora_jax.models.cache import Entries, stored_as
from tinylora_jax.models.sharding import over_heads

_LANES = 128


def on_tpu() -> bool:
    """Whether the program being traced will run on a TPU."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform == "tpu"
    return jax.default_backend() == "tpu"


def can_write(keys: Entries, k: jax.Array) -> bool:
    """Whether `write_entry` applies: one new position per row, in a cache of whole tiles."""
    return k.shape[1] == 1 and keys.shape[1] % _LANES == 0


class _Tiles(NamedTuple):
    """How an array of the cache lies in tiled memory.

    Attributes:
      order: axes of the array in the layout that XLA chooses.
      shape: shape of a row in this layout; scales have no axis of size 1.
      axis: axis of the positions in that shape.
      size: number of positions in a tile.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int
    size: int

    @classmethod
    def of(cls, x: jax.Array) -> _Tiles:
        _, capacity, kv_heads, head_dim = x.shape
        # The minor axis must fill the 128 lanes: it is that of the head, or else that of the positions.
        if head_dim % _LANES == 0:
            return cls((0, 2, 1, 3), (kv_heads, capacity, head_dim), 1, 32 if x.dtype.itemsize == 1 else 16)
        shape = (kv_heads, capacity) if head_dim == 1 else (kv_heads, head_dim, capacity)
        return cls((0, 2, 3, 1), shape, len(shape) - 1, _LANES)

    def laid(self, x: jax.Array) -> jax.Array:
        """The array, or a new entry, in this layout."""
        turned = jnp.transpose(x, self.order)
        return turned.reshape(len(x), *self._part(x.shape[1]))

    def back(self, x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `laid`, for an array of this shape."""
        turned = x.reshape([shape[axis] for axis in self.order])
        return jnp.transpose(turned, [self.order.index(axis) for axis in range(4)])

    def blocks(self) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """The blocks of a row's new entry, and of the tile of its position."""

        def at(row, start):
            return (row, *(start[row] // self.size if axis == self.axis else 0 for axis in range(len(self.shape))))

        first = lambda row, _: (row, *(0 for _ in self.shape))
        return pl.BlockSpec((None, *self._part(1)), first), pl.BlockSpec((None, *self._part(self.size)), at)

    def _part(self, positions: int) -> tuple[int, ...]:
        return tuple(positions if axis == self.axis else n for axis, n in enumerate(self.shape))


def _write_kernel(start, *refs, tiles: list[_Tiles]):
    """Puts each new entry into the cache tile of its position; the tile's other entries are unchanged."""
    count = len(tiles)
    for tile, new, old, out in zip(tiles, refs[:count], refs[count:-count], refs[-count:], strict=True):
        at = jax.lax.broadcasted_iota(jnp.int32, out.shape, tile.axis) == start[pl.program_id(0)] % tile.size
        kind = jnp.int32 if jnp.issubdtype(out.dtype, jnp.integer) else jnp.float32
        out[...] = jnp.where(at, new[...].astype(kind), old[...].astype(kind)).astype(out.dtype)


def _write(old: list[jax.Array], new: list[jax.Array], start: jax.Array, interpret: bool) -> list[jax.Array]:
    tiles = [_Tiles.of(x) for x in old]
    entries, caches = zip(*(tile.blocks() for tile in tiles), strict=True)
    laid = lambda arrays: [tile.laid(x) for tile, x in zip(tiles, arrays, strict=True)]
    written = pl.pallas_call(
        partial(_write_kernel, tiles=tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(len(start),),
            in_specs=[*entries, *caches],
            out_specs=list(caches),
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in laid(old)],
        input_output_aliases={1 + len(old) + i: i for i in range(len(old))},
        interpret=interpret,
        name="write_entry",
    )(start, *laid(new), *laid(old))
    return [tile.back(x, given.shape) for tile, x, given in zip(tiles, written, old, strict=True)]


def write_entry(
    keys: Entries,
    values: Entries,
    k: jax.Array,
    v: jax.Array,
    start: jax.Array,
    center: jax.Array | None = None,
    interpret: bool = False,
) -> tuple[Entries, Entries]:
    """Writes one new position of every row into the cache, in place.

    On a TPU, XLA's scatter processes rows one by one, at about ten microseconds per row and layer.

    Args:
      keys: cached keys, `[rows, capacity, kv_heads, head_dim]`, with capacity a multiple of 128; quantized or not.
      values: cached values, in the form of `keys`.
      k: new keys, `[rows, 1, kv_heads, head_dim]`.
      v: new values, in the shape of `k`.
      start: position of each row's new entry, int32 `[rows]`.
      center: float32 array that a quantized cache subtracts from `k`; None for none.
      interpret: whether to run the kernel in Python, for tests.
    """
    old, structure = jax.tree.flatten((keys, values))
    new = jax.tree.leaves((stored_as(keys, k, center), stored_as(values, v)))
    return structure.unflatten(over_heads(partial(_write, interpret=interpret), old, new, start))


_BLOCK = 512  # largest number of queries and of keys in a block
ATTENTION = "attention"  # checkpoint name: lets the backward pass keep attention's residuals instead of recomputing


def _splash(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
    rows, length, heads, head_dim = q.shape
    padding = -length % _LANES
    block = next(b for b in range(_BLOCK, 0, -_LANES) if (length + padding) % b == 0)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).swapaxes(1, 2)
    size = length + padding
    blocks = splash.BlockSizes(
        **{name: block for name in ("block_q", "block_kv", "block_kv_compute")},
        **{name: block for name in ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")},
        **{name: block for name in ("block_q_dq", "block_kv_dq")},
    )
    mask = splash.MultiHeadMask([splash.CausalMask((size, size)) for _ in range(heads)])
    kernel = splash.make_splash_mha_single_device(
        mask, block_sizes=blocks, residual_checkpoint_name=ATTENTION, interpret=interpret
    )
    scaled = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    mixed = jax.vmap(kernel)(pad(scaled), pad(k), pad(v))
    return mixed.swapaxes(1, 2)[:, :length].astype(q.dtype)


def causal(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool = False) -> jax.Array:
    """Causal attention that never stores a row's scores (JAX's splash attention); see `causal_attention`."""
    return over_heads(partial(_splash, interpret=interpret), q, k, v)
