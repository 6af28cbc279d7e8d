"""A graded rollout as arrays, and its packing into sequences of one static size."""

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
_ROOM = 3  # places in a sequence's rows for each of its tokens: rows may be a third full
_NARROWEST = 512  # places; rows that fit into fewer are not sorted any further


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """One graded rollout of N prompts with G samples of at most T tokens, as arrays of the host.

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

    prompts: Int[np.ndarray, "prompts prompt_tokens"]
    lengths: Int[np.ndarray, " prompts"]
    completions: Int[np.ndarray, "prompts samples tokens"]
    mask: Bool[np.ndarray, "prompts samples tokens"]
    rollout_logprobs: Float[np.ndarray, "prompts samples tokens"]
    advantages: Float[np.ndarray, "prompts samples"]
    old_logprobs: Float[np.ndarray, "prompts samples tokens"] | None = None
    ref_logprobs: Float[np.ndarray, "prompts samples tokens"] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Microbatch:
    """A microbatch of a rollout, packed: B sequences of T tokens; every field but `packing` is `[B, T]`.

    Attributes:
      tokens: int32; completions, then prompts, then 0 in the unused rest.
      packing: how the tokens form rows.
      source: int32, the place of each token in the rollout's flat `[N·G·T]` completions; −1 for others.
      mask: bool, as in `Batch`.
      weights: float32, of each token's loss.
      advantages: float32.
      rollout_logprobs: float32.
      old_logprobs: float32 or None.
      ref_logprobs: float32 or None.
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


class _Unit(NamedTuple):
    """A prompt with some of its completions, which share it."""

    prompt: int
    samples: tuple[int, ...]
    tokens: int


class SequenceShape(NamedTuple):
    """The static size of a sequence: the same for every rollout of a run, so that nothing compiles twice."""

    tokens: int
    rows: int
    places: int
    samples: int


def sequence_shapes(
    prompts: int, prompt_tokens: int, samples: int, completion_tokens: int, max_tokens: int, room: int = _ROOM
) -> tuple[SequenceShape, ...]:
    """The sizes of sequences for rollouts of these bounds, by width of their rows, the narrowest first.

    Most completions are far shorter than the longest allowed, and a row costs attention for all its places: so
    short rows and long ones go to different sequences.

    Args:
      prompts: N.
      prompt_tokens: P, the padded width of the prompts.
      samples: G.
      completion_tokens: T, the longest completion.
      max_tokens: tokens in a sequence; raised to one prompt and completion, lowered to the whole rollout.
      room: places in a sequence's rows for each of its tokens.
    """
    row = prompt_tokens + completion_tokens
    own = prompt_tokens / samples + completion_tokens  # a row's tokens, its share of the prompt among them
    filled = min(1 / room, 0.8 * own / row)  # many short completions of one prompt are many rows of few tokens
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
    """A sequence being filled."""

    tokens: int  # free
    rows: int  # free
    units: list[_Unit] = field(default_factory=list)

    def fitting(self, prompt: int, ends: np.ndarray) -> int:
        """How many of these completions fit, beside their prompt."""
        return min(self.rows, int(np.searchsorted(prompt + np.cumsum(ends), self.tokens, side="right")))

    def add(self, unit: _Unit) -> None:
        self.units.append(unit)
        self.tokens -= unit.tokens
        self.rows -= len(unit.samples)


def _fill(batch: Batch, ends: np.ndarray, wanted: np.ndarray, shape: SequenceShape) -> list[list[_Unit]]:
    """First-fit decreasing; a group that fits nowhere whole is divided, and its prompt repeated.

    Completions without tokens are left out.
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
    """Puts what fits of a prompt's completions into a sequence and gives the rest."""
    count = sequence.fitting(length, ends[prompt, rest])
    if count:
        taken = rest[:count]
        sequence.add(_Unit(prompt, tuple(taken.tolist()), length + int(ends[prompt, taken].sum())))
    return rest[count:]


class _Laid(NamedTuple):
    """Tokens and their places, of one sequence or, stacked, of several: fields as in `Microbatch` and `Packing`."""

    tokens: Int[np.ndarray, "*sequences tokens"]
    source: Int[np.ndarray, "*sequences tokens"]
    positions: Int[np.ndarray, "*sequences tokens"]
    tokens_at: Int[np.ndarray, "*sequences rows places"]
    places_of: Int[np.ndarray, "*sequences tokens samples"]
    lengths: Int[np.ndarray, "*sequences rows"]

    @classmethod
    def stack(cls, laid: Sequence[_Laid]) -> _Laid:
        """Several sequences as one."""
        return cls(*(np.stack(arrays) for arrays in zip(*laid, strict=True)))


def _lay_out(units: Sequence[_Unit], batch: Batch, ends: np.ndarray, shape: SequenceShape) -> _Laid:
    """Puts the tokens of units into one sequence, and says where each stands."""
    none = shape.rows * shape.places
    tokens, positions = np.zeros(shape.tokens, np.int32), np.zeros(shape.tokens, np.int32)
    source = np.full(shape.tokens, -1, np.int32)
    tokens_at = np.full((shape.rows, shape.places), shape.tokens, np.int32)
    places_of = np.full((shape.tokens, shape.samples), none, np.int32)
    lengths = np.ones(shape.rows, np.int32)  # an unused row is one token of nothing: some kernels need a length
    width = batch.completions.shape[2]
    # Completions first, prompts after them: what is scored stands together, and the head skips the rest.
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


def pack(
    batch: Batch,
    weights: np.ndarray,
    shapes: Sequence[SequenceShape],
    sequences: int = 1,
    wanted: np.ndarray | None = None,
) -> Iterator[Microbatch]:
    """Cuts a rollout into microbatches of `sequences` sequences each, first-fit by length.

    A microbatch is laid out when it is asked for, so that the devices work on one while the host makes the next.

    Args:
      batch: the rollout.
      weights: float32 `[N, G, T]`, `losses.token_weights` of it.
      shapes: `sequence_shapes` of the run.
      sequences: B, sequences a microbatch.
      wanted: bool `[N, G]`, completions to take; None takes all.

    Yields:
      The microbatches; none if no completion is wanted. Those of one shape run one compiled program.
    """
    ends = np.where(batch.mask, np.arange(1, batch.mask.shape[2] + 1), 0).max(axis=-1)
    left = np.ones(ends.shape, bool) if wanted is None else wanted
    rows = batch.lengths[:, None] + ends
    for shape in shapes:
        bins = _fill(batch, ends, left & (rows <= shape.places), shape)
        bins += [[] for _ in range(-len(bins) % sequences)]
        left = left & (rows > shape.places)
        for first in range(0, len(bins), sequences):
            laid = [_lay_out(units, batch, ends, shape) for units in bins[first : first + sequences]]
            yield _microbatch(batch, weights, _Laid.stack(laid))


def empty_microbatch(shape: SequenceShape, sequences: int = 1, *, old: bool = False, ref: bool = False) -> Microbatch:
    """A microbatch without a token, for compiling a program before it is needed.

    Args:
      shape: shape of the sequences.
      sequences: B.
      old: with log-probabilities before the update.
      ref: with those of the reference policy.
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
    return _microbatch(batch, zeros, _Laid.stack(laid))


def _microbatch(batch: Batch, weights: np.ndarray, laid: _Laid) -> Microbatch:
    source = laid.source
    spread = np.broadcast_to(batch.advantages[:, :, None], batch.mask.shape)
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
    )


def unpack(microbatches: Sequence[Microbatch], values: Sequence[jax.Array | np.ndarray], batch: Batch) -> np.ndarray:
    """Per-token values of packed microbatches, back in the rollout's `[N, G, T]`; zero where none has the token."""
    out = np.zeros(batch.completions.size, np.float32)
    for microbatch, value in zip(microbatches, values, strict=True):
        there = microbatch.source >= 0
        out[microbatch.source[there]] = to_host(value)[there]
    return out.reshape(batch.completions.shape)
