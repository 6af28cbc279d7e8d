"""A weight with a low-rank update beside it, and the one matmul that understands both.

The update is never added to the weight: in bfloat16 a tiny ΔW would be rounded away, and a row of
the batch may carry an adapter of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedKernel:
    """A frozen kernel W and its update ΔW = right · core · leftᵀ, kept apart.

    A stacked kernel has one more leading axis on every field (its layers), which `jax.lax.scan`
    slices off together.

    Attributes:
      base: the kernel, `[*in, *out]`.
      right: V, `[in, rank]` with the input axes flattened, float32.
      core: Rᵀ Σ, `[rank, rank]`, or `[rows, rank, rank]` with one adapter per row of the batch, float32.
      left: U, `[out, rank]` with the output axes flattened, float32.
    """

    base: jax.Array
    right: jax.Array
    core: jax.Array
    left: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _wide_dot(x, W, dims):
    """x·W in float32. Left to JAX, its gradient would multiply a float32 copy of W by a float32 cotangent."""
    return jax.lax.dot_general(x, W, dims, preferred_element_type=jnp.float32)


def _wide_dot_backward(dims, primals, cotangent):
    # `matmul` rounds its result to x.dtype, so this cotangent was widened from x.dtype: nothing is lost.
    narrow = lambda x, W: jax.lax.dot_general(x, W, dims, preferred_element_type=x.dtype)
    return jax.vjp(narrow, *primals)[1](cotangent.astype(primals[0].dtype))


_wide_dot.defvjp(lambda x, W, dims: (_wide_dot(x, W, dims), (x, W)), _wide_dot_backward)


def matmul(x: Float[Array, ...], kernel: jax.Array | AdaptedKernel, num_in: int = 1) -> Float[Array, ...]:
    """Contracts the trailing axes of `x` with the leading axes of a kernel, adapted or not.

    y = x·W + x·V·(RᵀΣ)·Uᵀ, the update accumulated in float32 and added before the one rounding to `x.dtype`.

    Args:
      x: activations `[..., *in]`; `[rows, ..., *in]` if the kernel carries one adapter per row.
      kernel: an array `[*in, *out]` or an `AdaptedKernel`.
      num_in: how many axes `in` has.

    Returns:
      Activations `[..., *out]` in the dtype of `x`.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """
    contract = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
    if not isinstance(kernel, AdaptedKernel):
        return jax.lax.dot_general(x, kernel.astype(x.dtype), (contract, ((), ())))
    base = _wide_dot(x, kernel.base.astype(x.dtype), (contract, ((), ())))
    flat = x.reshape(*x.shape[: x.ndim - num_in], math.prod(x.shape[x.ndim - num_in :]))
    skinny = jnp.matmul(flat, kernel.right.astype(x.dtype), preferred_element_type=jnp.float32)
    if kernel.core.ndim == 3:
        skinny = jnp.einsum("b...r,brs->b...s", skinny, kernel.core)
    else:
        skinny = skinny @ kernel.core
    return (base + (skinny @ kernel.left.T).reshape(base.shape)).astype(x.dtype)
