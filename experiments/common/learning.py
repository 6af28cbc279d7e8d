"""The half of a step that learns: from graded answers to an update of what is trained."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np
import optax

from experiments.common.answering import Answers, grades_of
from experiments.common.cli import TrainingError
from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.data import Prompt
from tinylora_jax.training import Batch, Gradient, Metrics, Plan, Step, TrainState, group_advantages, score


@dataclass(frozen=True)
class Underway:
    """An update that the devices may still be computing.

    Attributes:
      state: after it.
      metrics: of it, on the device.
      answers: what it learns from.
      seconds: that the host spent on it.
    """

    state: TrainState
    metrics: Metrics
    answers: Answers
    seconds: float


class Learner:
    """Updates one trained thing on graded rollouts.

    Args:
      gradient: of GRPO's loss; several learners may share it.
      optimizer: optax transformation.
      samples: completions a prompt.
      point: the policy's v as a function of what is trained; None: itself.
    """

    def __init__(
        self,
        gradient: Gradient,
        optimizer: optax.GradientTransformation,
        samples: int,
        point: Callable[[Trained], Trained] | None = None,
    ):
        self.samples = samples
        self.update = Step(gradient, optimizer, point)

    @property
    def plan(self) -> Plan:
        """What the programs are compiled for."""
        return self.update.gradient.plan

    def learn(
        self, policy: Adapted, state: TrainState, answers: Answers, index: int
    ) -> tuple[TrainState, dict[str, float]]:
        """The updates on one graded rollout, and the metrics of both: `begin`, then `finish`."""
        return self.finish(self.begin(policy, state, answers), index)

    def begin(self, policy: Adapted, state: TrainState, answers: Answers) -> Underway:
        """Gives the devices the updates on one graded rollout, and does not wait for them.

        Args:
          policy: everything frozen.
          state: before them.
          answers: of this state's own policy.
        """
        started = time.perf_counter()
        batch = self._batch(policy, state, answers)
        metrics: Metrics = {}
        for _ in range(self.plan.grpo.updates_per_rollout):
            state, metrics = self.update(state, policy, batch)
        return Underway(state, metrics, answers, time.perf_counter() - started)

    def finish(self, underway: Underway, index: int) -> tuple[TrainState, dict[str, float]]:
        """Waits for the updates; gives the state after them, and the metrics of them and of the rollout.

        Args:
          underway: from `begin`.
          index: of the step, for messages.

        Raises:
          TrainingError: the loss, the gradient or v is not finite.
        """
        started, state, answers = time.perf_counter(), underway.state, underway.answers
        metrics = {name: float(value) for name, value in jax.device_get(underway.metrics).items()}
        if not all(math.isfinite(metrics[name]) for name in ("loss", "grad_norm", "v_norm")):
            shown = {name: metrics[name] for name in ("loss", "grad_norm", "v_norm")}
            raise TrainingError(
                f"step {index} is not finite ({shown}); the state before it is kept. Lower"
                " config.optimizer.learning_rate or config.optimizer.max_grad_norm and train in a new --workdir"
            )
        metrics |= rollout_metrics(answers, self.samples)
        metrics |= {"rollout_s": answers.seconds, "grading_s": answers.grading_seconds}
        metrics["update_s"] = underway.seconds + time.perf_counter() - started
        metrics["tokens_per_s"] = answers.num_tokens / answers.seconds
        return dataclasses.replace(state, step=state.step + 1), metrics

    def _batch(self, policy: Adapted, state: TrainState, answers: Answers) -> Batch:
        grpo, completions = self.plan.grpo, answers.completions
        shape = (len(answers.arrays.ids), self.samples, completions.tokens.shape[1])
        mask = np.arange(shape[2]) < completions.lengths[:, None]
        rewards = grades_of(answers, "strict").reshape(shape[:2])
        batch = Batch(
            prompts=answers.arrays.tokens,
            lengths=answers.arrays.lengths,
            completions=completions.tokens.reshape(shape),
            mask=mask.reshape(shape),
            rollout_logprobs=completions.logprobs.reshape(shape),
            advantages=group_advantages(rewards, grpo.normalize_std),
        )
        scores = lambda v: score(self.plan, policy, v, batch)
        if grpo.updates_per_rollout > 1:
            batch = dataclasses.replace(batch, old_logprobs=scores(self.update.point(state.v)))
        if grpo.kl_coef:
            batch = dataclasses.replace(batch, ref_logprobs=scores(policy.init()))
        return batch


def rollout_metrics(answers: Answers, samples: int) -> dict[str, float]:
    """What a step logs of its answers."""
    strict, lenient = grades_of(answers, "strict"), grades_of(answers, "lenient")
    groups = strict.reshape(-1, samples)
    return {
        "reward": float(strict.mean()),
        "reward_lenient": float(lenient.mean()),
        # Answers of one question are alike, so the means of the questions are what is independent.
        "reward_se": float(groups.mean(axis=1).std(ddof=1) / len(groups) ** 0.5) if len(groups) > 1 else 0.0,
        "groups_without_signal": float((groups == groups[:, :1]).all(axis=1).mean()),
        "length": float(answers.completions.lengths.mean()),
        "truncated": float(1 - answers.completions.stopped.mean()),
        "slot_efficiency": answers.num_tokens / int(answers.completions.slot_steps),
    }


def answers_page(prompts: Sequence[Prompt], answers: Answers, samples: int, kept: int) -> str:
    """A readable page: the first prompts of a step with all their completions."""
    lines = []
    for place, prompt in enumerate(prompts[:kept]):
        lines.append(f"=== question {prompt.id}: {prompt.question}\n=== answer: {prompt.answer}\n")
        for index in range(place * samples, (place + 1) * samples):
            grade = answers.grades[index]
            lines.append(f"--- strict {grade.strict:g}, lenient {grade.lenient:g}\n{answers.texts[index]}\n")
    return "\n".join(lines)
