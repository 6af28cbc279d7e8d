"""TinyLoRA as transforms of a pytree of weights: factorize once, then apply or merge any vector.

    ΔW = U Σ (Σᵢ v[g, i] Pᵢ) Vᵀ        for every adapted module, g its tie group

(equation 3 and §4 of "Learning to Reason in 13 Parameters", arXiv 2602.04118). W is the torch-oriented
weight `[out, in]`; kernels laid out `[in, out]` get the transpose of the same update.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from tinylora_jax.adapters.kernel import AdaptedKernel
from tinylora_jax.adapters.projections import projection
from tinylora_jax.adapters.svd import SVD, compile_svds, is_undetermined, mismatch, truncated_svd
from tinylora_jax.adapters.targets import Module, Target, leaves_by_path, map_by_path, select, tie_groups
from tinylora_jax.fetch import fetch

LINEAR_MAPS = tuple(
    rf"(.*/)?{name}/kernel" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
"""The seven linear maps of a block, the paper's choice of modules."""

BATCH_BYTES = 2**30  # of matrices decomposed together
_FOREIGN = 0.02  # by how much given triplets may miss: those of the weight in float32 miss it by 4e-3 in bfloat16
_MAX_PROJECTION = 2**20  # numbers of one module's P; beyond r² a module's P only repeats directions


@dataclass(frozen=True)
class TinyLoRA:
    """What to train: a frozen, hashable description; the trained vector has ceil-many rows of `u` numbers.

    Attributes:
      rank: r, the rank of the truncated SVD (the paper's main experiments use 2).
      u: numbers per tie group.
      n_tie: modules per tie group.
      tying: `tiled` (neighbours in depth share, whatever their type) or `structured` (the same type shares).
      targets: regular expressions over leaf paths, or `Target`s for kernels that are not `[in, out]`.
      seed: of the fixed projections P.

    >>> TinyLoRA(rank=0)
    Traceback (most recent call last):
    ...
    ValueError: TinyLoRA needs rank >= 1, got 0
    """

    rank: int = 2
    u: int = 1
    n_tie: int = 1
    tying: str = "tiled"
    targets: tuple[str | Target, ...] = LINEAR_MAPS
    seed: int = 0

    def __post_init__(self):
        for name in ("rank", "u", "n_tie"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"TinyLoRA needs {name} >= 1, got {value!r}")
        if self.u * self.rank**2 > _MAX_PROJECTION:
            raise ValueError(f"TinyLoRA u={self.u} at rank {self.rank}: u · rank² must be at most {_MAX_PROJECTION}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"TinyLoRA needs an integer seed >= 0, got {self.seed!r}")
        if self.tying not in ("tiled", "structured"):
            raise ValueError(f"TinyLoRA tying {self.tying!r}: expected 'tiled' or 'structured'")
        if not self.targets or isinstance(self.targets, str):
            raise ValueError(f"TinyLoRA targets {self.targets!r}: expected a tuple of patterns or Targets, not empty")
        object.__setattr__(self, "targets", tuple(t if isinstance(t, Target) else Target(t) for t in self.targets))


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
      undetermined: names of the modules whose weight does not fix its singular vectors well enough, so that another
        back end or method may find others. An adapter file holds the factors of these.
    """

    leaves: dict[str, LeafFactors]
    spec: TinyLoRA = field(metadata={"static": True})
    undetermined: tuple[str, ...] = field(default=(), metadata={"static": True})

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
      The factors, on the default device. Modules whose weight leaves its singular vectors undetermined are named in a
      warning and in `Factors.undetermined` (but not inside a jitted function, where no number is known).

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
    groups = dict(zip(modules, tie_groups(modules, spec.n_tie, spec.tying), strict=True))
    found = _decompose(params, modules, spec.rank, method, max_batch_bytes)
    # Inside a jitted function the values are not known yet, and the check is the caller's.
    known = [module for module in modules if not isinstance(found[module].S, jax.core.Tracer)]
    broken = [module.name for module in known if not np.isfinite(found[module].S).all()]
    if broken:
        raise ValueError(f"{len(broken)} weights are not finite: {', '.join(broken[:5])}; load the model again")
    undetermined = tuple(module.name for module in known if is_undetermined(found[module], spec.rank))
    if undetermined:
        logging.warning(
            "%d of %d weights do not determine their factors, since singular values are close or a sign is not sure: "
            "%s. A saved adapter holds these factors, and so stays portable",
            *(len(undetermined), len(modules), _some(undetermined)),
        )
    leaves = {}
    for path, members in _by_path(modules).items():
        leading = [_leading(found[module], spec.rank) for module in members]
        U, S, V = (_stack(parts) for parts in zip(*leading, strict=True))
        P = jnp.asarray(np.stack([projection(spec.seed, m.name, spec.u, spec.rank) for m in members]))
        leaves[path] = LeafFactors(U, S, V, P, tuple(groups[m] for m in members), members[0].target)
    return Factors(leaves, spec, undetermined)


def exchange(params: Any, factors: Factors, triplets: Mapping[str, SVD]) -> Factors:
    """The factors, with given ones for some modules, which must be right for their weights too.

    Where singular values are close, several sets of vectors are; this puts those in place that a vector was trained
    with.

    Args:
      params: the tree that was factorized.
      factors: of `factorize(params, spec)`.
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
        mixed = SVD(*(np.array(x) for x in fetch((leaf.U, leaf.S, leaf.V))))
        for layer, svd in given.items():
            W = _oriented_stack((weights[path],), ((members[layer].target, members[layer].layer),))[0]
            if not _is_of(W, svd, mixed.S[layer]):
                wrong.append(members[layer].name)
                continue
            for ours, theirs in zip(mixed, svd, strict=True):
                ours[layer] = theirs
        leaves[path] = replace(leaf, **{name: jnp.asarray(x) for name, x in mixed._asdict().items()})
    if wrong:
        raise ValueError(f"{_some(wrong)}: the given factors are not the leading singular triplets of the weight")
    return replace(factors, leaves=leaves, undetermined=tuple(dict.fromkeys((*factors.undetermined, *triplets))))


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
    if not traced and not any(_is_split(leaves[module.path]) for module in modules):
        dtype = lambda batch: jnp.result_type(leaves[batch[0].path])
        kinds = dict.fromkeys(((len(x), *x[0].shape[::-1]), dtype(x), num_triplets(x[0], rank)) for x in parts)
        compile_svds([(jax.ShapeDtypeStruct(shape, kind), rank) for shape, kind, rank in kinds], method)
    for batch in parts:
        W = _oriented_stack(tuple(leaves[m.path] for m in batch), tuple((m.target, m.layer) for m in batch))
        svd = truncated_svd(W, num_triplets(batch[0], rank), method)
        svd = svd if traced else fetch(svd)  # cut apart on the host, where nothing compiles
        found |= {module: SVD(*(part[i] for part in svd)) for i, module in enumerate(batch)}
    return found


def num_triplets(module: Module, rank: int) -> int:
    """How many triplets are computed of a module: one more than are used, to see whether those are determined."""
    return min(rank + 1, *module.shape)


def _is_split(leaf: Any) -> bool:
    """Whether a leaf lies on several devices."""
    return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


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


def _check_tree(params: Any, factors: Factors) -> None:
    """Refuses a tree other than the factorized one: a reshaped update would fit any weight of equal size."""
    shapes = {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items() if path in factors.leaves}
    problems = []
    for path, leaf in factors.leaves.items():
        if path not in shapes:
            problems.append(f"{path} is missing")
        elif len(shapes[path]) != len(leaf.target.layout.split()):
            problems.append(f"{path} has shape {shapes[path]}, but its layout is {leaf.target.layout!r}")
        else:
            sizes = [math.prod(shapes[path][axis] for axis in leaf.target.axes(w)) for w in ("layer", "out", "in")]
            expected = [len(leaf.groups), leaf.U.shape[-2], leaf.V.shape[-2]]
            if sizes != expected:
                problems.append(f"{path} has [layers, out, in] = {sizes}, expected {expected}")
    if problems:
        raise ValueError("this is not the tree that was factorized:\n  " + "\n  ".join(problems[:20]))


def batches(modules: Sequence[Module], max_bytes: int) -> list[list[Module]]:
    """Modules of equal shape together, in batches of about equal size whose weights in float32 are bounded."""
    by_shape: dict[tuple[int, int], list[Module]] = {}
    for module in modules:
        by_shape.setdefault(module.shape, []).append(module)
    found = []
    for shape, members in by_shape.items():
        most = max(1, max_bytes // (4 * math.prod(shape)))
        size = -(-len(members) // -(-len(members) // most))
        found += [members[start : start + size] for start in range(0, len(members), size)]
    return found


@partial(jax.jit, static_argnames="where")
def _oriented_stack(
    leaves: tuple[jax.Array, ...], where: tuple[tuple[Target, int | None], ...]
) -> Float[Array, "modules out in"]:
    """The weights of modules, each `[out, in]`: one layer of its leaf."""
    pairs = zip(leaves, where, strict=True)
    return jnp.stack([_oriented(leaf, target)[layer or 0] for leaf, (target, layer) in pairs])


def _oriented(leaf: jax.Array, target: Target) -> jax.Array:
    """A leaf as `[layers, out, in]`, its input and output axes flattened."""
    order = [target.axes(word) for word in ("layer", "out", "in")]
    sizes = [math.prod(leaf.shape[axis] for axis in axes) for axes in order]
    return jnp.transpose(leaf, sum(order, ())).reshape(sizes)


def _restored(W: jax.Array, like: jax.Array, target: Target) -> jax.Array:
    """The inverse of `_oriented`: `[layers, out, in]` back to the shape of `like`."""
    order = sum((target.axes(word) for word in ("layer", "out", "in")), ())
    return jnp.transpose(W.reshape([like.shape[axis] for axis in order]), np.argsort(order))


def init(factors: Factors) -> Float[Array, "groups u"]:
    """The vector at the start of training: zeros, under which every adapted weight is the base weight.

    Args:
      factors: of `factorize`; say how many groups there are.

    Returns:
      float32 `[groups, u]`, whatever the dtype of the weights.
    """
    return jnp.zeros((factors.num_groups, factors.spec.u), jnp.float32)


def _groups(leaf: LeafFactors) -> Int[Array, " layers"]:
    return jnp.asarray(leaf.groups, jnp.int32)


def _expand(
    P: Float[Array, "layers u rank rank"], groups: Int[Array, " layers"], v: Float[Array, "... groups u"]
) -> Float[Array, "... layers rank rank"]:
    """R = Σᵢ v[g, i] Pᵢ for every layer of a leaf."""
    return jnp.einsum("...lu,luij->...lij", jnp.take(v, groups, axis=-2, mode="clip"), P)


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


def _check_vector(factors: Factors, v: jax.Array, ranks: tuple[int, ...]) -> None:
    expected = (factors.num_groups, factors.spec.u)
    if v.ndim not in ranks or v.shape[-2:] != expected:
        rows = " (or with one leading axis of rows)" if 3 in ranks else ""
        raise ValueError(f"v has shape {v.shape}, but these factors need {expected}{rows}")


def apply(params: Any, factors: Factors, v: Float[Array, "... groups u"]) -> Any:
    """The tree with every adapted weight replaced by an `AdaptedKernel`: base and update kept apart.

    Args:
      params: the tree that was factorized.
      factors: its factors.
      v: the vector, `[groups, u]`, or `[rows, groups, u]` for one adapter per row of a batch.

    Returns:
      The same tree; forward code multiplies through `matmul`.

    Raises:
      ValueError: the tree is not the one that was factorized, the shape of `v` does not fit, or a kernel's
        layout is not `layer… in… out…` (merge those).
    """
    _check_vector(factors, v, (2, 3))
    _check_tree(params, factors)

    def wrap(name, leaf):
        if name not in factors.leaves:
            return leaf
        part = factors.leaves[name]
        if part.target.layout.split() != sorted(part.target.layout.split(), key=("layer", "in", "out").index):
            raise ValueError(f"{name} is laid out {part.target.layout!r}; apply needs 'layer in out' order, use merge")
        stacked = bool(part.target.axes("layer"))
        return AdaptedKernel(leaf, *_parts(part.U, part.S, part.V, part.P, _groups(part), v, stacked))

    return map_by_path(wrap, params)


def merge(params: Any, factors: Factors, v: Float[Array, "groups u"]) -> Any:
    """The tree with every adapted weight replaced by W + ΔW, dense and in its own dtype.

    In bfloat16 a small ΔW is mostly rounded away; `apply` keeps it. Any layout is merged, stacked or not.

    Args:
      params: the tree that was factorized.
      factors: its factors.
      v: the vector, `[groups, u]`.

    Returns:
      A tree of the same structure, shapes and dtypes, that any code takes.

    Raises:
      ValueError: the tree is not the one that was factorized, or the shape of `v` does not fit.
    """
    _check_vector(factors, v, (2,))
    _check_tree(params, factors)

    def add(name, leaf):
        part = factors.leaves.get(name)
        return leaf if part is None else merge_leaf(leaf, part, v)

    return map_by_path(add, params)


def merge_leaf(leaf: jax.Array, part: LeafFactors, v: Float[Array, "groups u"]) -> jax.Array:
    """One leaf of `merge`, for those who have no room for all of them."""
    wide = np.promote_types(leaf.dtype, np.float32)
    update = _restored(_delta(part, v), leaf, part.target)
    return (leaf.astype(wide) + update.astype(wide)).astype(leaf.dtype)


def delta(factors: Factors, v: Float[Array, "groups u"]) -> dict[str, Float[Array, "layers out in"]]:
    """ΔW = U Σ (Σᵢ vᵢ Pᵢ) Vᵀ of every adapted leaf, to look at.

    Args:
      factors: of `factorize`.
      v: the vector, `[groups, u]`.

    Returns:
      By leaf path, float32 `[layers, out, in]` in the paper's orientation; one layer for a leaf that is not stacked.
    """
    _check_vector(factors, v, (2,))
    return {path: _delta(part, v) for path, part in factors.leaves.items()}


def _delta(part: LeafFactors, v: Float[Array, "groups u"]) -> Float[Array, "layers out in"]:
    return jnp.einsum("lor,lr,lrs,lis->loi", part.U, part.S, _expand(part.P, _groups(part), v), part.V)
