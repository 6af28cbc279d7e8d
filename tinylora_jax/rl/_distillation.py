"""On-policy distillation: the student's own answers, judged token by token by a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import optax
from jaxtyping import Bool, Float

from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.rl._learner import Learner
from tinylora_jax.rl._rollout import GradedRollout
from tinylora_jax.training import Batch, Plan, TrainState, score

TokenFloats = Float[np.ndarray, "prompts samples tokens"]


@dataclass(frozen=True)
class Teacher:
    """A frozen model with the student's tokenizer.

    Attributes:
      plan: plan of an update of the teacher's architecture, from `plan`; nothing is updated.
      policy: weights of the teacher.
      v: trained parameters of the teacher's adapter; `policy.init()` without one.
    """

    plan: Plan
    policy: Adapted
    v: Trained

    def logprobs(self, batch: Batch) -> TokenFloats:
        """Log-probabilities of a batch's completions, float32 `[N, G, T]`."""
        return score(self.plan, self.policy, self.v, batch)


class DistillationLearner(Learner):
    """A `Learner` whose advantages come from a teacher instead of rewards, see `distillation_advantages`.

    The metric `loss` estimates the reverse KL divergence before the step, averaged as `GRPO.loss_type` says.

    Args:
      plan: static sizes and settings of an update, from `plan`.
      optimizer: optax transformation, such as `Optimizer(1e-2).transform()`.
      teacher: function that returns the teacher; it is called in every step, so it should keep it.
    """

    def __init__(self, plan: Plan, optimizer: optax.GradientTransformation, teacher: Callable[[], Teacher]):
        super().__init__(plan, optimizer)
        self._teacher = teacher

    def batch(self, state: TrainState, policy: Adapted, graded: GradedRollout) -> Batch:
        """Converts a rollout to the loss's input, with an advantage for every token."""
        batch = super().batch(state, policy, graded)
        advantages = distillation_advantages(self._teacher().logprobs(batch), batch.rollout_logprobs, batch.mask)
        return dataclasses.replace(batch, advantages=advantages)

    def _advantages(self, graded: GradedRollout) -> np.ndarray:
        """Zeros, until the teacher replaces them: rewards do not matter, so one completion per prompt is enough."""
        return np.zeros((len(graded.prompts), graded.samples), np.float32)


def distillation_advantages(
    teacher: TokenFloats, student: TokenFloats, mask: Bool[np.ndarray, "prompts samples tokens"]
) -> TokenFloats:
    """Computes Âₜ = ln π_teacher(t) − ln π(t) for the student's own tokens (arXiv 2306.13649, with reverse KL).

    The expectation of −Âₜ ∇ ln π(t) over the student's tokens is the gradient of KL(π ‖ π_teacher) at each position.
    What a token does to the divergence at later positions is left out, as with a discount of zero.

    Args:
      teacher: log-probabilities under the teacher, float32 `[N, G, T]`.
      student: log-probabilities from generation, float32 `[N, G, T]`.
      mask: True for the tokens to train on, bool `[N, G, T]`.

    Returns:
      Advantages, float32 `[N, G, T]`; zero outside the mask.
    """
    return np.where(mask, teacher - student, np.float32(0))
