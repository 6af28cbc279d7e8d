"""Sampling of the next token: temperature, top-k and top-p, with one random number per token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from tinylora_jax.models import CACHE_SCHEMES

_BLOCK = 128  # block size of the two-level search; a vocabulary of 151,936 becomes 1,187 partial sums


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of completions.

    Attributes:
      max_new_tokens: largest number of tokens in a completion, including the stop token.
      temperature: divisor of the logits; 0 takes the most likely token.
      top_k: number of most likely tokens to sample from; 0 for all.
      top_p: probability mass of the most likely tokens to sample from; 1 for all.
      stop_tokens: ids of the tokens that end a completion.
      quantize_cache: storage of the KV cache: `none` keeps the dtype of the weights; `int8` has one scale per position
        and head. In int8 the log-probabilities are those of the rounded cache, not exactly the trainer's.

    >>> Sampling(max_new_tokens=8, temperature=-1.0)
    Traceback (most recent call last):
    ...
    ValueError: Sampling: temperature must be finite and >= 0, got -1.0
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    quantize_cache: str = "none"

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"Sampling: max_new_tokens must be >= 1, got {self.max_new_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"Sampling: temperature must be finite and >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"Sampling: top_k must be >= 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}")
        if self.quantize_cache not in CACHE_SCHEMES:
            expected = " or ".join(CACHE_SCHEMES)
            raise ValueError(f"Sampling: quantize_cache must be {expected}, got {self.quantize_cache!r}")

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p excludes tokens, which needs all scores of a row on one device."""
        return self.top_k > 0 or self.top_p < 1

    @property
    def logprob_temperature(self) -> float:
        """Temperature of the reported log-probabilities; 1 for greedy decoding."""
        return self.temperature or 1.0


def completion_keys(key: Key[Array, "*prompts"], ids: UInt32[Array, " prompts"], samples: int) -> Key[Array, " rows"]:
    """Derives one key per completion from (key, prompt id, sample index), never from its place in the batch.

    Args:
      key: PRNG key of the step, derived from (seed, step); or one per prompt if several runs sample together.
      ids: prompt ids, uint32 `[prompts]`.
      samples: number of completions per prompt.

    Returns:
      Keys in prompt-major order, `[prompts × samples]`.
    """
    of_prompt = jax.vmap(jax.random.fold_in, (0 if key.ndim else None, 0))(key, ids)
    per_sample = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(per_sample, (0, None))(of_prompt, jnp.arange(samples, dtype=jnp.uint32)).reshape(-1)


def uniforms(keys: Key[Array, " rows"], token_index: Int[Array, ""]) -> Float[Array, " rows"]:
    """One number in [0, 1) per completion, which depends only on its key and the token's index."""
    return jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, token_index)))(keys)


def _truncate(scaled: Float[Array, "rows vocab"], sampling: Sampling) -> Float[Array, "rows vocab"]:
    """Sets scores excluded by top-k, then by top-p of the rest, to −∞; ties with the last kept token stay."""
    if 0 < sampling.top_k < scaled.shape[-1]:
        worst = jax.lax.top_k(scaled, sampling.top_k)[0][:, -1:]
        scaled = jnp.where(scaled < worst, -jnp.inf, scaled)
    if sampling.top_p < 1:
        ordered = jnp.sort(scaled, axis=-1, descending=True)
        p = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(p, axis=-1) - p < sampling.top_p  # a token is kept while the sum before it is too small
        worst = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < worst, -jnp.inf, scaled)
    return scaled


def _running_sums(weights: Float[Array, "rows n"]) -> Float[Array, "rows n"]:
    """Cumulative sums, as two small products: a scan would take dozens of kernels."""
    rows, n = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -n % _BLOCK))).reshape(rows, -1, _BLOCK)
    inside = jnp.matmul(blocks, jnp.triu(jnp.ones((_BLOCK, _BLOCK), weights.dtype)), precision="highest")
    count = blocks.shape[1]
    earlier = jnp.triu(jnp.ones((count, count), weights.dtype), 1)
    offsets = jnp.matmul(inside[:, :, -1], earlier, precision="highest")
    return (inside + offsets[:, :, None]).reshape(rows, -1)[:, :n]


def _search(
    weights: Float[Array, "rows n"], cumulative: Float[Array, "rows n"], target: Float[Array, " rows"]
) -> Int[Array, " rows"]:
    """Index of the first weight whose cumulative sum exceeds `target`, never one with zero weight."""
    # Rounding must not select an index past the last nonzero weight.
    target = jnp.minimum(target, jnp.max(cumulative, axis=-1) * (1 - 2.0**-22))
    return jnp.argmax((cumulative > target[:, None]) & (weights > 0), axis=-1)


def inverse_cdf(
    scores: Float[Array, "rows vocab"], uniform: Float[Array, " rows"], axes: tuple[str, ...] = ()
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Samples an index with probability softmax(scores) from one uniform number per row; also log Σ exp(scores).

    The search covers sums over blocks of 128 first, then the chosen block. So it needs neither a random number per
    vocabulary entry nor a cumulative sum over the vocabulary. It reads the scores twice and writes no array of their
    size.

    Args:
      scores: unnormalized log-probabilities, float32 `[rows, vocab]`.
      uniform: random numbers in [0, 1), float32 `[rows]`.
      axes: mesh axes that split the vocabulary, inside `jax.shard_map`. Devices then exchange a few numbers per row to
        find the device whose share of the cumulative sum contains the number.
    """
    rows, vocab = scores.shape
    padded = jnp.pad(scores, ((0, 0), (0, -vocab % _BLOCK)), constant_values=-jnp.inf) if vocab % _BLOCK else scores
    blocks = padded.reshape(rows, -1, _BLOCK)
    top = _largest(jnp.max(scores, axis=-1), axes)
    sums = jnp.sum(jnp.exp(blocks - top[:, None, None]), axis=-1)
    cumulative = _running_sums(sums)
    start, end, total = _shares(cumulative[:, -1], axes)
    target = uniform * total
    if axes:  # rounding must not select an index past the last device
        target = jnp.minimum(target, total * (1 - 2.0**-22))
    here = (start <= target) & (target < end)
    target = target - start
    block = _search(sums, cumulative, target)
    before = jnp.where(block > 0, jnp.take_along_axis(cumulative, block[:, None] - 1, axis=1)[:, 0], 0.0)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    inside = jnp.exp(inside - top[:, None])
    index = block * _BLOCK + _search(inside, _running_sums(inside), target - before)
    return _from_one(index + _first(vocab, axes), here, axes), top + jnp.log(total)


def _largest(x: Float[Array, " rows"], axes: tuple[str, ...]) -> Float[Array, " rows"]:
    return jax.lax.pmax(x, axes) if axes else x


def _from_one(x: Array, here: Bool[Array, " rows"], axes: tuple[str, ...]) -> Array:
    """Broadcasts each row's value from the device where `here` is true."""
    return jax.lax.psum(jnp.where(here, x, 0), axes) if axes else x


def _first(vocab: int, axes: tuple[str, ...]) -> Int[Array, ""] | int:
    """The first token of this device's part of the vocabulary."""
    return jax.lax.axis_index(axes) * vocab if axes else 0


def _shares(
    own: Float[Array, " rows"], axes: tuple[str, ...]
) -> tuple[Float[Array, " rows"], Float[Array, " rows"], Float[Array, " rows"]]:
    """Start and end of this device's share of the cumulative sum, and the total, which is equal on every device."""
    if not axes:
        return jnp.zeros_like(own), jnp.full_like(own, jnp.inf), own
    ends = jnp.cumsum(jax.lax.all_gather(own, axes), axis=0)
    place = jax.lax.axis_index(axes)
    return jnp.where(place > 0, ends[place - 1], 0.0), ends[place], ends[-1]


def sample(
    logits: Float[Array, "rows vocab"], uniform: Float[Array, " rows"], sampling: Sampling, axes: tuple[str, ...] = ()
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """Samples one token per row.

    Args:
      logits: scores before softmax, float32 `[rows, vocab]`.
      uniform: random numbers in [0, 1), float32 `[rows]`; unused in greedy decoding.
      sampling: sampling settings.
      axes: mesh axes that split the vocabulary, inside `jax.shard_map`; top-k and top-p are then unavailable.

    Returns:
      Token ids, int32 `[rows]`, and their log-probabilities under softmax(logits / temperature), before top-k and
      top-p; this is the policy that the trainer differentiates.
    """
    scaled = logits / sampling.logprob_temperature
    if sampling.temperature == 0:
        token, log_normalizer = _greedy(logits, axes)
    else:
        kept = _truncate(scaled, sampling)
        token, log_normalizer = inverse_cdf(kept, uniform, axes)
        if kept is not scaled:
            log_normalizer = jax.nn.logsumexp(scaled, axis=-1)
    local = token - _first(logits.shape[1], axes)
    here = (local >= 0) & (local < logits.shape[1])
    chosen = jnp.take_along_axis(scaled, jnp.where(here, local, 0)[:, None], axis=1)[:, 0]
    return token.astype(jnp.int32), _from_one(chosen, here, axes) - log_normalizer


def _greedy(
    logits: Float[Array, "rows vocab"], axes: tuple[str, ...]
) -> tuple[Int[Array, " rows"], Float[Array, " rows"]]:
    """The first most likely token, and log Σ exp(logits)."""
    token, log_normalizer = jnp.argmax(logits, axis=-1), jax.nn.logsumexp(logits, axis=-1)
    if not axes:
        return token, log_normalizer
    own = jnp.max(logits, axis=-1)
    token = jnp.where(own == _largest(own, axes), token + _first(logits.shape[1], axes), jnp.iinfo(jnp.int32).max)
    top = _largest(log_normalizer, axes)
    return jax.lax.pmin(token, axes), top + jnp.log(jax.lax.psum(jnp.exp(log_normalizer - top), axes))
