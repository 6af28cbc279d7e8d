"""The learning half of a step: from graded rollouts to updated parameters."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import optax
from jax.typing import DTypeLike

from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.data import Prompt, padded_width
from tinylora_jax.models import ModelConfig, active_mesh, device_bytes
from tinylora_jax.rl._rollout import GradedRollout
from tinylora_jax.rollout import Sampling
from tinylora_jax.training import (
    GRPO,
    Batch,
    Bounds,
    Metrics,
    Plan,
    TrainState,
    Update,
    decoupled_advantages,
    finite_metrics,
    group_advantages,
    init_state,
    plan_update,
    score,
)


def plan(
    config: ModelConfig,
    grpo: GRPO,
    sampling: Sampling,
    prompts: Sequence[Prompt],
    samples: int,
    dtype: DTypeLike = np.float32,
) -> Plan:
    """Plans updates on rollouts of such prompts, for the current mesh; see `plan_update`.

    Args:
      config: architecture of the model.
      grpo: GRPO settings.
      sampling: sampling settings of the rollouts.
      prompts: prompts of one rollout, including the longest one.
      samples: number of completions per prompt.
      dtype: dtype of the weights.

    Returns:
      The plan, for `Learner`.
    """
    bounds = Bounds(len(prompts), padded_width(prompts), samples, sampling.max_new_tokens)
    return plan_update(config, grpo, sampling.temperature, bounds, dtype, active_mesh(), device_bytes())


@dataclass(frozen=True)
class Underway:
    """An update that may still be running on the devices.

    Attributes:
      state: training state after the update.
      metrics: metrics of the update, as device arrays.
      graded: rollout used for the update.
      seconds: host time spent on the update so far, in seconds.
    """

    state: TrainState
    metrics: Metrics
    graded: GradedRollout
    seconds: float


class Learner:
    """Updates parameters on graded rollouts. It holds no weights, so it can be created and compiled without them.

    Args:
      plan: static sizes and settings of an update, from `plan`.
      optimizer: optax transformation, such as `Optimizer(1e-2).transform()`.
      point: function from the trained parameters to the policy's v, see `Update`.
    """

    def __init__(
        self,
        plan: Plan,
        optimizer: optax.GradientTransformation,
        point: Callable[[Trained], Trained] | None = None,
    ):
        self.plan, self._update = plan, Update(plan, optimizer, point=point)

    def with_optimizer(
        self, optimizer: optax.GradientTransformation, point: Callable[[Trained], Trained] | None = None
    ) -> Learner:
        """Creates a learner with another optimizer and point, which shares this learner's compiled gradient."""
        other = copy.copy(self)
        other._update = self._update.with_optimizer(optimizer, point)
        return other

    def init(self, policy: Adapted) -> TrainState:
        """The training state before the first step."""
        return init_state(policy.init(), self._update.optimizer)

    def point(self, v: Trained) -> Trained:
        """The policy's v for the given trained parameters."""
        return self._update.point(v)

    def lower(self, state: TrainState, policy: Adapted) -> Iterator[jax.stages.Lowered]:
        """Lowers all programs of an update; the state and the policy may hold shapes only."""
        yield from self._update.lower(state, policy)

    def update(self, state: TrainState, policy: Adapted, graded: GradedRollout) -> tuple[TrainState, dict[str, float]]:
        """Runs the updates on one graded rollout: `begin`, then `finish`.

        Args:
          state: training state.
          policy: frozen weights and the adapter's structure.
          graded: graded rollout, drawn from the policy at this state.

        Returns:
          The next state, and metrics of the rollout and of the update.

        Raises:
          DivergenceError: the loss, the gradient or v is not finite.
        """
        return self.finish(self.begin(state, policy, graded))

    def begin(self, state: TrainState, policy: Adapted, graded: GradedRollout) -> Underway:
        """Starts the updates on one graded rollout without waiting; takes the arguments of `update`."""
        started = time.perf_counter()
        batch = self.batch(state, policy, graded)
        metrics: Metrics = {}
        for _ in range(self.plan.grpo.updates_per_rollout):
            state, metrics = self._update(state, policy, batch)
        return Underway(state, metrics, graded, time.perf_counter() - started)

    def finish(self, underway: Underway) -> tuple[TrainState, dict[str, float]]:
        """Waits for the updates that `begin` started; returns and raises the same as `update`."""
        started, state, graded = time.perf_counter(), underway.state, underway.graded
        metrics = finite_metrics(underway.metrics, ("loss", "grad_norm", "v_norm")) | rollout_metrics(graded)
        metrics |= {"rollout_s": graded.seconds, "grading_s": graded.grading_seconds}
        metrics["update_s"] = underway.seconds + time.perf_counter() - started
        metrics["tokens_per_s"] = graded.num_tokens / graded.seconds
        return dataclasses.replace(state, step=state.step + 1), metrics

    def batch(self, state: TrainState, policy: Adapted, graded: GradedRollout) -> Batch:
        """Converts a rollout to the loss's input: tokens, advantages, and the log-probabilities that the plan needs."""
        grpo, completions = self.plan.grpo, graded.completions
        shape = (len(graded.prompts), graded.samples, completions.tokens.shape[1])
        mask = np.arange(shape[2]) < completions.lengths[:, None]
        if grpo.mask_truncated_completions:
            mask &= completions.stopped[:, None]
        batch = Batch(
            prompts=graded.arrays.tokens,
            lengths=graded.arrays.lengths,
            completions=np.reshape(completions.tokens, shape),
            mask=mask.reshape(shape),
            rollout_logprobs=np.reshape(completions.logprobs, shape),
            advantages=self._advantages(graded),
        )
        scores = lambda v: score(self.plan, policy, v, batch)
        if grpo.updates_per_rollout > 1:
            batch = dataclasses.replace(batch, old_logprobs=scores(self.point(state.v)))
        if grpo.kl_coef:
            batch = dataclasses.replace(batch, ref_logprobs=scores(policy.init()))
        return batch

    def _advantages(self, graded: GradedRollout) -> np.ndarray:
        """The advantage of each completion, float32 `[prompts, samples]`."""
        grpo = self.plan.grpo
        if grpo.multi_objective_aggregation == "normalize_then_sum":
            return decoupled_advantages(graded.part_rewards(), tuple(graded.weights.values()) or (1.0,))
        return np.asarray(group_advantages(graded.rewards(), grpo.normalize_std))


def rollout_metrics(graded: GradedRollout) -> dict[str, float]:
    """Computes metrics of a graded rollout: rewards, lengths and the utilization of the slots."""
    groups, lenient = graded.rewards(), graded.rewards("lenient")
    return {
        "reward": float(groups.ravel().mean()),
        "reward_lenient": float(lenient.ravel().mean()),
        # The completions of one question are correlated, so only the means of questions are independent.
        "reward_se": standard_error(groups.mean(axis=1)),
        "groups_without_signal": float((groups == groups[:, :1]).all(axis=1).mean()),
        "length": float(graded.completions.lengths.mean()),
        "truncated": float(1 - graded.completions.stopped.mean()),
        "slot_efficiency": graded.num_tokens / int(graded.completions.slot_steps),
        **{
            f"reward/{name}": float(part.mean())
            for name, part in zip(graded.weights, graded.part_rewards(), strict=False)
        },
    }


def standard_error(means: np.ndarray) -> float:
    """The standard error of the mean of independent values `[questions]`; 0 for a single one."""
    return float(means.std(ddof=1) / len(means) ** 0.5) if len(means) > 1 else 0.0
