"""Attention functions for training and decoding; each uses the fastest kernel of the back end.

The plain path is `jax.nn.dot_product_attention` through XLA. It runs everywhere, and the other kernels are tested
against it. For 16-bit inputs on an NVIDIA GPU, whole rows use cuDNN's flash attention. Decoding uses a Pallas kernel
that reads each row's cache only up to its length and writes the new entry in place.

An int8 cache has one scale per position and head. The scales of the keys multiply the scores, and those of the values
multiply the weights, so that no wide copy of the cache exists: (q·k₈)·s_k, then (p·s_v)·v₈. Keys are stored without
their bias, see `KeyBias`.
"""

from __future__ import annotations

from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tinylora_jax.models.cache import Entries, KeyBias, QuantizedEntries, stored_as
from tinylora_jax.models.gpu import BLOCK, decode_kernel
from tinylora_jax.models.sharding import over_heads
from tinylora_jax.models.tpu import can_write, on_tpu, write_entry
from tinylora_jax.models.tpu import causal as flash_causal

Queries = Float[Array, "rows seq heads head_dim"]
Keys = Float[Array, "rows seq kv_heads head_dim"]
Cache = Float[Array, "rows capacity kv_heads head_dim"] | QuantizedEntries

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


def write(buffer: Entries, update: jax.Array, start: jax.Array, center: jax.Array | None = None) -> Entries:
    """Writes `update` `[rows, seq, …]` into `buffer` `[rows, capacity, …]` from each row's `start` on."""
    place = lambda b, u, s: jax.lax.dynamic_update_slice_in_dim(b, u, s, axis=0)
    return jax.tree.map(lambda b, u: jax.vmap(place)(b, u, start), buffer, stored_as(buffer, update, center))


def cached_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    keys: Cache,
    values: Cache,
    start: Int[Array, " rows"],
    bias: KeyBias | None = None,
) -> tuple[Queries, Cache, Cache]:
    """Writes new keys and values at `start`, `start + 1`, …, then attends to all positions so far.

    Args:
      q: queries of the new positions, `[rows, seq, heads, head_dim]`.
      k: keys of the new positions, `[rows, seq, kv_heads, head_dim]`.
      v: values of the new positions, in the shape of `k`.
      keys: cached keys, `[rows, capacity, kv_heads, head_dim]`, with capacity for `start + seq` positions; quantized or
        not.
      values: cached values, in the form of `keys`.
      start: first new position of each row, int32 `[rows]`.
      bias: bias of the keys, which a quantized cache leaves out; None if it stores whole keys.

    Returns:
      Weighted sums of the values, and the updated cache.
    """
    center = None if bias is None else bias.rotated
    factors = None if bias is None else (bias.queries(q), bias.table)
    if q.shape[1] == 1 and _on_gpu(q) and keys.shape[1] % BLOCK == 0:
        return over_heads(decode_kernel, q, k, v, keys, values, start, *(() if factors is None else (center, *factors)))
    if on_tpu() and can_write(keys, k):
        keys, values = write_entry(keys, values, k, v, start, center)
    else:
        keys, values = write(keys, k, start, center), write(values, v, start)
    added = None if factors is None else _of_table(*factors, keys.shape[2])
    if q.shape[1] == 1 and jax.default_backend() == "cpu" and not on_tpu():
        return _summed(q, keys, values, start, added), keys, values
    position = start[:, None] + jnp.arange(q.shape[1])
    visible = jnp.arange(keys.shape[1]) <= position[:, None, :, None]
    if isinstance(keys, QuantizedEntries):
        return _scaled(q, keys, cast(QuantizedEntries, values), visible, added), keys, values
    return _plain(q, keys, cast(jax.Array, values), mask=visible), keys, values


def _of_table(queries: jax.Array, table: jax.Array, kv_heads: int) -> jax.Array:
    """The part of the scores that a `KeyBias` leaves out, float32 `[rows, kv_heads, groups, seq, capacity]`.

    Its terms are large and cancel, so 16 bits would not do.
    """
    grouped = queries.reshape(*queries.shape[:2], kv_heads, -1, queries.shape[-1])
    return jnp.einsum("bskgd,td->bkgst", grouped, table, precision="highest") * queries.shape[-1] ** -0.5


def _scaled(
    q: Queries,
    keys: QuantizedEntries,
    values: QuantizedEntries,
    visible: Bool[Array, "rows 1 seq capacity"],
    added: jax.Array | None,
) -> Queries:
    """Attention to an int8 cache, with `added` scores; XLA converts the numbers inside each product."""
    kv_heads, head_dim = keys.shape[2:]
    of_positions = lambda scale: scale.transpose(0, 2, 3, 1)[:, :, None]  # [rows, kv_heads, 1, 1, capacity]
    grouped = q.reshape(*q.shape[:2], kv_heads, -1, head_dim)
    product = lambda rule, x, y: jnp.einsum(rule, x, y.values.astype(q.dtype), preferred_element_type=jnp.float32)
    scores = product("bskgd,btkd->bkgst", grouped, keys) * head_dim**-0.5 * of_positions(keys.scale)
    scores = scores if added is None else scores + added
    p = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    weights = (p * of_positions(values.scale)).astype(q.dtype)
    return product("bkgst,btkd->bskgd", weights, values).reshape(q.shape).astype(q.dtype)


def _summed(q: Queries, keys: Cache, values: Cache, position: Int[Array, " rows"], added: jax.Array | None) -> Queries:
    """Attention of one query per row by sums, with `added` scores; for products a CPU would transpose the cache."""
    rows, capacity, kv_heads, head_dim = keys.shape
    grouped = q.astype(jnp.float32).reshape(rows, 1, kv_heads, -1, head_dim)
    (k, k_scale), (v, v_scale) = map(_wide, (keys, values))
    scores = jnp.sum(grouped * k, axis=-1) * (k_scale * head_dim**-0.5)
    if added is not None:
        scores = scores + added[:, :, :, 0].transpose(0, 3, 1, 2)
    visible = jnp.arange(capacity) <= position[:, None]
    p = jax.nn.softmax(jnp.where(visible[:, :, None, None], scores, -jnp.inf), axis=1) * v_scale
    return jnp.sum(p[..., None] * v, axis=1).reshape(q.shape).astype(q.dtype)


def _wide(entries: Cache) -> tuple[jax.Array, Any]:
    """The numbers of a cache as float32 `[rows, capacity, kv_heads, 1, head_dim]`, and their scale."""
    values, scale = (entries.values, entries.scale) if isinstance(entries, QuantizedEntries) else (entries, 1.0)
    return values[:, :, :, None].astype(jnp.float32), scale
