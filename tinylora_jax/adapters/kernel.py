"""A weight with a low-rank update beside it, and the one matmul that understands both.

The update is never added to the weight: in bfloat16 a tiny ΔW would be rounded away, and a row of
the batch may carry an adapter of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


_UNROLLED = 6  # up to this rank the update is a few fused multiply-adds; above, a product


def _mix(skinny: jax.Array, core: jax.Array) -> jax.Array:
    """skinny · core for `[..., r]` and `[r, r]`, or `[rows, r, r]` when each row has its own; exact float32."""
    rank = core.shape[-1]
    if core.ndim == 3:
        core = core.reshape(core.shape[0], *(1,) * (skinny.ndim - 2), rank, rank)
    if rank <= _UNROLLED:
        return sum(skinny[..., j, None] * core[..., j, :] for j in range(rank))
    return jnp.matmul(skinny[..., None, :], core, precision="highest")[..., 0, :]


def _expand(skinny: jax.Array, factor: jax.Array) -> jax.Array:
    """skinny · factorᵀ for `[..., r]` and `[out, r]`; at a small rank XLA fuses it into whatever reads it."""
    rank = factor.shape[-1]
    if rank <= _UNROLLED:
        return sum(skinny[..., k, None] * factor[:, k] for k in range(rank))
    return jnp.matmul(skinny, factor.T, precision="highest")


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ · b for `[..., tokens, r]`, exact float32."""
    if a.shape[-1] <= _UNROLLED:
        return jnp.sum(a[..., :, None] * b[..., None, :], axis=-3)
    return jnp.matmul(jnp.swapaxes(a, -1, -2), b, precision="highest")


def _flat(x: jax.Array, num: int) -> jax.Array:
    """Joins the trailing `num` axes."""
    return x.reshape(*x.shape[: x.ndim - num], math.prod(x.shape[x.ndim - num :]))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted(x, W, right, core, left, num_in):
    return _adapted_forward(x, W, right, core, left, num_in)[0]


def _adapted_forward(x, W, right, core, left, num_in):
    contract = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
    base = jax.lax.dot_general(x, W, (contract, ((), ())), preferred_element_type=jnp.float32)
    skinny = jnp.matmul(_flat(x, num_in), right.astype(x.dtype), preferred_element_type=jnp.float32)
    update = _expand(_mix(skinny, core), left).reshape(base.shape)
    return (base + update).astype(x.dtype), (x, W, right, core, left, skinny)


def _adapted_backward(num_in, residuals, g):
    # Left to JAX, float32 copies of W and of the cotangent would be multiplied. What nobody asks for (dL/dW
    # above all) is dead code that the compiler drops.
    x, W, right, core, left, skinny = residuals
    num_out = W.ndim - num_in
    narrow = lambda x, W: jax.lax.dot_general(
        x, W, ((tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in))), ((), ())), preferred_element_type=x.dtype
    )
    dx, dW = jax.vjp(narrow, x, W)[1](g)
    wide = partial(jnp.matmul, preferred_element_type=jnp.float32)
    g_flat, x_flat = _flat(g, num_out), _flat(x, num_in)
    g_mixed = wide(g_flat, left.astype(g.dtype))
    g_skinny = _mix(g_mixed, jnp.swapaxes(core, -1, -2))
    dx = dx + _expand(g_skinny, right.astype(jnp.float32)).reshape(x.shape).astype(x.dtype)
    rows = lambda y: y.reshape(y.shape[0], -1, y.shape[-1]) if core.ndim == 3 else y.reshape(-1, y.shape[-1])
    d_core = _outer(rows(skinny), rows(g_mixed))
    tokens = lambda y: y.reshape(-1, y.shape[-1])
    d_right = wide(tokens(x_flat).T, tokens(g_skinny).astype(x.dtype)).astype(right.dtype)
    d_left = wide(tokens(g_flat).T, tokens(_mix(skinny, core)).astype(g.dtype)).astype(left.dtype)
    return dx, dW, d_right, d_core, d_left


_adapted.defvjp(_adapted_forward, _adapted_backward)


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
    if isinstance(kernel, AdaptedKernel):
        return _adapted(x, kernel.base.astype(x.dtype), kernel.right, kernel.core, kernel.left, num_in)
    contract = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (contract, ((), ())))


@partial(jax.tree_util.register_dataclass, data_fields=["base", "core", "left"], meta_fields=["widths"])
@dataclass(frozen=True)
class FusedKernel:
    """Several kernels that read the same input, as one product: decoding is bound by launches and by bytes.

    The columns of `base` are those of every W, then those of every V, then zeros up to a multiple of 64: the
    skinny products x·V cost no launch of their own. All updates together are one of rank R = Σ rank, whose core is
    block diagonal; where all rows share it, it is folded into `left`.

    Attributes:
      base: `[in, Σ out + R + padding]`.
      core: `[rows, R, R]` if each row has its own adapter, else None.
      left: `[Σ out, R]`, block diagonal; None if no kernel is adapted.
      widths: per kernel the width of its output.
    """

    base: jax.Array
    core: jax.Array | None
    left: jax.Array | None
    widths: tuple[int, ...]


def _block_diagonal(blocks: Sequence[jax.Array]) -> jax.Array:
    """`[..., Σ rows, Σ columns]` from blocks `[..., rows, columns]`."""
    before, total = 0, sum(b.shape[-1] for b in blocks)
    padded = []
    for block in blocks:
        after = total - before - block.shape[-1]
        padded.append(jnp.pad(block, ((0, 0),) * (block.ndim - 1) + ((before, after),)))
        before += block.shape[-1]
    return jnp.concatenate(padded, axis=-2)


def fuse(kernels: Sequence[jax.Array | AdaptedKernel]) -> FusedKernel:
    """Joins two-dimensional kernels of one input; `fused_matmul` is its use."""
    adapted = [k for k in kernels if isinstance(k, AdaptedKernel)]
    bases = [k.base if isinstance(k, AdaptedKernel) else k for k in kernels]
    columns = [*bases, *(a.right.astype(a.base.dtype) for a in adapted)]
    padding = -sum(c.shape[1] for c in columns) % 64
    core = left = None
    if adapted:
        lefts = [k.left if isinstance(k, AdaptedKernel) else jnp.zeros((k.shape[1], 0), jnp.float32) for k in kernels]
        left, core = _block_diagonal(lefts), _block_diagonal([a.core for a in adapted])
        if core.ndim == 2:
            left, core = jnp.matmul(left, core.T, precision="highest"), None
    return FusedKernel(
        jnp.concatenate([*columns, jnp.zeros((columns[0].shape[0], padding), columns[0].dtype)], axis=1),
        core,
        left,
        tuple(b.shape[1] for b in bases),
    )


def fused_matmul(x: Float[Array, "... in"], kernel: FusedKernel) -> tuple[Float[Array, ...], ...]:
    """What `matmul` gives for each of the fused kernels, from one product."""
    out = sum(kernel.widths)
    product = jnp.matmul(x, kernel.base, preferred_element_type=x.dtype if kernel.left is None else jnp.float32)
    y = product[..., :out]
    if kernel.left is not None:
        skinny = product[..., out : out + kernel.left.shape[-1]]
        y = y + _expand(skinny if kernel.core is None else _mix(skinny, kernel.core), kernel.left)
    splits = [sum(kernel.widths[: i + 1]) for i in range(len(kernel.widths) - 1)]
    return tuple(jnp.split(y.astype(x.dtype), splits, axis=-1))


def select_rows(params: Any, index: Int[Array, " rows"]) -> Any:
    """The tree in which row i has the adapter of row `index[i]`; adapters shared by all rows stay as they are."""
    kernels = (AdaptedKernel, FusedKernel)

    def select(kernel: Any) -> Any:
        own = isinstance(kernel, kernels) and kernel.core is not None and kernel.core.ndim == 3
        return replace(kernel, core=kernel.core[index]) if own else kernel

    return jax.tree.map(select, params, is_leaf=lambda x: isinstance(x, kernels))
