"""The key/value cache: slot i of a row holds the key and value of that row's position i."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tinylora_jax.models.config import ModelConfig
from tinylora_jax.models.sharding import split_heads

CACHE_SCHEMES = ("none", "int8")
"""The ways to store the cache; `none` keeps the dtype of the weights."""

_LEVELS = 127  # symmetric: -128 is not used
_SMALLEST = 1e-30  # entries with a smaller scale become zeros, because dividing by it could overflow


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedEntries:
    """Keys or values x ≈ values · scale of one layer, with one scale per position and head.

    The scale is constant along `head_dim`, so it stays outside both products of attention. It is float32: it adds 4
    bytes to 64 or 128, and a bfloat16 scale would save half of that but round every score once more.

    Attributes:
      values: int8 `[rows, capacity, kv_heads, head_dim]`.
      scale: float32 `[rows, capacity, kv_heads, 1]`: the axes of the values, so that it moves and is split like them.
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of x."""
        return self.values.shape


Entries = jax.Array | QuantizedEntries


def quantized_entries(x: Float[Array, "rows seq kv_heads head_dim"]) -> QuantizedEntries:
    """Rounds keys or values to int8: scale = max |x| / 127 for every position and head.

    The error is at most half a scale. A vector of zeros has the scale 0. One that is not finite stays so.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / _LEVELS
    values = jnp.round(wide / jnp.where(scale <= _SMALLEST, 1.0, scale))
    return QuantizedEntries(values.astype(jnp.int8), scale)


def stored_as(buffer: Entries, x: jax.Array, center: jax.Array | None = None) -> Entries:
    """Converts keys or values to the form in which `buffer` stores them.

    Args:
      buffer: buffer of the cache.
      x: keys or values, `[rows, seq, kv_heads, head_dim]`.
      center: float32 array to subtract before rounding to int8, in the shape of `x`; see `KeyBias`.
    """
    if not isinstance(buffer, QuantizedEntries):
        return x.astype(buffer.dtype)
    return quantized_entries(x if center is None else x.astype(jnp.float32) - center)


class KeyBias(NamedTuple):
    """The bias of the keys, which an int8 cache leaves out.

    Qwen2.5 has biases that make a few numbers of each key a hundred times as large as the others, so one scale for all
    would round the others to zero. The cache stores k − R(n)·b, where R(n) is the rotation at position n. The missing
    part of a score is exact, with one table for all rows, heads and layers:

        q·R(n)·b = c(n)·(q₁b₁ + q₂b₂) + s(n)·(q₂b₁ − q₁b₂)        c, s: cosines and sines; 1, 2: halves of a head

    Attributes:
      bias: b, `[kv_heads, head_dim]`.
      rotated: R(n)·b at the new positions, float32 `[rows, seq, kv_heads, head_dim]`.
      table: c(n) and s(n) of every position in the cache, float32 `[capacity, head_dim]`.
    """

    bias: jax.Array
    rotated: jax.Array
    table: jax.Array

    def queries(self, q: Float[Array, "rows seq heads head_dim"]) -> Float[Array, "rows seq heads head_dim"]:
        """The factors of `table` in the missing part of the scores, float32."""
        grouped = q.astype(jnp.float32).reshape(*q.shape[:2], len(self.bias), -1, q.shape[-1])
        (q1, q2), (b1, b2) = (jnp.split(x, 2, axis=-1) for x in (grouped, self.bias[:, None].astype(jnp.float32)))
        return jnp.concatenate([q1 * b1 + q2 * b2, q2 * b1 - q1 * b2], axis=-1).reshape(q.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, one pair of arrays per layer so that XLA updates each in place.

    A query at position p attends only to slots 0…p. Slots beyond a row's length may hold any finite values, because
    they are written before a query can see them. So right padding needs no mask.

    Attributes:
      keys: cached keys of each layer, `[rows, capacity, kv_heads, head_dim]`.
      values: cached values of each layer, in the shape of the keys.
    """

    keys: tuple[Entries, ...]
    values: tuple[Entries, ...]

    @property
    def capacity(self) -> int:
        """Number of positions of a row."""
        return self.keys[0].shape[1]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int, dtype: DTypeLike, quantize: str = "none") -> KVCache:
        """Creates a cache of zeros.

        Args:
          config: architecture of the model.
          rows: number of rows.
          capacity: number of positions of a row.
          dtype: dtype of keys and values that are not quantized.
          quantize: entry of `CACHE_SCHEMES`.
        """
        shape = (rows, capacity, config.num_kv_heads)
        zeros = lambda size, dtype: split_heads(jnp.zeros((*shape, size), dtype), config.num_kv_heads)

        def entries() -> Entries:
            if quantize == "none":
                return zeros(config.head_dim, dtype)
            return QuantizedEntries(zeros(config.head_dim, jnp.int8), zeros(1, jnp.float32))

        make = lambda: tuple(entries() for _ in range(config.num_layers))
        return cls(make(), make())
