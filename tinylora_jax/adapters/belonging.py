"""Checks that factors were computed from the given weights, which equal shapes do not prove."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters.batches import oriented_stack
from tinylora_jax.adapters.factors import Factors, LeafFactors
from tinylora_jax.adapters.targets import Target

# The cosine of W v and u for the first triplet is 1 up to rounding, whatever the precision of W; for another weight it
# is about 1/√out. Fine-tuning turns a leading direction by far less than this threshold allows.
_LEAST_ALIGNED = 0.5
_SAMPLED = 3  # leaves: the first, the middle and the last
_ENOUGH = 16  # a column with fewer entries may be aligned by chance
_known: dict[tuple[int, int], tuple[weakref.ref, weakref.ref]] = {}  # pairs of arrays that passed the check before


def check_weights(weights: Mapping[str, Any], factors: Factors) -> None:
    """Raises an error if the leading singular directions of the weights are not those of the factors.

    The check uses one column of three leaves, and runs once for each pair of arrays. It covers only concrete arrays:
    inside a jitted function values are unknown, and nothing is computed.

    Args:
      weights: leaves of the tree by path, with shapes that fit the factors.
      factors: factors computed by `factorize` or read from a file.

    Raises:
      ValueError: the factors belong to other weights (the message names them).
    """
    paths = list(factors.leaves)
    sampled = dict.fromkeys(paths[i * (len(paths) - 1) // (_SAMPLED - 1)] for i in range(_SAMPLED))
    foreign = [path for path in sampled if not _belongs(weights[path], factors.leaves[path])]
    if foreign:
        raise ValueError(
            f"the factors belong to other weights: the singular directions of {', '.join(foreign)} differ from those"
            " in the given tree; factorize this tree, or pass the tree that was factorized"
        )


def _belongs(W: Any, leaf: LeafFactors) -> bool:
    array = jax.tree.leaves(W)[0]  # a quantized kernel is a new object in every copy of its tree
    key = id(array), id(leaf.U)
    if key in _known or not _can_tell(W, leaf):
        return True
    with jax.ensure_compile_time_eval():
        cosine = float(_cosine(jax.tree.map(jnp.asarray, W), jnp.asarray(leaf.U), jnp.asarray(leaf.V), leaf.target))
    if cosine < _LEAST_ALIGNED:
        return False
    # Python may reuse an id once its array is gone, so the pair is forgotten when either array is.
    forget = lambda _: _known.pop(key, None)
    _known[key] = weakref.ref(array, forget), weakref.ref(leaf.U, forget)
    return True


def _can_tell(W: Any, leaf: LeafFactors) -> bool:
    """Whether the check applies: concrete arrays on the same devices of this process, and large enough."""
    arrays = (*jax.tree.leaves(W), leaf.U, leaf.V)
    if any(isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array | np.ndarray) for x in arrays):
        return False
    places = {frozenset(x.sharding.device_set) for x in arrays if isinstance(x, jax.Array)}
    if len(places) > 1 or not all(x.is_fully_addressable for x in arrays if isinstance(x, jax.Array)):
        return False
    return min(leaf.U.shape[-2], leaf.V.shape[-2]) >= _ENOUGH and jnp.issubdtype(W.dtype, jnp.floating)


@partial(jax.jit, static_argnames="target")
def _cosine(
    W: Any, U: Float[Array, "layers out rank"], V: Float[Array, "layers num_in rank"], target: Target
) -> Float[Array, ""]:
    """The cosine of W v and u for the leading triplet of the first layer; 1 where W v is zero."""
    image = oriented_stack((W,), ((target, 0),))[0].astype(jnp.float32) @ V[0, :, 0]
    sizes = jnp.linalg.norm(image) * jnp.linalg.norm(U[0, :, 0])
    return jnp.where(sizes > 0, jnp.dot(image, U[0, :, 0]) / jnp.where(sizes > 0, sizes, 1.0), 1.0)
