"""A frozen tree of weights and a way to adapt it: everything but what is trained.

Training, rollout, sharding and evaluation know a policy by few things: `policy(v)`, the weights at v; `init()`, the v
of the base model; `merged(v)`, dense weights; `map_frozen`; and `num_params`. What v is, a vector or a tree of
matrices, is the policy's own.
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
"""A pytree of float32 arrays: what is trained."""


@runtime_checkable
class Adapted(Protocol):
    """What every policy can do.

    Attributes:
      params: the base weights.
      rows_apart: whether v may have a leading axis, with one adapter for each row of a batch.
      trains_head: whether the output head is among what is trained.
      num_params: how many numbers are trained.
      ill_conditioned: `Factors.ill_conditioned`; empty where nothing is decomposed.
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
        """The same policy of other frozen parts.

        Args:
          weights: function of the base weights.
          factors: function of the factors; not called where there are none.
        """
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Policy:
    """An `Adapted` by TinyLoRA, LoRA-XS included; v is `[groups, u]`.

    Attributes:
      params: the base weights.
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
        """Zeros."""
        return init(self.factors)

    def merged(self, v: Float[Array, "groups u"]) -> Any:
        """Dense weights."""
        return merge(self.params, self.factors, v)

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> Policy:
        """The same policy of other frozen parts."""
        return replace(self, params=weights(self.params), factors=factors(self.factors))

    @property
    def num_params(self) -> int:
        """How many numbers are trained."""
        return self.factors.num_params

    @property
    def ill_conditioned(self) -> tuple[str, ...]:
        """`Factors.ill_conditioned`."""
        return self.factors.ill_conditioned


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LoRAPolicy:
    """An `Adapted` by LoRA; v is the two matrices of every module.

    Attributes:
      params: the base weights.
      spec: what is trained.
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
        """A random, B zero."""
        return init_lora(self.params, self.spec)

    def merged(self, v: Matrices) -> Any:
        """Dense weights."""
        return merge_lora(self.params, self.spec, v)

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> LoRAPolicy:
        """The same policy of other base weights."""
        return replace(self, params=weights(self.params))

    @property
    def num_params(self) -> int:
        """How many numbers are trained."""
        return _count(jax.eval_shape(self.init))


@dataclass(frozen=True)
class Full:
    """Full fine-tuning: every weight is trained, the embedding and the head included."""

    needs_svd = False


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FullPolicy:
    """An `Adapted` by training the weights themselves; v is all of them, by path, in float32.

    Attributes:
      params: the base weights, whose dtypes are those of computation.
    """

    params: Any

    rows_apart = False
    trains_head = True
    ill_conditioned = ()

    def __call__(self, v: dict[str, Any]) -> Any:
        """The weights at v in the base's dtypes."""
        return map_by_path(lambda path, leaf: v[path].astype(leaf.dtype), self.params)

    def init(self) -> dict[str, jax.Array]:
        """The base weights."""
        return {path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves_by_path(self.params).items()}

    def merged(self, v: dict[str, Any]) -> Any:
        """The weights at v."""
        return self(v)

    def map_frozen(self, weights: Callable[[Any], Any], factors: Callable[[Factors], Factors]) -> FullPolicy:
        """The same policy of other base weights."""
        return replace(self, params=weights(self.params))

    @property
    def num_params(self) -> int:
        """How many numbers are trained."""
        return _count(self.params)


Spec: TypeAlias = TinyLoRA | LoRA | Full


def adapt(params: Any, spec: Spec, method: str = "auto") -> Adapted:
    """The policy of a spec.

    Args:
      params: the base weights.
      spec: what is trained, and how.
      method: method of `truncated_svd`, which only TinyLoRA needs.

    Raises:
      ValueError: the spec does not fit the tree.
    """
    if isinstance(spec, Full):
        return FullPolicy(params)
    if isinstance(spec, LoRA):
        jax.eval_shape(lambda params: init_lora(params, spec), params)  # refuses a tree without such modules
        return LoRAPolicy(params, spec)
    return Policy(params, factorize(params, spec, method))


def lower_adapt(params: Any, spec: Spec, method: str = "auto") -> Iterator[jax.stages.Lowered]:
    """The programs that `adapt` runs with these arguments, to be compiled before it; shapes may stand for weights."""
    if isinstance(spec, TinyLoRA):
        yield from lower_factorize(params, spec, method)


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
