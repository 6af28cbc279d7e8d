"""The learning half of a step of the evolution strategy: points to try, and the step of v."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from tinylora_jax.models import abstract_everywhere
from tinylora_jax.rl._learner import rollout_metrics, standard_error
from tinylora_jax.rl._rollout import GradedRollout, step_key
from tinylora_jax.training import (
    Evolution,
    Metrics,
    TrainState,
    antithetic_points,
    evolution_gradient,
    finite_metrics,
    search_noise,
    shaped_differences,
)


class EvolutionLearner:
    """Moves v by an evolution strategy, see `training.evolution`. It holds no weights and differentiates nothing.

    A step answers its prompts twice: at v + σ ε in the first half of the rollout's rows, and at v − σ ε in the second
    half. Each pair of points gets an equal share of the prompts. Both points of a pair answer with the same sampling
    noise, because it depends on the prompt and the sample alone; this makes their difference less noisy.

    Args:
      evolution: settings of the strategy.
      optimizer: optax transformation, such as `Optimizer(1e-2).transform()`.
      seed: seed of the noise ε.
    """

    def __init__(self, evolution: Evolution, optimizer: optax.GradientTransformation, seed: int = 0):
        self.evolution, self._seed = evolution, seed
        self._rows = jax.jit(partial(_rows, evolution), static_argnames="prompts")
        self._apply = jax.jit(partial(_apply, evolution, optimizer))

    def rows(self, state: TrainState, prompts: int) -> Float[Array, "rows ..."]:
        """The point of every row of a rollout that answers `prompts` prompts twice, float32 `[2 · prompts, *v]`.

        Raises:
          ValueError: the pairs do not divide the prompts.
        """
        if prompts % self.evolution.pairs:
            raise ValueError(
                f"Evolution: population={self.evolution.population} has {self.evolution.pairs} pairs, which do not"
                f" divide {prompts} prompts"
            )
        return self._rows(state.v, self._key(state), prompts=prompts)

    def abstract_rows(self, state: TrainState, prompts: int) -> jax.ShapeDtypeStruct:
        """The shape and sharding of `rows`; the state may hold shapes only."""
        shape = jax.ShapeDtypeStruct((2 * prompts, *state.v.shape), jnp.float32)
        return abstract_everywhere(shape)

    def lower(self, state: TrainState) -> Iterator[jax.stages.Lowered]:
        """Lowers the program of the step; the state may hold shapes only."""
        key = abstract_everywhere(jax.eval_shape(lambda: jax.random.key(0)))
        yield self._apply.lower(state, key, np.zeros(self.evolution.pairs, np.float32))

    def update(self, state: TrainState, graded: GradedRollout) -> tuple[TrainState, dict[str, float]]:
        """Moves v along the estimated gradient of the reward.

        Args:
          state: training state.
          graded: graded rollout at `rows(state, prompts)`.

        Returns:
          The next state, and metrics of the rollout and of the update.

        Raises:
          DivergenceError: the gradient or v is not finite.
        """
        started = time.perf_counter()
        differences = reward_differences(graded.rewards(), self.evolution.pairs)
        state, device_metrics = self._apply(state, self._key(state), differences)
        metrics = finite_metrics(device_metrics) | rollout_metrics(graded)
        del metrics["groups_without_signal"]  # it compares the samples of one point, and the step compares points
        metrics |= {"pairs_that_differ": float((differences != 0).mean())}
        # Both points of a pair answer the same questions, so a question counts once.
        metrics["reward_se"] = standard_error(graded.rewards().reshape(2, -1, graded.samples).mean(axis=(0, 2)))
        metrics |= {"rollout_s": graded.seconds, "grading_s": graded.grading_seconds}
        metrics["update_s"] = time.perf_counter() - started
        metrics["tokens_per_s"] = graded.num_tokens / graded.seconds
        return state, metrics

    def _key(self, state: TrainState) -> jax.Array:
        return step_key(self._seed, "search", int(state.step))


def reward_differences(rewards: Float[np.ndarray, "rows samples"], pairs: int) -> Float[np.ndarray, " pairs"]:
    """Computes F(v + σ εᵢ) − F(v − σ εᵢ), the difference of the mean rewards of each pair.

    Args:
      rewards: rewards, float32 `[2 · prompts, samples]`: those of the points v + σ εᵢ, then those of v − σ εᵢ.
      pairs: number of pairs.
    """
    means = rewards.reshape(2, pairs, -1).mean(axis=2)
    return means[0] - means[1]


def _rows(evolution: Evolution, v: jax.Array, key: jax.Array, prompts: int) -> jax.Array:
    points = antithetic_points(v, search_noise(key, evolution.pairs, v.shape), evolution.sigma)
    return jnp.repeat(points, prompts // evolution.pairs, axis=1).reshape(2 * prompts, *v.shape)


def _apply(
    evolution: Evolution,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    key: jax.Array,
    differences: jax.Array,
) -> tuple[TrainState, Metrics]:
    """Applies the optimizer step of the pairs' differences."""
    noise = search_noise(key, evolution.pairs, state.v.shape)
    gradient = evolution_gradient(shaped_differences(differences, evolution.shaping), noise, evolution.sigma)
    with jax.numpy_dtype_promotion("standard"):  # as for `Update`
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.v)
    v = optax.apply_updates(state.v, updates)
    metrics = {"grad_norm": optax.tree.norm(gradient), "v_norm": optax.tree.norm(v)}
    return TrainState(v, opt_state, state.step + 1), metrics
