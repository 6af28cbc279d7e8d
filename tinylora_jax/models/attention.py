"""Attention functions for training and decoding; each uses the fastest kernel of the back end.

The plain path is `jax.nn.dot_product_attention` through XLA. It runs everywhere, and the other kernels are tested
against it. For 16-bit inputs on an NVIDIA GPU, whole rows use cuDNN's flash attention. Decoding uses a Pallas kernel
that reads each row's cache only up to its length and writes the new entry in place.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tinylora_jax.models.sharding import over_heads
from tinylora_jax.models.tpu import can_write, on_tpu, write_entry
from tinylora_jax.models.tpu import causal as flash_causal

Queries = Float[Array, "rows seq heads head_dim"]
Keys = Float[Array, "rows seq kv_heads head_dim"]
Cache = Float[Array, "rows capacity kv_heads head_dim"]

_BLOCK = 64  # number of cached positions read at once
_WARPS, _STAGES = 4, 3  # decoding kernel: warps per row and head, and pipeline stages
_FLASH_FROM = 512  # row length from which a TPU uses flash attention, which does not store all scores


def _on_gpu(x: jax.Array) -> bool:
    """Whether the 16-bit kernels of an NVIDIA GPU apply."""
    return jax.default_backend() == "gpu" and x.dtype in (jnp.bfloat16, jnp.float16) and x.shape[-1] in (64, 128)


def _plain(q: jax.Array, k: jax.Array, v: jax.Array, **options) -> jax.Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX promotes bfloat16 scores to float32 implicitly
        return jax.nn.dot_product_attention(q, k, v, **options)


def causal_attention(q: Queries, k: Keys, v: Keys, lengths: Int[Array, " rows"] | None = None) -> Queries:
    """Causal attention in right-padded rows: each position attends to itself and to all earlier ones.

    Args:
      q: queries, `[rows, seq, heads, head_dim]`.
      k: keys, `[rows, seq, kv_heads, head_dim]`; the number of their heads divides that of the queries.
      v: values, in the shape of `k`.
      lengths: row lengths, int32 `[rows]`, if known; a kernel may skip the padding, where the result is undefined.

    Returns:
      Weighted sums of the values, in the shape of `q`.
    """
    if on_tpu() and q.shape[1] >= _FLASH_FROM:
        return flash_causal(q, k, v)
    if not _on_gpu(q):
        return _plain(q, k, v, is_causal=True)
    return over_heads(_cudnn, q, k, v, *(() if lengths is None else (lengths,)))


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
    seq_lengths = {} if lengths is None else {"query_seq_lengths": lengths, "key_value_seq_lengths": lengths}
    return _plain(q, k, v, is_causal=True, implementation="cudnn", **seq_lengths)


def write(buffer: jax.Array, update: jax.Array, start: jax.Array) -> jax.Array:
    """Writes `update` `[rows, seq, …]` into `buffer` `[rows, capacity, …]` from each row's `start` on."""
    place = lambda b, u, s: jax.lax.dynamic_update_slice_in_dim(b, u, s, axis=0)
    return jax.vmap(place)(buffer, update.astype(buffer.dtype), start)


def cached_attention(
    q: Queries, k: Keys, v: Keys, keys: Cache, values: Cache, start: Int[Array, " rows"]
) -> tuple[Queries, Cache, Cache]:
    """Writes new keys and values at `start`, `start + 1`, …, then attends to all positions so far.

    Args:
      q: queries of the new positions, `[rows, seq, heads, head_dim]`.
      k: keys of the new positions, `[rows, seq, kv_heads, head_dim]`.
      v: values of the new positions, in the shape of `k`.
      keys: cached keys, `[rows, capacity, kv_heads, head_dim]`, with capacity for `start + seq` positions.
      values: cached values, in the shape of `keys`.
      start: first new position of each row, int32 `[rows]`.

    Returns:
      Weighted sums of the values, and the updated cache.
    """
    if q.shape[1] == 1 and _on_gpu(q) and keys.shape[1] % _BLOCK == 0:
        return over_heads(decode_kernel, q, k, v, keys, values, start)
    if on_tpu() and can_write(keys, k):
        keys, values = write_entry(keys, values, k, v, start)
    else:
        keys, values = write(keys, k, start), write(values, v, start)
    if q.shape[1] == 1 and jax.default_backend() == "cpu" and not on_tpu():
        return _summed(q, keys, values, start), keys, values
    position = start[:, None] + jnp.arange(q.shape[1])
    visible = jnp.arange(keys.shape[1]) <= position[:, None, :, None]
    return _plain(q, keys, values, mask=visible), keys, values


def _summed(q: Queries, keys: Cache, values: Cache, position: Int[Array, " rows"]) -> Queries:
    """Attention of one query per row by sums; for products a CPU would transpose the cache at every step."""
    rows, capacity, kv_heads, head_dim = keys.shape
    grouped = q.astype(jnp.float32).reshape(rows, 1, kv_heads, -1, head_dim)
    scores = jnp.sum(grouped * keys[:, :, :, None].astype(jnp.float32), axis=-1) * head_dim**-0.5
    visible = jnp.arange(capacity) <= position[:, None]
    p = jax.nn.softmax(jnp.where(visible[:, :, None, None], scores, -jnp.inf), axis=1)
    return jnp.sum(p[..., None] * values[:, :, :, None].astype(jnp.float32), axis=1).reshape(q.shape).astype(q.dtype)


def _decode_kernel(new_ref, start_ref, keys_in, values_in, o_ref, keys_out, values_out, *, groups, tile):
    """Attention of one row and kv head: `groups` queries, padded to `tile`, with the cached and new positions."""
    from jax.experimental.pallas import triton as plt

    position = start_ref[...]
    k_new, v_new = new_ref[groups, :], new_ref[groups + 1, :]
    plt.store(keys_out.at[pl.ds(position, 1), :], k_new[None])
    plt.store(values_out.at[pl.ds(position, 1), :], v_new[None])
    heads = (jnp.arange(tile) < groups)[:, None]
    q = plt.load(new_ref.at[...], mask=heads, other=0.0)
    scale = q.shape[-1] ** -0.5
    top = jnp.sum(q.astype(jnp.float32) * k_new.astype(jnp.float32), axis=1) * scale

    def block(index, carry):
        top, total, mixed = carry
        at = pl.ds(index * _BLOCK, _BLOCK)
        seen = index * _BLOCK + jnp.arange(_BLOCK) < position
        k = plt.load(keys_in.at[at, :], mask=seen[:, None], other=0.0)
        scores = jnp.where(seen[None], plt.dot(q, k.T).astype(jnp.float32) * scale, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        p, shrink = jnp.exp(scores - new_top[:, None]), jnp.exp(top - new_top)
        v = plt.load(values_in.at[at, :], mask=seen[:, None], other=0.0)
        mixed = mixed * shrink[:, None] + plt.dot(p.astype(v.dtype), v).astype(jnp.float32)
        return new_top, total * shrink + jnp.sum(p, axis=1), mixed

    first = jnp.broadcast_to(v_new.astype(jnp.float32)[None], q.shape)
    _, total, mixed = jax.lax.fori_loop(
        0, pl.cdiv(position, _BLOCK), block, (top, jnp.ones((tile,), jnp.float32), first)
    )
    plt.store(o_ref.at[...], (mixed / total[:, None]).astype(o_ref.dtype), mask=heads)


def decode_kernel(
    q: Queries, k: Keys, v: Keys, keys: Cache, values: Cache, start: Int[Array, " rows"], interpret: bool = False
) -> tuple[Queries, Cache, Cache]:
    """`cached_attention` for one new position per row, as a single Pallas (Triton) kernel.

    Work and memory traffic depend on each row's own length. The cache is updated in place, and the queries that share
    a kv head form one tile.
    """
    from jax.experimental.pallas import triton as plt

    rows, _, num_heads, head_dim = q.shape
    capacity, kv_heads = keys.shape[1:3]
    groups = num_heads // kv_heads
    tile = max(16, pl.next_power_of_2(groups + 2))  # the matrix units need at least 16 rows
    # One array for q, k and v: XLA then rotates them and adds biases and adapters in a single kernel.
    by_head = (x.astype(keys.dtype).reshape(rows, kv_heads, -1, head_dim) for x in (q, k, v))
    new = jnp.concatenate(list(by_head), axis=2)
    block = pl.BlockSpec((None, None, tile, head_dim), lambda i, j: (i, j, 0, 0))
    cache = pl.BlockSpec((None, capacity, None, head_dim), lambda i, j: (i, 0, j, 0))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    mixed, keys, values = pl.pallas_call(
        partial(_decode_kernel, groups=groups, tile=tile),
        grid=(rows, kv_heads),
        in_specs=[
            block,
            pl.BlockSpec((None,), lambda i, j: (i,)),
            cache,
            cache,
        ],
        out_specs=[block, cache, cache],
        out_shape=[jax.ShapeDtypeStruct((rows, kv_heads, groups, head_dim), q.dtype), like(keys), like(values)],
        input_output_aliases={2: 1, 3: 2},
        compiler_params=plt.CompilerParams(num_warps=_WARPS, num_stages=_STAGES),
        interpret=interpret,
        name="decode_attention",
    )(new, start, keys, values)
    return mixed.reshape(q.shape), keys, values
