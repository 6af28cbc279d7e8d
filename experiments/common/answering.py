"""Answering prompts with an adapted model, and grading the answers: the part that training and evaluation share."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.multihost import collect, share
from experiments.common.setup import Task
from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.data import Prompt, PromptArrays, pad_prompts
from tinylora_jax.fetch import fetch
from tinylora_jax.models import ModelConfig, outline_everywhere
from tinylora_jax.rewards import Grade, grade_batch
from tinylora_jax.rollout import Completions, Sampling, generate


@partial(jax.jit, static_argnames=("config", "sampling", "samples", "slots"))
def _rollout(
    config: ModelConfig,
    policy: Adapted,
    v: Trained,
    prompts: PromptArrays,
    key: jax.Array,
    sampling: Sampling,
    samples: int,
    slots: int,
) -> Completions:
    return generate(config, policy(v), *prompts, key, sampling, samples, slots)


lower_rollout = _rollout.lower
"""The rollout of these arguments, lowered but not run."""


@dataclass(frozen=True)
class Drawn:
    """Completions of a batch of prompts, prompt-major.

    Attributes:
      arrays: the padded prompts.
      completions: what was generated, as NumPy arrays.
      seconds: spent generating.
    """

    arrays: PromptArrays
    completions: Completions
    seconds: float

    def part(self, first: int, prompts: int, samples: int) -> Drawn:
        """Those of `prompts` of the prompts from the first one given on; the time is the share of their tokens.

        Slots belong to all of them together: what is said of their use is said of the whole.
        """
        rows = slice(first * samples, (first + prompts) * samples)
        arrays = PromptArrays(*(x[first : first + prompts] for x in self.arrays))
        own = {name: getattr(self.completions, name)[rows] for name in ("tokens", "logprobs", "lengths", "stopped")}
        share = float(own["lengths"].sum()) / max(1, self.num_tokens)
        steps = np.maximum(1, np.round(self.completions.slot_steps * share)).astype(np.int32)
        return Drawn(arrays, Completions(**own, slot_steps=steps), self.seconds * share)

    @property
    def num_tokens(self) -> int:
        """Tokens generated."""
        return int(self.completions.lengths.sum())


@dataclass(frozen=True)
class Answers(Drawn):
    """Completions with their texts and grades.

    Attributes:
      texts: decoded without special tokens.
      grades: one per completion.
      grading_seconds: spent decoding and grading.
    """

    texts: tuple[str, ...]
    grades: tuple[Grade, ...]
    grading_seconds: float


def lower_answer(
    task: Task,
    v: Trained,
    prompts: int,
    width: int,
    sampling: Sampling,
    samples: int = 1,
    key: jax.Array | jax.ShapeDtypeStruct | None = None,
) -> jax.stages.Lowered:
    """The program with which `answer` answers so many prompts, to be compiled before it is needed."""
    key = outline_everywhere(jax.eval_shape(lambda: jax.random.key(0))) if key is None else key
    arrays = PromptArrays(
        np.zeros(prompts, np.uint32), np.zeros((prompts, width), np.int32), np.ones(prompts, np.int32)
    )
    return _rollout.lower(task.model, task.policy, v, arrays, key, sampling, samples, task.slots)


def draw(
    task: Task,
    v: Trained,
    prompts: Sequence[Prompt],
    key: jax.Array,
    sampling: Sampling,
    samples: int = 1,
    width: int | None = None,
) -> Drawn:
    """Generates `samples` completions of every prompt.

    Args:
      task: the model.
      v: what was trained.
      prompts: the questions.
      key: of the sampling noise, or one for every prompt.
      sampling: how completions are drawn.
      samples: completions per prompt.
      width: padded length of the prompts, so that every batch runs the same program.
    """
    arrays = pad_prompts(prompts, width)
    started = time.perf_counter()
    completions = fetch(_rollout(task.model, task.policy, v, arrays, key, sampling, samples, task.slots))
    return Drawn(arrays, completions, time.perf_counter() - started)


def grade(task: Task, drawn: Drawn, prompts: Sequence[Prompt], samples: int) -> Answers:
    """Decodes and grades the completions of these prompts, `samples` of each; no device has a part in it."""
    started = time.perf_counter()
    completions = drawn.completions
    texts = tuple(
        task.tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(completions.tokens, completions.lengths, strict=True)
    )
    own = share(len(texts))  # grading may be slow: a process does it for its part
    grades = grade_batch(task.reward, [texts[i] for i in own], [prompts[i // samples] for i in own])
    grades = tuple(Grade(*fields) for fields in collect([dataclasses.astuple(grade) for grade in grades]))
    return Answers(drawn.arrays, completions, drawn.seconds, texts, grades, time.perf_counter() - started)


def answer(
    task: Task,
    v: Trained,
    prompts: Sequence[Prompt],
    key: jax.Array,
    sampling: Sampling,
    samples: int = 1,
    width: int | None = None,
) -> Answers:
    """`draw`, then `grade`."""
    return grade(task, draw(task, v, prompts, key, sampling, samples, width), prompts, samples)


def grades_of(answers: Answers, which: str) -> np.ndarray:
    """One grade of every completion, `strict` or `lenient`, as float32."""
    return np.array([getattr(grade, which) for grade in answers.grades], np.float32)


def step_key(seed: int, purpose: str, step: int) -> jax.Array:
    """The key of one step's sampling noise: no two steps, and no two purposes, share it."""
    purposes = ("train", "eval")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purposes.index(purpose)), jnp.uint32(step))
