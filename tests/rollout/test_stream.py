"""Streaming: part by part exactly what `generate` draws, each adapter as if it were alone, compiled once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.rollout import Sampling, generate, stream
from tinylora_jax.rollout.stream import _advance

LENGTHS = np.array([3, 5, 1, 6], np.int32)
IDS = np.array([11, 2, 2**32 - 5, 7], np.uint32)
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def prompts(qwen2):
    tokens = np.random.default_rng(1).integers(0, qwen2.config.vocab_size, (4, 6))
    return np.where(np.arange(6) < LENGTHS[:, None], tokens, 55).astype(np.int32)


def joined(parts, field):
    """The parts of every row, one after the other."""
    rows = range(len(parts[0].lengths))
    return [np.concatenate([getattr(p, field)[row, : p.lengths[row]] for p in parts]) for row in rows]


@pytest.fixture(scope="module")
def arguments(qwen2, policy, v, prompts):
    """Every prompt has another adapter."""
    several = policy(jnp.stack([v, -v, jnp.zeros_like(v), 2 * v]))
    return qwen2.config, several, jnp.asarray(IDS), jnp.asarray(prompts), jnp.asarray(LENGTHS)


SAMPLING = Sampling(10, stop_tokens=tuple(range(0, 97, 6)))


@pytest.mark.parametrize("every", [1, 4])  # of 10 tokens
def test_the_parts_are_what_generate_draws(arguments, every):
    whole = generate(*arguments, KEY, SAMPLING, samples=3)
    parts = list(stream(*arguments, KEY, SAMPLING, samples=3, every=every))
    assert all(part.tokens.shape == part.logprobs.shape == (12, every) for part in parts)
    lengths = sum(part.lengths for part in parts)
    np.testing.assert_array_equal(lengths, whole.lengths)
    assert len(parts) == -(-lengths.max() // every), "it ends with the longest"
    np.testing.assert_array_equal(sum(part.stopped for part in parts), whole.stopped)
    assert sum(part.slot_steps for part in parts) == whole.slot_steps
    tokens, logprobs = joined(parts, "tokens"), joined(parts, "logprobs")
    for row, length in enumerate(lengths):
        np.testing.assert_array_equal(tokens[row], whole.tokens[row, :length])
        np.testing.assert_allclose(logprobs[row], whole.logprobs[row, :length], atol=1e-5)
    assert lengths.min() < 4 < lengths.max(), "there must be short ones and long ones"


def test_nothing_compiles_from_part_to_part_and_leaving_early_harms_nothing(arguments):
    draw = lambda key: stream(*arguments, key, SAMPLING, samples=3, every=4)
    first = list(draw(KEY))
    before = _advance._cache_size()
    left = draw(KEY)
    np.testing.assert_array_equal(next(left).tokens, first[0].tokens)
    left.close()
    np.testing.assert_array_equal([part.tokens for part in draw(KEY)], [part.tokens for part in first])
    other = next(draw(jax.random.key(1)))
    assert _advance._cache_size() == before
    assert (other.tokens != first[0].tokens).any()
