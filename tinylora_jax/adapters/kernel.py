"""A weight with a separate low-rank update or offset, and a matmul that handles them.

The update is never added to the weight: in bfloat16 a tiny ΔW would be lost to rounding, and each row of the batch
may have its own adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from tinylora_jax.adapters.quantized import (
    QuantizedKernel,
    contract,
    float_product,
    is_quantized,
    joined,
    product_gradients,
    quantized_gradient,
    quantized_product,
)
from tinylora_jax.adapters.shifted import Shifted, aligned, shifted_product


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AdaptedKernel:
    """A frozen kernel W and its separate update ΔW = right · core · leftᵀ.

    In a stacked kernel every field has one more leading axis (the layers), which `jax.lax.scan` slices together.

    Attributes:
      base: kernel W, `[*in, *out]`, quantized or not.
      right: V, float32 `[in, rank]`, with the input axes flattened.
      core: Rᵀ Σ, float32 `[rank, rank]`, `[rows, rank, rank]` with one adapter per row of the batch, or
        `[rows, tokens, rank, rank]` with one per token.
      left: U, float32 `[out, rank]`, with the output axes flattened.
    """

    base: Float[Array, ...] | QuantizedKernel
    right: Float[Array, "*layers num_in rank"]
    core: Float[Array, "*rows rank rank"]
    left: Float[Array, "*layers num_out rank"]


_HALF = (jnp.bfloat16, jnp.float16)
_PARTS = 4  # number of parts of a long sum
# Number of inputs from which updates become rows of the product: decoding is then 4 % faster with 3,584 inputs, 2 %
# with 2,048, no faster with 1,536 and slower with 896.
_WIDE_FROM = 2048
_FEW_ROWS = 512  # up to this many rows, the products leave multiprocessors idle
_UNROLLED = 6  # up to this rank the update is a few fused multiply-adds; above, a matrix product


def _mix(skinny: jax.Array, core: jax.Array) -> jax.Array:
    """skinny · core for `[..., r]` and `[r, r]`, or `[rows, (tokens,) r, r]` with own ones; exact float32."""
    rank = core.shape[-1]
    if core.ndim > 2:
        own = core.shape[:-2]
        core = core.reshape(*own, *(1,) * (skinny.ndim - 1 - len(own)), rank, rank)
    if rank <= _UNROLLED:
        return sum(skinny[..., j, None] * core[..., j, :] for j in range(rank))
    return jnp.matmul(skinny[..., None, :], core, precision="highest")[..., 0, :]


def _expand(skinny: jax.Array, factor: jax.Array) -> jax.Array:
    """skinny · factor for `[..., r]` and `[r, out]`; at a small rank XLA fuses it into its consumer."""
    rank = factor.shape[0]
    if rank <= _UNROLLED:
        return sum(skinny[..., k, None] * factor[k] for k in range(rank))
    return jnp.matmul(skinny, factor, precision="highest")


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    """aᵀ · b for `[..., tokens, r]`, in exact float32."""
    if a.shape[-1] <= _UNROLLED:
        return jnp.sum(a[..., :, None] * b[..., None, :], axis=-3)
    return jnp.matmul(jnp.swapaxes(a, -1, -2), b, precision="highest")


def _flat(x: jax.Array, num: int) -> jax.Array:
    """Flattens the trailing `num` axes into one."""
    return x.reshape(*x.shape[: x.ndim - num], math.prod(x.shape[x.ndim - num :]))


def pieces(x: jax.Array, dtype: jnp.dtype, count: int) -> tuple[jax.Array, ...]:
    """Splits x into a sum of `count` 16-bit arrays, for `count` times their precision."""
    info, found = jnp.finfo(dtype), []
    for _ in range(count - 1):
        high = jax.lax.reduce_precision(x, info.nexp, info.nmant)  # XLA would optimize a pair of casts away
        found, x = [*found, high.astype(dtype)], x - high
    return (*found, x.astype(dtype))


def _in_one_product(x: jax.Array, W: Any) -> bool:
    """Whether the update becomes part of a wide kernel's product; only on a GPU, because elsewhere XLA fuses it."""
    if is_quantized(W):
        return False  # the update does not have the scales of W
    return jax.default_backend() == "gpu" and x.dtype in _HALF and W.ndim == 2 and W.shape[1] >= 2 * W.shape[0]


def _widened(W: jax.Array, left: jax.Array) -> jax.Array:
    """The rows of W, then Uᵀ in two pieces that match those of `_columns`, padded to a multiple of 64 rows."""
    high, low = pieces(left.T, W.dtype, 2)
    padding = jnp.zeros((-(W.shape[0] + 3 * left.shape[1]) % 64, W.shape[1]), W.dtype)
    return jnp.concatenate([W, high, high, low, padding])


def _columns(x: jax.Array, mixed: jax.Array, size: int) -> jax.Array:
    """`[x, mixed]` whose product with `_widened` is x·W + mixed·Uᵀ with more than 16-bit precision before rounding."""
    high, low = pieces(mixed, x.dtype, 2)
    padding = jnp.zeros((*x.shape[:-1], size - x.shape[-1] - 3 * mixed.shape[-1]), x.dtype)
    return jnp.concatenate([x, high, low, high, padding], axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantized(x, W, num_in):
    return quantized_product(x, W, num_in).astype(x.dtype)


_quantized.defvjp(
    lambda x, W, num_in: (_quantized(x, W, num_in), W),
    lambda num_in, W, g: (quantized_gradient(g, W, num_in), None),  # JAX's own rule would convert W to float32
)


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
        base = float_product(x, W, num_in)
        y = (base + _expand(mixed, left.T).reshape(base.shape)).astype(x.dtype)
    return y, (x, W, right, core, left, skinny)


def _adapted_backward(num_in, residuals, g):
    # JAX's own rule would multiply float32 copies of W and of the cotangent. Unused gradients (above all dL/dW) are
    # dead code that the compiler removes.
    x, W, right, core, left, skinny = residuals
    num_out = W.ndim - num_in
    dx, dW = product_gradients(x, W, num_in, g)
    wide = partial(jnp.matmul, preferred_element_type=jnp.float32)
    g_flat, x_flat = _flat(g, num_out), _flat(x, num_in)
    g_mixed = wide(g_flat, left.astype(g.dtype))
    g_skinny = _mix(g_mixed, jnp.swapaxes(core, -1, -2))
    dx = dx + _expand(g_skinny, right.astype(jnp.float32).T).reshape(x.shape).astype(x.dtype)
    rows = lambda y: y.reshape(*core.shape[:-2], -1, y.shape[-1])
    d_core = _outer(rows(skinny), rows(g_mixed))
    tokens = lambda y: y.reshape(-1, y.shape[-1])
    d_right = wide(tokens(x_flat).T, tokens(g_skinny).astype(x.dtype)).astype(right.dtype)
    d_left = wide(tokens(g_flat).T, tokens(_mix(skinny, core)).astype(g.dtype)).astype(left.dtype)
    return dx, dW, d_right, d_core, d_left


_adapted.defvjp(_adapted_forward, _adapted_backward)


Kernel: TypeAlias = jax.Array | QuantizedKernel | AdaptedKernel | Shifted
"""What `matmul` multiplies by."""


def _base(kernel: Kernel) -> jax.Array | QuantizedKernel:
    """The frozen weight of a kernel."""
    return kernel.base if is_adapted(kernel) else kernel


def is_adapted(leaf: Any) -> bool:
    """Whether a leaf of `policy(v)` holds a frozen weight and something trained beside it."""
    return isinstance(leaf, AdaptedKernel | Shifted)


def matmul(x: Float[Array, ...], kernel: Kernel, num_in: int = 1) -> Float[Array, ...]:
    """Contracts the trailing axes of `x` with the leading axes of a kernel, adapted, quantized, both or neither.

    y = x·W + x·V·(RᵀΣ)·Uᵀ, or x·W + b for a `Shifted` kernel. What is trained is accumulated in float32 and added
    before a single rounding to `x.dtype`.

    Args:
      x: activations `[..., *in]`; `[rows, ..., *in]` if the kernel has one adapter per row.
      kernel: array `[*in, *out]`, `QuantizedKernel`, `AdaptedKernel` or `Shifted`.
      num_in: number of input axes.

    Returns:
      Activations `[..., *out]` in the dtype of `x`.

    >>> import jax.numpy as jnp
    >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
    (2, 4)
    """
    if isinstance(kernel, AdaptedKernel):
        base = kernel.base if is_quantized(kernel.base) else kernel.base.astype(x.dtype)
        return _adapted(x, base, kernel.right, kernel.core, kernel.left, num_in)
    if isinstance(kernel, Shifted):
        return shifted_product(x, kernel, num_in)
    if is_quantized(kernel):
        return _quantized(x, kernel, num_in)
    return contract(x, kernel.astype(x.dtype), num_in)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FusedKernel:
    """Several kernels with the same input, as one product: launches and memory traffic limit decoding.

    The columns of `base` are those of every W, then those of every V, then zeros up to a multiple of 64, so that the
    skinny products x·V need no separate launch. Wide kernels instead keep V separate and add their updates as further
    rows of `base` (`_in_one_product`): a float32 output of twice the size would cost more than that launch. Quantized
    kernels also keep V separate, because V has no scale in common with them.

    Attributes:
      base: joined kernels, `[in, Σ out + Σ rank + padding]` or `[in + 3 Σ rank + padding, Σ out]`; quantized
        `[in, Σ out + padding]`.
      updates: function of each kernel that turns its skinny product into its update.
      widths: output width of each kernel.
      right: every V, `[in, Σ rank]`, if they are not columns of `base`; else None.
    """

    base: jax.Array | QuantizedKernel
    updates: tuple[_Update, ...]
    widths: tuple[int, ...] = field(metadata={"static": True})
    right: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Update:
    """The update of one kernel, as `core` `[rows, rank, rank]` and `left` `[rank, out]`, or as an offset.

    `core` is None if all rows share the adapter: it is then part of `left`. A kernel without matrices has rank 0.
    """

    core: jax.Array | None
    left: jax.Array
    offset: jax.Array | None = None

    @classmethod
    def of(cls, kernel: Kernel) -> _Update:
        if not isinstance(kernel, AdaptedKernel):
            offset = kernel.offset if isinstance(kernel, Shifted) else None
            return cls(None, jnp.zeros((0, _base(kernel).shape[1]), jnp.float32), offset)
        # Adjacent outputs are adjacent in memory, because adjacent threads read them.
        left = kernel.left.T
        if kernel.core.ndim == 3:
            return cls(kernel.core, left)
        return cls(None, jnp.matmul(kernel.core, left, precision="highest"))

    @property
    def rank(self) -> int:
        return self.left.shape[0]

    def mixed(self, skinny: jax.Array) -> jax.Array:
        """The factor of the rows of `left`."""
        return skinny if self.core is None else _mix(skinny, self.core)

    @property
    def is_none(self) -> bool:
        """Whether the kernel has no adapter."""
        return not self.rank and self.offset is None

    def added(self, y: jax.Array, skinny: jax.Array) -> jax.Array:
        """The product of the frozen weight with the update, in float32."""
        if self.rank:
            y = y + _expand(self.mixed(skinny), self.left)
        return y if self.offset is None else y + aligned(self.offset, y.ndim)


def map_shared(function: Callable[[jax.Array], jax.Array], kernel: Kernel) -> Any:
    """Applies a function to the arrays of a kernel that all rows may share, which are all but `core` and `offset`."""
    if isinstance(kernel, Shifted):
        return replace(kernel, base=jax.tree.map(function, kernel.base))
    if not isinstance(kernel, AdaptedKernel):
        return jax.tree.map(function, kernel)
    shared = jax.tree.map(function, (kernel.base, kernel.right, kernel.left))
    return AdaptedKernel(shared[0], shared[1], kernel.core, shared[2])


def can_fuse(kernels: Sequence[Kernel]) -> bool:
    """Whether kernels have the same input: in int4 each has its own scales of the inputs."""
    bases = [_base(kernel) for kernel in kernels]
    return not any(is_quantized(base) and base.inputs is not None for base in bases)


def fuse(kernels: Sequence[Kernel]) -> FusedKernel:
    """Joins two-dimensional kernels with the same input, for `fused_matmul`; all are quantized, or none is."""
    bases = [_base(kernel) for kernel in kernels]
    rights = [k.right.astype(k.base.dtype) for k in kernels if isinstance(k, AdaptedKernel)]
    updates, widths = tuple(_Update.of(kernel) for kernel in kernels), tuple(base.shape[1] for base in bases)
    if is_quantized(bases[0]):
        base = joined(bases, sum(widths) + -sum(widths) % 64)
        return FusedKernel(base, updates, widths, jnp.concatenate(rights, axis=1) if rights else None)
    whole = jax.ShapeDtypeStruct((bases[0].shape[0], sum(widths)), bases[0].dtype)
    if rights and whole.shape[0] >= _WIDE_FROM and _in_one_product(whole, whole):
        left = jax.scipy.linalg.block_diag(*(update.left for update in updates))
        base = _widened(jnp.concatenate(bases, axis=1), left.T)
        return FusedKernel(base, updates, widths, jnp.concatenate(rights, axis=1))
    columns = [*bases, *rights]
    padding = jnp.zeros((whole.shape[0], -sum(c.shape[1] for c in columns) % 64), whole.dtype)
    return FusedKernel(jnp.concatenate([*columns, padding], axis=1), updates, widths)


def _product(x: jax.Array, W: Any, dtype: DTypeLike) -> jax.Array:
    """x·W in a given dtype, quantized or not; on a GPU long sums over few rows are split, to use all multiprocessors.

    `[256, 18944] · [18944, 3584]` has only 28 output tiles for 132 multiprocessors, and took 85 µs although reading
    the operands takes 50 µs.
    """
    if is_quantized(W):
        return (_product(x, W.values.astype(x.dtype), jnp.float32) * W.scale[0]).astype(dtype)
    few = math.prod(x.shape[:-1]) <= _FEW_ROWS
    if not (jax.default_backend() == "gpu" and x.dtype in _HALF and few and W.shape[0] >= _PARTS * W.shape[1]):
        return jnp.matmul(x, W, preferred_element_type=dtype)
    x, W = x.reshape(*x.shape[:-1], _PARTS, -1), W.reshape(_PARTS, -1, W.shape[1])
    return jnp.sum(jnp.einsum("...gk,gkn->g...n", x, W, preferred_element_type=jnp.float32), axis=0).astype(dtype)


def fused_matmul(x: Float[Array, "... in"], kernel: FusedKernel) -> tuple[Float[Array, ...], ...]:
    """Computes `matmul` for each of the fused kernels with one product."""
    apart = kernel.right is not None
    skinny = jnp.matmul(x, kernel.right, preferred_element_type=jnp.float32) if apart else None
    if apart and not is_quantized(kernel.base):
        ranks = np.cumsum([update.rank for update in kernel.updates])[:-1]
        mixed = [update.mixed(part) for update, part in zip(kernel.updates, jnp.split(skinny, ranks, -1), strict=True)]
        columns = _columns(x, jnp.concatenate(mixed, axis=-1), kernel.base.shape[0])
        return tuple(jnp.split(_product(columns, kernel.base, x.dtype), np.cumsum(kernel.widths)[:-1], axis=-1))
    adapted = not all(update.is_none for update in kernel.updates)
    product = _product(x, kernel.base, jnp.float32 if adapted else x.dtype)
    outputs, at, skinny_at = [], 0, 0
    skinny = skinny if apart else product[..., sum(kernel.widths) :]
    for width, update in zip(kernel.widths, kernel.updates, strict=True):
        y = update.added(product[..., at : at + width], skinny[..., skinny_at : skinny_at + update.rank])
        outputs.append(y.astype(x.dtype))
        at, skinny_at = at + width, skinny_at + update.rank
    return tuple(outputs)


_WITH_ROWS = (AdaptedKernel, Shifted, _Update)


def _of_rows(node: Any) -> dict[str, jax.Array]:
    """The fields of a node that have one entry per row of the batch."""
    core, offset = getattr(node, "core", None), getattr(node, "offset", None)
    found = {"core": core} if core is not None and core.ndim == 3 else {}
    return found | ({"offset": offset} if offset is not None and offset.ndim == 2 else {})


def _map_rows(change: Callable[..., Any], params: Any, *trees: Any) -> Any:
    return jax.tree.map(change, params, *trees, is_leaf=lambda x: isinstance(x, _WITH_ROWS))


def select_rows(params: Any, index: Int[Array, " rows"]) -> Any:
    """Gives row i the adapter of row `index[i]`; adapters that all rows share are unchanged."""

    def select(node: Any) -> Any:
        own = _of_rows(node)
        return replace(node, **{name: x[index] for name, x in own.items()}) if own else node

    return _map_rows(select, params)


def rows_marked(params: Any, tree: Any, mark: Any) -> Any:
    """A tree like `params`, with `mark` for leaves that have one entry per batch row and `tree`'s leaves elsewhere."""

    def select(node: Any, other: Any) -> Any:
        own = _of_rows(node)
        return replace(other, **dict.fromkeys(own, mark)) if own else other

    return _map_rows(select, params, tree)
