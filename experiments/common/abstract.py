"""Shapes, dtypes and shardings in place of arrays, to lower programs early."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tinylora_jax.adapters import Adapted, Spec, adapt
from tinylora_jax.models import abstract_at, policy_shardings


def abstract_policy(params: Any, spec: Spec, mesh: Mesh | None) -> Adapted:
    """The shapes and shardings of the policy that `adapt` would return.

    Args:
      params: weights, or their shapes.
      spec: adapter settings.
      mesh: device mesh; None for the default device.

    Raises:
      ValueError: the spec does not fit the tree.
    """
    policy = jax.eval_shape(lambda params: adapt(params, spec), params)
    return policy if mesh is None else jax.tree.map(abstract_at, policy, policy_shardings(mesh, policy))


def base_policy(params: Any, method: str, spec: Spec) -> Adapted:
    """The policy of a spec for evaluating the base model, without a decomposition.

    Its factors are zeros. The programs and, at v = 0, all their results are the same as with the real factors, which
    v = 0 multiplies by zero anyway.

    Args:
      params: weights of the base model.
      method: SVD method, not used.
      spec: adapter settings.
    """
    del method
    if not spec.needs_svd:
        return adapt(params, spec)
    zeros = lambda leaf: jnp.zeros(leaf.shape, leaf.dtype)
    shapes = jax.eval_shape(lambda params: adapt(params, spec), params)
    return shapes.map_frozen(lambda _: params, lambda factors: jax.tree.map(zeros, factors))
