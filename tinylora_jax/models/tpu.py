"""Pallas kernels for TPUs, which avoid slow scatters and attention scores in memory.

The platform is taken from the surrounding mesh, so programs can be compiled for a TPU on a machine without one.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from tinylora_jax.models.sharding import over_heads

_LANES = 128


def on_tpu() -> bool:
    """Whether the program being traced will run on a TPU."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None:
        return mesh.abstract_device.platform == "tpu"
    return jax.default_backend() == "tpu"


def can_write(keys: jax.Array, k: jax.Array) -> bool:
    """Whether `write_entry` applies: one new position per row, in a cache of whole tiles."""
    return k.shape[1] == 1 and keys.shape[1] % _LANES == 0


def _write_kernel(start, *refs, axis: int, tile: int):
    """Puts each new entry into the cache tile of its position; the tile's other entries are unchanged."""
    here = start[pl.program_id(0)] % tile
    for new, old, out in zip(refs[:2], refs[2:4], refs[4:], strict=True):
        at = jax.lax.broadcasted_iota(jnp.int32, out.shape, axis) == here
        wide = jnp.where(at, new[...].astype(jnp.float32), old[...].astype(jnp.float32))
        out[...] = wide.astype(out.dtype)


def _write(
    keys: jax.Array, values: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    rows, capacity, kv_heads, head_dim = keys.shape
    # The minor axis of tiled memory must fill the 128 lanes; XLA chooses that layout for the cache.
    wide = head_dim % _LANES == 0
    order = (0, 2, 1, 3) if wide else (0, 2, 3, 1)
    axis, tile = (1, 16) if wide else (2, _LANES)
    at = (lambda i, start: (i, 0, start[i] // tile, 0)) if wide else (lambda i, start: (i, 0, 0, start[i] // tile))
    cache = pl.BlockSpec((None, kv_heads, tile, head_dim) if wide else (None, kv_heads, head_dim, tile), at)
    entry = pl.BlockSpec(
        (None, kv_heads, 1, head_dim) if wide else (None, kv_heads, head_dim, 1), lambda i, _: (i, 0, 0, 0)
    )
    new = [jnp.transpose(x, order).astype(keys.dtype) for x in (k, v)]
    old = [jnp.transpose(x, order) for x in (keys, values)]
    written = pl.pallas_call(
        partial(_write_kernel, axis=axis, tile=tile),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows,),
            in_specs=[entry, entry, cache, cache],
            out_specs=[cache, cache],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in old],
        input_output_aliases={3: 0, 4: 1},
        interpret=interpret,
        name="write_entry",
    )(start, *new, *old)
    back = [order.index(i) for i in range(4)]
    return tuple(jnp.transpose(x, back) for x in written)


def write_entry(
    keys: jax.Array, values: jax.Array, k: jax.Array, v: jax.Array, start: jax.Array, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Writes one new position of every row into the cache, in place.

    On a TPU, XLA's scatter processes rows one by one, at about ten microseconds per row and layer.

    Args:
      keys: cached keys, `[rows, capacity, kv_heads, head_dim]`, with capacity a multiple of 128.
      values: cached values, in the shape of `keys`.
      k: new keys, `[rows, 1, kv_heads, head_dim]`.
      v: new values, in the shape of `k`.
      start: position of each row's new entry, int32 `[rows]`.
      interpret: whether to run the kernel in Python, for tests.
    """
    return over_heads(partial(_write, interpret=interpret), keys, values, k, v, start)


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
