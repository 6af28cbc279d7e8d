"""Streaming generation: the completions of `generate`, a few tokens at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

from tinylora_jax.models import ModelConfig
from tinylora_jax.multihost import to_host
from tinylora_jax.rollout.generate import Completions, admit_all, decode_step, empty_state, prepare
from tinylora_jax.rollout.placing import placed
from tinylora_jax.rollout.sampling import Sampling


@partial(jax.jit, static_argnames=("config", "sampling", "samples"))
def _begin(config, params, ids, tokens, lengths, key, sampling, samples):
    """Prepares weights, noise and a state in which every completion has a slot and no tokens yet."""
    params, prefilled, noise = prepare(config, params, ids, tokens, lengths, key, sampling, samples)
    total, width = len(tokens) * samples, tokens.shape[1]
    state = empty_state(config, params, total, total, width, sampling, prefilled.hidden.dtype)
    state = admit_all(state, prefilled, params, samples)
    return state.slots.params, noise, placed(_without_params(state))


def _without_params(state):
    # The state is donated from one part to the next; the weights belong to the caller.
    return replace(state, slots=replace(state.slots, params=None))


@partial(jax.jit, static_argnames=("config", "sampling", "every"), donate_argnames="state")
def _advance(config, sampling, every, params, noise, start, state):
    """Up to `every` tokens more; the state, what they are, and whether a completion still goes on."""
    total, steps_before = state.lengths.shape[0], state.slot_steps
    going = lambda state: jnp.any(state.slots.completion < total)

    def step(carry):
        count, state = carry
        state = replace(state, slots=replace(state.slots, params=params))
        return count + 1, _without_params(decode_step(config, sampling, noise, state))

    _, state = jax.lax.while_loop(lambda carry: (carry[0] < every) & going(carry[1]), step, (jnp.int32(0), state))
    drawn = jnp.where(state.slots.completion < total, state.slots.index, state.lengths)
    lengths = jnp.clip(drawn - start, 0, every)
    part = lambda x: jnp.take(x, start + jnp.arange(every), axis=1, mode="fill", fill_value=0)
    stopped = state.stopped & (lengths > 0)
    new = Completions(part(state.tokens), part(state.logprobs), lengths, stopped, state.slot_steps - steps_before)
    return placed(state), new, going(state)


def stream(
    config: ModelConfig,
    params: Any,
    ids: UInt32[Array, " prompts"] | UInt32[np.ndarray, " prompts"],
    tokens: Int[Array, "prompts seq"] | Int[np.ndarray, "prompts seq"],
    lengths: Int[Array, " prompts"] | Int[np.ndarray, " prompts"],
    key: Key[Array, ""],
    sampling: Sampling,
    samples: int = 1,
    every: int = 4,
) -> Iterator[Completions]:
    """Generates the completions of `generate` and yields them in parts while they are generated.

    Two programs are compiled per prompt shape: the prefill, and `every` decoding steps. No state is copied between
    parts, and a caller may stop iterating at any time.

    Args:
      config: architecture of the model.
      params: weights, adapted or not. `policy(v)` with v `[prompts, groups, u]` gives every prompt its own adapter.
      ids: prompt ids, uint32 `[prompts]`, from which the sampling noise is derived.
      tokens: right-padded prompts, int32 `[prompts, seq]`.
      lengths: prompt lengths, int32 `[prompts]`, at least 1.
      key: PRNG key of this step.
      sampling: sampling settings.
      samples: number of completions per prompt.
      every: number of tokens per completion in a part.

    Yields:
      The new part, as NumPy arrays: `tokens` and `logprobs` `[rows, every]`, the number of valid entries in `lengths`,
      and `stopped`, which is True for rows that reached a stop token in this part. The parts of a row, concatenated,
      equal the row of `generate`.
    """
    params, noise, state = _begin(config, params, ids, tokens, lengths, key, sampling, samples)
    going, start = True, 0
    while going:
        state, part, going = _advance(config, sampling, every, params, noise, jnp.int32(start), state)
        part, going = to_host((part, going))
        yield part
        start += every
