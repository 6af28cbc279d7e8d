"""A graded rollout as arrays, and its packing into sequences of static size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from tinylora_jax.models import Packing
from tinylora_jax.multihost import to_host

AnyArray: TypeAlias = jax.Array | np.ndarray

_ALIGN = 32  # sequence lengths are multiples of this
_ROOM = 3  # places in a sequence's rows per token, so rows may be only a third full
_NARROWEST = 512  # smallest row width, in places


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """A graded rollout of N prompts with G samples of at most T tokens, as host arrays.

    Attributes:
      prompts: right-padded prompt tokens, int32 `[N, P]`.
      lengths: prompt lengths, int32 `[N]`.
      completions: right-padded completion tokens, int32 `[N, G, T]`.
      mask: True for the tokens to train on, bool `[N, G, T]`.
      rollout_logprobs: log-probabilities from generation, float32 `[N, G, T]`.
      advantages: advantage of each completion, float32 `[N, G]`, or of each token, `[N, G, T]`.
      old_logprobs: log-probabilities under the policy before the first update, float32 `[N, G, T]`; None in the first
        update, which uses the current policy instead.
      ref_logprobs: log-probabilities under v = 0, float32 `[N, G, T]`; None without KL.
    """

    prompts: Int[np.ndarray, "prompts prompt_tokens"]
    lengths: Int[np.ndarray, " prompts"]
    completions: Int[np.ndarray, "prompts samples tokens"]
    mask: Bool[np.ndarray, "prompts samples tokens"]
    rollout_logprobs: Float[np.ndarray, "prompts samples tokens"]
    advantages: Float[np.ndarray, "prompts samples"] | Float[np.ndarray, "prompts samples tokens"]
    old_logprobs: Float[np.ndarray, "prompts samples tokens"] | None = None
    ref_logprobs: Float[np.ndarray, "prompts samples tokens"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Microbatch:
    """A packed microbatch of a rollout: B sequences of T tokens. All fields but `packing` are `[B, T]`.

    Attributes:
      tokens: token ids, int32: completions, then prompts, then zeros as padding.
      packing: maps between tokens and rows.
      source: index of each token in the rollout's flattened completions `[N·G·T]`, int32; −1 for other tokens.
      mask: True for the tokens to train on, bool.
      weights: weight of each token's loss, float32.
      advantages: advantage of each token or of its completion, float32.
      rollout_logprobs: log-probabilities from generation, float32.
      old_logprobs: log-probabilities before the first update, float32; or None.
      ref_logprobs: log-probabilities under the reference policy, float32; or None.
      prompt: index of each token's prompt in the rollout, int32; −1 for padding; or None.
    """

    tokens: Int[AnyArray, "sequences tokens"]
    packing: Packing
    source: Int[AnyArray, "sequences tokens"]
    mask: Bool[AnyArray, "sequences tokens"]
    weights: Float[AnyArray, "sequences tokens"]
    advantages: Float[AnyArray, "sequences tokens"]
    rollout_logprobs: Float[AnyArray, "sequences tokens"]
    old_logprobs: Float[AnyArray, "sequences tokens"] | None = None
    ref_logprobs: Float[AnyArray, "sequences tokens"] | None = None
    prompt: Int[AnyArray, "sequences tokens"] | None = None


class _Unit(NamedTuple):
    """A prompt and some of its completions."""

    prompt: int
    samples: tuple[int, ...]
    tokens: int


class SequenceShape(NamedTuple):
    """The static size of a sequence, equal for every rollout of a run, so that nothing compiles twice."""

    tokens: int
    rows: int
    places: int
    samples: int


def sequence_shapes(
    prompts: int, prompt_tokens: int, samples: int, completion_tokens: int, max_tokens: int, room: int = _ROOM
) -> tuple[SequenceShape, ...]:
    """Chooses sequence shapes for rollouts within these bounds, ordered from the narrowest rows to the widest.

    Most completions are far shorter than the longest allowed, and attention in a row costs time for all its places.
    So short and long rows go to different sequences.

    Args:
      prompts: N, the number of prompts.
      prompt_tokens: P, the padded prompt length in tokens.
      samples: G, the number of completions per prompt.
      completion_tokens: T, the longest completion in tokens.
      max_tokens: number of tokens in a sequence; raised to fit one prompt and completion, lowered to the whole rollout.
      room: number of places in a sequence's rows per token.
    """
    row = prompt_tokens + completion_tokens
    own = prompt_tokens / samples + completion_tokens  # tokens of a row, including its share of the prompt
    filled = min(1 / room, 0.8 * own / row)  # many short completions of one prompt give many rows with few tokens
    whole = prompts * (prompt_tokens + samples * completion_tokens)
    up = lambda x, unit: -(-x // unit) * unit
    tokens = up(min(max(max_tokens, row), whole), _ALIGN)
    widths = [up(row, 8)]
    while widths[0] // 4 >= _NARROWEST:
        widths.insert(0, up(widths[0] // 4, 8))
    rows = lambda width: min(prompts * samples, math.ceil(tokens / (filled * width)))
    return tuple(SequenceShape(tokens, rows(width), width, samples) for width in widths)


@dataclass
class _OpenSequence:
    """A sequence that is being filled."""

    tokens: int  # free
    rows: int  # free
    units: list[_Unit] = field(default_factory=list)

    def fitting(self, prompt: int, ends: np.ndarray) -> int:
        """Number of these completions that fit together with their prompt."""
        return min(self.rows, int(np.searchsorted(prompt + np.cumsum(ends), self.tokens, side="right")))

    def add(self, unit: _Unit) -> None:
        self.units.append(unit)
        self.tokens -= unit.tokens
        self.rows -= len(unit.samples)


def _fill(batch: Batch, ends: np.ndarray, wanted: np.ndarray, shape: SequenceShape) -> list[list[_Unit]]:
    """First-fit decreasing; a group that fits in no sequence is divided, and its prompt repeated.

    Completions without tokens are skipped.
    """
    sequences: list[_OpenSequence] = []
    wanted = wanted & (ends > 0)
    sizes = np.where(wanted, ends, 0).sum(axis=1) + batch.lengths
    for prompt in np.argsort(-sizes, kind="stable").tolist():
        length, rest = int(batch.lengths[prompt]), np.flatnonzero(wanted[prompt])
        together, shortest = int(sizes[prompt]), length + 1
        whole = next((s for s in sequences if s.tokens >= together and s.rows >= rest.size), None)
        for sequence in sequences if whole is None else [whole]:
            if rest.size and sequence.rows and sequence.tokens >= shortest:
                rest = _put(sequence, prompt, length, rest, ends)
        while rest.size:
            sequences.append(_OpenSequence(shape.tokens, shape.rows))
            rest = _put(sequences[-1], prompt, length, rest, ends)
    return [sequence.units for sequence in sequences]


def _put(sequence: _OpenSequence, prompt: int, length: int, rest: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Puts as many of a prompt's completions into a sequence as fit, and returns the rest."""
    count = sequence.fitting(length, ends[prompt, rest])
    if count:
        taken = rest[:count]
        sequence.add(_Unit(prompt, tuple(taken.tolist()), length + int(ends[prompt, taken].sum())))
    return rest[count:]


class _Laid(NamedTuple):
    """Tokens and places of one sequence or of several stacked ones; fields as in `Microbatch` and `Packing`."""

    tokens: Int[np.ndarray, "*sequences tokens"]
    source: Int[np.ndarray, "*sequences tokens"]
    positions: Int[np.ndarray, "*sequences tokens"]
    tokens_at: Int[np.ndarray, "*sequences rows places"]
    places_of: Int[np.ndarray, "*sequences tokens samples"]
    lengths: Int[np.ndarray, "*sequences rows"]

    @classmethod
    def stack(cls, laid: Sequence[_Laid]) -> _Laid:
        """Stacks several sequences."""
        return cls(*(np.stack(arrays) for arrays in zip(*laid, strict=True)))


def _lay_out(units: Sequence[_Unit], batch: Batch, ends: np.ndarray, shape: SequenceShape) -> _Laid:
    """Lays out the tokens of units in one sequence, and records the place of each."""
    none = shape.rows * shape.places
    tokens, positions = np.zeros(shape.tokens, np.int32), np.zeros(shape.tokens, np.int32)
    source = np.full(shape.tokens, -1, np.int32)
    tokens_at = np.full((shape.rows, shape.places), shape.tokens, np.int32)
    places_of = np.full((shape.tokens, shape.samples), none, np.int32)
    lengths = np.ones(shape.rows, np.int32)  # an unused row has length 1, because some kernels need a positive length
    width = batch.completions.shape[2]
    # Completions come before prompts: the tokens to score are contiguous, and the output head skips the rest.
    at, start = 0, sum(unit.tokens - int(batch.lengths[unit.prompt]) for unit in units)
    row = 0
    for prompt, samples, _ in units:
        length = int(batch.lengths[prompt])
        asked = np.arange(start, start + length)
        tokens[asked], positions[asked] = batch.prompts[prompt, :length], np.arange(length)
        for share, sample in enumerate(samples):
            end = int(ends[prompt, sample])
            own = np.arange(at, at + end)
            tokens[own] = batch.completions[prompt, sample, :end]
            positions[own] = length + np.arange(end)
            source[own] = (prompt * batch.completions.shape[1] + sample) * width + np.arange(end)
            tokens_at[row, : length + end] = np.concatenate([asked, own])
            first = row * shape.places
            places_of[asked, share] = first + np.arange(length)
            places_of[own, 0] = first + length + np.arange(end)
            lengths[row] = length + end
            at, row = at + end, row + 1
        start += length
    return _Laid(tokens, source, positions, tokens_at, places_of, lengths)


def _owners(units: Sequence[_Unit], batch: Batch, tokens: int) -> Int[np.ndarray, " tokens"]:
    """The prompt of each token of a sequence that `_lay_out` lays out; −1 for padding."""
    prompts = np.array([unit.prompt for unit in units], np.int32)
    asked = batch.lengths[prompts]
    answered = np.array([unit.tokens for unit in units], np.int32) - asked
    owners = np.repeat(np.tile(prompts, 2), np.concatenate([answered, asked]))
    return np.pad(owners, (0, tokens - owners.size), constant_values=-1)


def pack(
    batch: Batch,
    weights: np.ndarray,
    shapes: Sequence[SequenceShape],
    sequences: int = 1,
    wanted: np.ndarray | None = None,
    by_prompt: bool = False,
) -> Iterator[Microbatch]:
    """Packs a rollout into microbatches of `sequences` sequences each, first-fit by length.

    A microbatch is laid out only when requested, so that the devices compute one while the host prepares the next.

    Args:
      batch: rollout to pack.
      weights: weight of each token's loss, float32 `[N, G, T]`, from `losses.token_weights`.
      shapes: shapes of the run's sequences, from `sequence_shapes`.
      sequences: B, the number of sequences per microbatch.
      wanted: completions to include, bool `[N, G]`; None includes all.
      by_prompt: whether the microbatches say which prompt each token belongs to.

    Yields:
      The microbatches; none if no completion is wanted. Microbatches of one shape run the same compiled program.
    """
    ends = np.where(batch.mask, np.arange(1, batch.mask.shape[2] + 1), 0).max(axis=-1)
    left = np.ones(ends.shape, bool) if wanted is None else wanted
    rows = batch.lengths[:, None] + ends
    for shape in shapes:
        bins = _fill(batch, ends, left & (rows <= shape.places), shape)
        bins += [[] for _ in range(-len(bins) % sequences)]
        left = left & (rows > shape.places)
        for first in range(0, len(bins), sequences):
            units = bins[first : first + sequences]
            laid = _Laid.stack([_lay_out(each, batch, ends, shape) for each in units])
            owners = np.stack([_owners(each, batch, shape.tokens) for each in units]) if by_prompt else None
            yield _microbatch(batch, weights, laid, owners)


def empty_microbatch(
    shape: SequenceShape, sequences: int = 1, *, old: bool = False, ref: bool = False, by_prompt: bool = False
) -> Microbatch:
    """Creates a microbatch without tokens, to compile a program in advance.

    Args:
      shape: shape of the sequences.
      sequences: B, the number of sequences.
      old: whether to include log-probabilities before the update.
      ref: whether to include log-probabilities of the reference policy.
      by_prompt: whether to include the prompt of each token.
    """
    zeros = np.zeros((1, shape.samples, 1), np.float32)
    batch = Batch(
        prompts=np.zeros((1, 1), np.int32),
        lengths=np.ones(1, np.int32),
        completions=np.zeros(zeros.shape, np.int32),
        mask=zeros > 0,
        rollout_logprobs=zeros,
        advantages=zeros[:, :, 0],
        old_logprobs=zeros if old else None,
        ref_logprobs=zeros if ref else None,
    )
    laid = [_lay_out((), batch, np.zeros(zeros.shape[:2], int), shape)] * sequences
    owners = np.stack([_owners((), batch, shape.tokens)] * sequences) if by_prompt else None
    return _microbatch(batch, zeros, _Laid.stack(laid), owners)


def _microbatch(batch: Batch, weights: np.ndarray, laid: _Laid, owners: np.ndarray | None) -> Microbatch:
    source = laid.source
    spread = batch.advantages
    if spread.ndim == 2:
        spread = np.broadcast_to(spread[:, :, None], batch.mask.shape)
    per_token = lambda x: None if x is None else np.where(source >= 0, x.reshape(-1)[source], 0)
    return Microbatch(
        tokens=laid.tokens,
        packing=Packing(laid.positions, laid.tokens_at, laid.places_of, laid.lengths),
        source=source,
        mask=per_token(batch.mask).astype(bool),
        weights=per_token(weights),
        advantages=per_token(spread),
        rollout_logprobs=per_token(batch.rollout_logprobs),
        old_logprobs=per_token(batch.old_logprobs),
        ref_logprobs=per_token(batch.ref_logprobs),
        prompt=owners,
    )


def unpack(microbatches: Sequence[Microbatch], values: Sequence[jax.Array | np.ndarray], batch: Batch) -> np.ndarray:
    """Restores per-token values of packed microbatches to `[N, G, T]`, with zero for tokens that none holds."""
    out = np.zeros(batch.completions.size, np.float32)
    for microbatch, value in zip(microbatches, values, strict=True):
        there = microbatch.source >= 0
        out[microbatch.source[there]] = to_host(value)[there]
    return out.reshape(batch.completions.shape)
