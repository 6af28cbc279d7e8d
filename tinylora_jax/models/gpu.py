"""The Pallas (Triton) kernel for decoding on NVIDIA GPUs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tinylora_jax.models.cache import Entries, QuantizedEntries, stored_as

BLOCK = 64  # number of cached positions read at once; divides the capacity of the cache
_WARPS, _STAGES = 4, 3  # warps per row and head, and pipeline stages


def _decode_kernel(new_ref, start_ref, *refs, groups: int, tile: int, arrays: int, factors: int):
    """Attention of one row and kv head: `groups` queries, padded to `tile`, with the cached and new positions.

    `refs` are the `factors` factors of the scores that a `KeyBias` leaves out (two or none), the `arrays` arrays of the
    cache, the new entries' scales if it is quantized, the output, and the updated cache. A scale is constant along a
    position's numbers, so it multiplies scores and weights.
    """
    from jax.experimental.pallas import triton as plt

    apart_ref, table_ref = refs[:factors] or (None, None)
    refs = refs[factors:]
    keys_in, values_in, *scales_in = refs[:arrays]
    new_scales, o_ref = [ref[...] for ref in refs[arrays : -arrays - 1]], refs[-arrays - 1]
    keys_out, values_out, *scales_out = refs[-arrays:]
    position = start_ref[...]
    k_new, v_new = new_ref[groups, :], new_ref[groups + 1, :]
    plt.store(keys_out.at[pl.ds(position, 1), :], k_new[None].astype(keys_out.dtype))
    plt.store(values_out.at[pl.ds(position, 1), :], v_new[None].astype(values_out.dtype))
    for out, scale in zip(scales_out, new_scales, strict=True):
        plt.store(out.at[pl.ds(position, 1)], jnp.broadcast_to(scale, (1,)))
    key_scale, value_scale = new_scales or (1.0, 1.0)
    heads = (jnp.arange(tile) < groups)[:, None]
    q = plt.load(new_ref.at[...], mask=heads, other=0.0)
    scale, zero = q.shape[-1] ** -0.5, 0 if scales_in else 0.0
    top = jnp.sum(q.astype(jnp.float32) * k_new.astype(jnp.float32), axis=1) * (scale * key_scale)
    if apart_ref is not None:
        apart = plt.load(apart_ref.at[...], mask=heads, other=0.0)
        top += jnp.sum(apart * plt.load(table_ref.at[pl.ds(position, 1), :]), axis=1) * scale

    def block(index, carry):
        top, total, mixed = carry
        at = pl.ds(index * BLOCK, BLOCK)
        seen = index * BLOCK + jnp.arange(BLOCK) < position
        load = lambda ref: plt.load(ref.at[at, :], mask=seen[:, None], other=zero).astype(q.dtype)
        scaled = lambda x, i: x * plt.load(scales_in[i].at[at], mask=seen, other=0.0)[None] if scales_in else x
        scores = scaled(plt.dot(q, load(keys_in).T).astype(jnp.float32) * scale, 0)
        if apart_ref is not None:
            angles = plt.load(table_ref.at[at, :], mask=seen[:, None], other=0.0)
            scores += plt.dot(apart, angles.T, precision="highest") * scale
        scores = jnp.where(seen[None], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        p, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        added = plt.dot(scaled(p, 1).astype(q.dtype), load(values_in)).astype(jnp.float32)
        return new_top, total * shrink + jnp.sum(p, axis=1), mixed * shrink[:, None] + added

    first = jnp.broadcast_to(v_new.astype(jnp.float32)[None] * value_scale, q.shape)
    _, total, mixed = jax.lax.fori_loop(
        0, pl.cdiv(position, BLOCK), block, (top, jnp.ones((tile,), jnp.float32), first)
    )
    plt.store(o_ref.at[...], (mixed / total[:, None]).astype(o_ref.dtype), mask=heads)


def decode_kernel(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: Entries,
    values: Entries,
    start: jax.Array,
    *bias: jax.Array,
    interpret: bool = False,
) -> tuple[jax.Array, Any, Any]:
    """`cached_attention` for one new position per row, as a single kernel.

    Work and memory traffic depend on each row's own length. The cache is updated in place, and the queries that share
    a kv head form one tile. An int8 cache is converted in registers, block by block. If it leaves out the bias of the
    keys, `bias` is `KeyBias.rotated`, `KeyBias.queries(q)` and `KeyBias.table`.
    """
    from jax.experimental.pallas import triton as plt

    rows, _, num_heads, head_dim = q.shape
    capacity, kv_heads = keys.shape[1:3]
    groups = num_heads // kv_heads
    tile = max(16, pl.next_power_of_2(groups + 2))  # the matrix units need at least 16 rows
    center, *factors = bias or (None,)
    entries: list[Any] = [stored_as(keys, k, center), stored_as(values, v)]
    caches: list[Any] = [keys, values]
    scales: list[jax.Array] = []
    if isinstance(keys, QuantizedEntries):
        # 16 bits represent the numbers of int8 exactly, so the new entries can share an array with the queries.
        scales = [x.scale for x in entries]
        entries = [x.values for x in entries]
        caches = [*(x.values for x in caches), *(x.scale for x in caches)]
    # One array for q, k and v: XLA then rotates them and adds biases and adapters in a single kernel.
    new = jnp.concatenate([x.astype(q.dtype).reshape(rows, kv_heads, -1, head_dim) for x in (q, *entries)], axis=2)
    block = pl.BlockSpec((None, None, tile, head_dim), lambda i, j: (i, j, 0, 0))
    numbers = pl.BlockSpec((None, capacity, None, head_dim), lambda i, j: (i, 0, j, 0))
    scale = pl.BlockSpec((None, capacity, None, None), lambda i, j: (i, 0, j, 0))
    one = pl.BlockSpec((None, None, None, None), lambda i, j: (i, 0, j, 0))
    specs = [numbers, numbers, scale, scale][: len(caches)]
    # The table is read by every row and head, so it stays in the second-level cache.
    whole = [block, pl.BlockSpec((capacity, head_dim), lambda i, j: (0, 0))][: len(factors)]
    factors = [x.reshape(rows, kv_heads, groups, head_dim) if x.ndim == 4 else x for x in factors]
    mixed, *caches = pl.pallas_call(
        partial(_decode_kernel, groups=groups, tile=tile, arrays=len(caches), factors=len(factors)),
        grid=(rows, kv_heads),
        in_specs=[block, pl.BlockSpec((None,), lambda i, j: (i,)), *whole, *specs, *[one] * len(scales)],
        out_specs=[block, *specs],
        out_shape=[
            jax.ShapeDtypeStruct((rows, kv_heads, groups, head_dim), q.dtype),
            *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in caches),
        ],
        input_output_aliases={2 + len(factors) + i: 1 + i for i in range(len(caches))},
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="decode_attention",
    )(new, start, *factors, *caches, *scales)
    written = map(QuantizedEntries, caches[:2], caches[2:]) if scales else caches
    return mixed.reshape(q.shape), *written
