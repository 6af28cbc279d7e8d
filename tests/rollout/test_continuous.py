"""Prompts that arrive in chunks: exactly what `generate` draws, whatever the chunk, the slots and the moment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import FullPolicy, LoRA, Policy, TinyLoRA, adapt, factorize
from tinylora_jax.io.hf import quantize_maps
from tinylora_jax.rollout import ContinuousBatch, QueueSizes, Sampling, continuous, generate, lower_continuous

PROMPTS, SAMPLES, WIDTH = 8, 3, 6
LENGTHS = np.array([3, 5, 1, 6, 2, 6, 4, 1], np.int32)
IDS = np.array([11, 2, 2**32 - 5, 7, 1, 0, 99, 3], np.uint32)
KEY = jax.random.key(0)
STOPS = Sampling(10, stop_tokens=tuple(range(0, 97, 6)))


@pytest.fixture(scope="module")
def prompts(qwen2):
    tokens = np.random.default_rng(1).integers(0, qwen2.config.vocab_size, (PROMPTS, WIDTH))
    return np.where(np.arange(WIDTH) < LENGTHS[:, None], tokens, 55).astype(np.int32)


def whole(config, policy, v, prompts, sampling=STOPS):
    return jax.device_get(generate(config, policy(v), IDS, prompts, LENGTHS, KEY, sampling, SAMPLES))


def arriving(config, policy, v, prompts, chunk, slots, every, sampling=STOPS, key=KEY, may_shrink=False):
    """Adds a chunk as soon as none waits; the progress at the end, and the counts of tokens on the way."""
    batch = ContinuousBatch(config, policy, v, key, sampling, QueueSizes(PROMPTS, chunk, SAMPLES, slots, WIDTH))
    counts, progress = [0], None
    while progress is None or (progress.lengths == 0).any():
        if batch.num_added < PROMPTS and (progress is None or not progress.waiting):
            part = slice(batch.num_added, batch.num_added + chunk)
            batch.add(IDS[part], prompts[part], LENGTHS[part])
        batch.advance(every, batch.num_added < PROMPTS, may_shrink)
        progress = batch.progress()
        counts.append(int(progress.num_tokens))
    return progress, counts


def check(progress, expected):
    for name in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(progress, name), getattr(expected, name))
    np.testing.assert_allclose(progress.logprobs, expected.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    ("chunk", "slots", "every"),
    [
        (2, 24, 100),  # more slots than a chunk has completions
        (4, 5, 3),  # completions of two chunks decode together, with pauses
        pytest.param(8, 1, 7, marks=pytest.mark.slow),  # one slot
    ],
)
def test_the_completions_are_those_of_generate(qwen2, policy, v, prompts, chunk, slots, every):
    expected = whole(qwen2.config, policy, v, prompts)
    progress, counts = arriving(qwen2.config, policy, v, prompts, chunk, slots, every)
    check(progress, expected)
    assert counts == sorted(counts) and counts[-1] == expected.lengths.sum()
    assert progress.slot_steps >= counts[-1] and (slots > 1 or progress.slot_steps == counts[-1])
    assert expected.lengths.min() == 1 and expected.lengths.max() == 10, "there must be short ones and long ones"


def test_slots_do_not_idle_while_prompts_may_be_added(qwen2, policy, v, prompts):
    """Five completions are always under way until the last chunk was added."""
    progress, _ = arriving(qwen2.config, policy, v, prompts, 4, 5, 100)
    idle = progress.slot_steps - progress.lengths.sum()
    assert idle < 4 * STOPS.max_new_tokens, "only the end may have empty slots"


@pytest.mark.slow
def test_a_pool_that_shrinks_saves_steps_of_empty_slots(qwen2, policy, v, prompts):
    large, _ = arriving(qwen2.config, policy, v, prompts, 4, 64, 4)
    small, _ = arriving(qwen2.config, policy, v, prompts, 4, 64, 4, may_shrink=True)
    check(small, large)
    check(small, whole(qwen2.config, policy, v, prompts))
    longest, lengths = large.lengths.max(), large.lengths
    assert large.slot_steps == 64 * longest
    in_use = [int((lengths > step).sum()) for step in range(longest)]
    # All 24 completions begin together in 64 slots. At the end of a part they go on in 32, and in 8 if so few are left.
    assert max(in_use) == 24 and min(in_use) < 8
    assert small.slot_steps < 40 * longest


@pytest.mark.slow
def test_of_quantized_weights_and_a_quantized_cache(qwen2, v, prompts):
    params = quantize_maps(qwen2.params, "int8")
    policy = Policy(params, factorize(params, TinyLoRA(rank=2, u=2, n_tie=4, seed=3)))
    sampling = Sampling(10, stop_tokens=STOPS.stop_tokens, quantize_cache="int8")
    expected = whole(qwen2.config, policy, v, prompts, sampling)
    check(arriving(qwen2.config, policy, v, prompts, 4, 5, 4, sampling)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_of_other_methods(qwen2, prompts, method):
    policy = adapt(qwen2.params, LoRA(rank=2)) if method == "lora" else FullPolicy(qwen2.params)
    leaves, structure = jax.tree.flatten(policy.init())
    keys = jax.random.split(jax.random.key(4), len(leaves))
    moved = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    v = jax.tree.unflatten(structure, moved)
    base = whole(qwen2.config, policy, policy.init(), prompts)
    expected = whole(qwen2.config, policy, v, prompts)
    assert (expected.tokens != base.tokens).any(), "v must matter"
    check(arriving(qwen2.config, policy, v, prompts, 4, 5, 4)[0], expected)


def test_nothing_compiles_again_and_another_key_draws_others(qwen2, policy, v, prompts):
    first, _ = arriving(qwen2.config, policy, v, prompts, 4, 5, 3)
    programs = continuous._open, continuous._add, continuous._advance
    before = [program._cache_size() for program in programs]
    other, _ = arriving(qwen2.config, policy, 0.5 * v, prompts, 4, 5, 2, key=jax.random.key(1))
    assert [program._cache_size() for program in programs] == before
    assert (other.tokens != first.tokens).any(axis=1).mean() > 0.8, "a few may end at once with the same token"


def test_all_programs_can_be_lowered_from_shapes(qwen2, policy, v):
    sizes = QueueSizes(PROMPTS, 4, SAMPLES, 5, WIDTH)
    shapes = jax.eval_shape(lambda policy, v: (policy, v), policy, v)
    lowered = list(lower_continuous(qwen2.config, *shapes, STOPS, sizes))
    assert len(lowered) == 3
    shrinking = QueueSizes(PROMPTS, 4, SAMPLES, 64, WIDTH)  # to 32, then to 8 slots
    assert len(list(lower_continuous(qwen2.config, *shapes, STOPS, shrinking))) == 3 + 2 * 2


def test_wrong_chunks_are_refused(qwen2, policy, v, prompts):
    batch = ContinuousBatch(qwen2.config, policy, v, KEY, STOPS, QueueSizes(4, 4, SAMPLES, 5, WIDTH))
    with pytest.raises(ValueError, match=r"a chunk has prompts of shape \[4, 6\], got \[3, 6\]"):
        batch.add(IDS[:3], prompts[:3], LENGTHS[:3])
    batch.add(IDS[:4], prompts[:4], LENGTHS[:4])
    with pytest.raises(ValueError, match="all 4 prompts were added"):
        batch.add(IDS[4:], prompts[4:], LENGTHS[4:])
    assert jnp.sum(batch._buffers.state.waiting) == 0
