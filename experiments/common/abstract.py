"""Shapes, dtypes and shardings in place of arrays, so that programs can be lowered early."""

from __future__ import annotations

from typing import Any

import jax
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
