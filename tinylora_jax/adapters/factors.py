"""The frozen part of TinyLoRA: singular triplets of every adapted weight, P and the tie groups."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
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

_FOREIGN = 0.02  # by how much given triplets may miss: those of the weight in float32 miss it by 4e-3 in bfloat16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LeafFactors:
    """Frozen factors of one leaf; `layers` is 1 for a leaf that is not stacked.

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
    """Everything frozen that turns a vector into an update.

    Attributes:
      leaves: the factors by leaf path.
      spec: that they follow.
      ill_conditioned: names of the modules whose weight does not fix its singular vectors well enough, so that another
        back end or method may find others. An adapter file holds the factors of these.
    """

    leaves: dict[str, LeafFactors]
    spec: TinyLoRA = field(metadata={"static": True})
    ill_conditioned: tuple[str, ...] = field(default=(), metadata={"static": True})

    @property
    def num_groups(self) -> int:
        """Rows of the trained vector."""
        return 1 + max(group for leaf in self.leaves.values() for group in leaf.groups)

    @property
    def num_params(self) -> int:
        """How many numbers are trained."""
        return self.num_groups * self.spec.u


def factorize(params: Any, spec: TinyLoRA, method: str = "auto", max_batch_bytes: int = BATCH_BYTES) -> Factors:
    """Computes the frozen factors of every adapted module.

    Args:
      params: any pytree of weights.
      spec: what to adapt.
      method: see `truncated_svd`.
      max_batch_bytes: bound on the float32 copies of the matrices decomposed together.

    Returns:
      The factors, on the default device. Modules whose weight determines its singular vectors badly are named in a
      warning and in `Factors.ill_conditioned` (but not inside a jitted function, where no number is known).

    Raises:
      ValueError: a target matches nothing, the rank exceeds a matrix's smaller side, or a weight is not of a
        float type or not finite (each is named).
    """
    modules = select(params, spec.targets)
    small = [f"{m.name} {m.shape}" for m in modules if spec.rank > min(m.shape)]
    if small:
        raise ValueError(
            f"rank {spec.rank} exceeds the smaller side of {len(small)} modules: {', '.join(small[:5])};"
            " lower the rank or narrow the targets"
        )
    _check_floats(params, modules)
    found = _decompose(params, modules, spec.rank, method, max_batch_bytes)
    # Inside a jitted function the values are not known yet, and the check is the caller's.
    known = [module for module in modules if not isinstance(found[module].S, jax.core.Tracer)]
    broken = [module.name for module in known if not np.isfinite(found[module].S).all()]
    if broken:
        raise ValueError(f"{len(broken)} weights are not finite: {', '.join(broken[:5])}; load the model again")
    ill_conditioned = tuple(module.name for module in known if is_ill_conditioned(found[module], spec.rank))
    if ill_conditioned:
        _LOG.warning(
            "%d of %d weights do not determine their factors, since singular values are close or a sign is not sure: "
            "%s. A saved adapter holds these factors, and so stays portable",
            *(len(ill_conditioned), len(modules), _some(ill_conditioned)),
        )
    leaves, ties = {}, _ties(modules, spec)
    for path, members in _by_path(modules).items():
        leading = [_leading(found[module], spec.rank) for module in members]
        leaves[path] = LeafFactors(*(_stack(parts) for parts in zip(*leading, strict=True)), *ties[path])
    return Factors(leaves, spec, ill_conditioned)


def _ties(modules: Sequence[Module], spec: TinyLoRA) -> dict[str, tuple[jax.Array, tuple[int, ...], Target]]:
    """What a spec adds to the triplets of each leaf: P, the groups, and the target."""
    groups = dict(zip(modules, tie_groups(modules, spec.n_tie, spec.tying), strict=True))
    P = lambda members: jnp.asarray(np.stack([spec.P(module.name) for module in members]))
    return {
        path: (P(members), tuple(groups[module] for module in members), members[0].target)
        for path, members in _by_path(modules).items()
    }


def retie(params: Any, factors: Factors, spec: TinyLoRA) -> Factors:
    """The factors of another spec of the same rank and targets, without decomposing again.

    Args:
      params: the tree that was factorized.
      factors: factors of these weights; the result shares U, Σ and V with them.
      spec: the other spec.

    Raises:
      ValueError: the rank or the targets differ.
    """
    if (spec.rank, spec.targets) != (factors.spec.rank, factors.spec.targets):
        raise ValueError(
            f"factors of rank {factors.spec.rank} cannot serve rank {spec.rank}, nor other targets: factorize again"
        )
    ties = _ties(select(params, spec.targets), spec)
    leaves = {path: LeafFactors(leaf.U, leaf.S, leaf.V, *ties[path]) for path, leaf in factors.leaves.items()}
    return Factors(leaves, spec, factors.ill_conditioned)


def exchange(params: Any, factors: Factors, triplets: Mapping[str, SVD]) -> Factors:
    """The factors, with given ones for some modules, which must be right for their weights too.

    Where singular values are close, several sets of vectors are; this puts those in place that a vector was trained
    with.

    Args:
      params: the tree that was factorized.
      factors: factors computed by `factorize(params, spec)`.
      triplets: by module name, NumPy arrays without a batch axis.

    Returns:
      The factors, on the default device.

    Raises:
      ValueError: names the modules that are not adapted, or whose triplets are not the leading ones of their weight.
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
    """Whether triplets are leading ones of a weight with these singular values."""
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
    params: Any, modules: Sequence[Module], rank: int, method: str, max_batch_bytes: int
) -> dict[Module, SVD]:
    """Triplets of every module, one more than `rank` if there is one: NumPy arrays, or traced in a jitted function."""
    leaves = leaves_by_path(params)
    traced = any(isinstance(leaves[module.path], jax.core.Tracer) for module in modules)
    found, parts = {}, batches(modules, max_batch_bytes)
    if not traced:
        compile_svds(svd_shapes(leaves, parts, rank), method)
    for batch in parts:
        arguments, place = stack_arguments(leaves, batch)
        W = oriented_stack(*arguments, place=place)
        svd = truncated_svd(W, num_triplets(batch[0], rank), method)
        svd = svd if traced else to_host(svd)  # cut apart on the host, where nothing compiles
        found |= {module: SVD(*(part[i] for part in svd)) for i, module in enumerate(batch)}
    return found


def _stack(parts: Sequence[Any]) -> jax.Array:
    """One array on the device, in one transfer where the parts are the host's."""
    return jnp.asarray(np.stack(parts)) if isinstance(parts[0], np.ndarray) else jnp.stack(parts)


def _check_floats(params: Any, modules: Sequence[Module]) -> None:
    leaves = leaves_by_path(params)
    wrong = sorted({f"{m.path} ({leaves[m.path].dtype})" for m in modules if not _is_float(leaves[m.path])})
    if wrong:
        raise ValueError(f"only weights of a float type can be adapted, got {', '.join(wrong[:5])}")


def _is_float(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.floating)
