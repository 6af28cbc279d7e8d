"""One GRPO update as one jitted program in which only v is differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from tinylora_jax.adapters import Policy
from tinylora_jax.models import ModelConfig
from tinylora_jax.training.logprobs import completion_logprobs
from tinylora_jax.training.losses import clipped_surrogate, importance_weights, k3, token_weights
from tinylora_jax.training.state import TrainState

Metrics = dict[str, Float[Array, ""]]


@dataclass(frozen=True)
class GRPO:
    """The algorithm's settings.

    Attributes:
      loss_type: `grpo`, `dapo` or `dr_grpo`; see `losses.token_weights`.
      normalize_std: divide a group's advantages by their standard deviation.
      clip_low: the ratio's lower bound is 1 − this.
      clip_high: the ratio's upper bound is 1 + this.
      kl_coef: weight of the KL to the untrained model (v = 0).
      tis_cap: cap of truncated importance sampling; 0 turns it off.
      updates_per_rollout: optimizer updates on each rollout.
      micro_batch: prompts whose groups are differentiated at once; 0 takes all.
      remat: recompute activations in the backward pass.
    """

    loss_type: str = "grpo"
    normalize_std: bool = True
    clip_low: float = 0.2
    clip_high: float = 0.2
    kl_coef: float = 0.0
    tis_cap: float = 2.0
    updates_per_rollout: int = 1
    micro_batch: int = 0
    remat: bool = True

    def __post_init__(self):
        if self.loss_type not in ("grpo", "dapo", "dr_grpo"):
            raise ValueError(f"GRPO: loss_type {self.loss_type!r}: expected 'grpo', 'dapo' or 'dr_grpo'")
        for name in ("clip_low", "clip_high", "kl_coef", "tis_cap"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"GRPO: {name} must be finite and >= 0, got {value}")
        if self.updates_per_rollout < 1:
            raise ValueError(f"GRPO: updates_per_rollout must be >= 1, got {self.updates_per_rollout}")
        if self.micro_batch < 0:
            raise ValueError(f"GRPO: micro_batch must be >= 0, got {self.micro_batch}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One graded rollout of N prompts with G samples of at most T tokens.

    Attributes:
      prompts: int32 `[N, P]`, right-padded.
      lengths: int32 `[N]`.
      completions: int32 `[N, G, T]`, right-padded.
      mask: bool `[N, G, T]`, True for the tokens that are trained on.
      rollout_logprobs: float32 `[N, G, T]`, as generated.
      advantages: float32 `[N, G]`.
      old_logprobs: float32 `[N, G, T]` under the policy before the first update; None means that this
        update is the first, and the current policy takes its place.
      ref_logprobs: float32 `[N, G, T]` under v = 0; None without KL.
    """

    prompts: jax.Array
    lengths: jax.Array
    completions: jax.Array
    mask: jax.Array
    rollout_logprobs: jax.Array
    advantages: jax.Array
    old_logprobs: jax.Array | None = None
    ref_logprobs: jax.Array | None = None


@partial(jax.jit, static_argnames=("config", "temperature", "micro_batch"))
def score(
    config: ModelConfig, policy: Policy, v: Float[Array, "groups u"], batch: Batch, temperature: float, micro_batch: int
) -> Float[Array, "prompts samples seq"]:
    """Log-probabilities of a batch's completions at v (the reference policy is v = 0)."""

    def one(part: Batch):
        scores = completion_logprobs(
            config, policy(v), part.prompts, part.lengths, part.completions, temperature, remat=False
        )
        return scores[0]

    scores = jax.lax.map(one, _split(batch, micro_batch))
    return scores.reshape(batch.completions.shape)


def _split(tree: Any, micro_batch: int) -> Any:
    """Cuts the leading axis of N prompts into `[N / micro_batch, micro_batch]`."""
    prompts = jax.tree.leaves(tree)[0].shape[0]
    size = micro_batch or prompts
    if prompts % size:
        raise ValueError(f"a batch of {prompts} prompts is not divisible by micro_batch={size}")
    return jax.tree.map(lambda x: x.reshape(prompts // size, size, *x.shape[1:]), tree)


def grpo_loss(
    v: Float[Array, "groups u"],
    config: ModelConfig,
    grpo: GRPO,
    temperature: float,
    policy: Policy,
    batch: Batch,
    weights: Float[Array, "prompts samples seq"],
) -> tuple[Float[Array, ""], Metrics]:
    """Σ over tokens of weight · (importance · surrogate + β · k3), and sums of metrics over tokens.

    Args:
      v: the only differentiated argument.
      config: architecture.
      grpo: settings.
      temperature: of the policy.
      policy: everything frozen.
      batch: the rollout, or a part of it.
      weights: `losses.token_weights` of the whole rollout, cut like `batch`.

    Returns:
      The loss and, per metric, its sum over the tokens of the mask.
    """
    logprobs, entropy = completion_logprobs(
        config, policy(v), batch.prompts, batch.lengths, batch.completions, temperature, grpo.remat
    )
    # Entries outside the mask are padding scored against garbage: silence them before they meet exp().
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
        "kl": kl,
        "entropy": entropy,
        "clip_low": low,
        "clip_high": high,
        "delta_prob": jnp.abs(jnp.exp(old) - jnp.exp(rollout)),
        "importance": importance,
    }
    sums = {name: jnp.sum(quiet(x.astype(jnp.float32))) for name, x in per_token.items()}
    return jnp.sum(weights * loss), sums


def make_grpo_step(
    config: ModelConfig, grpo: GRPO, temperature: float, max_tokens: int, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Policy, Batch], tuple[TrainState, Metrics]]:
    """Builds the jitted update: gradient of the loss with respect to v, accumulated, then one optimizer step.

    Args:
      config: architecture.
      grpo: settings.
      temperature: of the policy.
      max_tokens: longest completion allowed (`dr_grpo`).
      optimizer: optax transformation of v.

    Returns:
      `step(state, policy, batch)` giving the next state and scalar metrics. It does not advance
      `state.step`, which counts rollouts.
    """

    @jax.jit
    def step(state: TrainState, policy: Policy, batch: Batch) -> tuple[TrainState, Metrics]:
        weights = token_weights(batch.mask, grpo.loss_type, max_tokens)
        gradient = jax.value_and_grad(grpo_loss, has_aux=True)

        # Everything is a sum over tokens, so the parts of a split batch add up to the whole one exactly.
        parts = jax.lax.map(
            lambda part: gradient(state.v, config, grpo, temperature, policy, *part),
            _split((batch, weights), grpo.micro_batch),
        )
        (loss, sums), grad = jax.tree.map(lambda x: x.sum(axis=0), parts)
        with jax.numpy_dtype_promotion("standard"):  # optax raises Python floats to traced counts
            updates, opt_state = optimizer.update(grad, state.opt_state, state.v)
        v = optax.apply_updates(state.v, updates)
        tokens = jnp.maximum(jnp.sum(batch.mask), 1).astype(jnp.float32)
        metrics = {name: total / tokens for name, total in sums.items()}
        metrics |= {"loss": loss, "grad_norm": jnp.linalg.norm(grad), "v_norm": jnp.linalg.norm(v)}
        return TrainState(v, opt_state, state.step), metrics

    return step
