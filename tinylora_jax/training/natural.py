"""Natural gradient of a short v, with an exact Fisher matrix in a trust region.

v has so few numbers that the matrix [n, n] needs no approximation by blocks or Kronecker factors. It is estimated from
the gradients of single prompts, which the update's one backward pass gives, because every token has its own copy of v:

    g_p = ∇ Σ_{t in p} c_t ln π(t),    ĝ = Σ_p g_p,    F̂ = Σ_p g_p g_pᵀ / Σ_t c_t²

c_t is a token's weight times its advantage; signs do not matter. The scores ∇ ln π(t) of on-policy tokens are
martingale differences. So E[Σ_p g_p g_pᵀ] = Σ_t c_t² E[∇ ln π(t) ∇ ln π(t)ᵀ] if advantages do not depend on the scores.
F̂ is then the Fisher matrix of a token, and ½ ΔvᵀF̂Δv the KL divergence of a step in nats per token.

This is the empirical Fisher. Advantages do depend on the scores, and F̂ also holds the mean gradient, which shortens
steps along it. Clipping, importance weights and a KL term are not part of c_t. The true Fisher, from scores that no
advantage multiplies, would need a second backward pass, and an update would take about half as long again.

Prompts are the unit because completions of one prompt are compared with each other, and because sums over packed
sequences would depend on the packing, and so on the mesh. The step is that of TRPO (arXiv 1502.05477), with damping.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int

MOST_NUMBERS = 4096
"""Largest number of trained parameters: their matrix takes 64 MiB, and so does every checkpoint."""


class FisherTransformation(optax.GradientTransformationExtraArgs):
    """An optax transformation whose `update` takes the matrix of `fisher_matrix` as the keyword `fisher`."""


class NaturalState(NamedTuple):
    """The state of `natural`.

    Attributes:
      updates: number of updates, int32 scalar.
      seen: number of matrices in the average, int32 scalar; batches without signal have none.
      fisher: moving average of F̂ before bias correction, float32 `[n, n]`.
      momentum: moving average of the gradient before bias correction, float32 `[n]`.
    """

    updates: Int[Array, ""]
    seen: Int[Array, ""]
    fisher: Float[Array, "n n"]
    momentum: Float[Array, " n"]


def fisher_matrix(gradients: Float[Array, "prompts n"], power: Float[Array, ""]) -> Float[Array, "n n"]:
    """Computes F̂ = Σ_p g_p g_pᵀ / Σ_t c_t², the empirical Fisher matrix of a token.

    Args:
      gradients: gradient g_p of each prompt's part of the loss, float32 `[prompts, n]`.
      power: Σ_t c_t², with c_t the weight of a token's log-probability in the loss, float32 scalar.

    Returns:
      F̂, float32 `[n, n]`; zero without any signal.
    """
    moments = jnp.einsum("pi,pj->ij", gradients, gradients, precision="highest")
    return jnp.where(power > 0, moments / jnp.where(power > 0, power, 1.0), 0.0)


def natural_direction(
    fisher: Float[Array, "n n"], gradient: Float[Array, " n"], damping: float
) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Computes d = (F̂ + λI)⁻¹ g and its squared length dᵀ(F̂ + λI)d = gᵀd, with λ = damping · tr(F̂) / n.

    λ is relative to the mean eigenvalue, so that it fits losses and models of any scale. It is part of the length too:
    otherwise a step along a direction that F̂ does not know would have no bound.

    Args:
      fisher: F̂, float32 `[n, n]`.
      gradient: g, float32 `[n]`.
      damping: λ in units of the mean eigenvalue of F̂, > 0.

    Returns:
      d, float32 `[n]`, and its squared length, float32 scalar; zero if F̂ is zero.
    """
    ridge = damping * jnp.trace(fisher) / gradient.shape[0]
    damped = fisher + jnp.where(ridge > 0, ridge, 1.0) * jnp.eye(gradient.shape[0])
    direction = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(damped), gradient)
    direction = jnp.where(ridge > 0, direction, 0.0)
    return direction, jnp.vdot(gradient, direction, precision="highest")


def trust_scale(squared_length: Float[Array, ""], kl_radius: float) -> Float[Array, ""]:
    """Computes α = √(2δ / dᵀ(F̂ + λI)d), with which the step −αd has ½ ΔvᵀF̂Δv ≤ δ (TRPO, arXiv 1502.05477).

    Args:
      squared_length: dᵀ(F̂ + λI)d, float32 scalar.
      kl_radius: δ, the KL divergence of a step in nats per token.
    """
    some = squared_length > 0
    return jnp.where(some, jnp.sqrt(2 * kl_radius / jnp.where(some, squared_length, 1.0)), 0.0)


def natural(
    rates: optax.Schedule, kl_radius: float, damping: float, fisher_decay: float, b1: float
) -> optax.GradientTransformationExtraArgs:
    """Creates the transformation v ← v − α (F̂ + λI)⁻¹ m, with moving averages F̂ and m of matrices and gradients.

    Args:
      rates: factor of the step as a function of the update's index: α itself, or with a radius the share of its step.
      kl_radius: δ, the KL divergence of a step in nats per token; 0 sets no radius.
      damping: λ in units of the mean eigenvalue of F̂, > 0.
      fisher_decay: decay rate of F̂.
      b1: decay rate of m; 0 gives the natural gradient of each batch.

    Returns:
      The transformation; `update` needs the keyword `fisher`.
    """

    def start(v: optax.Params) -> NaturalState:
        size = sum(leaf.size for leaf in jax.tree.leaves(v))
        if size > MOST_NUMBERS:
            raise ValueError(
                f"Optimizer: method 'natural' needs a matrix of all trained numbers; expected at most {MOST_NUMBERS:,},"
                f" got {size:,}; train fewer, or use method 'adam'"
            )
        count = jnp.zeros((), jnp.int32)
        return NaturalState(count, count, jnp.zeros((size, size), jnp.float32), jnp.zeros((size,), jnp.float32))

    def update(gradient, state, v=None, *, fisher, **ignored):
        del v, ignored
        flat, unravel = ravel_pytree(gradient)
        seen = state.seen + (jnp.trace(fisher) > 0).astype(jnp.int32)
        average = fisher_decay * state.fisher + (1 - fisher_decay) * fisher
        average = jnp.where(seen > state.seen, average, state.fisher)
        momentum = b1 * state.momentum + (1 - b1) * flat
        corrected = average / (1 - fisher_decay ** jnp.maximum(seen, 1))
        direction, length = natural_direction(corrected, momentum / (1 - b1 ** (state.updates + 1)), damping)
        scale = rates(state.updates) * (trust_scale(length, kl_radius) if kl_radius else 1.0)
        return unravel(-scale * direction), NaturalState(state.updates + 1, seen, average, momentum)

    return optax.GradientTransformationExtraArgs(start, update)
