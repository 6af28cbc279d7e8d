"""A policy: a frozen tree of weights and a way to adapt it, without the trained parameters.

Training, rollout, sharding and evaluation use a small interface: `policy(v)` gives the weights at v, `init()` the v of
the base model and `merged(v)` dense weights; `map_frozen` and `num_params` complete it. Each policy defines what v is:
a vector or a tree of matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters.batches import lower_factorize
from tinylora_jax.adapters.factors import Factors, factorize
from tinylora_jax.adapters.lora import LoRA, Matrices, apply_lora, init_lora, merge_lora
from tinylora_jax.adapters.spec import TinyLoRA
from tinylora_jax.adapters.targets import leaves_by_path, map_by_path
from tinylora_jax.adapters.tinylora import apply, init, merge

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
    """A policy adapted by LoRA; v holds the two matrices of every module.

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

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> LoRAPolicy:
        """Applies a function to the base weights and returns the new policy."""
        return replace(self, params=weights(self.params))

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


Spec: TypeAlias = TinyLoRA | LoRA | Full


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
        return FullPolicy(params)
    if isinstance(spec, LoRA):
        jax.eval_shape(lambda params: init_lora(params, spec), params)  # raises if the tree has no such modules
        return LoRAPolicy(params, spec)
    return Policy(params, factorize(params, spec, method, report=report))


def lower_adapt(params: Any, spec: Spec, method: str = "auto") -> Iterator[jax.stages.Lowered]:
    """Lowers the programs that `adapt` would run, to compile them in advance; `params` may hold shapes only."""
    if isinstance(spec, TinyLoRA):
        yield from lower_factorize(params, spec, method)


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
