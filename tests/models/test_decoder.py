"""Laws of the decoder: a cache, padding, chunks and rematerialization change nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import Target, TinyLoRA, apply, factorize, init, merge
from tinylora_jax.io.hf import quantize_maps
from tinylora_jax.models import KVCache, ModelConfig, Rope, forward, fused, head_kernel, logits

CAPACITY = 16
LENGTHS = np.array([3, 7, 1])


@partial(jax.jit, static_argnames="config")
def extend(config, params, tokens, start, cache):
    hidden, cache = forward(config, params, tokens, start, cache)
    return logits(config, params, hidden), cache


def tokens_of(config, rows, width, seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, (rows, width)), jnp.int32)


def garbage(config, rows, capacity):
    """A cache full of large numbers: whoever looks beyond a row's length will notice."""
    return jax.tree.map(lambda x: x + 1e4, KVCache.empty(config, rows, capacity, jnp.float32))


def test_cached_decoding_is_the_full_forward(family, full_logits):
    config, params = family
    tokens = tokens_of(config, 3, 12)
    expected = np.asarray(full_logits(config, params, tokens))

    # Right-padded prompts of different lengths, then every row goes on at its own position.
    padded = jnp.where(jnp.arange(7) < LENGTHS[:, None], tokens[:, :7], 5)
    got, cache = extend(config, params, padded, jnp.zeros(3, jnp.int32), garbage(config, 3, CAPACITY))
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(got[row, :length], expected[row, :length], atol=2e-5)
    for step in range(4):
        position = jnp.asarray(LENGTHS + step, jnp.int32)
        got, cache = extend(config, params, tokens[jnp.arange(3), position][:, None], position, cache)
        np.testing.assert_allclose(got[:, 0], expected[np.arange(3), LENGTHS + step], atol=2e-5)


def test_a_prompt_may_come_in_chunks(tiny, full_logits):
    config, params = tiny("qwen3")
    tokens = tokens_of(config, 3, 12)
    expected = np.asarray(full_logits(config, params, tokens))
    cache = garbage(config, 3, CAPACITY)
    for begin in range(0, 12, 4):
        got, cache = extend(config, params, tokens[:, begin : begin + 4], jnp.full(3, begin, jnp.int32), cache)
        np.testing.assert_allclose(got, expected[:, begin : begin + 4], atol=2e-5)


@pytest.mark.parametrize("adapters", [0, 1, 3])
def test_joined_kernels_are_the_same_map(qwen2, adapters):
    config, params = qwen2
    if adapters:
        factors = factorize(params, TinyLoRA(n_tie=5))
        v = init(factors) + 0.1 * jnp.arange(1.0, 1.0 + adapters)[:, None, None]
        params = apply(params, factors, v[0] if adapters == 1 else v)
    run = jax.jit(lambda params: forward(config, params, tokens_of(config, 3, 12))[0])
    np.testing.assert_allclose(run(fused(params)), run(params), atol=2e-5)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("adapters", [0, 3])
def test_joined_quantized_kernels_are_the_same_map(qwen2, adapters, scheme):
    config, params = qwen2.config, quantize_maps(qwen2.params, scheme)
    if adapters:
        factors = factorize(params, TinyLoRA(n_tie=5))
        params = apply(params, factors, init(factors) + 0.1 * jnp.arange(1.0, 1.0 + adapters)[:, None, None])
    run = jax.jit(lambda params: forward(config, params, tokens_of(config, 3, 12))[0])
    np.testing.assert_allclose(run(fused(params)), run(params), atol=2e-5)


def test_later_tokens_do_not_reach_earlier_logits(family, full_logits):
    config, params = family
    tokens = tokens_of(config, 2, 12)
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % config.vocab_size)
    a, b = full_logits(config, params, tokens), full_logits(config, params, changed)
    np.testing.assert_array_equal(a[:, :7], b[:, :7])
    assert (np.abs(a - b)[:, 7:].max(axis=-1) > 1e-4).all()


def test_rematerialization_changes_neither_values_nor_gradients(qwen2):
    config, params = qwen2
    factors = factorize(params, TinyLoRA(n_tie=5))
    tokens = tokens_of(config, 2, 6)

    @partial(jax.jit, static_argnames="remat")
    def value_and_grad(v, remat):
        return jax.value_and_grad(
            lambda v: jnp.mean(jnp.tanh(forward(config, apply(params, factors, v), tokens, remat=remat)[0]))
        )(v)

    v = 0.3 + init(factors)
    (value, gradient), (value_remat, gradient_remat) = value_and_grad(v, False), value_and_grad(v, True)
    np.testing.assert_allclose(value_remat, value, rtol=1e-5)
    np.testing.assert_allclose(gradient_remat, gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient).min() > 1e-5


def test_bfloat16_is_close_to_float32(family, full_logits):
    config, params = family
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tokens = tokens_of(config, 2, 12)
    wide = full_logits(config, jax.tree.map(lambda x: x.astype(jnp.float32), half), tokens)
    got = full_logits(config, half, tokens)
    assert got.dtype == jnp.float32
    error = np.linalg.norm(got - wide) / np.linalg.norm(wide)
    assert 1e-5 < error < 0.03


def test_adapted_and_merged_weights_agree_in_the_whole_model(tiny, full_logits):
    config, params = tiny("qwen3")
    tokens = tokens_of(config, 2, 12)
    factors = factorize(params, TinyLoRA(u=2, n_tie=3))
    v = jnp.asarray(0.3 * np.random.default_rng(0).standard_normal(init(factors).shape), jnp.float32)
    base = full_logits(config, params, tokens)
    adapted = full_logits(config, apply(params, factors, v), tokens)
    np.testing.assert_allclose(adapted, full_logits(config, merge(params, factors, v), tokens), atol=2e-4)
    assert np.abs(adapted - base).max() > 0.1
    np.testing.assert_allclose(full_logits(config, apply(params, factors, init(factors)), tokens), base, atol=1e-6)

    # One vector per row of the batch.
    both = jnp.stack([v, -v])
    rows = full_logits(config, apply(params, factors, both), tokens)
    np.testing.assert_allclose(rows[0], adapted[0], atol=2e-5)
    minus = full_logits(config, apply(params, factors, -v), tokens)
    np.testing.assert_allclose(rows[1], minus[1], atol=2e-5)


def test_every_adapted_module_reaches_the_logits(qwen2, full_logits):
    # A kernel that the forward pass multiplied past `matmul` would lose its adapter.
    config, params = qwen2
    factors = factorize(params, TinyLoRA())
    tokens = tokens_of(config, 2, 12)
    base = full_logits(config, params, tokens)
    for group in range(factors.num_groups):
        got = full_logits(config, apply(params, factors, init(factors).at[group].set(1.0)), tokens)
        assert np.abs(got - base).max() > 1e-3, group


@pytest.mark.parametrize(
    ("name", "path"),
    [("llama", "lm_head/kernel"), ("llama", "embed_tokens/embedding"), ("qwen2", "embed_tokens/embedding")],
)
def test_adapters_on_the_head_are_refused(tiny, name, path):
    config, params = tiny(name)
    factors = factorize(params, TinyLoRA(targets=(Target(path),)))
    with pytest.raises(ValueError, match="embed_tokens or lm_head"):
        head_kernel(config, apply(params, factors, init(factors)))


SMALL = {
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 2,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({name: 0}, f"{name}=0") for name in SMALL],
        ({"num_kv_heads": 3}, "num_heads=4 is not a multiple of num_kv_heads=3"),
        ({"head_dim": 3}, "head_dim=3 must be even"),
    ],
)
def test_impossible_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL, **change})


def test_impossible_ropes_are_refused():
    with pytest.raises(ValueError, match="'dynamic'.*default, linear, llama3, yarn"):
        Rope(kind="dynamic")
    for kind in ("llama3", "yarn"):
        with pytest.raises(ValueError, match="original_max_position_embeddings"):
            Rope(kind=kind, factor=2.0)
