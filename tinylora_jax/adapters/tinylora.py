"""TinyLoRA as transforms of a pytree of weights: factorize once, then apply or merge any vector.

    ΔW = U Σ (Σᵢ v[g, i] Pᵢ) Vᵀ        for every adapted module in tie group g

(equation 3 and §4 of "Learning to Reason in 13 Parameters", arXiv 2602.04118). W is the torch-oriented
weight `[out, in]`; kernels laid out `[in, out]` get the transpose of this update.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinylora_jax.adapters.belonging import check_weights
from tinylora_jax.adapters.factors import Factors, LeafFactors
from tinylora_jax.adapters.kernel import AdaptedKernel
from tinylora_jax.adapters.quantized import dense, exact
from tinylora_jax.adapters.spec import lora_xs
from tinylora_jax.adapters.targets import Target, leaves_by_path, map_by_path


def init(factors: Factors) -> Float[Array, "groups u"]:
    """Creates the vector at the start of training: zeros, which leave every weight unchanged.

    Args:
      factors: factors computed by `factorize`; they determine the number of groups.

    Returns:
      float32 `[groups, u]`, whatever the dtype of the weights.
    """
    return jnp.zeros((factors.num_groups, factors.spec.u), jnp.float32)


def _groups(leaf: LeafFactors) -> Int[Array, " layers"]:
    return jnp.asarray(leaf.groups, jnp.int32)


def _expand(
    P: Float[Array, "layers u rank rank"], groups: Int[Array, " layers"], v: Float[Array, "... groups u"]
) -> Float[Array, "... layers rank rank"]:
    """R = Σᵢ v[g, i] Pᵢ for every layer of a leaf.

    The precision is set to exact float32: by default a TPU would round v to bfloat16 and lose the latest updates.
    """
    return jnp.einsum("...lu,luij->...lij", jnp.take(v, groups, axis=-2, mode="clip"), P, precision="highest")


@partial(jax.jit, static_argnames="stacked")
def _parts(
    U: Float[Array, "layers out rank"],
    S: Float[Array, "layers rank"],
    V: Float[Array, "layers num_in rank"],
    P: Float[Array, "layers u rank rank"],
    groups: Int[Array, " layers"],
    v: Float[Array, "... groups u"],
    stacked: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`right`, `core` and `left` of an `AdaptedKernel`; jitted so that leaves of one shape are traced once."""
    core = _expand(P, groups, v).swapaxes(-1, -2) * S[:, None, :]
    parts = V, jnp.moveaxis(core, -3, 0), U
    return parts if stacked else tuple(part[0] for part in parts)


def free(factors: Factors) -> Factors:
    """Builds LoRA-XS factors in the same singular directions, with a separate R for every module.

    >>> import jax
    >>> from tinylora_jax.adapters import TinyLoRA, factorize
    >>> free(factorize({"a": {"up_proj": {"kernel": jax.numpy.eye(4, 3)}}}, TinyLoRA(targets=(".*kernel",)))).num_params
    4
    """
    leaves, first = {}, 0
    rank, spec = factors.spec.rank, lora_xs(factors.spec.rank, factors.spec.targets)
    for path, leaf in factors.leaves.items():
        layers = len(leaf.groups)
        P = jnp.broadcast_to(jnp.eye(rank**2).reshape(rank**2, rank, rank), (layers, rank**2, rank, rank))
        leaves[path] = LeafFactors(leaf.U, leaf.S, leaf.V, P, tuple(range(first, first + layers)), leaf.target)
        first += layers
    return Factors(leaves, spec, factors.ill_conditioned)


def coordinates(free: Factors, factors: Factors, v: Float[Array, "... groups u"]) -> Float[Array, "... modules free"]:
    """Converts a vector to the LoRA-XS vector of the same adapter: R of every module. Linear in v.

    All adapters of one rank are points of one space, whatever their tying. Their coordinates in it let a population of
    different adapters decode in one batch. R of a module that an adapter does not change is zero.

    Args:
      free: factors of `lora_xs`.
      factors: factors of `v`, computed by `retie`.
      v: trained vector, float32 `[..., groups, u]`.
    """
    order = np.argsort(np.concatenate([leaf.groups for leaf in free.leaves.values()]))

    def own(path: str) -> Float[Array, "... layers rank rank"]:
        if path in factors.leaves:
            return _expand(factors.leaves[path].P, _groups(factors.leaves[path]), v)
        rank = free.spec.rank
        return jnp.zeros((*v.shape[:-2], len(free.leaves[path].groups), rank, rank), v.dtype)

    R = jnp.concatenate([own(path) for path in free.leaves], axis=-3)
    return R.reshape(*R.shape[:-2], free.spec.u)[..., order, :]


def _check_tree(params: Any, factors: Factors) -> None:
    """Raises for any tree but the factorized one: a reshaped update would fit every weight of equal size."""
    weights = {path: leaf for path, leaf in leaves_by_path(params).items() if path in factors.leaves}
    shapes = {path: np.shape(leaf) for path, leaf in weights.items()}
    problems = []
    for path, leaf in factors.leaves.items():
        if path not in shapes:
            problems.append(f"{path} is missing")
        elif not hasattr(weights[path], "dtype"):
            problems.append(f"{path} is a {type(weights[path]).__name__}, expected an array; unwrap it first")
        elif len(shapes[path]) != len(leaf.target.layout.split()):
            problems.append(f"{path} has shape {shapes[path]}, but its layout is {leaf.target.layout!r}")
        else:
            sizes = [math.prod(shapes[path][axis] for axis in leaf.target.axes(w)) for w in ("layer", "out", "in")]
            expected = [len(leaf.groups), leaf.U.shape[-2], leaf.V.shape[-2]]
            if sizes != expected:
                problems.append(f"{path} has [layers, out, in] = {sizes}, expected {expected}")
    if problems:
        raise ValueError("the tree is not the one that was factorized:\n  " + "\n  ".join(problems[:20]))
    check_weights(weights, factors)


def _check_vector(factors: Factors, v: jax.Array, ranks: tuple[int, ...]) -> None:
    expected = (factors.num_groups, factors.spec.u)
    if v.ndim not in ranks or v.shape[-2:] != expected:
        rows = " (optionally with one leading axis of rows)" if 3 in ranks else ""
        raise ValueError(f"v has shape {v.shape}, but these factors need {expected}{rows}")


def apply(params: Any, factors: Factors, v: Float[Array, "... groups u"]) -> Any:
    """Replaces every adapted weight with an `AdaptedKernel`, which keeps base and update separate.

    Args:
      params: tree of weights that was factorized.
      factors: factors computed from these weights by `factorize`.
      v: trained vector, float32 `[groups, u]`, `[rows, groups, u]` with one adapter per row of a batch, or
        `[rows, tokens, groups, u]` with one per token, whose gradient is that of each token apart.

    Returns:
      A tree of the same structure; forward code must multiply through `matmul`.

    Raises:
      ValueError: the tree is not the one that was factorized, the shape of `v` does not fit, or a kernel's
        layout is not `layer… in… out…` (use `merge` for such layouts).
    """
    _check_vector(factors, v, (2, 3, 4))
    _check_tree(params, factors)

    def wrap(name, leaf):
        if name not in factors.leaves:
            return leaf
        part = factors.leaves[name]
        if not part.target.is_ordered:
            raise ValueError(f"{name} has layout {part.target.layout!r}; apply needs 'layer in out' order, use merge")
        stacked = bool(part.target.axes("layer"))
        return AdaptedKernel(leaf, *_parts(part.U, part.S, part.V, part.P, _groups(part), v, stacked))

    return map_by_path(wrap, params)


def merge(params: Any, factors: Factors, v: Float[Array, "groups u"]) -> Any:
    """Replaces every adapted weight with W + ΔW, dense and in its own dtype.

    In bfloat16 a small ΔW is mostly lost to rounding; `apply` keeps it. A quantized weight becomes W + ΔW in the dtype
    that it had before quantization. Every layout can be merged, stacked or not.

    Args:
      params: tree of weights that was factorized.
      factors: factors computed from these weights by `factorize`.
      v: trained vector, float32 `[groups, u]`.

    Returns:
      A tree of the same structure, shapes and dtypes, which works in any code.

    Raises:
      ValueError: the tree is not the one that was factorized, or the shape of `v` does not fit.
    """
    _check_vector(factors, v, (2,))
    _check_tree(params, factors)

    def add(name, leaf):
        part = factors.leaves.get(name)
        return dense(leaf) if part is None else merge_leaf(leaf, part, v)

    return map_by_path(add, params)


def merge_leaf(leaf: Any, part: LeafFactors, v: Float[Array, "groups u"]) -> jax.Array:
    """Merges one leaf, for callers without memory for all of them at once."""
    wide = np.promote_types(leaf.dtype, np.float32)
    update = _restored(_delta(part, v), leaf, part.target)
    return (exact(leaf).astype(wide) + update.astype(wide)).astype(leaf.dtype)


def delta(factors: Factors, v: Float[Array, "groups u"]) -> dict[str, Float[Array, "layers out in"]]:
    """Computes ΔW = U Σ (Σᵢ vᵢ Pᵢ) Vᵀ of every adapted leaf, for inspection.

    Args:
      factors: factors computed by `factorize`.
      v: trained vector, float32 `[groups, u]`.

    Returns:
      ΔW by leaf path, float32 `[layers, out, in]` in the paper's orientation; an unstacked leaf has one layer.
    """
    _check_vector(factors, v, (2,))
    return {path: _delta(part, v) for path, part in factors.leaves.items()}


def _delta(part: LeafFactors, v: Float[Array, "groups u"]) -> Float[Array, "layers out in"]:
    R = _expand(part.P, _groups(part), v)
    return jnp.einsum("lor,lr,lrs,lis->loi", part.U, part.S, R, part.V, precision="highest")


def _restored(W: jax.Array, like: Any, target: Target) -> jax.Array:
    """Reshapes `[layers, out, in]` back to the shape of `like`; the inverse of `_oriented`."""
    order = sum((target.axes(word) for word in ("layer", "out", "in")), ())
    return jnp.transpose(W.reshape([like.shape[axis] for axis in order]), np.argsort(order))
