"""Batched generation: one prefill per prompt, then one compiled loop that decodes all completions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt32

from tinylora_jax.models import KVCache, ModelConfig, forward, logits
from tinylora_jax.rollout.sampling import Sampling, completion_keys, sample, uniforms


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Completions:
    """What a model answered, prompt-major: rows `p * samples … (p + 1) * samples - 1` belong to prompt p.

    Attributes:
      tokens: int32 `[rows, max_new_tokens]`; 0 after the end.
      logprobs: float32, the same shape: log-probability of each token when it was drawn; 0 after the end.
      lengths: int32 `[rows]`, the stop token included.
      stopped: bool `[rows]`; False for a completion cut off at `max_new_tokens`.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array


@partial(jax.jit, static_argnames=("config", "sampling", "samples"))
def generate(
    config: ModelConfig,
    params: Any,
    ids: UInt32[Array, " prompts"],
    tokens: Int[Array, "prompts seq"],
    lengths: Int[Array, " prompts"],
    key: Key[Array, ""],
    sampling: Sampling,
    samples: int = 1,
) -> Completions:
    """Draws `samples` completions of every prompt.

    A completion depends on (key, prompt id, sample index) and its prompt alone: not on the other rows,
    their number or its place among them.

    Args:
      config: architecture.
      params: weights, adapted or not.
      ids: prompt ids, which key the sampling noise.
      tokens: right-padded prompts.
      lengths: their lengths, at least 1.
      key: key of this step.
      sampling: how tokens are picked.
      samples: completions per prompt; they share one prefill.

    Returns:
      The completions.
    """
    rows, width = tokens.shape[0] * samples, tokens.shape[1]
    keys = completion_keys(key, ids, samples)
    stops = jnp.asarray(sampling.stop_tokens, jnp.int32)
    dtype = params["embed_tokens"]["embedding"].dtype
    zero = jnp.zeros((tokens.shape[0],), jnp.int32)

    cache = KVCache.empty(config, tokens.shape[0], width + sampling.max_new_tokens, dtype)
    hidden, cache = forward(config, params, tokens, zero, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    cache, first, start = cache.repeat(samples), jnp.repeat(last, samples, axis=0), jnp.repeat(lengths, samples)

    def pick(hidden, index):
        token, logprob = sample(logits(config, params, hidden), uniforms(keys, index), sampling)
        return token, logprob, jnp.any(token[:, None] == stops, axis=-1)

    def unfinished(carry):
        index, _, stopped, *_ = carry
        return (index < sampling.max_new_tokens) & ~jnp.all(stopped)

    def step(carry):
        index, previous, stopped, cache, out_tokens, out_logprobs, out_lengths = carry
        hidden, cache = forward(config, params, previous[:, None], start + index - 1, cache)
        token, logprob, ends = pick(hidden[:, 0], index)
        token, logprob = jnp.where(stopped, 0, token), jnp.where(stopped, 0.0, logprob)
        out_tokens = jax.lax.dynamic_update_index_in_dim(out_tokens, token, index, axis=0)
        out_logprobs = jax.lax.dynamic_update_index_in_dim(out_logprobs, logprob, index, axis=0)
        return (
            index + 1,
            token,
            stopped | ends,
            cache,
            out_tokens,
            out_logprobs,
            out_lengths + (~stopped).astype(jnp.int32),
        )

    token, logprob, stopped = pick(first, jnp.int32(0))
    shape = (sampling.max_new_tokens, rows)
    carry = (
        jnp.int32(1),
        token,
        stopped,
        cache,
        jnp.zeros(shape, jnp.int32).at[0].set(token),
        jnp.zeros(shape, jnp.float32).at[0].set(logprob),
        jnp.ones((rows,), jnp.int32),
    )
    _, _, stopped, _, out_tokens, out_logprobs, out_lengths = jax.lax.while_loop(unfinished, step, carry)
    return Completions(out_tokens.T, out_logprobs.T, out_lengths, stopped)
