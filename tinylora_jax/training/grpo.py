"""GRPO: its settings, and the loss of a microbatch at v."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import Adapted
from tinylora_jax.adapters.policy import Trained
from tinylora_jax.models import ModelConfig
from tinylora_jax.models.sharding import split_microbatch
from tinylora_jax.training.batch import Batch, Microbatch, SequenceShape, pack, unpack
from tinylora_jax.training.logprobs import packed_logprobs
from tinylora_jax.training.losses import clipped_surrogate, importance_weights, k3

Metrics = dict[str, Float[Array, ""]]
SUMS = ("tokens", "kl", "entropy", "clip_low", "clip_high", "delta_prob", "importance")


@dataclass(frozen=True)
class GRPO:
    """Settings of the GRPO algorithm.

    Attributes:
      loss_type: averaging of the loss: `grpo`, `dapo` or `dr_grpo`; see `losses.token_weights`.
      normalize_std: whether to divide a group's advantages by their standard deviation.
      clip_low: distance of the ratio's lower bound from 1.
      clip_high: distance of the ratio's upper bound from 1.
      kl_coef: coefficient of the KL divergence from the untrained model.
      tis_cap: cap of truncated importance sampling; 0 turns it off.
      updates_per_rollout: number of optimizer updates per rollout.
      stream_tokens: number of tokens in a packed sequence, which are differentiated at once.
      remat: recomputation of activations in the backward pass: `on`, `off`, or `auto` to recompute only if they would
        not fit in memory (`plan_update`).
      skip_without_signal: whether to skip groups with equal rewards, whose gradient is zero unless there is a KL term.
        Metrics over tokens (entropy, delta_prob, …) then cover only the other groups, unless there are none.
    """

    loss_type: str = "grpo"
    normalize_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    tis_cap: float = 2.0
    updates_per_rollout: int = 1
    stream_tokens: int = 8192
    remat: str = "auto"
    skip_without_signal: bool = True

    def __post_init__(self):
        if self.loss_type not in ("grpo", "dapo", "dr_grpo"):
            raise ValueError(f"GRPO: loss_type {self.loss_type!r}: expected 'grpo', 'dapo' or 'dr_grpo'")
        for name in ("clip_low", "clip_high", "kl_coef", "tis_cap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"GRPO: {name} must be finite and >= 0, got {value}")
        if self.updates_per_rollout < 1:
            raise ValueError(f"GRPO: updates_per_rollout must be >= 1, got {self.updates_per_rollout}")
        if self.stream_tokens < 1:
            raise ValueError(f"GRPO: stream_tokens must be >= 1, got {self.stream_tokens}")
        if self.remat not in ("auto", "on", "off"):
            raise ValueError(f"GRPO: remat {self.remat!r}: expected 'auto', 'on' or 'off'")


@dataclass(frozen=True)
class Plan:
    """Static sizes and settings for which a run's programs are compiled.

    Attributes:
      config: architecture of the model.
      grpo: GRPO settings.
      temperature: sampling temperature of the policy.
      max_tokens: longest allowed completion, in tokens (`dr_grpo`).
      shapes: shapes of the packed sequences; see `sequence_shapes`.
      sequences: number of sequences differentiated at once.
      remat: whether the activations of a block are recomputed in the backward pass.
    """

    config: ModelConfig
    grpo: GRPO
    temperature: float
    max_tokens: int
    shapes: tuple[SequenceShape, ...]
    sequences: int = 1
    remat: bool = False


@partial(jax.jit, static_argnames=("config", "temperature"))
def _score(config: ModelConfig, policy: Adapted, v: Trained, batch: Microbatch, temperature: float) -> jax.Array:
    batch = split_microbatch(batch)
    return packed_logprobs(config, policy(v), batch.tokens, batch.packing, batch.source >= 0, temperature)[0]


def score(plan: Plan, policy: Adapted, v: Trained, batch: Batch) -> np.ndarray:
    """Computes log-probabilities of a batch's completions at v (for the reference policy, `policy.init()`).

    Args:
      plan: static sizes and settings of the run.
      policy: frozen weights and the adapter's structure.
      v: trained parameters.
      batch: rollout to score; its rewards and advantages are not used.

    Returns:
      Log-probabilities, float32 `[N, G, T]`; 0 outside the mask.
    """
    microbatches = list(pack(batch, np.zeros(batch.mask.shape, np.float32), plan.shapes, plan.sequences))
    return unpack(
        microbatches,
        [_score(plan.config, policy, v, microbatch, plan.temperature) for microbatch in microbatches],
        batch,
    )


def policy_logprobs(v: Trained, plan: Plan, policy: Adapted, batch: Microbatch) -> tuple[jax.Array, jax.Array]:
    """Computes `packed_logprobs` of a microbatch at v for the tokens in the mask, with or without remat.

    Args:
      v: trained parameters, optionally with a leading axis of one entry per sequence.
      plan: static sizes and settings.
      policy: frozen weights and the adapter's structure.
      batch: packed microbatch.

    Returns:
      Log-probabilities and entropies, float32 in the shape of the mask; undefined outside it.
    """
    return packed_logprobs(
        plan.config,
        policy(v),
        batch.tokens,
        batch.packing,
        batch.mask,
        plan.temperature,
        plan.remat,
        policy.trains_head,
    )


def grpo_loss(v: Trained, plan: Plan, policy: Adapted, batch: Microbatch) -> tuple[Float[Array, ""], Metrics]:
    """Computes Σ weight · (importance · surrogate + β · k3) over tokens, and sums of metrics over tokens.

    Args:
      v: trained parameters, the only differentiated argument; optionally with a leading axis of one entry per sequence.
      plan: static sizes and settings.
      policy: frozen weights and the adapter's structure.
      batch: packed microbatch of a rollout.

    Returns:
      The loss, and the sum of each metric over the tokens in the mask.
    """
    grpo = plan.grpo
    logprobs, entropy = policy_logprobs(v, plan, policy, batch)
    # Entries outside the mask are undefined: zero them before exp(), so that they cannot overflow.
    quiet = lambda x: jnp.where(batch.mask, x, 0.0)
    logprobs = quiet(logprobs)
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else quiet(batch.old_logprobs)
    rollout = quiet(batch.rollout_logprobs)
    importance = importance_weights(old, rollout, grpo.tis_cap)
    surrogate, low, high = clipped_surrogate(logprobs, old, batch.advantages, grpo.clip_low, grpo.clip_high)
    loss = importance * surrogate
    kl = jnp.zeros_like(loss)
    if batch.ref_logprobs is not None:
        kl = k3(logprobs, quiet(batch.ref_logprobs))
        loss = loss + grpo.kl_coef * kl
    per_token = {
        "tokens": jnp.ones_like(loss),
        "kl": kl,
        "entropy": entropy,
        "clip_low": low,
        "clip_high": high,
        "delta_prob": jnp.abs(jnp.exp(old) - jnp.exp(rollout)),
        "importance": importance,
    }
    sums = {name: jnp.sum(quiet(x.astype(jnp.float32))) for name, x in per_token.items()}
    return jnp.sum(batch.weights * loss), sums
