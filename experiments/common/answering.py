"""Answers prompts with a task's model and grades the answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import numpy as np

from experiments.common.task import Task
from tinylora_jax import rl
from tinylora_jax.adapters import Trained
from tinylora_jax.data import Prompt, PromptArrays
from tinylora_jax.models import abstract_everywhere
from tinylora_jax.rollout import QueueSizes, Sampling, lower_continuous


def answer(
    task: Task,
    v: Trained,
    prompts: Sequence[Prompt],
    key: jax.Array,
    sampling: Sampling,
    samples: int = 1,
    width: int | None = None,
) -> rl.GradedRollout:
    """Runs `rl.rollout` and `rl.grade` with the task's model, slots and reward."""
    drawn = rl.rollout(task.model, task.policy, v, prompts, key, sampling, samples, width, task.slots)
    return rl.grade(drawn, task.reward, task.tokenizer)


def answer_until_signal(
    task: Task,
    v: Trained,
    queue: Iterator[Prompt],
    key: jax.Array,
    sizes: QueueSizes,
    batch_size: int,
) -> rl.Refilled:
    """Runs `rl.refill` with the task's model, sampling settings and reward."""
    graders = task.reward, task.tokenizer
    return rl.refill(task.model, task.policy, v, queue, key, task.sampling, sizes, batch_size, *graders)


def lower_answer_until_signal(task: Task, v: Trained, sizes: QueueSizes) -> Iterator[jax.stages.Lowered]:
    """Lowers the programs of `answer_until_signal`, to compile them in advance."""
    yield from lower_continuous(task.model, task.policy, v, task.sampling, sizes)


def lower_answer(
    task: Task,
    v: Trained,
    prompts: int,
    width: int,
    sampling: Sampling,
    samples: int = 1,
    key: jax.Array | jax.ShapeDtypeStruct | None = None,
) -> jax.stages.Lowered:
    """Lowers the program of `answer` for a number of prompts, to compile it in advance.

    Args:
      task: task, loaded or abstract.
      v: trained vector, or its shape.
      prompts: number of prompts.
      width: padded length of the prompts.
      sampling: sampling settings.
      samples: number of completions per prompt.
      key: PRNG key of the sampling noise, or its shape; None for a single key.
    """
    key = abstract_everywhere(jax.eval_shape(lambda: jax.random.key(0))) if key is None else key
    arrays = PromptArrays(
        np.zeros(prompts, np.uint32), np.zeros((prompts, width), np.int32), np.ones(prompts, np.int32)
    )
    return rl.lower_rollout(task.model, task.policy, v, arrays, key, sampling, samples, task.slots)


def readable_page(prompts: Sequence[Prompt], graded: rl.GradedRollout, kept: int) -> str:
    """Formats the first `kept` prompts of a rollout, with all their completions and grades, for reading."""
    lines = []
    for place, prompt in enumerate(prompts[:kept]):
        lines.append(f"=== question {prompt.id}: {prompt.question}\n=== answer: {prompt.answer}\n")
        for index in range(place * graded.samples, (place + 1) * graded.samples):
            grade = graded.grades[index]
            parts = "".join(f", {name} {part:g}" for name, part in zip(graded.weights, grade.parts, strict=True))
            lines.append(f"--- strict {grade.strict:g}, lenient {grade.lenient:g}{parts}\n{graded.texts[index]}\n")
    return "\n".join(lines)
