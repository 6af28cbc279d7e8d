"""Generation whose prompts arrive while earlier ones decode.

The host adds prompts in chunks of one size. A chunk is prefilled into a waiting room, and its completions take slots
that become free. So slots stay busy as long as the host has prompts to add, and a caller may stop at any time. Once no
more prompts are to come, the pool of slots shrinks as in `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, UInt32

from tinylora_jax.adapters import Adapted, Trained
from tinylora_jax.models import KVCache, ModelConfig, abstract_everywhere, active_mesh
from tinylora_jax.models.sharding import abstract_at, cache_shards, current_mesh, heads_axes
from tinylora_jax.multihost import to_host
from tinylora_jax.rollout.generate import (
    _Prefilled,
    _State,
    admit,
    crowded,
    decode_step,
    decoding_layout,
    empty_state,
    pool_sizes,
    prepare,
    room,
    shrink,
    worth_an_admission,
)
from tinylora_jax.rollout.placing import map_caches, placed
from tinylora_jax.rollout.sampling import Sampling


@dataclass(frozen=True)
class QueueSizes:
    """The static sizes of a `ContinuousBatch`.

    Attributes:
      prompts: largest number of prompts, a multiple of `chunk`.
      chunk: number of prompts that are added at once.
      samples: number of completions per prompt.
      slots: number of completions decoded at once, on all devices together.
      width: padded prompt length, in tokens.

    >>> QueueSizes(prompts=6, chunk=4, samples=2, slots=8, width=16)
    Traceback (most recent call last):
    ...
    ValueError: QueueSizes: prompts must be a positive multiple of chunk=4, got 6
    """

    prompts: int
    chunk: int
    samples: int
    slots: int
    width: int

    def __post_init__(self):
        for name in ("chunk", "samples", "slots", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"QueueSizes: {name} must be >= 1, got {getattr(self, name)}")
        if self.prompts < 1 or self.prompts % self.chunk:
            raise ValueError(
                f"QueueSizes: prompts must be a positive multiple of chunk={self.chunk}, got {self.prompts}"
            )

    @property
    def rows(self) -> int:
        """Largest number of completions."""
        return self.prompts * self.samples


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Buffers:
    """All arrays on the devices, which are donated from one program to the next."""

    state: _State  # without weights, which belong to the caller
    room: _Prefilled  # the newest chunk
    first: jax.Array  # index of the room's first completion, int32 scalar
    noise: jax.Array  # float32 [rows, max_new_tokens]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Progress:
    """The results of the completions so far; rows `p * samples … (p + 1) * samples - 1` belong to the p-th prompt.

    Attributes:
      tokens: generated token ids, int32 `[rows, max_new_tokens]`.
      logprobs: log-probability of each token when it was sampled, float32 in the shape of `tokens`.
      lengths: number of tokens, int32 `[rows]`, including the stop token; 0 for a completion that has not ended.
      stopped: whether the completion ended with a stop token, bool `[rows]`.
      waiting: number of added completions without a slot, int32 scalar.
      num_tokens: number of tokens generated so far, int32 scalar, including those of completions that have not ended.
      slot_steps: slots × decoding steps so far, int32 scalar, as in `Completions`.
      crowded: number of slots in use if every device were as full as the fullest, int32 scalar.
    """

    tokens: jax.Array
    logprobs: jax.Array
    lengths: jax.Array
    stopped: jax.Array
    waiting: jax.Array
    num_tokens: jax.Array
    slot_steps: jax.Array
    crowded: jax.Array


def _groups(config: ModelConfig, sizes: QueueSizes) -> int:
    """Number of parts of a chunk whose caches stay on their devices, see `admit`."""
    shards = cache_shards(sizes.slots, config.num_kv_heads)
    return shards if cache_shards(sizes.chunk, config.num_kv_heads) == shards else 1


def _share(sizes: QueueSizes, groups: int) -> int:
    """Number of completions of a chunk in each of its parts."""
    return sizes.chunk * sizes.samples // groups


@partial(jax.jit, static_argnames=("config", "sampling", "sizes", "dtype"))
def _open(config: ModelConfig, sampling: Sampling, sizes: QueueSizes, dtype: jnp.dtype) -> _Buffers:
    """Creates the buffers: all slots empty, nothing waits."""
    groups = _groups(config, sizes)
    state = empty_state(config, None, sizes.rows, sizes.slots, sizes.width, sampling, dtype, groups)
    state = replace(state, waiting=jnp.full((groups,), _share(sizes, groups), jnp.int32))
    room = _Prefilled(
        cache=KVCache.empty(config, sizes.chunk, sizes.width, dtype, sampling.quantize_cache),
        hidden=jnp.zeros((sizes.chunk, config.hidden_size), dtype),
        lengths=jnp.zeros((sizes.chunk,), jnp.int32),
    )
    noise = jnp.zeros((sizes.rows, sampling.max_new_tokens), jnp.float32)
    return placed(_Buffers(state, room, jnp.int32(0), noise))


@partial(jax.jit, static_argnames=("config", "sampling", "sizes"), donate_argnames="buffers")
def _add(config, sampling, sizes, policy, v, key, first_prompt, ids, tokens, lengths, buffers):
    """Prefills a chunk, whose completions then wait for slots."""
    _, room, noise = prepare(config, policy(v), ids, tokens, lengths, key, sampling, sizes.samples)
    first = first_prompt * sizes.samples
    noise = jax.lax.dynamic_update_slice_in_dim(buffers.noise, noise, first, axis=0)
    state = replace(buffers.state, waiting=jnp.zeros_like(buffers.state.waiting))
    return placed(_Buffers(state, room, first, noise))


@partial(jax.jit, static_argnames=("config", "sampling", "sizes"), donate_argnames="buffers")
def _advance(config, sampling, sizes, policy, v, most_steps, more, least, buffers):
    """Admits and decodes at most `most_steps` tokens, until `least` slots suffice, or another chunk is wanted."""
    params, chunk = decoding_layout(policy(v)), buffers.room
    size, groups = buffers.state.slots.completion.shape[0], buffers.state.waiting.shape[0]
    shards = cache_shards(size, config.num_kv_heads)
    enough, share = worth_an_admission(size, groups), _share(sizes, groups)
    without = lambda state: replace(state, slots=replace(state.slots, params=None))

    def waits(state: _State) -> jax.Array:
        return state.waiting < share

    def is_over(state: _State) -> jax.Array:
        empty = jnp.sum(state.slots.completion == sizes.rows)
        few = crowded(state, sizes.rows, shards) <= jnp.where(more, 0, least)
        return ~jnp.any(waits(state)) & (few | more & (empty >= enough))

    def has_room(state: _State) -> jax.Array:
        return room(state, waits(state), sizes.rows) >= enough

    def decodes_on(carry) -> jax.Array:
        count, state = carry
        return (count < most_steps) & ~has_room(state) & ~is_over(state)

    def goes_on(carry) -> jax.Array:
        count, state = carry
        return (count < most_steps) & ~is_over(state)

    def step(carry):
        count, state = carry
        state = replace(state, slots=replace(state.slots, params=params))
        return count + 1, without(decode_step(config, sampling, buffers.noise, state))

    def fill_and_decode(carry):
        count, state = carry
        state = without(admit(state, chunk, params, sizes.samples, buffers.first))
        return jax.lax.while_loop(decodes_on, step, (count, state))

    _, state = jax.lax.while_loop(goes_on, fill_and_decode, (jnp.int32(0), buffers.state))
    return placed(replace(buffers, state=state)), _progress(state, sizes, share, shards)


@partial(jax.jit, static_argnames=("config", "sizes", "size"))
def _shrunk(config: ModelConfig, sizes: QueueSizes, size: int, buffers: _Buffers) -> _Buffers:
    """Keeps only `size` slots, those in use first."""
    shards = cache_shards(buffers.state.slots.completion.shape[0], config.num_kv_heads)
    state = replace(buffers.state, slots=shrink(buffers.state.slots, size, sizes.rows, shards))
    return placed(replace(buffers, state=state))


def _progress(state: _State, sizes: QueueSizes, share: int, shards: int) -> Progress:
    """The progress of a state, as arrays of its own."""
    slots = state.slots
    ongoing = jnp.sum(jnp.where(slots.completion < sizes.rows, slots.index, 0))
    progress = Progress(
        tokens=state.tokens,
        logprobs=state.logprobs,
        lengths=state.lengths,
        stopped=state.stopped,
        waiting=jnp.sum(share - state.waiting),
        num_tokens=jnp.sum(state.lengths) + ongoing,
        slot_steps=state.slot_steps,
        crowded=crowded(state, sizes.rows, shards),
    )
    if current_mesh() is None:
        return progress
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), progress)


class ContinuousBatch:
    """Completions for prompts that are added in chunks.

    A completion equals that of `generate` for the same prompt and key, whatever the chunk, the slots and the moment
    at which its prompt was added; log-probabilities agree up to rounding.

    Args:
      config: architecture of the model.
      policy: frozen weights and the adapter's structure.
      v: trained parameters, shared by all prompts.
      key: PRNG key of this step.
      sampling: sampling settings.
      sizes: static sizes.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: Adapted,
        v: Trained,
        key: jax.Array,
        sampling: Sampling,
        sizes: QueueSizes,
    ):
        self.sizes, self.num_added = sizes, 0
        self._static, self._model, self._key = (config, sampling, sizes), (policy, v), key
        self._buffers = _open(*self._static, dtype=_dtype(policy))
        self._progress: Progress | None = None
        self._smaller = _smaller(config, sizes)
        self._crowded = sizes.slots

    def add(
        self,
        ids: UInt32[np.ndarray, " chunk"],
        tokens: Int[np.ndarray, "chunk width"],
        lengths: Int[np.ndarray, " chunk"],
    ) -> None:
        """Prefills a chunk of prompts without waiting; all completions of the chunk before must have had a slot.

        Args:
          ids: prompt ids, distinct from those of all earlier chunks.
          tokens: right-padded prompts.
          lengths: prompt lengths, at least 1.

        Raises:
          ValueError: the shape is not that of a chunk, or there are more prompts than `sizes.prompts`.
        """
        if tokens.shape != (self.sizes.chunk, self.sizes.width):
            expected = [self.sizes.chunk, self.sizes.width]
            raise ValueError(f"a chunk has prompts of shape {expected}, got {list(tokens.shape)}")
        if self.num_added == self.sizes.prompts:
            raise ValueError(f"all {self.sizes.prompts} prompts were added; make `sizes.prompts` larger")
        arrays = self._key, np.int32(self.num_added), ids, tokens, lengths
        self._buffers = _add(*self._static, *self._model, *arrays, self._buffers)
        self.num_added += self.sizes.chunk
        self._crowded = self.sizes.slots

    def advance(self, most_steps: int, more: bool, may_shrink: bool = False) -> None:
        """Decodes without waiting, until all added completions have ended, or `most_steps` tokens were sampled.

        Args:
          most_steps: largest number of decoding steps.
          more: whether to end as soon as slots are free for another chunk.
          may_shrink: whether to drop most empty slots, once many are empty; later chunks then have fewer slots.
        """
        may_shrink = may_shrink and not more
        while may_shrink and self._smaller and self._crowded <= self._smaller[0]:
            config, _, sizes = self._static
            self._buffers = _shrunk(config, sizes, self._smaller.pop(0), self._buffers)
        least = self._smaller[0] if may_shrink and self._smaller else 0
        arguments = np.int32(most_steps), np.bool_(more), np.int32(least)
        self._buffers, self._progress = _advance(*self._static, *self._model, *arguments, self._buffers)

    def progress(self) -> Progress:
        """Waits for the last `advance`; returns its results as NumPy arrays."""
        progress = to_host(self._progress)
        self._crowded = int(progress.crowded) if not progress.waiting else self.sizes.slots
        return progress


def _smaller(config: ModelConfig, sizes: QueueSizes) -> list[int]:
    """The sizes to which the pool shrinks, largest first."""
    return pool_sizes(sizes.slots, cache_shards(sizes.slots, config.num_kv_heads))[1:]


def _dtype(policy: Adapted) -> jnp.dtype:
    """The dtype of hidden states, which is that of the embeddings."""
    return policy.params["embed_tokens"]["embedding"].dtype


def lower_continuous(
    config: ModelConfig, policy: Adapted, v: Trained, sampling: Sampling, sizes: QueueSizes
) -> Iterator[jax.stages.Lowered]:
    """Lowers the programs of a `ContinuousBatch`, to compile them in advance; takes arrays or their shapes."""
    static, model = (config, sampling, sizes), (policy, v)
    yield _open.lower(*static, dtype=_dtype(policy))
    buffers = _abstract(jax.eval_shape(partial(_open, *static, dtype=_dtype(policy))))
    key = abstract_everywhere(jax.eval_shape(lambda: jax.random.key(0)))
    prompts = np.zeros((sizes.chunk, sizes.width), np.int32)
    arrays = key, np.int32(0), np.zeros(sizes.chunk, np.uint32), prompts, np.ones(sizes.chunk, np.int32)
    yield _add.lower(*static, *model, *arrays, buffers)
    for size in (sizes.slots, *_smaller(config, sizes)):
        if size < sizes.slots:
            yield _shrunk.lower(config, sizes, size, buffers)
            buffers = _abstract(jax.eval_shape(partial(_shrunk, config, sizes, size), buffers))
        yield _advance.lower(*static, *model, np.int32(0), np.bool_(True), np.int32(0), buffers)


def _abstract(buffers: _Buffers) -> _Buffers:
    """The shapes of buffers with the placement that `placed` gives them."""
    mesh = active_mesh()
    if mesh is None:
        return buffers

    def cache(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        rows, heads = heads_axes(mesh, x.shape[0], x.shape[2])
        return abstract_at(x, NamedSharding(mesh, P(rows or None, None, heads or None, None)))

    return map_caches(lambda x: abstract_at(x, NamedSharding(mesh, P())), cache, buffers)
