"""Generation with continuous batching: one program prefills every prompt once, then decodes.

A pool of slots decodes together. A finished completion gives its slot to a waiting one. Once none is waiting, the pool
shrinks, so that the last long completions do not compute empty slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Int, Key, UInt32

from tinylora_jax.adapters import rows_marked, select_rows
from tinylora_jax.models import KVCache, ModelConfig, forward, fused, logits
from tinylora_jax.models.sharding import (
    AXES,
    DATA,
    cache_shards,
    current_mesh,
    gather_rows,
    over_vocabulary,
    rows_alone,
    split_heads,
    split_rows,
    split_vocabulary,
    vocabulary_axes,
    weights_are_split,
)
from tinylora_jax.models.tpu import on_tpu
from tinylora_jax.rollout.sampling import Sampling, completion_keys, sample, uniforms

_PREFILL_TOKENS = 32768  # prompts are prefilled in parts of about this size
_CAPACITY_STEP = 128  # the cache length is a multiple of this, for whole TPU tiles and GPU blocks


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Completions:
    """Generated completions; rows `p * samples … (p + 1) * samples - 1` belong to prompt p.

    Attributes:
      tokens: generated token ids, int32 `[rows, max_new_tokens]`; 0 after the end.
      logprobs: log-probability of each token when it was sampled, float32 in the shape of `tokens`; 0 after the end.
      lengths: number of tokens, int32 `[rows]`, including the stop token.
      stopped: whether the completion ended with a stop token, bool `[rows]`; False if cut off at `max_new_tokens`.
      slot_steps: slots × decoding steps, int32 scalar, including empty slots: `lengths.sum() / slot_steps` is the share
        of useful work.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    slot_steps: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Prefilled:
    """Results of the prefill that a prompt's completions need."""

    cache: KVCache
    hidden: jax.Array  # [prompts, hidden] of the last token
    lengths: jax.Array  # [prompts]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Slots:
    """The pool: S completions in progress."""

    completion: jax.Array  # [S] index of the completion; the total number for an empty slot
    index: jax.Array  # [S] of the token to sample next
    position: jax.Array  # [S] of that token in its row; 0 for an empty slot
    hidden: jax.Array  # [S, hidden] from which it is sampled
    cache: KVCache
    params: Any  # the weights, with one adapter per slot if there are several


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """The state of the decoding loop."""

    slots: _Slots
    waiting: jax.Array  # [groups] number of completions of each group of prompts that have or had a slot
    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    slot_steps: jax.Array


def _prefill(
    config: ModelConfig, params: Any, tokens: jax.Array, lengths: jax.Array, quantize_cache: str
) -> _Prefilled:
    prompts, width = tokens.shape
    part = max(1, min(prompts, _PREFILL_TOKENS // width))
    padded = -(-prompts // part) * part
    split = lambda x: jnp.pad(x, ((0, padded - prompts), *((0, 0),) * (x.ndim - 1))).reshape(-1, part, *x.shape[1:])
    dtype = params["embed_tokens"]["embedding"].dtype

    def one(args):
        tokens, lengths, rows = args
        own = select_rows(params, rows)
        cache = KVCache.empty(config, part, width, dtype, quantize_cache)
        hidden, cache = forward(config, own, tokens, cache=cache)
        last = jnp.maximum(lengths - 1, 0)[:, None, None]
        return cache, jnp.take_along_axis(hidden, last, axis=1)[:, 0]

    parts = split(tokens), split(lengths), split(jnp.arange(prompts))
    if padded == part:
        cache, hidden = one(jax.tree.map(lambda x: x[0], parts))
    else:
        join = lambda x: x.reshape(padded, *x.shape[2:])[:prompts]
        cache, hidden = jax.tree.map(join, jax.lax.map(one, parts))
    return _Prefilled(cache, hidden, lengths)


def prepare(
    config: ModelConfig,
    params: Any,
    ids: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    samples: int,
) -> tuple[Any, _Prefilled, jax.Array]:
    """Prepares decoding: weights in its layout, the prompts' caches, and a random number per token."""
    params = decoding_layout(params)
    keys = completion_keys(key, ids, samples)
    noise = jax.vmap(uniforms, (None, 0), 1)(keys, jnp.arange(sampling.max_new_tokens))
    return params, _prefill(config, params, tokens, lengths, sampling.quantize_cache), noise


def decoding_layout(params: Any) -> Any:
    """The weights in the layout that decodes fastest; a copy of the blocks, unless they are split or on a TPU."""
    # Joining split kernels would move them, and a TPU gains nothing from it.
    return params if weights_are_split() or on_tpu() else fused(params)


def admit(state: _State, prefilled: _Prefilled, params: Any, samples: int, first: jax.Array | None = None) -> _State:
    """Gives empty slots to waiting completions, in order.

    If devices split the rows, each device's slots take completions of its own prompts, so that no cache moves.

    Args:
      state: decoding state.
      prefilled: prefilled prompts, some of whose completions may wait.
      params: weights, adapted or not.
      samples: number of completions per prompt.
      first: index of the first completion of these prompts, int32 scalar; None for 0.
    """
    slots, total, groups = state.slots, state.lengths.shape[0], state.waiting.shape[0]
    share = prefilled.lengths.shape[0] * samples // groups  # number of completions in a group
    group = jnp.arange(groups, dtype=jnp.int32)[:, None]
    start = group * share if first is None else group * share + first
    empty = (slots.completion == total).reshape(groups, -1)
    candidate = state.waiting[:, None] + jnp.cumsum(empty, axis=1) - 1
    taken_of = empty & (candidate < share)
    taken = taken_of.reshape(-1)
    completion = jnp.where(taken, (candidate + start).reshape(-1), slots.completion).astype(jnp.int32)
    prompt_of = jnp.clip(completion.reshape(groups, -1) - start, 0, share - 1) // samples
    prompt = (prompt_of + group * (share // samples)).reshape(-1)
    width = prefilled.cache.capacity

    def pick(prompts: jax.Array) -> jax.Array:
        parts = prompts.reshape(groups, -1, *prompts.shape[1:])
        return jax.vmap(lambda part, index: jnp.take(part, index, axis=0))(parts, prompt_of).reshape(
            -1, *prompts.shape[1:]
        )

    def copy(cache: jax.Array, prompts: jax.Array) -> jax.Array:
        kept = jax.lax.slice_in_dim(cache, 0, width, axis=1)
        prompts = gather_rows(prompts, prompts.shape[2]) if groups == 1 else prompts
        new = jnp.where(taken[:, None, None, None], pick(prompts), kept)
        return jax.lax.dynamic_update_slice_in_dim(cache, new, 0, axis=1)

    slots = _Slots(
        completion=completion,
        index=jnp.where(taken, 0, slots.index),
        position=jnp.where(taken, prefilled.lengths[prompt], slots.position),
        hidden=jnp.where(taken[:, None], prefilled.hidden[prompt], slots.hidden),
        cache=jax.tree.map(copy, slots.cache, prefilled.cache),
        params=select_rows(params, prompt),
    )
    return replace(state, slots=slots, waiting=state.waiting + jnp.sum(taken_of, axis=1, dtype=jnp.int32))


def admit_all(state: _State, prefilled: _Prefilled, params: Any, samples: int) -> _State:
    """Gives every completion a slot at once, so that no prompt leaves its device."""
    total = state.lengths.shape[0]

    def each(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x[:, None], (x.shape[0], samples, *x.shape[1:])).reshape(total, *x.shape[1:])

    place = lambda cache, prompts: jax.lax.dynamic_update_slice_in_dim(cache, each(prompts), 0, axis=1)
    completion = jnp.arange(total, dtype=jnp.int32)
    slots = replace(
        state.slots,
        completion=completion,
        position=each(prefilled.lengths),
        hidden=each(prefilled.hidden),
        cache=jax.tree.map(place, state.slots.cache, prefilled.cache),
        params=select_rows(params, completion // samples),
    )
    return replace(state, slots=slots, waiting=jnp.full_like(state.waiting, total // state.waiting.shape[0]))


def shrink(slots: _Slots, size: int, total: int, shards: int) -> _Slots:
    """Shrinks the pool to `size` slots, those in use first, with equally many from every shard."""
    empty = (slots.completion == total).reshape(shards, -1)
    order = jnp.argsort(empty, axis=1, stable=True)[:, : size // shards]

    def take(x: jax.Array) -> jax.Array:  # within the shards, so that no cache moves between devices
        parts = x.reshape(*empty.shape, *x.shape[1:])
        return jax.vmap(lambda part, index: jnp.take(part, index, axis=0))(parts, order).reshape(size, *x.shape[1:])

    arrays = jax.tree.map(take, replace(slots, params=None))
    cache = jax.tree.map(lambda x: split_heads(x, x.shape[2]), arrays.cache)
    index = order + empty.shape[1] * jnp.arange(shards)[:, None]
    return replace(arrays, cache=cache, params=select_rows(slots.params, index.reshape(-1)))


def _draw(scores: jax.Array, uniform: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Calls `sample` on the devices that hold the scores, which are the largest array of a step."""
    axes = vocabulary_axes(scores.shape[1])
    if not axes or sampling.truncates:  # truncation sorts the whole vocabulary, so each device handles some rows
        return sample(split_rows(scores, AXES), uniform, sampling)
    return over_vocabulary(lambda scores, uniform: sample(scores, uniform, sampling, axes), scores, uniform)


def decode_step(config: ModelConfig, sampling: Sampling, noise: jax.Array, state: _State) -> _State:
    """Samples the next token of every slot and runs it through the model."""
    slots, total = state.slots, state.lengths.shape[0]
    active = slots.completion < total
    uniform = noise.at[slots.completion, slots.index].get(mode="clip")
    token, logprob = _draw(split_vocabulary(logits(config, slots.params, slots.hidden)), uniform, sampling)
    stopped = jnp.any(token[:, None] == jnp.asarray(sampling.stop_tokens, jnp.int32), axis=-1)
    ended = stopped | (slots.index + 1 == sampling.max_new_tokens)
    at = {"mode": "drop", "unique_indices": True}  # an empty slot writes nowhere
    # Each empty slot gets a different out-of-range index, because scattered indices must be unique.
    row = jnp.where(active, slots.completion, total + jnp.arange(active.shape[0], dtype=jnp.int32))
    done = jnp.where(active & ended, row, total + jnp.arange(active.shape[0], dtype=jnp.int32))

    position = jnp.where(active, slots.position, 0)
    hidden, cache = forward(config, slots.params, token[:, None], position, slots.cache)
    slots = replace(
        slots,
        completion=jnp.where(ended, total, slots.completion),
        index=jnp.where(ended, 0, slots.index + 1),
        position=jnp.where(ended | ~active, 0, slots.position + 1),
        hidden=hidden[:, 0],
        cache=cache,
    )
    return _State(
        slots=slots,
        waiting=state.waiting,
        tokens=state.tokens.at[row, state.slots.index].set(token, **at),
        logprobs=state.logprobs.at[row, state.slots.index].set(logprob, **at),
        lengths=state.lengths.at[done].set(state.slots.index + 1, **at),
        stopped=state.stopped.at[done].set(stopped, **at),
        slot_steps=state.slot_steps + active.shape[0],
    )


def empty_state(
    config: ModelConfig,
    params: Any,
    total: int,
    slots: int,
    width: int,
    sampling: Sampling,
    dtype: jnp.dtype,
    groups: int = 1,
) -> _State:
    """The state before the first admission: all slots empty, with prompts to be admitted in `groups`."""
    capacity = -(-(width + sampling.max_new_tokens) // _CAPACITY_STEP) * _CAPACITY_STEP
    zeros = lambda *shape, dtype=jnp.int32: jnp.zeros(shape, dtype)
    pool = _Slots(
        completion=jnp.full((slots,), total, jnp.int32),
        index=zeros(slots),
        position=zeros(slots),
        hidden=zeros(slots, config.hidden_size, dtype=dtype),
        cache=KVCache.empty(config, slots, capacity, dtype, sampling.quantize_cache),
        params=select_rows(params, zeros(slots)),
    )
    return _State(
        slots=pool,
        waiting=zeros(groups),
        tokens=zeros(total, sampling.max_new_tokens),
        logprobs=zeros(total, sampling.max_new_tokens, dtype=jnp.float32),
        lengths=zeros(total),
        stopped=zeros(total, dtype=bool),
        slot_steps=jnp.int32(0),
    )


def pool_sizes(slots: int, shards: int) -> list[int]:
    """The successive sizes of the pool; only a few, because each needs a compiled loop.

    Pools of at least 64 slots shrink to a half, then to a quarter of that. Large pools, whose steps take time in
    proportion to their size, are halved twice.
    """
    sizes = [slots]
    for divisor in () if slots < 64 else (2, 4) if slots < 1024 else (2, 2, 4):
        if sizes[-1] // divisor % shards == 0:
            sizes.append(sizes[-1] // divisor)
    return sizes


@dataclass(frozen=True)
class _Pool:
    """The pool at one size, with the rules for when to fill and when to shrink it.

    Attributes:
      total: number of completions of the rollout.
      groups: number of groups of prompts, each with its own queue of completions.
      shards: number of parts into which devices split the slots.
      size: number of slots.
      next_size: number of slots after shrinking; 0 for the last pool.
    """

    total: int
    groups: int
    shards: int
    size: int
    next_size: int

    def drain(self, state: _State, admit: Callable[[_State], _State], step: Callable[[_State], _State]) -> _State:
        """Admits and decodes until the slots in use fit the next size."""
        fill_and_decode = lambda state: jax.lax.while_loop(self._decodes_on, step, admit(state))
        return jax.lax.while_loop(self._is_needed, fill_and_decode, state)

    def _decodes_on(self, state: _State) -> jax.Array:
        enough = worth_an_admission(self.size, self.groups)
        waits = jnp.any(self._waiting(state))
        return jnp.where(waits, self._room(state) < enough, crowded(state, self.total, self.shards) > self.next_size)

    def _is_needed(self, state: _State) -> jax.Array:
        return jnp.any(self._waiting(state)) | (crowded(state, self.total, self.shards) > self.next_size)

    def _waiting(self, state: _State) -> jax.Array:
        """Which groups have completions without a slot."""
        return state.waiting < self.total // self.groups

    def _room(self, state: _State) -> jax.Array:
        """Number of empty slots for which a completion is waiting."""
        return room(state, self._waiting(state), self.total)


def room(state: _State, waiting: Bool[Array, " groups"], total: int) -> Int[Array, ""]:
    """Number of empty slots in those groups in which a completion waits; an empty slot has the completion `total`."""
    empty = jnp.sum((state.slots.completion == total).reshape(len(waiting), -1), axis=1)
    return jnp.sum(jnp.where(waiting, empty, 0))


def crowded(state: _State, total: int, shards: int) -> Int[Array, ""]:
    """Number of slots in use if every shard were as full as the fullest."""
    return shards * jnp.max(jnp.sum((state.slots.completion < total).reshape(shards, -1), axis=1))


def worth_an_admission(size: int, groups: int) -> int:
    """Number of empty slots from which an admission pays off: it costs less than a step.

    A single group must be able to reach this number, because it may be the last one waiting.
    """
    return max(1, size // max(16, groups))


@partial(jax.jit, static_argnames=("config", "sampling", "samples", "slots"))
def generate(
    config: ModelConfig,
    params: Any,
    ids: UInt32[Array, " prompts"],
    tokens: Int[Array, "prompts seq"],
    lengths: Int[Array, " prompts"],
    key: Key[Array, "*prompts"],
    sampling: Sampling,
    samples: int = 1,
    slots: int = 0,
) -> Completions:
    """Generates `samples` completions for every prompt.

    A completion depends only on its prompt and on (key, prompt id, sample index). It does not depend on the other
    rows, their number, its place among them or the number of slots.

    Args:
      config: architecture of the model.
      params: weights, adapted or not. `policy(v)` with v `[prompts, groups, u]` gives every prompt its own adapter;
        completions are the same as when that adapter runs alone.
      ids: prompt ids, uint32 `[prompts]`, from which the sampling noise is derived.
      tokens: right-padded prompts, int32 `[prompts, seq]`.
      lengths: prompt lengths, int32 `[prompts]`, at least 1.
      key: PRNG key of this step, or one per prompt.
      sampling: sampling settings.
      samples: number of completions per prompt; they share one prefill.
      slots: number of completions decoded at once, on all devices together; 0, or more than there are, for all.

    Returns:
      The completions.
    """
    if rows_alone(len(tokens)):
        return _on_each_device(config, params, ids, tokens, lengths, key, sampling, samples, slots)
    prompts, width = tokens.shape
    total = prompts * samples
    slots = min(slots, total) or total
    params, prefilled, noise = prepare(config, params, ids, tokens, lengths, key, sampling, samples)
    shards = cache_shards(slots, config.num_kv_heads)
    groups = shards if cache_shards(prompts, config.num_kv_heads) == shards else 1
    state = empty_state(config, params, total, slots, width, sampling, prefilled.hidden.dtype, groups)
    if slots == total:
        state = admit_all(state, prefilled, params, samples)
    fill = partial(admit, prefilled=prefilled, params=params, samples=samples)
    fill = (lambda state: state) if slots == total else fill
    step = partial(decode_step, config, sampling, noise)
    sizes = pool_sizes(slots, shards)
    for size, next_size in zip(sizes, [*sizes[1:], 0], strict=True):
        if state.slots.completion.shape[0] != size:
            state = replace(state, slots=shrink(state.slots, size, total, shards))
        state = _Pool(total, groups, shards, size, next_size).drain(state, fill, step)
    return Completions(state.tokens, state.logprobs, state.lengths, state.stopped, state.slot_steps)


def _on_each_device(
    config: ModelConfig,
    params: Any,
    ids: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    key: jax.Array,
    sampling: Sampling,
    samples: int,
    slots: int,
) -> Completions:
    """`generate` on a mesh that splits only rows: each device runs its own program for its share of prompts.

    The devices exchange no data, and none waits for another's longest completion before the end.
    """
    devices = current_mesh().size
    own_slots = -(-slots // devices)

    def one(params, ids, tokens, lengths, key):
        own = generate(config, params, ids, tokens, lengths, key, sampling, samples, own_slots)
        return replace(own, slot_steps=own.slot_steps[None])

    everywhere = jax.tree.map(lambda _: P(), params)
    places = rows_marked(params, everywhere, P(DATA)), *(P(DATA),) * 3, P(DATA) if key.ndim else P()
    split = jax.shard_map(one, in_specs=places, out_specs=P(DATA), check_vma=False)
    drawn = split(params, jnp.asarray(ids), jnp.asarray(tokens), jnp.asarray(lengths), key)
    return replace(drawn, slot_steps=jnp.sum(drawn.slot_steps))
