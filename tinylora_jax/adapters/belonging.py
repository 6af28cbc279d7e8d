"""Checks that factors were computed from these weights; equal shapes alone do not show it."""

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

# The cosine of W v and u for the first triplet: 1 but for rounding, whatever the precision of W, and of another weight
# about 1/√out. Fine-tuning turns a leading direction by far less than this allows.
_LEAST_ALIGNED = 0.5
_SAMPLED = 3  # leaves: the first, the middle and the last
_ENOUGH = 16  # a column of fewer entries may be aligned by chance
_known: dict[tuple[int, int], tuple[weakref.ref, weakref.ref]] = {}  # pairs of arrays that fitted before


def check_weights(weights: Mapping[str, Any], factors: Factors) -> None:
    """Refuses weights whose leading singular directions are not those of the factors.

    It looks at one column of three leaves, once for each pair of arrays, and only at concrete arrays: inside a jitted
    function nothing is known of them, and nothing is computed.

    Args:
      weights: leaves of the tree by path, of the shapes that the factors fit.
      factors: factors computed by `factorize` or read from a file.

    Raises:
      ValueError: names the weights.
    """
    paths = list(factors.leaves)
    sampled = dict.fromkeys(paths[i * (len(paths) - 1) // (_SAMPLED - 1)] for i in range(_SAMPLED))
    foreign = [path for path in sampled if not _belongs(weights[path], factors.leaves[path])]
    if foreign:
        raise ValueError(
            f"these factors are of other weights: the singular directions of {', '.join(foreign)} are not those of the"
            " given tree; factorize this tree, or give the one that was factorized"
        )


def _belongs(W: Any, leaf: LeafFactors) -> bool:
    key = id(W), id(leaf.U)
    if key in _known or not _can_tell(W, leaf):
        return True
    with jax.ensure_compile_time_eval():
        cosine = float(_cosine(jnp.asarray(W), jnp.asarray(leaf.U), jnp.asarray(leaf.V), leaf.target))
    if cosine < _LEAST_ALIGNED:
        return False
    # An id may be another array's once its own is gone, so the pair is forgotten with either.
    forget = lambda _: _known.pop(key, None)
    _known[key] = weakref.ref(W, forget), weakref.ref(leaf.U, forget)
    return True


def _can_tell(W: Any, leaf: LeafFactors) -> bool:
    """Whether the arrays are concrete, on the same devices of this process, and large enough."""
    arrays = (W, leaf.U, leaf.V)
    if any(isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array | np.ndarray) for x in arrays):
        return False
    places = {frozenset(x.sharding.device_set) for x in arrays if isinstance(x, jax.Array)}
    if len(places) > 1 or not all(x.is_fully_addressable for x in arrays if isinstance(x, jax.Array)):
        return False
    return min(leaf.U.shape[-2], leaf.V.shape[-2]) >= _ENOUGH and jnp.issubdtype(W.dtype, jnp.floating)


@partial(jax.jit, static_argnames="target")
def _cosine(
    W: jax.Array, U: Float[Array, "layers out rank"], V: Float[Array, "layers num_in rank"], target: Target
) -> Float[Array, ""]:
    """The cosine of W v and u for the leading triplet of the first layer; 1 where W v is zero."""
    image = oriented_stack((W,), ((target, 0),))[0].astype(jnp.float32) @ V[0, :, 0]
    sizes = jnp.linalg.norm(image) * jnp.linalg.norm(U[0, :, 0])
    return jnp.where(sizes > 0, jnp.dot(image, U[0, :, 0]) / jnp.where(sizes > 0, sizes, 1.0), 1.0)
