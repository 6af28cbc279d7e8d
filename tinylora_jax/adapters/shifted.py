"""A weight with a trained vector beside it: an offset of a kernel's outputs, or of a norm's scale.

    y = x·W + b        for a kernel W
    y = x ⊙ (s + b)    for a scale s, where x is normalized

The vector b stays in float32 and is added before the only rounding: added to a bfloat16 number, a small b is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tinylora_jax.adapters.quantized import QuantizedKernel, float_product, product_gradients


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shifted:
    """A frozen kernel or scale, and its separate offset.

    In a stacked weight every field has one more leading axis (the layers), which `jax.lax.scan` slices together.

    Attributes:
      base: kernel W, `[*in, *out]`, quantized or not, or scale s, `[width]`.
      offset: b, float32 `[out]` with the output axes flattened, or `[rows, out]` with one offset per row of the batch.
    """

    base: Float[Array, ...] | QuantizedKernel
    offset: Float[Array, "*rows out"]


def aligned(offset: Float[Array, "*rows out"], ndim: int) -> jax.Array:
    """The offset as an array that is added to `[..., out]`, or to `[rows, ..., out]` if every row has its own."""
    if offset.ndim == 1:
        return offset
    return offset.reshape(offset.shape[0], *(1,) * (ndim - 2), offset.shape[1])


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x, W, offset, num_in):
    y = float_product(x, W, num_in)
    flat = y.reshape(*x.shape[: x.ndim - num_in], offset.shape[-1])
    return (flat + aligned(offset, flat.ndim)).reshape(y.shape).astype(x.dtype)


def _backward(num_in, residuals, g):
    # JAX's own rule would multiply by a float32 copy of W. The gradient of W is dead code that the compiler removes.
    x, W, offset = residuals
    dx, dW = product_gradients(x, W, num_in, g)
    tokens = g.astype(jnp.float32).reshape(*offset.shape[:-1], -1, offset.shape[-1])
    return dx, dW, jnp.sum(tokens, axis=-2)


_product.defvjp(lambda x, W, offset, num_in: (_product(x, W, offset, num_in), (x, W, offset)), _backward)


def shifted_product(x: Float[Array, ...], kernel: Shifted, num_in: int = 1) -> Float[Array, ...]:
    """x·W + b, in the dtype of x; see `matmul`."""
    base = kernel.base if isinstance(kernel.base, QuantizedKernel) else kernel.base.astype(x.dtype)
    return _product(x, base, kernel.offset, num_in)


def rescale(
    x: Float[Array, "... width"], scale: Float[Array, " width"] | Shifted, dtype: DTypeLike
) -> Float[Array, "... width"]:
    """Multiplies normalized activations by the scale of a norm, shifted or not.

    Args:
      x: normalized activations, float32 `[..., width]`; `[rows, ..., width]` if every row has its own offset.
      scale: scale `[width]`, or that with its offset.
      dtype: dtype of the model, to which x is rounded before the product, and then the result.
    """
    if not isinstance(scale, Shifted):
        return x.astype(dtype) * scale
    info = jnp.finfo(dtype)
    # As the frozen scale would: XLA optimizes a pair of casts away, and the result at b = 0 would differ by a rounding.
    rounded = lambda x: jax.lax.reduce_precision(x, info.nexp, info.nmant)
    wide = rounded(x) * (cast(jax.Array, scale.base).astype(jnp.float32) + aligned(scale.offset, x.ndim))
    return rounded(wide).astype(dtype)
