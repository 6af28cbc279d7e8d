"""Expresses foreign factors in a weight's own singular triplets, so that adapters can share a batch.

An update B (Σᵢ vᵢ Pᵢ) A whose B and A span the weight's leading singular directions is a TinyLoRA update with other P:

    B Pᵢ A = U Σ Pᵢ' Vᵀ        Pᵢ' = Σ⁺ Uᵀ B Pᵢ A V

So an adapter trained by another library needs only u · r² stored numbers per module, not the directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters.factors import Factors, LeafFactors, exchange, factorize
from tinylora_jax.adapters.spec import TinyLoRA
from tinylora_jax.adapters.svd import SVD
from tinylora_jax.adapters.targets import module_name
from tinylora_jax.adapters.tinylora import coordinates, free
from tinylora_jax.multihost import to_host

# As a share of the update. Two float32 decompositions of a weight, by the writer and the reader of a file, differ by up
# to 7.5e-7 / gap. That can move logits by more than all other rounding; in such cases the given directions are kept.
_SAME = 1e-5
_PORTABLE = 1e-3  # relative accuracy of an update that an adapter file guarantees
_ZERO = 1e-6  # of the largest singular value


class CombinationError(ValueError):
    """Adapters cannot share their factors."""


def places_of(factors: Factors) -> dict[str, tuple[str, int]]:
    """Maps each module name to the location of its factors: leaf path and layer index."""
    return {
        module_name(path, layer if leaf.target.axes("layer") else None): (path, layer)
        for path, leaf in factors.leaves.items()
        for layer in range(len(leaf.groups))
    }


def with_projections(factors: Factors, projections: Mapping[str, np.ndarray]) -> Factors:
    """Replaces the projections P of some modules with given ones.

    Args:
      factors: factors of a model's weights.
      projections: matrices P by module name, float32 `[u, rank, rank]`.

    Raises:
      ValueError: a module is not adapted, or its P has the wrong shape (the message names the module).
    """
    places, changed = places_of(factors), {}
    for name, P in projections.items():
        if name not in places:
            raise ValueError(f"{name}: no such module is adapted")
        path, layer = places[name]
        expected = factors.leaves[path].P.shape[1:]
        if P.shape != expected:
            raise ValueError(f"{name}: P has shape {P.shape}, expected {expected}")
        changed.setdefault(path, np.array(to_host(factors.leaves[path].P)))[layer] = P
    new = {path: replace(factors.leaves[path], P=jnp.asarray(P)) for path, P in changed.items()}
    return replace(factors, leaves=factors.leaves | new)


def rebase(factors: Factors, onto: Factors) -> tuple[Factors, dict[str, float]]:
    """Expresses the same updates with U, Σ and V of other factors of the same weights.

    Args:
      factors: factors from any source: U Σ and V need not be orthonormal.
      onto: factors of the same leaves and rank, with orthonormal U and V.

    Returns:
      The factors with unchanged tie groups, and the error of each module as a share of its update.

    Raises:
      CombinationError: the two adapt different leaves, or have different ranks.
    """
    _check_alike(factors, onto)
    leaves, missed = {}, {}
    for path, leaf in factors.leaves.items():
        ours, theirs, P = _wide(onto.leaves[path]), _wide(leaf), np.asarray(to_host(leaf.P), np.float64)
        moved = [_moved(SVD(*(x[i] for x in ours)), SVD(*(x[i] for x in theirs)), P[i]) for i in range(len(P))]
        names = [module_name(path, i if leaf.target.axes("layer") else None) for i in range(len(P))]
        missed |= dict(zip(names, (share for _, share in moved), strict=True))
        leaves[path] = replace(
            onto.leaves[path], P=jnp.asarray(np.stack([P for P, _ in moved]), jnp.float32), groups=leaf.groups
        )
    return Factors(leaves, factors.spec, onto.ill_conditioned), missed


def _check_alike(factors: Factors, onto: Factors) -> None:
    apart = sorted(set(factors.leaves) ^ set(onto.leaves))
    if apart:
        raise CombinationError(f"they adapt different weights, among others {', '.join(apart[:3])}, …")
    shapes = lambda leaf: (leaf.U.shape, leaf.V.shape)
    wrong = [path for path, leaf in factors.leaves.items() if shapes(leaf) != shapes(onto.leaves[path])]
    if wrong:
        found = " and ".join(str(shapes(x.leaves[wrong[0]])) for x in (factors, onto))
        raise CombinationError(f"their factors have different shapes: U and V of {wrong[0]} have {found}")


def _wide(leaf: LeafFactors) -> SVD:
    return SVD(*(np.asarray(x, np.float64) for x in to_host((leaf.U, leaf.S, leaf.V))))


def _moved(onto: SVD, svd: SVD, P: np.ndarray) -> tuple[np.ndarray, float]:
    """P' of one module, and its error as a share of the update."""
    kept = onto.S > _ZERO * onto.S.max()
    left, right = svd.U * svd.S, svd.V
    inside, across = (onto.U.T @ left) * kept[:, None], onto.V.T @ right
    moved = np.einsum("ab,ubc,dc->uad", inside, P, across) / np.where(kept, onto.S, 1)[:, None]
    # L P Rᵀ - L' P R'ᵀ = (L - L') P Rᵀ + L' P (R - R')ᵀ: cancellation happens only in L - L' and R - R'.
    size = _size(left, P, right)
    lost = _size(left - onto.U @ inside, P, right) + _size(onto.U @ inside, P, right - onto.V @ across)
    return moved, lost / size if size else 0.0


def _size(left: np.ndarray, P: np.ndarray, right: np.ndarray) -> float:
    """The Frobenius norm of L Pᵢ Rᵀ over all i."""
    return float(np.sqrt(max(0.0, np.einsum("ab,ubc,cd,uad->", left.T @ left, P, right.T @ right, P))))


def own_triplets(
    params: Any, factors: Factors, v: Float[Array, "groups u"], method: str = "auto"
) -> tuple[Factors, Float[Array, "own_groups u"]]:
    """Converts an adapter of another library: the same updates, with triplets from `factorize` and other P.

    Args:
      params: the base model's tree.
      factors: factors from any source. A tie group may join several tie groups of the spec.
      v: trained vector, float32 `[groups, u]`.
      method: SVD method, see `truncated_svd`.

    Returns:
      Factors with the tie groups of their spec, and the vector, which repeats a row where one group became several.
      Where the weight's triplets differ from the given directions (because they are ambiguous or were rounded), the
      given ones are kept, and the module counts as ill-conditioned.

    Raises:
      ValueError: the given directions are not singular directions of the weights, or the spec ties modules that had
        separate vectors.
    """
    own = factorize(params, factors.spec, method)
    moved, missed = rebase(factors, own)
    far = [name for name, share in missed.items() if share > _SAME]
    if far:
        places = places_of(factors)
        own = exchange(params, own, {name: _triplets(factors, *places[name]) for name in far})
        moved, _ = rebase(factors, own)
    rows: dict[int, int] = {}
    for path, leaf in own.leaves.items():
        for ours, theirs in zip(leaf.groups, factors.leaves[path].groups, strict=True):
            if rows.setdefault(ours, theirs) != theirs:
                raise ValueError(f"{path}: {factors.spec} ties modules that have different vectors")
    leaves = {path: replace(leaf, groups=own.leaves[path].groups) for path, leaf in moved.leaves.items()}
    return replace(moved, leaves=leaves), v[jnp.asarray([rows[group] for group in range(own.num_groups)])]


def retied(
    params: Any, factors: Factors, v: Float[Array, "groups u"], spec: TinyLoRA, method: str = "auto"
) -> tuple[Factors, Float[Array, "own_groups u"]] | None:
    """Finds the factors and the vector of a spec that give the same updates, for an adapter whose ties were dissolved.

    Args:
      params: the base model's tree.
      factors: factors of the same leaves and rank, in which several groups may have equal vectors.
      v: trained vector, float32 `[groups, u]`.
      spec: spec from which the factors were made.
      method: SVD method, see `truncated_svd`.

    Returns:
      Factors of the spec and their vector; None if the updates are not those of the spec.
    """
    try:
        own = factorize(params, spec, method)
        moved, missed = rebase(factors, own)
    except ValueError:
        return None
    rows: dict[int, np.ndarray] = {}
    vectors = np.asarray(to_host(v))
    for path, leaf in own.leaves.items():
        for ours, theirs in zip(leaf.groups, factors.leaves[path].groups, strict=True):
            if not np.array_equal(rows.setdefault(ours, vectors[theirs]), vectors[theirs]):
                return None
        expected, found = (np.asarray(to_host(each.leaves[path].P)) for each in (own, moved))
        if not np.allclose(found, expected, rtol=0, atol=_SAME * np.abs(expected).max()):
            return None
    if max(missed.values()) > _SAME:
        return None
    return own, jnp.asarray(np.stack([rows[group] for group in range(own.num_groups)]))


def _triplets(factors: Factors, path: str, layer: int) -> SVD:
    """The singular triplets of U Σ Vᵀ, where U and V are any matrices."""
    U, S, V = (x[layer] for x in _wide(factors.leaves[path]))
    (left, R), (right, T) = np.linalg.qr(U * S), np.linalg.qr(V)
    u, s, vt = np.linalg.svd(R @ T.T)
    return SVD(*(x.astype(np.float32) for x in (left @ u, s, right @ vt.T)))


def combine(
    adapters: Sequence[tuple[Factors, Float[Array, "_ _"] | np.ndarray]],
) -> tuple[Factors, list[np.ndarray]]:
    """Expresses adapters of one base model, with their own P or tie groups, as vectors of common factors.

    All updates of one rank in the same singular directions are points of one space. The common factors are those of
    LoRA-XS, and a vector is R of every module (`coordinates`).

    Args:
      adapters: factors and vector of each adapter, with factors from `factorize` or `own_triplets`; adapters may share
        factors.

    Returns:
      The common factors, and the vectors as NumPy arrays, float32 `[groups, u]`; stacked, the vectors give each row its
      own adapter. Factors that all adapters share are returned unchanged.

    Raises:
      CombinationError: the adapters have different leaves, ranks or singular directions of a weight.
    """
    distinct = list({id(factors): factors for factors, _ in adapters}.values())
    first = distinct[0]
    if len(distinct) == 1:
        return first, [np.asarray(v, np.float32) for _, v in adapters]
    moved = {id(first): first}
    for factors in distinct[1:]:
        new, missed = rebase(factors, first)
        if far := [name for name, share in missed.items() if share > _PORTABLE]:
            raise CombinationError(
                f"they use different singular directions for {len(far)} of {len(missed)} weights"
                f" ({', '.join(far[:3])}, …)"
            )
        moved[id(factors)] = new
    common = free(first)
    points = [coordinates(common, moved[id(factors)], jnp.asarray(v, jnp.float32)) for factors, v in adapters]
    return common, [np.asarray(point) for point in points]
