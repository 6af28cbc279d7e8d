"""An evolution strategy over v: the gradient of the reward from answers at a population of points.

    ĝ = 1 / (2 σ n) Σᵢ (F(v + σ εᵢ) − F(v − σ εᵢ)) εᵢ,    εᵢ ~ N(0, I),  i = 1 … n

estimates ∇ E[F(v + σ ε)] for the mean reward F ("Evolution Strategies as a Scalable Alternative to Reinforcement
Learning", Salimans et al. 2017, arXiv 1703.03864, with antithetic pairs). Its variance grows with the number of
parameters, of which there are few here. Nothing is differentiated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SHAPINGS = ("standardized", "ranks", "none")


@dataclass(frozen=True)
class Evolution:
    """Settings of the evolution strategy.

    Attributes:
      population: number of points of a step, in antithetic pairs; even.
      sigma: σ, the standard deviation of the noise in every number of v.
      shaping: scaling of the pairs' differences, see `shaped_differences`.
    """

    population: int = 32
    sigma: float = 0.02
    shaping: str = "standardized"

    def __post_init__(self):
        if self.population < 2 or self.population % 2:
            raise ValueError(f"Evolution: population must be even and at least 2, got {self.population}")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"Evolution: sigma must be finite and > 0, got {self.sigma}")
        if self.shaping not in SHAPINGS:
            raise ValueError(f"Evolution: shaping {self.shaping!r}: expected {' or '.join(map(repr, SHAPINGS))}")

    @property
    def pairs(self) -> int:
        """n, the number of antithetic pairs."""
        return self.population // 2


def search_noise(key: jax.Array, pairs: int, shape: tuple[int, ...]) -> Float[Array, "pairs ..."]:
    """Draws εᵢ of every pair; it depends on the key and on i alone, not on the number of pairs.

    Args:
      key: PRNG key of the step.
      pairs: number of pairs.
      shape: shape of v.
    """
    keys = jax.vmap(lambda pair: jax.random.fold_in(key, pair))(jnp.arange(pairs))
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def antithetic_points(
    v: Float[Array, ...], noise: Float[Array, "pairs ..."], sigma: float
) -> Float[Array, "signs pairs ..."]:
    """Computes v + σ εᵢ and v − σ εᵢ of every pair.

    Args:
      v: trained parameters, float32.
      noise: εᵢ from `search_noise`, float32 with a leading axis of pairs.
      sigma: σ, the standard deviation of the noise.

    Returns:
      The points, float32; the first axis has the two signs.
    """
    return jnp.stack([v + sigma * noise, v - sigma * noise])


def shaped_differences(differences: Float[Array, " pairs"], shaping: str) -> Float[Array, " pairs"]:
    """Makes the pairs' differences of rewards independent of the scale of rewards.

    `standardized` divides them by their root mean square. `ranks` replaces the size of each by its rank among the
    sizes, from 1/n to 1, where equal sizes share their mean rank: one outlier cannot decide the step. The paper ranks
    the rewards of all points; here pairs answer different questions, so only their differences can be compared.

    Args:
      differences: F(v + σ εᵢ) − F(v − σ εᵢ), float32 `[pairs]`.
      shaping: one of `SHAPINGS`; `none` changes nothing.

    Returns:
      Shaped differences, float32 `[pairs]`; zeros stay zeros.
    """
    if shaping == "none":
        return differences
    if shaping == "standardized":
        scale = jnp.sqrt(jnp.mean(differences**2))
        return differences / jnp.where(scale > 0, scale, 1.0)
    sizes = jnp.abs(differences)
    below = jnp.sum(sizes[None, :] < sizes[:, None], axis=1).astype(jnp.float32)
    equal = jnp.sum(sizes[None, :] == sizes[:, None], axis=1).astype(jnp.float32)
    return jnp.sign(differences) * (below + (equal + 1) / 2) / differences.shape[0]


def evolution_gradient(
    differences: Float[Array, " pairs"], noise: Float[Array, "pairs ..."], sigma: float
) -> Float[Array, ...]:
    """Computes −1 / (2 σ n) Σᵢ dᵢ εᵢ, the gradient of the negative reward, for an optimizer that minimizes.

    Args:
      differences: dᵢ = F(v + σ εᵢ) − F(v − σ εᵢ), shaped or not, float32 `[pairs]`.
      noise: εᵢ, float32 with a leading axis of pairs.
      sigma: σ, the standard deviation of the noise.
    """
    total = jnp.einsum("i,i...->...", differences, noise, precision="highest")
    return -total / (2 * sigma * differences.shape[0])
