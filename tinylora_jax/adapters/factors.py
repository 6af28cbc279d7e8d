"""The frozen part of TinyLoRA: singular triplets of every adapted weight, P and the tie groups."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters.batches import (
    BATCH_BYTES,
    batches,
    num_triplets,
    oriented_stack,
    stack_arguments,
    svd_shapes,
)
from tinylora_jax.adapters.spec import TinyLoRA
from tinylora_jax.adapters.svd import SVD, compile_svds, is_ill_conditioned, mismatch, truncated_svd
from tinylora_jax.adapters.targets import Module, Target, leaves_by_path, select, tie_groups
from tinylora_jax.multihost import to_host

_LOG = logging.getLogger(__name__)

_FOREIGN = 0.02  # largest accepted mismatch of given triplets; float32 triplets miss a bfloat16 weight by 4e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LeafFactors:
    """Frozen factors of one leaf; `layers` is 1 for an unstacked leaf.

    Attributes:
      U: left singular vectors, `[layers, out, rank]`, float32.
      S: singular values, `[layers, rank]`, float32.
      V: right singular vectors, `[layers, in, rank]`, float32.
      P: fixed projections, `[layers, u, rank, rank]`, float32.
      groups: tie group of each layer.
      target: meaning of the leaf's axes.
    """

    U: jax.Array
    S: jax.Array
    V: jax.Array
    P: jax.Array
    groups: tuple[int, ...] = field(metadata={"static": True})
    target: Target = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """All frozen data that turns a trained vector into a weight update.

    Attributes:
      leaves: factors of each adapted leaf, by path.
      spec: description from which the factors were computed.
      ill_conditioned: names of the modules whose weight does not determine its singular vectors well enough, so that
        another back end or method may find different ones. An adapter file stores the factors of these modules.
    """

    leaves: dict[str, LeafFactors]
    spec: TinyLoRA = field(metadata={"static": True})
    ill_conditioned: tuple[str, ...] = field(default=(), metadata={"static": True})

    @property
    def num_groups(self) -> int:
        """Number of tie groups, which are the rows of the trained vector."""
        return 1 + max(group for leaf in self.leaves.values() for group in leaf.groups)

    @property
    def num_params(self) -> int:
        """Number of trained parameters."""
        return self.num_groups * self.spec.u


def factorize(
    params: Any,
    spec: TinyLoRA,
    method: str = "auto",
    max_batch_bytes: int = BATCH_BYTES,
    report: Callable[[int, int], None] | None = None,
) -> Factors:
    """Computes the frozen factors of every adapted module.

    Args:
      params: any pytree of weights.
      spec: description of what to adapt.
      method: SVD method, see `truncated_svd`.
      max_batch_bytes: upper bound in bytes on the float32 copies of the matrices decomposed together.
      report: function called with the number of decomposed matrices and of all, after every batch.

    Returns:
      The factors, on the default device. A warning and `Factors.ill_conditioned` name the modules whose weight does
      not determine its singular vectors well enough (not inside a jitted function, where values are unknown).

    Raises:
      ValueError: a target matches nothing, the rank exceeds a matrix's smaller side, or a weight is not floating-point
        or not finite (the message names each).
    """
    modules = select(params, spec.targets)
    small = [f"{m.name} {m.shape}" for m in modules if spec.rank > min(m.shape)]
    if small:
        raise ValueError(
            f"rank {spec.rank} exceeds the smaller side of {len(small)} modules: {', '.join(small[:5])};"
            " lower the rank or narrow the targets"
        )
    _check_floats(params, modules)
    found = _decompose(params, modules, spec.rank, method, max_batch_bytes, report)
    # Inside a jitted function values are unknown, so the caller must check.
    known = [module for module in modules if not isinstance(found[module].S, jax.core.Tracer)]
    broken = [module.name for module in known if not np.isfinite(found[module].S).all()]
    if broken:
        raise ValueError(f"{len(broken)} weights are not finite: {', '.join(broken[:5])}; load the model again")
    ill_conditioned = tuple(module.name for module in known if is_ill_conditioned(found[module], spec.rank))
    if ill_conditioned:
        _LOG.warning(
            "%d of %d weights do not determine their factors uniquely, because singular values are close or the sign of"
            " a singular vector is ambiguous: %s. Saved adapters include these factors, so they stay portable",
            *(len(ill_conditioned), len(modules), _some(ill_conditioned)),
        )
    leaves, ties = {}, _ties(modules, spec)
    for path, members in _by_path(modules).items():
        leading = [_leading(found[module], spec.rank) for module in members]
        leaves[path] = LeafFactors(*(_stack(parts) for parts in zip(*leading, strict=True)), *ties[path])
    return Factors(leaves, spec, ill_conditioned)


def _ties(modules: Sequence[Module], spec: TinyLoRA) -> dict[str, tuple[jax.Array, tuple[int, ...], Target]]:
    """For each leaf, what a spec adds to the triplets: P, the tie groups and the target."""
    groups = dict(zip(modules, tie_groups(modules, spec.n_tie, spec.tying), strict=True))
    P = lambda members: jnp.asarray(np.stack([spec.P(module.name) for module in members]))
    return {
        path: (P(members), tuple(groups[module] for module in members), members[0].target)
        for path, members in _by_path(modules).items()
    }


def retie(params: Any, factors: Factors, spec: TinyLoRA) -> Factors:
    """Computes factors for another spec of the same rank, without a new decomposition.

    Args:
      params: the tree that was factorized.
      factors: factors of these weights; the result shares U, Σ and V with them.
      spec: spec of the new factors; its targets may be some of the adapted modules.

    Raises:
      ValueError: the rank differs, or the targets select a module that is not adapted, or select it with another
        layout.
    """
    modules = select(params, spec.targets)
    known = {path: leaf.target.layout for path, leaf in factors.leaves.items()}
    if spec.rank != factors.spec.rank or any(known.get(each.path) != each.target.layout for each in modules):
        raise ValueError(
            f"factors of rank {factors.spec.rank} do not fit rank {spec.rank} or targets outside them; call factorize"
        )
    ties, names = _ties(modules, spec), {module.name for module in modules}
    leaves = {
        path: LeafFactors(leaf.U, leaf.S, leaf.V, *ties[path]) for path, leaf in factors.leaves.items() if path in ties
    }
    return Factors(leaves, spec, tuple(name for name in factors.ill_conditioned if name in names))


def exchange(params: Any, factors: Factors, triplets: Mapping[str, SVD]) -> Factors:
    """Replaces the triplets of some modules with given ones, after checking that they fit the weights.

    Where singular values are close, several sets of singular vectors are valid. This function restores the set that
    a vector was trained with.

    Args:
      params: the tree that was factorized.
      factors: factors computed by `factorize(params, spec)`.
      triplets: triplets by module name, as NumPy arrays without a batch axis.

    Returns:
      The factors, on the default device.

    Raises:
      ValueError: a module is not adapted, or its triplets are not the leading ones of its weight (the message names
        the modules).
    """
    modules = _by_path(select(params, factors.spec.targets))
    strange = sorted(set(triplets) - {module.name for members in modules.values() for module in members})
    if strange:
        raise ValueError(f"{_some(strange)}: no such module is adapted")
    leaves, wrong, weights = dict(factors.leaves), [], leaves_by_path(params)
    for path, members in modules.items():
        given = {layer: triplets[module.name] for layer, module in enumerate(members) if module.name in triplets}
        if not given:
            continue
        leaf = leaves[path]
        mixed = SVD(*(np.array(x) for x in to_host((leaf.U, leaf.S, leaf.V))))
        for layer, svd in given.items():
            W = oriented_stack((weights[path],), ((members[layer].target, members[layer].layer),))[0]
            if not _is_of(W, svd, mixed.S[layer]):
                wrong.append(members[layer].name)
                continue
            for ours, theirs in zip(mixed, svd, strict=True):
                ours[layer] = theirs
        leaves[path] = replace(leaf, **{name: jnp.asarray(x) for name, x in mixed._asdict().items()})
    if wrong:
        raise ValueError(f"{_some(wrong)}: the given factors are not the leading singular triplets of the weight")
    return replace(factors, leaves=leaves, ill_conditioned=tuple(dict.fromkeys((*factors.ill_conditioned, *triplets))))


def _is_of(W: Float[Array, "out in"], svd: SVD, S: np.ndarray) -> bool:
    """Whether the triplets are the leading ones of a weight with these singular values."""
    shapes = ((W.shape[0], len(S)), S.shape, (W.shape[1], len(S)))
    if tuple(x.shape for x in svd) != shapes or not np.all(np.abs(svd.S - S) <= _FOREIGN * np.max(S)):
        return False
    return mismatch(W, svd) <= _FOREIGN


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def _by_path(modules: Iterable[Module]) -> dict[str, list[Module]]:
    """The modules of each leaf, layer by layer."""
    found: dict[str, list[Module]] = {}
    for module in modules:
        found.setdefault(module.path, []).append(module)
    return found


def _leading(svd: SVD, rank: int) -> SVD:
    return SVD(svd.U[:, :rank], svd.S[:rank], svd.V[:, :rank])


def _decompose(
    params: Any,
    modules: Sequence[Module],
    rank: int,
    method: str,
    max_batch_bytes: int,
    report: Callable[[int, int], None] | None,
) -> dict[Module, SVD]:
    """Triplets of every module, `rank + 1` where possible: NumPy arrays, or tracers inside a jitted function."""
    leaves = leaves_by_path(params)
    traced = any(isinstance(x, jax.core.Tracer) for module in modules for x in jax.tree.leaves(leaves[module.path]))
    found, parts = {}, batches(modules, max_batch_bytes)
    if not traced:
        compile_svds(svd_shapes(leaves, parts, rank), method)
    for batch in parts:
        arguments, place = stack_arguments(leaves, batch)
        W = oriented_stack(*arguments, place=place)
        svd = truncated_svd(W, num_triplets(batch[0], rank), method)
        svd = svd if traced else to_host(svd)  # sliced on the host, where nothing compiles
        found |= {module: SVD(*(part[i] for part in svd)) for i, module in enumerate(batch)}
        if report is not None:
            report(len(found), len(modules))
    return found


def _stack(parts: Sequence[Any]) -> jax.Array:
    """Stacks the parts into one device array, with a single transfer if they are host arrays."""
    return jnp.asarray(np.stack(parts)) if isinstance(parts[0], np.ndarray) else jnp.stack(parts)


def _check_floats(params: Any, modules: Sequence[Module]) -> None:
    leaves = leaves_by_path(params)
    wrong = sorted({f"{m.path} ({leaves[m.path].dtype})" for m in modules if not _is_float(leaves[m.path])})
    if wrong:
        raise ValueError(f"only floating-point weights can be adapted, got {', '.join(wrong[:5])}")


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
