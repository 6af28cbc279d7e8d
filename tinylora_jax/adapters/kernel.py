"""A weight with a low-rank update beside it, and the one matmul that understands both.

The update is never added to the weight: in bfloat16 a tiny ΔW would be rounded away, and a row of
the batch may carry an adapter of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
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

    base: Float[Array, ...]
    right: Float[Array, "*layers num_in rank"]
    core: Float[Array, "*rows rank rank"]
    left: Float[Array, "*layers num_out rank"]


_HALF = (jnp.bfloat16, jnp.float16)
_PARTS = 4  # of a long sum
_WIDE_FROM = 2048  # inputs: updates as rows of the product decode 3,584 4 % faster, 2,048 2 %, 1,536 not, 896 slower
_FEW_ROWS = 512  # up to which its products leave multiprocessors idle
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
    """skinny · factor for `[..., r]` and `[r, out]`; at a small rank XLA fuses it into whatever reads it."""
    rank = factor.shape[0]
    if rank <= _UNROLLED:
        return sum(skinny[..., k, None] * factor[k] for k in range(rank))
    return jnp.matmul(skinny, factor, precision="highest")


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ · b for `[..., tokens, r]`, exact float32."""
    if a.shape[-1] <= _UNROLLED:
        return jnp.sum(a[..., :, None] * b[..., None, :], axis=-3)
    return jnp.matmul(jnp.swapaxes(a, -1, -2), b, precision="highest")


def _flat(x: jax.Array, num: int) -> jax.Array:
    """Joins the trailing `num` axes."""
    return x.reshape(*x.shape[: x.ndim - num], math.prod(x.shape[x.ndim - num :]))


def pieces(x: jax.Array, dtype: jnp.dtype, count: int) -> tuple[jax.Array, ...]:
    """x as a sum of `count` numbers of 16 bits: so many times their precision."""
    info, found = jnp.finfo(dtype), []
    for _ in range(count - 1):
        high = jax.lax.reduce_precision(x, info.nexp, info.nmant)  # a pair of casts would be optimized away
        found, x = [*found, high.astype(dtype)], x - high
    return (*found, x.astype(dtype))


def _in_one_product(x: jax.Array, W: jax.Array) -> bool:
    """Whether the update rides in the product of a wide kernel: elsewhere than on a GPU it fuses into its end."""
    return jax.default_backend() == "gpu" and x.dtype in _HALF and W.ndim == 2 and W.shape[1] >= 2 * W.shape[0]


def _widened(W: jax.Array, left: jax.Array) -> jax.Array:
    """The rows of W, then Uᵀ in two halves that meet those of `_columns`, up to a multiple of 64 rows."""
    high, low = pieces(left.T, W.dtype, 2)
    padding = jnp.zeros((-(W.shape[0] + 3 * left.shape[1]) % 64, W.shape[1]), W.dtype)
    return jnp.concatenate([W, high, high, low, padding])


def _columns(x: jax.Array, mixed: jax.Array, size: int) -> jax.Array:
    """`[x, mixed]` such that its product with `_widened` is x·W + mixed·Uᵀ to more than 16 bits before rounding."""
    high, low = pieces(mixed, x.dtype, 2)
    padding = jnp.zeros((*x.shape[:-1], size - x.shape[-1] - 3 * mixed.shape[-1]), x.dtype)
    return jnp.concatenate([x, high, low, high, padding], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _adapted(x, W, right, core, left, num_in):
    return _adapted_forward(x, W, right, core, left, num_in)[0]


def _adapted_forward(x, W, right, core, left, num_in):
    skinny = jnp.matmul(_flat(x, num_in), right.astype(x.dtype), preferred_element_type=jnp.float32)
    mixed = _mix(skinny, core)
    if _in_one_product(x, W):
        wide = _widened(W, left)
        y = jnp.matmul(_columns(x, mixed, wide.shape[0]), wide)
    else:
        contract = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
        base = jax.lax.dot_general(x, W, (contract, ((), ())), preferred_element_type=jnp.float32)
        y = (base + _expand(mixed, left.T).reshape(base.shape)).astype(x.dtype)
    return y, (x, W, right, core, left, skinny)


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
    dx = dx + _expand(g_skinny, right.astype(jnp.float32).T).reshape(x.shape).astype(x.dtype)
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


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedKernel:
    """Several kernels that read the same input, as one product: decoding is bound by launches and by bytes.

    The columns of `base` are those of every W, then those of every V, then zeros up to a multiple of 64: the
    skinny products x·V cost no launch of their own. Wide kernels have V apart and their updates as further rows of
    `base` instead (`_in_one_product`): a float32 output of twice the bytes would cost more than that launch.

    Attributes:
      base: `[in, Σ out + Σ rank + padding]`, or `[in + 3 Σ rank + padding, Σ out]`.
      updates: per kernel what turns its skinny product into its update.
      widths: per kernel the width of its output.
      right: `[in, Σ rank]`, every V, where the updates are rows of `base`; else None.
    """

    base: jax.Array
    updates: tuple[_Update, ...]
    widths: tuple[int, ...] = field(metadata={"static": True})
    right: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Update:
    """`core` `[rows, rank, rank]` if each row has its own adapter, else None and part of `left` `[rank, out]`.

    A kernel without an adapter has `rank` 0.
    """

    core: jax.Array | None
    left: jax.Array

    @classmethod
    def of(cls, kernel: jax.Array | AdaptedKernel) -> _Update:
        if not isinstance(kernel, AdaptedKernel):
            return cls(None, jnp.zeros((0, kernel.shape[1]), jnp.float32))
        # Neighbours in the output are neighbours in memory, as they are for the threads that read them.
        left = kernel.left.T
        if kernel.core.ndim == 3:
            return cls(kernel.core, left)
        return cls(None, jnp.matmul(kernel.core, left, precision="highest"))

    @property
    def rank(self) -> int:
        return self.left.shape[0]

    def mixed(self, skinny: jax.Array) -> jax.Array:
        """What the rows of `left` are multiplied with."""
        return skinny if self.core is None else _mix(skinny, self.core)

    def __call__(self, skinny: jax.Array) -> jax.Array:
        return _expand(self.mixed(skinny), self.left)


def map_shared(function: Callable[[jax.Array], jax.Array], kernel: jax.Array | AdaptedKernel) -> Any:
    """A kernel, adapted or not, with a function applied to the arrays that all rows share: all but `core`."""
    if not isinstance(kernel, AdaptedKernel):
        return function(kernel)
    return replace(kernel, base=function(kernel.base), right=function(kernel.right), left=function(kernel.left))


def fuse(kernels: Sequence[jax.Array | AdaptedKernel]) -> FusedKernel:
    """Joins two-dimensional kernels of one input; `fused_matmul` is its use."""
    bases = [k.base if isinstance(k, AdaptedKernel) else k for k in kernels]
    rights = [k.right.astype(k.base.dtype) for k in kernels if isinstance(k, AdaptedKernel)]
    updates, widths = tuple(_Update.of(kernel) for kernel in kernels), tuple(base.shape[1] for base in bases)
    joined = jax.ShapeDtypeStruct((bases[0].shape[0], sum(widths)), bases[0].dtype)
    if rights and joined.shape[0] >= _WIDE_FROM and _in_one_product(joined, joined):
        left = jax.scipy.linalg.block_diag(*(update.left for update in updates))
        base = _widened(jnp.concatenate(bases, axis=1), left.T)
        return FusedKernel(base, updates, widths, jnp.concatenate(rights, axis=1))
    columns = [*bases, *rights]
    padding = jnp.zeros((joined.shape[0], -sum(c.shape[1] for c in columns) % 64), joined.dtype)
    return FusedKernel(jnp.concatenate([*columns, padding], axis=1), updates, widths)


def _product(x: jax.Array, W: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x·W in a dtype; on a GPU a long sum of few rows is cut into parts, so that all multiprocessors have some.

    `[256, 18944] · [18944, 3584]` is 28 tiles of output for 132 multiprocessors, and took 85 µs for 50 µs of reading.
    """
    few = math.prod(x.shape[:-1]) <= _FEW_ROWS
    if not (jax.default_backend() == "gpu" and x.dtype in _HALF and few and W.shape[0] >= _PARTS * W.shape[1]):
        return jnp.matmul(x, W, preferred_element_type=dtype)
    x, W = x.reshape(*x.shape[:-1], _PARTS, -1), W.reshape(_PARTS, -1, W.shape[1])
    return jnp.sum(jnp.einsum("...gk,gkn->g...n", x, W, preferred_element_type=jnp.float32), axis=0).astype(dtype)


def fused_matmul(x: Float[Array, "... in"], kernel: FusedKernel) -> tuple[Float[Array, ...], ...]:
    """What `matmul` gives for each of the fused kernels, from one product."""
    if kernel.right is not None:
        skinny = jnp.matmul(x, kernel.right, preferred_element_type=jnp.float32)
        ranks = np.cumsum([update.rank for update in kernel.updates])[:-1]
        mixed = [update.mixed(part) for update, part in zip(kernel.updates, jnp.split(skinny, ranks, -1), strict=True)]
        columns = _columns(x, jnp.concatenate(mixed, axis=-1), kernel.base.shape[0])
        return tuple(jnp.split(_product(columns, kernel.base, x.dtype), np.cumsum(kernel.widths)[:-1], axis=-1))
    adapted = any(update.rank for update in kernel.updates)
    product = _product(x, kernel.base, jnp.float32 if adapted else x.dtype)
    outputs, at, skinny_at = [], 0, sum(kernel.widths)
    for width, update in zip(kernel.widths, kernel.updates, strict=True):
        y = product[..., at : at + width]
        if update.rank:
            y = y + update(product[..., skinny_at : skinny_at + update.rank])
        outputs.append(y.astype(x.dtype))
        at, skinny_at = at + width, skinny_at + update.rank
    return tuple(outputs)


_WITH_CORES = (AdaptedKernel, _Update)


def _has_own_rows(kernel: Any) -> bool:
    """Whether each row of the batch has a core of its own."""
    return isinstance(kernel, _WITH_CORES) and kernel.core is not None and kernel.core.ndim == 3


def select_rows(params: Any, index: Int[Array, " rows"]) -> Any:
    """The tree in which row i has the adapter of row `index[i]`; adapters shared by all rows stay as they are."""
    select = lambda kernel: replace(kernel, core=kernel.core[index]) if _has_own_rows(kernel) else kernel
    return jax.tree.map(select, params, is_leaf=lambda x: isinstance(x, _WITH_CORES))


def rows_marked(params: Any, tree: Any, mark: Any) -> Any:
    """A tree like `params` with `mark` in place of what has one entry a row of the batch, `tree`'s leaves elsewhere."""
    select = lambda kernel, other: replace(other, core=mark) if _has_own_rows(kernel) else other
    return jax.tree.map(select, params, tree, is_leaf=lambda x: isinstance(x, _WITH_CORES))
