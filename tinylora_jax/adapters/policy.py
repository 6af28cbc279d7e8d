"""A policy: a frozen tree of weights and a way to adapt it, without the trained parameters.

Training, rollout, sharding and evaluation use a small interface: `policy(v)` gives the weights at v, `init()` the v of
the base model and `merged(v)` dense weights; `map_frozen` and `num_params` complete it. Each policy defines what v is:
a vector or a tree of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters.batches import lower_factorize
from tinylora_jax.adapters.factors import Factors, factorize, retie
from tinylora_jax.adapters.lora import LoRA, Matrices, apply_lora, complete, init_lora, merge_lora
from tinylora_jax.adapters.offsets import (
    Offsets,
    Vectors,
    apply_offsets,
    init_offsets,
    merge_offsets,
    selected,
    union,
)
from tinylora_jax.adapters.quantized import scheme_of
from tinylora_jax.adapters.spec import TinyLoRA, lora_xs
from tinylora_jax.adapters.targets import leaves_by_path, map_by_path
from tinylora_jax.adapters.tinylora import apply, coordinates, init, merge

Trained: TypeAlias = Any
"""The trained parameters: a pytree of float32 arrays."""


@runtime_checkable
class Adapted(Protocol):
    """The interface of every policy.

    Attributes:
      params: tree of base weights.
      rows_apart: whether v may have a leading axis, with one adapter for each row of a batch.
      trains_head: whether the output head is trained too.
      num_params: number of trained parameters.
      ill_conditioned: names as in `Factors.ill_conditioned`; empty if nothing is decomposed.
    """

    @property
    def params(self) -> Any: ...

    @property
    def rows_apart(self) -> bool: ...

    @property
    def trains_head(self) -> bool: ...

    @property
    def num_params(self) -> int: ...

    @property
    def ill_conditioned(self) -> tuple[str, ...]: ...

    def __call__(self, v: Trained) -> Any: ...

    def init(self) -> Trained: ...

    def merged(self, v: Trained) -> Any: ...

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> Adapted:
        """Applies functions to the frozen parts and returns the new policy.

        Args:
          weights: function applied to the base weights.
          factors: function applied to the factors; not called if the policy has none.
        """
        ...


@runtime_checkable
class Space(Adapted, Protocol):
    """A policy whose v can represent other adapters of the same weights, so that these share its programs."""

    def within(self, spec: Any) -> Space:
        """The policy of another spec, whose adapters are points of this policy's space."""
        ...

    def point(self, other: Any, v: Trained) -> Trained:
        """The v of this policy that gives the same weights as `v` of `other`; linear in `v`."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Policy:
    """A policy adapted by TinyLoRA or LoRA-XS; v is float32 `[groups, u]`.

    Attributes:
      params: tree of base weights.
      factors: factors computed by `factorize(params, spec)`.
    """

    params: Any
    factors: Factors

    rows_apart = True
    trains_head = False

    def __call__(self, v: Float[Array, "... groups u"]) -> Any:
        """The adapted weights at v, unmerged."""
        return apply(self.params, self.factors, v)

    def init(self) -> Float[Array, "groups u"]:
        """The vector of the base model: zeros."""
        return init(self.factors)

    def merged(self, v: Float[Array, "groups u"]) -> Any:
        """The adapted weights at v, merged into dense arrays."""
        return merge(self.params, self.factors, v)

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> Policy:
        """Applies functions to the frozen parts and returns the new policy."""
        return replace(self, params=weights(self.params), factors=factors(self.factors))

    def within(self, spec: TinyLoRA) -> Policy:
        """The policy of another spec of the same rank, without a new decomposition; see `retie`."""
        return Policy(self.params, retie(self.params, self.factors, spec))

    def point(self, other: Policy, v: Float[Array, "groups u"]) -> Float[Array, "modules free"]:
        """The vector of this policy, which is that of LoRA-XS, for a vector of `other`; see `coordinates`."""
        return coordinates(self.factors, other.factors, v)

    @property
    def num_params(self) -> int:
        """Number of trained parameters."""
        return self.factors.num_params

    @property
    def ill_conditioned(self) -> tuple[str, ...]:
        """Names as in `Factors.ill_conditioned`."""
        return self.factors.ill_conditioned


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAPolicy:
    """A policy adapted by LoRA; v holds the two matrices of every module, or only B if A is frozen.

    Attributes:
      params: tree of base weights.
      spec: description of the LoRA matrices.
    """

    params: Any
    spec: LoRA = field(metadata={"static": True})

    rows_apart = False
    trains_head = False
    ill_conditioned = ()

    def __call__(self, v: Matrices) -> Any:
        """The adapted weights at v, unmerged."""
        return apply_lora(self.params, self.spec, v)

    def init(self) -> Matrices:
        """The matrices of the base model: A random, B zero."""
        return init_lora(self.params, self.spec)

    def merged(self, v: Matrices) -> Any:
        """The adapted weights at v, merged into dense arrays."""
        return merge_lora(self.params, self.spec, v)

    def matrices(self, v: Matrices) -> Matrices:
        """Both matrices of every module at v."""
        return complete(self.params, self.spec, v)

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> LoRAPolicy:
        """Applies a function to the base weights and returns the new policy."""
        return replace(self, params=weights(self.params))

    @property
    def num_params(self) -> int:
        """Number of trained parameters."""
        return _count(jax.eval_shape(self.init))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OffsetPolicy:
    """A policy with trained offsets of outputs or of norms' scales; v maps each path to its vector.

    Attributes:
      params: tree of base weights.
      spec: description of the vectors.
    """

    params: Any
    spec: Offsets = field(metadata={"static": True})

    rows_apart = True
    trains_head = False
    ill_conditioned = ()

    def __call__(self, v: Vectors) -> Any:
        """The weights at v, with their offsets beside them."""
        return apply_offsets(self.params, self.spec, v)

    def init(self) -> Vectors:
        """The vectors of the base model: zeros."""
        return init_offsets(self.params, self.spec)

    def merged(self, v: Vectors) -> Any:
        """The weights at v as dense arrays; every kernel with an offset needs a bias beside it."""
        return merge_offsets(self.params, self.spec, v)

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> OffsetPolicy:
        """Applies a function to the base weights and returns the new policy."""
        return replace(self, params=weights(self.params))

    def within(self, spec: Offsets) -> OffsetPolicy:
        """The policy of a spec that selects some of the same leaves."""
        outside = sorted(set(selected(self.params, spec)) - set(selected(self.params, self.spec)))
        if outside:
            raise ValueError(f"targets outside those of all members: {', '.join(outside[:3])}, …")
        return OffsetPolicy(self.params, spec)

    def point(self, other: OffsetPolicy, v: Vectors) -> Vectors:
        """The vectors of this policy: those of `other`, and zeros for the leaves that it does not select."""
        return {**self.init(), **v}

    @property
    def num_params(self) -> int:
        """Number of trained parameters."""
        return _count(jax.eval_shape(self.init))


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every weight is trained, including the embedding and the head."""

    needs_svd = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullPolicy:
    """A policy whose weights are all trained; v maps each path to its weight in float32.

    Attributes:
      params: tree of base weights, whose dtypes are used for computation.
    """

    params: Any

    rows_apart = False
    trains_head = True
    ill_conditioned = ()

    def __call__(self, v: dict[str, Any]) -> Any:
        """The weights at v, in the dtypes of the base weights."""
        return map_by_path(lambda path, leaf: v[path].astype(leaf.dtype), self.params)

    def init(self) -> dict[str, jax.Array]:
        """The base weights in float32, by path."""
        return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves_by_path(self.params).items()}

    def merged(self, v: dict[str, Any]) -> Any:
        """The weights at v; the same as calling the policy."""
        return self(v)

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> FullPolicy:
        """Applies a function to the base weights and returns the new policy."""
        return replace(self, params=weights(self.params))

    @property
    def num_params(self) -> int:
        """Number of trained parameters."""
        return _count(self.params)


Spec: TypeAlias = TinyLoRA | LoRA | Full | Offsets


def joint_spec(base: Spec, members: Sequence[Spec]) -> TinyLoRA | Offsets:
    """The spec of the smallest space that contains the adapters of all members.

    Args:
      base: spec with the rank and targets of the space of TinyLoRA and LoRA-XS; not used for offsets.
      members: specs of the members.

    Raises:
      ValueError: no single space contains them.
    """
    if all(isinstance(spec, Offsets) for spec in members):
        return union([spec for spec in members if isinstance(spec, Offsets)])
    if isinstance(base, TinyLoRA) and all(isinstance(spec, TinyLoRA) for spec in members):
        return lora_xs(base.rank, base.targets)
    kinds = ", ".join(sorted({type(spec).__name__ for spec in (base, *members)}))
    raise ValueError(f"adapters of the kinds {kinds} are not points of one space")


def adapt(params: Any, spec: Spec, method: str = "auto", report: Callable[[int, int], None] | None = None) -> Adapted:
    """Builds the policy that a spec describes.

    Args:
      params: tree of base weights.
      spec: description of what is trained, and how.
      method: SVD method, see `truncated_svd`; used by TinyLoRA only.
      report: function called with the number of factorized weights and of all, as in `factorize`.

    Raises:
      ValueError: the spec does not fit the tree.
    """
    if isinstance(spec, Full):
        if (scheme := scheme_of(params)) != "none":
            raise ValueError(
                f"full fine-tuning trains the weights, but they are quantized in {scheme}; load the original model, or"
                " choose another method"
            )
        return FullPolicy(params)
    if isinstance(spec, LoRA):
        jax.eval_shape(lambda params: init_lora(params, spec), params)  # raises if the tree has no such modules
        return LoRAPolicy(params, spec)
    if isinstance(spec, Offsets):
        jax.eval_shape(lambda params: init_offsets(params, spec), params)  # raises likewise
        return OffsetPolicy(params, spec)
    return Policy(params, factorize(params, spec, method, report=report))


def lower_adapt(params: Any, spec: Spec, method: str = "auto") -> Iterator[jax.stages.Lowered]:
    """Lowers the programs that `adapt` would run, to compile them in advance; `params` may hold shapes only."""
    if isinstance(spec, TinyLoRA):
        yield from lower_factorize(params, spec, method)


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
