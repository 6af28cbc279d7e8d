"""Rollouts: completions of a batch of prompts, and their grades."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.data import Prompt, PromptArrays, pad_prompts
from tinylora_jax.models import ModelConfig
from tinylora_jax.multihost import collect, share, to_host
from tinylora_jax.rewards import Grade, Reward, grade_batch
from tinylora_jax.rollout import Completions, Sampling, generate


@runtime_checkable
class Decoder(Protocol):
    """The one method of a tokenizer that grading needs."""

    def decode(self, token_ids: np.ndarray, /, *, skip_special_tokens: bool) -> Any: ...


@partial(jax.jit, static_argnames=("config", "sampling", "samples", "slots"))
def _generate(
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


lower_rollout = _generate.lower
"""The program of `rollout`, lowered: of (config, policy, v, prompt arrays, key, sampling, samples, slots)."""


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch of prompts, prompt-major: rows `p * samples … (p + 1) * samples - 1` belong to prompt p.

    Attributes:
      prompts: prompts with their questions and gold answers.
      arrays: padded prompts.
      completions: generated tokens, as NumPy arrays.
      seconds: wall time of generation.
    """

    prompts: tuple[Prompt, ...]
    arrays: PromptArrays
    completions: Completions
    seconds: float

    @property
    def samples(self) -> int:
        """Completions of each prompt."""
        return len(self.completions.lengths) // len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""
        return int(self.completions.lengths.sum())

    def part(self, first: int, count: int) -> Rollout:
        """The rollout of `count` of the prompts from the first one given on.

        Seconds and decoding steps are divided in proportion to tokens, because the prompts shared the slots.
        """
        prompts = slice(first, first + count)
        rows = slice(first * self.samples, (first + count) * self.samples)
        own = {name: getattr(self.completions, name)[rows] for name in ("tokens", "logprobs", "lengths", "stopped")}
        portion = float(own["lengths"].sum()) / max(1, self.num_tokens)
        steps: Any = np.maximum(1, np.round(self.completions.slot_steps * portion)).astype(np.int32)
        arrays = PromptArrays(*(x[prompts] for x in self.arrays))
        return Rollout(self.prompts[prompts], arrays, Completions(**own, slot_steps=steps), self.seconds * portion)


@dataclass(frozen=True)
class GradedRollout(Rollout):
    """A rollout with texts and grades.

    Attributes:
      texts: completions decoded without special tokens.
      grades: one grade per completion.
      grading_seconds: wall time of decoding and grading.
    """

    texts: tuple[str, ...]
    grades: tuple[Grade, ...]
    grading_seconds: float

    def rewards(self, which: str = "strict") -> Float[np.ndarray, "prompts samples"]:
        """Grades of all completions as float32, `strict` or `lenient`."""
        return np.array([getattr(grade, which) for grade in self.grades], np.float32).reshape(-1, self.samples)


def rollout(
    config: ModelConfig,
    policy: Adapted,
    v: Trained,
    prompts: Sequence[Prompt],
    key: jax.Array,
    sampling: Sampling,
    samples: int = 1,
    width: int | None = None,
    slots: int = 0,
) -> Rollout:
    """Generates `samples` completions of every prompt.

    Args:
      config: architecture of the model.
      policy: frozen weights and what adapts them.
      v: trained vector, or a leading axis with one for every prompt.
      prompts: encoded prompts.
      key: key of the sampling noise, or one key for every prompt.
      sampling: how tokens are picked.
      samples: completions per prompt.
      width: padded length of the prompts, so that every batch runs the same program; None for the longest of them.
      slots: completions decoded at once; 0 for all.

    Returns:
      The completions, on the host.
    """
    arrays = pad_prompts(prompts, width)
    started = time.perf_counter()
    completions = to_host(_generate(config, policy, v, arrays, key, sampling, samples, slots))
    return Rollout(tuple(prompts), arrays, completions, time.perf_counter() - started)


def grade(drawn: Rollout, reward: Reward, tokenizer: Decoder) -> GradedRollout:
    """Decodes and grades the completions; no device has a part in it.

    Args:
      drawn: completions to grade.
      reward: reward, see `load_reward`.
      tokenizer: tokenizer of the model.

    Returns:
      The rollout with texts and grades.
    """
    started = time.perf_counter()
    completions = drawn.completions
    texts = tuple(
        tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(completions.tokens, completions.lengths, strict=True)
    )
    own = share(len(texts))  # grading may be slow, so every process grades its part
    grades = grade_batch(reward, [texts[i] for i in own], [drawn.prompts[i // drawn.samples] for i in own])
    everyone = tuple(Grade(*fields) for fields in collect([dataclasses.astuple(grade) for grade in grades]))
    fields = {field.name: getattr(drawn, field.name) for field in dataclasses.fields(Rollout)}
    return GradedRollout(**fields, texts=texts, grades=everyone, grading_seconds=time.perf_counter() - started)


def step_key(seed: int, purpose: str, step: int) -> jax.Array:
    """The key of one step's sampling noise: no two steps, and no two purposes, share it.

    Args:
      seed: seed of the run.
      purpose: `train` or `eval`.
      step: index of the step.

    Returns:
      A typed PRNG key.
    """
    purposes = ("train", "eval")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purposes.index(purpose)), jnp.uint32(step))
