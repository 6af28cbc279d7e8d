"""GRPO as functions of arrays: advantages, the clipped surrogate, KL, and loss averaging.

Notation: N prompts, G samples per prompt, T tokens; π is the current policy, π_old the policy at the start of the
update, π_rollout the policy that generated the completions, and π_ref the untrained model.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Tokens = Float[Array, "*tokens"]
Mask = Bool[Array, "*tokens"]
RolloutMask = Bool[Array, "prompts samples seq"] | Bool[np.ndarray, "prompts samples seq"]
RolloutFloats = Float[Array, "prompts samples seq"] | Float[np.ndarray, "prompts samples seq"]
Groups = Float[Array, "prompts samples"] | Float[np.ndarray, "prompts samples"]


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
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    if not normalize_std:
        return centred
    return centred / (rewards.std(axis=1, keepdims=True, ddof=1) + epsilon)


def importance_weights(old_logprobs: Tokens, rollout_logprobs: Tokens, cap: float) -> Tokens:
    """Truncated importance weights: min(π_old / π_rollout, cap) per token; 1 everywhere if `cap` is 0."""
    if cap == 0:
        return jnp.ones_like(old_logprobs)
    return jnp.minimum(jnp.exp(old_logprobs - rollout_logprobs), cap)


def clipped_surrogate(
    logprobs: Tokens,
    old_logprobs: Tokens,
    advantages: Float[Array, "*#tokens"],
    clip_low: float,
    clip_high: float,
) -> tuple[Tokens, Mask, Mask]:
    """Computes −min(ρ Â, clip(ρ, 1 − low, 1 + high) Â) with ρ = π / π_old (arXiv 2402.03300 eq. 3).

    Args:
      logprobs: ln π of each token, float32.
      old_logprobs: ln π_old of each token, float32.
      advantages: Â of each token's completion, float32.
      clip_low: distance of the lower bound from 1.
      clip_high: distance of the upper bound from 1.

    Returns:
      The loss of each token, and masks of the tokens where the lower and the upper bound were active.
    """
    ratio = jnp.exp(logprobs - old_logprobs)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    return loss, (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)


def k3(logprobs: Tokens, ref_logprobs: Tokens) -> Tokens:
    """Schulman's estimator of KL(π ‖ π_ref): π_ref/π − ln(π_ref/π) − 1 ≥ 0 (arXiv 2402.03300 eq. 4)."""
    log_ratio = ref_logprobs - logprobs
    return jnp.exp(log_ratio) - log_ratio - 1


def token_weights(mask: RolloutMask, loss_type: str, max_tokens: int) -> RolloutFloats:
    """Computes the weight of each token in the loss of the batch.

    `grpo` averages within each completion, then over completions. `dapo` averages over all tokens (arXiv 2503.14476).
    `dr_grpo` divides the sum by completions × `max_tokens`, a constant, which removes the length bias (arXiv
    2503.20783).

    Args:
      mask: True for tokens of completions, bool `[prompts, samples, seq]`.
      loss_type: `grpo`, `dapo` or `dr_grpo`.
      max_tokens: longest allowed completion, in tokens (`dr_grpo`).

    Returns:
      Weights, float32 in the shape of the mask, zero where it is False; computed on the host for a host array.
    """
    weight = mask.astype(jnp.float32)
    completions = mask.shape[0] * mask.shape[1]
    if loss_type == "grpo":
        return weight / weight.sum(-1, keepdims=True).clip(min=1) / completions
    if loss_type == "dapo":
        return weight / weight.sum().clip(min=1)
    if loss_type == "dr_grpo":
        return weight / (completions * max_tokens)
    raise ValueError(f"loss type {loss_type!r}: expected 'grpo', 'dapo' or 'dr_grpo'")
