"""Supervised fine-tuning: next-token loss on worked solutions."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import Adapted
from tinylora_jax.adapters.policy import Trained
from tinylora_jax.training.batch import Batch, Microbatch
from tinylora_jax.training.grpo import Metrics, Plan, policy_logprobs
from tinylora_jax.training.update import Objective


def sft_loss(v: Trained, plan: Plan, policy: Adapted, batch: Microbatch) -> tuple[Float[Array, ""], Metrics]:
    """Computes −Σ weight · ln π(token), and sums of metrics over tokens.

    Args:
      v: trained parameters, the only differentiated argument; optionally with a leading axis of one entry per sequence.
      plan: static sizes and settings; a temperature of 1 gives the usual loss.
      policy: frozen weights and the adapter's structure.
      batch: packed microbatch of a batch from `solutions_batch`.
    """
    logprobs, entropy = policy_logprobs(v, plan, policy, batch)
    quiet = lambda x: jnp.where(batch.mask, x, 0.0)
    sums = {"tokens": jnp.sum(quiet(jnp.ones_like(logprobs))), "entropy": jnp.sum(quiet(entropy))}
    return -jnp.sum(batch.weights * quiet(logprobs)), sums


SFT_OBJECTIVE = Objective(sft_loss, ("tokens", "entropy"))


def solutions_batch(prompts: np.ndarray, lengths: np.ndarray, solutions: Sequence[Sequence[int]], width: int) -> Batch:
    """Builds a batch of prompts with one solution each, all of whose tokens are trained on.

    Args:
      prompts: right-padded prompt tokens, int32 `[N, P]`.
      lengths: prompt lengths, int32 `[N]`.
      solutions: token ids of the N solutions.
      width: padded length of the solutions, in tokens.
    """
    completions = np.zeros((len(solutions), 1, width), np.int32)
    for row, tokens in zip(completions[:, 0], solutions, strict=True):
        row[: len(tokens)] = tokens
    counts = np.array([len(tokens) for tokens in solutions])
    mask = (np.arange(width) < counts[:, None])[:, None]
    return Batch(
        prompts=prompts,
        lengths=lengths,
        completions=completions,
        mask=mask,
        rollout_logprobs=np.zeros(mask.shape, np.float32),
        advantages=np.ones(mask.shape[:2], np.float32),
    )
