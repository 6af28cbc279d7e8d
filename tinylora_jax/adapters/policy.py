"""A frozen tree of weights and its factors: everything but the trained vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import Array, Float

from tinylora_jax.adapters.tinylora import Factors, apply


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Policy:
    """The frozen part of an adapted model; a vector v completes it.

    Attributes:
      params: the base weights.
      factors: of `factorize(params, spec)`.
    """

    params: Any
    factors: Factors

    def __call__(self, v: Float[Array, "... groups u"]) -> Any:
        """The adapted weights at v, unmerged."""
        return apply(self.params, self.factors, v)
