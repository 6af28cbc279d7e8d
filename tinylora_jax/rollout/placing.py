"""The placement of decoding arrays on a mesh, from one program to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from tinylora_jax.models import KVCache
from tinylora_jax.models.sharding import current_mesh, split_heads


def map_caches(small: Callable[[Any], Any], caches: Callable[[Any], Any], tree: Any) -> Any:
    """Applies `caches` to the arrays of every KV cache in a tree, and `small` to all other arrays."""
    is_cache = lambda x: isinstance(x, KVCache)
    change = lambda x: jax.tree.map(caches, x) if is_cache(x) else small(x)
    return jax.tree.map(change, tree, is_leaf=is_cache)


def placed(tree: Any) -> Any:
    """Splits the KV caches of a tree as attention does, and puts all other arrays on every device.

    The next program compiles only once if it always gets the same placement.
    """
    if current_mesh() is None:
        return tree
    everywhere = lambda x: jax.lax.with_sharding_constraint(x, P())
    return map_caches(everywhere, lambda x: split_heads(x, x.shape[2]), tree)
