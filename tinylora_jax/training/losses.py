"""GRPO and its variants as functions of arrays: advantages, surrogates, KL, and loss averaging.

Notation: N prompts, G samples per prompt, T tokens; π is the current policy, π_old the policy at the start of the
update, π_rollout the policy that generated the completions, and π_ref the untrained model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Tokens = Float[Array, "*tokens"]
Mask = Bool[Array, "*tokens"]
RolloutMask = Bool[Array, "prompts samples seq"] | Bool[np.ndarray, "prompts samples seq"]
RolloutFloats = Float[Array, "prompts samples seq"] | Float[np.ndarray, "prompts samples seq"]
Groups = Float[Array, "prompts samples"] | Float[np.ndarray, "prompts samples"]
Total = Callable[[Array], Array]
"""Gives every token the sum over its completion; how depends on the layout of the tokens."""

LOSS_TYPES = ("grpo", "dapo", "dr_grpo", "luspo", "cispo")
"""The averages of `token_weights`; `cispo` also replaces the clipped surrogate."""


def group_advantages(rewards: Groups, normalize_std: bool = True, epsilon: float = 1e-4) -> Groups:
    """Computes Âᵢ = rᵢ − mean(r), optionally divided by std(r) + ε (arXiv 2402.03300 eq. 3; not in Dr. GRPO).

    The standard deviation has Bessel's correction, as in TRL and verl.

    Args:
      rewards: rewards, float32 `[prompts, samples]`, with at least 2 samples.
      normalize_std: whether to divide by the standard deviation.
      epsilon: ε, added to the standard deviation.

    Returns:
      Advantages, float32 `[prompts, samples]`; zero if all rewards of a prompt are equal. For a host array they are
      computed on the host, without waiting for a device.

    >>> import jax.numpy as jnp
    >>> group_advantages(jnp.array([[1.0, 0.0, 0.0, 1.0]]), normalize_std=False).tolist()
    [[0.5, -0.5, -0.5, 0.5]]
    """
    # The mean of equal rewards is rounded, and would leave a tiny advantage of random sign.
    differ = (rewards != rewards[:, :1]).any(axis=1, keepdims=True).astype(rewards.dtype)
    centred = (rewards - rewards.mean(axis=1, keepdims=True)) * differ
    if not normalize_std:
        return centred
    return centred / (rewards.std(axis=1, keepdims=True, ddof=1) + epsilon)


def decoupled_advantages(
    rewards: Float[np.ndarray, "parts prompts samples"], weights: Sequence[float], epsilon: float = 1e-4
) -> Float[np.ndarray, "prompts samples"]:
    """Computes Â = a / (std(a) + ε) with a = Σₖ wₖ Âₖ: each reward is normalized by itself (GDPO, arXiv 2601.05242).

    A sum of rewards lets the one with the largest spread hide the others. Here every reward k gets its own group
    advantages Âₖ, and the outer standard deviation is that of the whole batch.

    Args:
      rewards: rewards of each kind, float32 `[parts, prompts, samples]`.
      weights: weight wₖ of each kind of reward.
      epsilon: ε, added to both standard deviations.

    Returns:
      Advantages, float32 `[prompts, samples]`; zero where all rewards of a prompt are equal.
    """
    total = np.zeros(rewards.shape[1:], np.float32)
    for weight, part in zip(weights, rewards, strict=True):
        total += np.float32(weight) * np.asarray(group_advantages(part, True, epsilon))
    return total / (np.std(total, ddof=1) + np.float32(epsilon))  # the mean of the batch is zero


def importance_weights(log_ratio: Tokens, cap: float, mode: str, total: Total) -> Tokens:
    """Computes importance weights c = π_old / π_rollout, bounded by a cap (truncated importance sampling).

    `token_truncate` gives min(cₜ, cap), and `token_mask` gives cₜ, or 0 above the cap. `sequence_truncate` and
    `sequence_mask` do so with the ratio of the whole completion, c = ∏ₜ cₜ.

    Args:
      log_ratio: ln π_old − ln π_rollout of each token, float32; 0 for tokens that do not count.
      cap: largest weight, > 0.
      mode: one of the four modes.
      total: function that gives every token the sum over its completion.

    Returns:
      The weight of each token, float32.
    """
    level, _, bound = mode.partition("_")
    ratio = jnp.exp(total(log_ratio) if level == "sequence" else log_ratio)
    if bound == "mask":
        return jnp.where(ratio > cap, 0.0, ratio)
    return jnp.minimum(ratio, cap)


def sequence_log_ratio(log_ratio: Tokens, mask: Mask, total: Total) -> Tokens:
    """Computes ln s = (1/|o|) Σₜ ln ρₜ, the log-ratio of a completion o per token (GSPO, arXiv 2507.18071).

    Args:
      log_ratio: ln ρ = ln π − ln π_old of each token, float32.
      mask: True for the tokens to train on, bool.
      total: function that gives every token the sum over its completion.

    Returns:
      ln s of each token's completion, float32. Its gradient reaches all tokens of the completion.
    """
    return total(jnp.where(mask, log_ratio, 0.0)) / jnp.maximum(total(mask.astype(jnp.float32)), 1.0)


def clipped_surrogate(
    log_ratio: Tokens, advantages: Float[Array, "*#tokens"], clip_low: float, clip_high: float
) -> tuple[Tokens, Mask, Mask]:
    """Computes −min(ρ Â, clip(ρ, 1 − low, 1 + high) Â) with ρ = π / π_old (arXiv 2402.03300 eq. 3).

    Args:
      log_ratio: ln ρ of each token, float32; or ln s of its completion (GSPO).
      advantages: Â of each token's completion, float32.
      clip_low: distance of the lower bound from 1.
      clip_high: distance of the upper bound from 1.

    Returns:
      The loss of each token, and masks of the tokens where the lower and the upper bound were active.
    """
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    return loss, (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def cispo(
    logprobs: Tokens, log_ratio: Tokens, advantages: Float[Array, "*#tokens"], clip_high: float
) -> tuple[Tokens, Mask, Mask]:
    """Computes −sg(min(ρ, 1 + high)) Â ln π; sg stops the gradient (CISPO, arXiv 2506.13585).

    The weight of a token is clipped, not its gradient: tokens beyond the bound still learn. As in the paper's
    experiments there is no lower bound.

    Args:
      logprobs: ln π of each token, float32.
      log_ratio: ln ρ of each token, float32.
      advantages: Â of each token's completion, float32.
      clip_high: distance of the upper bound from 1.

    Returns:
      The loss of each token, and masks of the tokens where a lower (none) and the upper bound were active.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
    high = ratio > 1 + clip_high
    return -jnp.minimum(ratio, 1 + clip_high) * advantages * logprobs, jnp.zeros_like(high), high


def k3(logprobs: Tokens, ref_logprobs: Tokens) -> Tokens:
    """Schulman's estimator of KL(π ‖ π_ref): π_ref/π − ln(π_ref/π) − 1 ≥ 0 (arXiv 2402.03300 eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return jnp.exp(log_ratio) - log_ratio - 1


def token_weights(mask: RolloutMask, loss_type: str, max_tokens: int) -> RolloutFloats:
    """Computes the weight of each token in the loss of the batch.

    `grpo` averages within each completion, then over completions. `dapo` and `cispo` average over all tokens (arXiv
    2503.14476). `dr_grpo` divides the sum by completions × `max_tokens`, a constant, which removes the length bias
    (arXiv 2503.20783). `luspo` divides the sum by completions alone, and is meant for sequence-level ratios (arXiv
    2602.05261).

    Args:
      mask: True for tokens of completions, bool `[prompts, samples, seq]`.
      loss_type: one of `LOSS_TYPES`.
      max_tokens: longest allowed completion, in tokens (`dr_grpo`).

    Returns:
      Weights, float32 in the shape of the mask, zero where it is False; computed on the host for a host array.
    """
    weight = mask.astype(jnp.float32)
    completions = mask.shape[0] * mask.shape[1]
    if loss_type == "grpo":
        return weight / weight.sum(-1, keepdims=True).clip(min=1) / completions
    if loss_type in ("dapo", "cispo"):
        return weight / weight.sum().clip(min=1)
    if loss_type == "dr_grpo":
        return weight / (completions * max_tokens)
    if loss_type == "luspo":
        return weight / completions
    raise ValueError(f"loss type {loss_type!r}: expected {' or '.join(map(repr, LOSS_TYPES))}")
