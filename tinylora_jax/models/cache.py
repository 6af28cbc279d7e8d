"""The key/value cache: slot i of a row holds the key and value of that row's position i."""

from __future__ import annotations

from dataclasses import dataclass

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


def stored_as(buffer: Entries, x: jax.Array) -> Entries:
    """Converts keys or values to the form in which `buffer` stores them."""
    return quantized_entries(x) if isinstance(buffer, QuantizedEntries) else x.astype(buffer.dtype)


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
