"""The half of a step that learns: from graded rollouts to an update of what is trained."""

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
    """The plan of updates on rollouts of such prompts, on the mesh in use; `plan_update` says more of it.

    Args:
      config: architecture of the model.
      grpo: settings of the algorithm.
      sampling: how rollouts are drawn.
      prompts: prompts of one rollout, the longest among them.
      samples: completions per prompt.
      dtype: dtype of the weights.

    Returns:
      The plan, for `Learner`.
    """
    bounds = Bounds(len(prompts), padded_width(prompts), samples, sampling.max_new_tokens)
    return plan_update(config, grpo, sampling.temperature, bounds, dtype, active_mesh(), device_bytes())


@dataclass(frozen=True)
class Underway:
    """An update that the devices may still be computing.

    Attributes:
      state: trained state after the update.
      metrics: metrics of the update, on the device.
      graded: rollout that the update learns from.
      seconds: time that the host spent on it so far.
    """

    state: TrainState
    metrics: Metrics
    graded: GradedRollout
    seconds: float


class Learner:
    """Updates what is trained on graded rollouts. It holds no weights, so it can be made, and compiled, without them.

    Args:
      plan: static sizes and settings of an update, see `plan`.
      optimizer: optax transformation, such as `Optimizer(1e-2).transform()`.
      point: see `Update`.
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
        """A learner with another optimizer at another point, which shares this one's compiled gradient."""
        other = copy.copy(self)
        other._update = self._update.with_optimizer(optimizer, point)
        return other

    def init(self, policy: Adapted) -> TrainState:
        """The state before the first step."""
        return init_state(policy.init(), self._update.optimizer)

    def point(self, v: Trained) -> Trained:
        """The policy's v for what is trained."""
        return self._update.point(v)

    def lower(self, state: TrainState, policy: Adapted) -> Iterator[jax.stages.Lowered]:
        """All programs of an update, lowered; shapes may stand for the state and the policy."""
        yield from self._update.lower(state, policy)

    def update(self, state: TrainState, policy: Adapted, graded: GradedRollout) -> tuple[TrainState, dict[str, float]]:
        """The updates on one graded rollout: `begin`, then `finish`.

        Args:
          state: trained state.
          policy: frozen weights and what adapts them.
          graded: graded rollout of this state's policy.

        Returns:
          The next state, and metrics of the rollout and the update.

        Raises:
          DivergenceError: the loss, the gradient or v is not finite.
        """
        return self.finish(self.begin(state, policy, graded))

    def begin(self, state: TrainState, policy: Adapted, graded: GradedRollout) -> Underway:
        """Gives the devices the updates on one graded rollout, and does not wait; takes what `update` takes."""
        started = time.perf_counter()
        batch = self.batch(state, policy, graded)
        metrics: Metrics = {}
        for _ in range(self.plan.grpo.updates_per_rollout):
            state, metrics = self._update(state, policy, batch)
        return Underway(state, metrics, graded, time.perf_counter() - started)

    def finish(self, underway: Underway) -> tuple[TrainState, dict[str, float]]:
        """Waits for updates that `begin` gave; returns and raises what `update` does."""
        started, state, graded = time.perf_counter(), underway.state, underway.graded
        metrics = finite_metrics(underway.metrics, ("loss", "grad_norm", "v_norm")) | rollout_metrics(graded)
        metrics |= {"rollout_s": graded.seconds, "grading_s": graded.grading_seconds}
        metrics["update_s"] = underway.seconds + time.perf_counter() - started
        metrics["tokens_per_s"] = graded.num_tokens / graded.seconds
        return dataclasses.replace(state, step=state.step + 1), metrics

    def batch(self, state: TrainState, policy: Adapted, graded: GradedRollout) -> Batch:
        """What the loss sees of a rollout: its tokens, advantages, and such log-probabilities as the plan needs."""
        grpo, completions = self.plan.grpo, graded.completions
        shape = (len(graded.prompts), graded.samples, completions.tokens.shape[1])
        mask = np.arange(shape[2]) < completions.lengths[:, None]
        batch = Batch(
            prompts=graded.arrays.tokens,
            lengths=graded.arrays.lengths,
            completions=np.reshape(completions.tokens, shape),
            mask=mask.reshape(shape),
            rollout_logprobs=np.reshape(completions.logprobs, shape),
            advantages=np.asarray(group_advantages(graded.rewards(), grpo.normalize_std)),
        )
        scores = lambda v: score(self.plan, policy, v, batch)
        if grpo.updates_per_rollout > 1:
            batch = dataclasses.replace(batch, old_logprobs=scores(self.point(state.v)))
        if grpo.kl_coef:
            batch = dataclasses.replace(batch, ref_logprobs=scores(policy.init()))
        return batch


def rollout_metrics(graded: GradedRollout) -> dict[str, float]:
    """What a graded rollout tells: rewards, lengths, and how well the slots were used."""
    groups, lenient = graded.rewards(), graded.rewards("lenient")
    return {
        "reward": float(groups.ravel().mean()),
        "reward_lenient": float(lenient.ravel().mean()),
        # The completions of one question are alike, so the means of the questions are what is independent.
        "reward_se": float(groups.mean(axis=1).std(ddof=1) / len(groups) ** 0.5) if len(groups) > 1 else 0.0,
        "groups_without_signal": float((groups == groups[:, :1]).all(axis=1).mean()),
        "length": float(graded.completions.lengths.mean()),
        "truncated": float(1 - graded.completions.stopped.mean()),
        "slot_efficiency": graded.num_tokens / int(graded.completions.slot_steps),
    }
