"""Rollouts: completions for a batch of prompts, and their grades."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
from tinylora_jax.rewards import Grade, Reward, WeightedRewards, grade_batch
from tinylora_jax.rollout import Completions, Sampling, generate


@runtime_checkable
class Decoder(Protocol):
    """A tokenizer with the one method that grading needs."""

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
"""Lowers the program of `rollout`; takes (config, policy, v, prompt arrays, key, sampling, samples, slots)."""


@dataclass(frozen=True)
class Rollout:
    """Completions for a batch of prompts; rows `p * samples … (p + 1) * samples - 1` belong to prompt p.

    Attributes:
      prompts: prompts with their questions and gold answers.
      arrays: padded prompts as NumPy arrays.
      completions: generated tokens as NumPy arrays.
      seconds: wall-clock time of generation, in seconds.
    """

    prompts: tuple[Prompt, ...]
    arrays: PromptArrays
    completions: Completions
    seconds: float

    @property
    def samples(self) -> int:
        """Number of completions per prompt."""
        return len(self.completions.lengths) // len(self.prompts)

    @property
    def num_tokens(self) -> int:
        """Number of generated tokens."""
        return int(self.completions.lengths.sum())

    def part(self, first: int, count: int) -> Rollout:
        """The part of the rollout for `count` prompts, starting at index `first`.

        Seconds and decoding steps are divided in proportion to tokens, because all prompts shared the slots.
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
    """A rollout with decoded texts and grades.

    Attributes:
      texts: completions, decoded without special tokens.
      grades: grade of each completion.
      grading_seconds: wall-clock time of decoding and grading, in seconds.
      weights: weights of several rewards, by name; empty for one reward.
    """

    texts: tuple[str, ...]
    grades: tuple[Grade, ...]
    grading_seconds: float
    weights: Mapping[str, float] = field(default_factory=dict)

    def rewards(self, which: str = "") -> Float[np.ndarray, "prompts samples"]:
        """The rewards of all completions, float32 `[prompts, samples]`.

        Args:
          which: `strict` or `lenient` for these grades. By default the rewards of training: the strict grades, or the
            weighted sum of several rewards.
        """
        if not which and self.weights:
            weighted = zip(self.weights.values(), self.part_rewards(), strict=True)
            return sum(np.float32(weight) * part for weight, part in weighted)
        grades = [getattr(grade, which or "strict") for grade in self.grades]
        return np.array(grades, np.float32).reshape(-1, self.samples)

    def num_right(self) -> list[int]:
        """Number of right completions of each prompt: those whose strict grade is more than one half."""
        return (self.rewards("strict") > 0.5).sum(axis=1).tolist()

    def groups(self, places: Sequence[int]) -> GradedRollout:
        """The groups at some places, as a rollout of their own; it keeps the seconds and decoding steps of the whole.

        Only the seconds of grading are divided, in proportion to the groups.
        """
        rows = [place * self.samples + sample for place in places for sample in range(self.samples)]
        own = {name: getattr(self.completions, name)[rows] for name in ("tokens", "logprobs", "lengths", "stopped")}
        return dataclasses.replace(
            self,
            prompts=tuple(self.prompts[place] for place in places),
            arrays=PromptArrays(*(x[list(places)] for x in self.arrays)),
            completions=dataclasses.replace(self.completions, **own),
            texts=tuple(self.texts[row] for row in rows),
            grades=tuple(self.grades[row] for row in rows),
            grading_seconds=self.grading_seconds * len(places) / len(self.prompts),
        )

    def part_rewards(self) -> Float[np.ndarray, "parts prompts samples"]:
        """The strict grades by each of several rewards, or by the one, float32 `[parts, prompts, samples]`."""
        values = [grade.parts if self.weights else (grade.strict,) for grade in self.grades]
        parts = np.array(values, np.float32)
        return np.moveaxis(parts.reshape(-1, self.samples, parts.shape[1]), 2, 0)


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
    """Generates `samples` completions for every prompt.

    Args:
      config: architecture of the model.
      policy: frozen weights and the adapter's structure.
      v: trained parameters, optionally with a leading axis of one entry per prompt.
      prompts: encoded prompts.
      key: PRNG key of the sampling noise, or one key per prompt.
      sampling: sampling settings.
      samples: number of completions per prompt.
      width: padded prompt length in tokens, so that every batch runs the same program; None uses the longest prompt.
      slots: number of completions decoded at once; 0 for all.

    Returns:
      The completions, on the host.
    """
    arrays = pad_prompts(prompts, width)
    started = time.perf_counter()
    completions = to_host(_generate(config, policy, v, arrays, key, sampling, samples, slots))
    return Rollout(tuple(prompts), arrays, completions, time.perf_counter() - started)


def grade(drawn: Rollout, reward: Reward, tokenizer: Decoder) -> GradedRollout:
    """Decodes and grades the completions on the host.

    Args:
      drawn: rollout to grade.
      reward: reward function, see `load_reward`.
      tokenizer: tokenizer of the model.

    Returns:
      The rollout with decoded texts and grades.
    """
    started = time.perf_counter()
    completions = drawn.completions
    texts = tuple(
        tokenizer.decode(row[:length], skip_special_tokens=True)
        for row, length in zip(completions.tokens, completions.lengths, strict=True)
    )
    # Grading may be slow, so each process grades its share. A group stays together: a reward may see all of it.
    own = [prompt * drawn.samples + sample for prompt in share(len(drawn.prompts)) for sample in range(drawn.samples)]
    prompts = [drawn.prompts[index // drawn.samples] for index in own]
    grades = grade_batch(reward, [texts[index] for index in own], prompts, drawn.samples)
    gathered = collect([dataclasses.astuple(grade) for grade in grades])
    everyone = tuple(Grade(strict, lenient, found, tuple(parts)) for strict, lenient, found, parts in gathered)
    weights = reward.weights if isinstance(reward, WeightedRewards) else {}
    fields = {field.name: getattr(drawn, field.name) for field in dataclasses.fields(Rollout)}
    seconds = time.perf_counter() - started
    return GradedRollout(**fields, texts=texts, grades=everyone, grading_seconds=seconds, weights=weights)


def step_key(seed: int, purpose: str, step: int) -> jax.Array:
    """Derives the key of one step's noise; it differs between steps and purposes.

    Args:
      seed: seed of the run.
      purpose: use of the noise: `train`, `eval` or `search`.
      step: index of the step.

    Returns:
      A typed PRNG key.
    """
    purposes = ("train", "eval", "search")
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purposes.index(purpose)), jnp.uint32(step))
