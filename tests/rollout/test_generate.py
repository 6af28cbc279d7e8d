"""Generation: what transformers generates, whoever shares the batch, with the trainer's log-probabilities."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from tinylora_jax.adapters import Policy, TinyLoRA, factorize
from tinylora_jax.io.hf import quantize_maps
from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._weights import LazyTensor, build_tree
from tinylora_jax.models import forward, logits
from tinylora_jax.rollout import Sampling, generate
from tinylora_jax.training import Batch, pack, packed_logprobs, sequence_shapes, unpack

LENGTHS = np.array([3, 5, 1, 6])
IDS = np.array([11, 2, 2**32 - 5, 7], np.uint32)
KEY = jax.random.key(0)
TEN = Sampling(max_new_tokens=10)


@pytest.fixture(scope="module")
def prompts(qwen2):
    """Four right-padded prompts; the padding is not zero, so that looking at it shows."""
    tokens = np.random.default_rng(1).integers(0, qwen2.config.vocab_size, (4, 6))
    return np.where(np.arange(6) < LENGTHS[:, None], tokens, 55)


_scores = jax.jit(packed_logprobs, static_argnames=("config", "temperature", "remat"))


def trainer(config, params, prompts, lengths, completions, ends, temperature):
    """The trainer's log-probabilities of completions `[N, G, T]` cut at `ends`."""
    n, samples, width = completions.shape
    mask = np.arange(width) < np.asarray(ends).reshape(n, samples, 1)
    zeros = np.zeros(mask.shape, np.float32)
    batch = Batch(np.asarray(prompts), np.asarray(lengths), np.asarray(completions), mask, zeros, zeros[:, :, 0])
    parts = list(pack(batch, zeros, sequence_shapes(n, prompts.shape[1], samples, width, 10_000)))
    return unpack(parts, [_scores(config, params, p.tokens, p.packing, p.mask, temperature)[0] for p in parts], batch)


def run(config, params, prompts, sampling=TEN, rows=slice(None), samples=1, key=KEY, width=6, slots=0):
    tokens = np.pad(prompts[rows], ((0, 0), (0, width - 6)), constant_values=44)
    return generate(
        config,
        params,
        jnp.asarray(IDS[rows]),
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(LENGTHS[rows], jnp.int32),
        key,
        sampling,
        samples,
        slots,
    )


@pytest.fixture(scope="module")
def adapted(policy, v):
    return policy(v)


@pytest.fixture(scope="module")
def reference(qwen2, adapted, prompts):
    """Two samples of every prompt, without stop tokens."""
    return run(qwen2.config, adapted, prompts, samples=2)


def test_greedy_is_what_transformers_generates():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Qwen2Config(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    state = {n: LazyTensor(tuple(t.shape), lambda t=t: t.detach().numpy()) for n, t in model.state_dict().items()}
    config = parse_config(model.config.to_dict())
    params = build_tree(config, state, jnp.float32)
    prompts = np.random.default_rng(1).integers(0, 97, (4, 6))
    got = run(config, params, prompts, Sampling(max_new_tokens=12, temperature=0.0))
    for row, length in enumerate(LENGTHS):
        with torch.no_grad():
            expected = model.generate(
                torch.tensor(prompts[row : row + 1, :length]),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                do_sample=False,
                max_new_tokens=12,
                pad_token_id=0,
            )[0, length:]
        assert got.tokens[row].tolist() == expected.tolist()
    assert len(np.unique(got.tokens)) > 5, "the model must not just repeat one token"


def test_completions_are_not_all_alike(reference):
    assert len(np.unique(reference.tokens, axis=0)) == 8


@pytest.mark.parametrize(
    ("rows", "samples", "width"),
    [
        ([3, 1, 0, 2], 2, 6),  # another order
        ([2], 3, 6),  # alone, with more samples
        ([1, 3], 1, 9),  # fewer samples, wider padding
    ],
)
def test_a_completion_does_not_depend_on_the_batch(qwen2, adapted, prompts, reference, rows, samples, width):
    got = run(qwen2.config, adapted, prompts, rows=rows, samples=samples, width=width)
    common = min(samples, 2)
    pick = lambda x, n, rows: np.asarray(x).reshape(-1, n, 10)[rows, :common]
    np.testing.assert_array_equal(pick(got.tokens, samples, range(len(rows))), pick(reference.tokens, 2, rows))
    np.testing.assert_allclose(
        pick(got.logprobs, samples, range(len(rows))), pick(reference.logprobs, 2, rows), atol=1e-5
    )


def test_other_keys_and_ids_give_other_completions_without_recompiling(qwen2, adapted, prompts, reference, policy, v):
    config = qwen2.config
    before = generate._cache_size()
    same = run(config, adapted, prompts, samples=2)
    np.testing.assert_array_equal(same.tokens, reference.tokens)
    other_step = run(config, adapted, prompts, samples=2, key=jax.random.fold_in(KEY, 1))
    other_prompts = run(config, policy(0.5 * v), (prompts + 1) % config.vocab_size, samples=2)
    assert generate._cache_size() == before
    changed = np.asarray(other_step.tokens != reference.tokens)
    assert changed.any(axis=1).all(), "every completion must meet new noise at a new step"
    assert np.asarray(other_prompts.tokens != reference.tokens).any(axis=1).all()


@pytest.mark.parametrize(
    "sampling",
    [
        TEN,
        Sampling(max_new_tokens=10, temperature=0.7, top_k=20, top_p=0.9, stop_tokens=(5, 17, 60, 61, 62, 63, 64, 65)),
    ],
)
def test_log_probabilities_are_the_trainers(qwen2, adapted, prompts, sampling):
    got = run(qwen2.config, adapted, prompts, sampling, samples=2)
    completions = got.tokens.reshape(4, 2, 10)
    scores = trainer(qwen2.config, adapted, prompts, LENGTHS, completions, got.lengths, sampling.temperature)
    mask = np.arange(10) < np.asarray(got.lengths)[:, None]
    difference = np.where(mask, scores.reshape(8, 10) - got.logprobs, 0)
    assert np.abs(difference).max() <= 1e-4
    assert np.asarray(got.logprobs)[mask].max() < 0 and mask.sum() > 20

    # And they depend on v: the base model scores the same tokens differently.
    base = np.log(softmax_of(qwen2, prompts, got, 0, sampling.temperature))
    assert np.abs(base - np.asarray(got.logprobs[0, 0])) > 1e-3


def softmax_of(model, prompts, completions, row, temperature):
    """The base model's probability of a completion's first token."""
    config, params = model
    tokens = jnp.asarray(prompts[row : row + 1, : LENGTHS[row]], jnp.int32)
    scores = np.asarray(logits(config, params, forward(config, params, tokens)[0])[0, -1], np.float64) / temperature
    return np.exp(scores[int(completions.tokens[row, 0])]) / np.exp(scores).sum()


def test_a_stop_token_cuts_the_same_completion(qwen2, adapted, prompts, reference):
    # Noise belongs to (prompt, sample, index), so stopping is a cut of the unstopped completion.
    free = np.asarray(reference.tokens)
    stops = (int(free[0, 0]), int(free[3, 4]), int(free[5, 9]), 3)
    got = run(qwen2.config, adapted, prompts, Sampling(max_new_tokens=10, stop_tokens=stops), samples=2)
    for row in range(8):
        ends = [i for i, token in enumerate(free[row]) if token in stops]
        length = ends[0] + 1 if ends else 10
        assert int(got.lengths[row]) == length
        assert bool(got.stopped[row]) == bool(ends)
        assert got.tokens[row].tolist() == [*free[row, :length], *[0] * (10 - length)]
        assert (np.asarray(got.logprobs)[row, length:] == 0).all()
        np.testing.assert_allclose(got.logprobs[row, :length], reference.logprobs[row, :length], atol=1e-5)
    assert int(got.lengths[0]) == 1 and bool(got.stopped[5]), "first and last places must be among the cases"
    assert not np.asarray(got.stopped).all()


def test_one_new_token(qwen2, adapted, prompts, reference):
    first = int(reference.tokens[0, 0])
    got = run(qwen2.config, adapted, prompts, Sampling(max_new_tokens=1, stop_tokens=(first,)), samples=2)
    np.testing.assert_array_equal(got.tokens, reference.tokens[:, :1])
    assert got.lengths.tolist() == [1] * 8
    np.testing.assert_array_equal(got.stopped, reference.tokens[:, 0] == first)


def test_without_stop_tokens_nothing_stops(reference):
    assert reference.lengths.tolist() == [10] * 8
    assert not np.asarray(reference.stopped).any()
    assert (np.asarray(reference.logprobs) < 0).all()


def test_bfloat16_weights_generate_float32_logprobs_close_to_the_trainers(qwen2, policy, v, prompts):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), qwen2.params)
    adapted = type(policy)(half, policy.factors)(v)
    got = run(qwen2.config, adapted, prompts, samples=2)
    completions = got.tokens.reshape(4, 2, 10)
    scores = trainer(qwen2.config, adapted, prompts, LENGTHS, completions, got.lengths, 1.0)
    assert got.logprobs.dtype == scores.dtype == jnp.float32
    # The paper measures 0.0022–0.0030 between its merged rollouts and its trainer; the same function does better.
    assert np.abs(np.exp(scores.reshape(8, 10)) - np.exp(got.logprobs)).mean() < 0.002


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_quantized_weights_the_logprobs_are_the_trainers_too(qwen2, v, prompts, scheme, dtype):
    params = quantize_maps(jax.tree.map(lambda x: x.astype(dtype), qwen2.params), scheme)
    weights = Policy(params, factorize(params, TinyLoRA(rank=2, u=2, n_tie=4, seed=3)))(v)
    got = run(qwen2.config, weights, prompts, samples=2)
    scores = trainer(qwen2.config, weights, prompts, LENGTHS, got.tokens.reshape(4, 2, 10), got.lengths, 1.0)
    apart = np.abs(np.exp(scores.reshape(8, 10)) - np.exp(got.logprobs))
    assert apart.max() <= 1e-4 if dtype == jnp.float32 else apart.mean() < 0.002


STOPS = Sampling(max_new_tokens=10, stop_tokens=tuple(range(0, 97, 6)))


@pytest.fixture(scope="module")
def pooled(qwen2, adapted, prompts):
    """64 completions of many lengths, all in a pool of their own: the pool also shrinks on the way."""
    return run(qwen2.config, adapted, prompts, STOPS, samples=16)


@pytest.mark.parametrize("slots", [1, 3, 17, 63])
def test_the_number_of_slots_changes_nothing(qwen2, adapted, prompts, pooled, slots):
    got = run(qwen2.config, adapted, prompts, STOPS, samples=16, slots=slots)
    np.testing.assert_array_equal(got.tokens, pooled.tokens)
    np.testing.assert_array_equal(got.lengths, pooled.lengths)
    np.testing.assert_array_equal(got.stopped, pooled.stopped)
    np.testing.assert_allclose(got.logprobs, pooled.logprobs, atol=1e-5)
    lengths = np.asarray(got.lengths)
    assert lengths.min() == 1 and lengths.max() == 10, "there must be short ones and long ones"
    assert int(got.slot_steps) >= lengths.sum()
    if slots == 1:
        assert int(got.slot_steps) == lengths.sum(), "one slot is never empty"


@pytest.mark.slow
def test_a_shrinking_pool_saves_steps_of_empty_slots(qwen2, adapted, prompts, pooled):
    lengths = np.asarray(pooled.lengths)
    in_use = lambda step: int((lengths > step).sum())
    expected = sum(64 if in_use(step) > 32 else 32 if in_use(step) > 8 else 8 for step in range(lengths.max()))
    assert int(pooled.slot_steps) == expected < 64 * lengths.max()
    large = run(qwen2.config, adapted, prompts, STOPS, samples=260)  # two halvings, then a quarter
    few = run(qwen2.config, adapted, prompts, STOPS, samples=260, slots=40)
    np.testing.assert_array_equal(large.tokens, few.tokens)
    assert np.asarray(large.lengths).sum() / int(large.slot_steps) > lengths.sum() / expected


def test_each_prompt_may_have_an_adapter_of_its_own(qwen2, policy, v, prompts, adapted, pooled):
    # Prompts 0 and 2 keep v, the others get another; slots are fewer than completions, so adapters move with them.
    several = jnp.stack([v, -v, v, 2 * v])
    got = run(qwen2.config, policy(several), prompts, STOPS, samples=16, slots=5)
    for prompt, own in enumerate(several):
        alone = run(qwen2.config, policy(own), prompts, STOPS, samples=16)
        rows = slice(16 * prompt, 16 * prompt + 16)
        np.testing.assert_array_equal(got.tokens[rows], alone.tokens[rows])
        np.testing.assert_allclose(got.logprobs[rows], alone.logprobs[rows], atol=1e-5)
    assert (np.asarray(got.tokens) != np.asarray(pooled.tokens)).any(axis=1).reshape(4, 16).any(axis=1).tolist() == [
        False,
        True,
        False,
        True,
    ]


def test_long_prompts_are_prefilled_in_parts(qwen2, adapted, prompts, reference, monkeypatch):
    monkeypatch.setattr(importlib.import_module("tinylora_jax.rollout.generate"), "_PREFILL_TOKENS", 20)
    jax.clear_caches()  # the limit is read when a program is traced
    got = run(qwen2.config, adapted, prompts, samples=2)  # three prompts at once, then one and two of padding
    np.testing.assert_array_equal(got.tokens, reference.tokens)
    np.testing.assert_allclose(got.logprobs, reference.logprobs, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 16, 32, 64])
@pytest.mark.parametrize("slots_of_a_group", [1, 2, 16])
def test_the_last_group_that_waits_can_have_enough_empty_slots(groups, slots_of_a_group):
    """Else a loop would decode empty slots for ever."""
    enough = importlib.import_module("tinylora_jax.rollout.generate").worth_an_admission
    assert 1 <= enough(groups * slots_of_a_group, groups) <= slots_of_a_group
