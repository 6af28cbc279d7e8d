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
from tinylora_jax.models.packing import row_sums
from tinylora_jax.models.sharding import split_microbatch
from tinylora_jax.training.batch import Batch, Microbatch, SequenceShape, pack, unpack
from tinylora_jax.training.logprobs import packed_logprobs
from tinylora_jax.training.losses import (
    LOSS_TYPES,
    cispo,
    clipped_surrogate,
    importance_weights,
    k3,
    sequence_log_ratio,
)

Metrics = dict[str, Float[Array, ""]]
_CHOICES = {
    "loss_type": LOSS_TYPES,
    "importance_sampling_level": ("token", "sequence"),
    "tis_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "remat": ("auto", "on", "off"),
}
SUMS = ("tokens", "kl", "entropy", "clip_low", "clip_high", "delta_prob", "importance")


@dataclass(frozen=True)
class GRPO:
    """Settings of the GRPO algorithm and its variants; `experiments/README.md` has a table of them.

    Attributes:
      loss_type: averaging of the loss, see `losses.token_weights`; `cispo` also replaces the clipped surrogate. TRL's
        `bnpo` is `dapo` here, because weights cover the whole batch.
      importance_sampling_level: ratio that is clipped: that of each `token`, or of the `sequence` (GSPO, which needs
        `loss_type="grpo"` and far smaller bounds, such as 3e-4 and 4e-4).
      normalize_std: whether to divide a group's advantages by their standard deviation.
      multi_objective_aggregation: advantages of several rewards: those of the weighted sum (`sum_then_normalize`), or
        the weighted sum of each reward's own advantages (`normalize_then_sum`, GDPO); see `decoupled_advantages`.
      clip_low: distance of the ratio's lower bound from 1.
      clip_high: distance of the ratio's upper bound from 1.
      kl_coef: coefficient of the KL divergence from the untrained model.
      tis_cap: cap of truncated importance sampling; 0 turns it off.
      tis_mode: ratio that `tis_cap` bounds, that of each `token` or of the `sequence`, followed by the treatment of
        larger ones: `_truncate` lowers them to the cap, `_mask` drops them; see `losses.importance_weights`.
      mask_truncated_completions: whether to ignore the tokens of completions that were cut off before a stop token.
        Their rewards still count in their group. Metrics over tokens leave them out too, and are 0 if all were cut off.
      updates_per_rollout: number of optimizer updates per rollout.
      stream_tokens: number of tokens in a packed sequence, which are differentiated at once.
      remat: recomputation of activations in the backward pass: `on`, `off`, or `auto` to recompute only if they would
        not fit in memory (`plan_update`).
      skip_without_signal: whether to skip groups with equal rewards, whose gradient is zero unless there is a KL term.
        Metrics over tokens (entropy, delta_prob, …) then cover only the other groups, unless there are none.
    """

    loss_type: str = "grpo"
    importance_sampling_level: str = "token"
    normalize_std: bool = True
    multi_objective_aggregation: str = "sum_then_normalize"
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    tis_cap: float = 2.0
    tis_mode: str = "token_truncate"
    mask_truncated_completions: bool = False
    updates_per_rollout: int = 1
    stream_tokens: int = 8192
    remat: str = "auto"
    skip_without_signal: bool = True

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                expected = " or ".join(map(repr, known))
                raise ValueError(f"GRPO: {name} {getattr(self, name)!r}: expected {expected}")
        if self.multi_objective_aggregation == "normalize_then_sum" and not self.normalize_std:
            raise ValueError(
                "GRPO: multi_objective_aggregation 'normalize_then_sum' divides by standard deviations, but"
                " normalize_std is False; set it to True"
            )
        for name in ("clip_low", "clip_high", "kl_coef", "tis_cap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"GRPO: {name} must be finite and >= 0, got {value}")
        if self.updates_per_rollout < 1:
            raise ValueError(f"GRPO: updates_per_rollout must be >= 1, got {self.updates_per_rollout}")
        if self.stream_tokens < 1:
            raise ValueError(f"GRPO: stream_tokens must be >= 1, got {self.stream_tokens}")


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
      prompts: number of prompts of a rollout, for gradients by prompt; 0 if it is unknown.
    """

    config: ModelConfig
    grpo: GRPO
    temperature: float
    max_tokens: int
    shapes: tuple[SequenceShape, ...]
    sequences: int = 1
    remat: bool = False
    prompts: int = 0


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
    return loss_of_logprobs(plan.grpo, *policy_logprobs(v, plan, policy, batch), batch)


def loss_of_logprobs(
    grpo: GRPO,
    logprobs: Float[Array, "sequences tokens"],
    entropy: Float[Array, "sequences tokens"],
    batch: Microbatch,
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the result of `grpo_loss` from `policy_logprobs`.

    Args:
      grpo: GRPO settings.
      logprobs: log-probabilities of the tokens, float32 `[B, T]`; undefined outside the mask.
      entropy: entropies of the policy at the tokens, float32 `[B, T]`; undefined outside the mask.
      batch: packed microbatch of a rollout.
    """
    # Entries outside the mask are undefined: zero them before exp(), so that they cannot overflow.
    quiet = lambda x: jnp.where(batch.mask, x, 0.0)
    total = lambda x: row_sums(x, batch.packing)
    logprobs = quiet(logprobs)
    old = jax.lax.stop_gradient(logprobs) if batch.old_logprobs is None else quiet(batch.old_logprobs)
    rollout = quiet(batch.rollout_logprobs)
    if grpo.tis_cap:
        importance = importance_weights(old - rollout, grpo.tis_cap, grpo.tis_mode, total)
    else:
        importance = jnp.ones_like(old)
    log_ratio = logprobs - old
    if grpo.importance_sampling_level == "sequence":
        log_ratio = sequence_log_ratio(log_ratio, batch.mask, total)
    if grpo.loss_type == "cispo":
        surrogate, low, high = cispo(logprobs, log_ratio, batch.advantages, grpo.clip_high)
    else:
        surrogate, low, high = clipped_surrogate(log_ratio, batch.advantages, grpo.clip_low, grpo.clip_high)
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
