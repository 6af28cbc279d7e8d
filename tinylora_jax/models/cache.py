"""The key/value cache: slot i of a row holds the key and value of that row's position i."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tinylora_jax.models.config import ModelConfig
from tinylora_jax.models.sharding import split_heads


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

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int, dtype: DTypeLike) -> KVCache:
        """A cache of zeros for `capacity` positions."""
        shape = (rows, capacity, config.num_kv_heads, config.head_dim)
        zeros = lambda: split_heads(jnp.zeros(shape, dtype), config.num_kv_heads)
        make = lambda: tuple(zeros() for _ in range(config.num_layers))
        return cls(make(), make())
