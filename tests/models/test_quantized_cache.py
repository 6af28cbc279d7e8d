"""The int8 cache: its rounding against NumPy, and attention, decoding and slots against what they should read."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.models import KVCache, QuantizedEntries, decoder, forward, logits
from tinylora_jax.models.attention import cached_attention, causal_attention, decode_kernel, write
from tinylora_jax.models.cache import KeyBias, quantized_entries
from tinylora_jax.models.config import Rope
from tinylora_jax.models.rope import Angles, cos_sin, rotate
from tinylora_jax.models.tpu import write_entry
from tinylora_jax.rollout import Sampling, generate, stream


def normals(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(entries):
    return np.asarray(entries.values, np.float64) * np.asarray(entries.scale, np.float64)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_rounding_is_numpy_s(dtype):
    x = normals(0, 3, 5, 2, 16, dtype=dtype)
    x = x.at[0, 0, 0].set(0).at[0, 1, 0, 3].set(1e30).at[1, 0, 1].set(1e-35).at[2, 2, 0].multiply(1e-20)
    got = jax.jit(quantized_entries)(x)
    given = np.asarray(x, np.float32)
    scale = np.abs(given).max(axis=-1, keepdims=True) / np.float32(127)
    np.testing.assert_allclose(got.scale, scale, rtol=1e-6, atol=1e-37)
    exact = given.astype(np.float64) / np.where(scale < 1e-30, 1, scale)
    assert np.abs(np.asarray(got.values, np.float64) - exact).max() <= 0.5 + 1e-4
    error = np.abs(wide(got) - given.astype(np.float64))
    assert (error <= 0.501 * scale + 1e-34).all()
    assert not got.values[0, 0, 0].any() and not got.values[1, 0, 1].any(), "zeros, and what is as good as zero"
    assert np.abs(np.asarray(got.values)).max() == 127 and got.values[0, 1, 0, 3] == 127


def test_what_is_not_finite_does_not_become_a_number():
    x = normals(0, 1, 3, 1, 8).at[0, 0, 0, 2].set(jnp.nan).at[0, 1, 0, 5].set(jnp.inf)
    got = quantized_entries(x)
    assert np.isnan(got.scale[0, 0]).all() and np.isinf(got.scale[0, 1]).all() and np.isfinite(got.scale[0, 2]).all()


def attention(q, keys, values):
    """One query `[heads, d]` against `[n, kv_heads, d]`, in float64."""
    groups = q.shape[0] // keys.shape[1]
    out = np.zeros(q.shape)
    for head in range(q.shape[0]):
        scores = keys[:, head // groups] @ np.asarray(q[head], np.float64) / np.sqrt(q.shape[1])
        p = np.exp(scores - scores.max())
        out[head] = (p / p.sum()) @ values[:, head // groups]
    return out


def filled(seed, start, *shape):
    """A cache of random entries; beyond a row's position all is 1e4."""
    x = normals(seed, *shape).at[0, 0, 0].set(0)
    beyond = (np.arange(shape[1]) >= np.asarray(start)[:, None])[:, :, None, None]
    return quantized_entries(jnp.where(beyond, 1e4, x))


START = np.array([0, 1, 63, 64, 65, 150, 189], np.int32)
_kernel = partial(decode_kernel, interpret=True)


def _through_products(q, k, v, keys, values, start, bias=None):
    """The path of a TPU, on which a single query takes part in products too."""
    twice = lambda x: jnp.concatenate([x, x], axis=1)
    both = bias and bias._replace(rotated=twice(bias.rotated))
    mixed, *_ = cached_attention(twice(q), twice(k), twice(v), keys, values, start, both)
    _, *cache = cached_attention(q, k, v, keys, values, start, bias)
    return mixed[:, :1], *cache


def _through_the_kernel(q, k, v, keys, values, start, bias):
    return _kernel(q, k, v, keys, values, start, bias.rotated, bias.queries(q), bias.table)


@pytest.mark.parametrize(
    "attend", [cached_attention, _through_products, _through_the_kernel], ids=["sums", "products", "kernel"]
)
def test_large_biases_of_the_keys_do_not_coarsen_their_rounding(attend):
    """Qwen2.5: a few numbers of the bias are in the hundreds, and what the keys say is in the others."""
    heads, kv_heads, size = 14, 2, 64
    rows, capacity, start = len(START), 192, jnp.asarray(START)
    q, content = normals(0, rows, 1, heads, size), normals(1, rows, capacity, kv_heads, size)
    b = normals(2, kv_heads, size).at[0, 3].set(300.0).at[1, size - 2].set(-170.0)
    v = normals(3, rows, capacity, kv_heads, size)
    angles = cos_sin(Rope(theta=1e4), size, jnp.arange(capacity)[None].repeat(rows, 0))
    rotated = rotate(jnp.broadcast_to(b, content.shape), *angles)
    keys = rotate(content, *angles) + rotated  # whole keys of all positions
    cached = quantized_entries(keys - rotated), quantized_entries(v)
    at = lambda x: x[np.arange(rows), START][:, None]
    bias = KeyBias(b, at(rotated), jnp.concatenate(angles, axis=-1)[0])
    mixed, new_keys, _ = attend(q, at(keys), at(v), *cached, start, bias)
    np.testing.assert_allclose(wide(new_keys), keys - rotated, atol=0.03)  # half of a scale
    whole = quantized_entries(keys)
    for row, last in enumerate(START.tolist()):
        seen = wide(cached[1])[row, : last + 1]
        exact = attention(q[row, 0], np.asarray(keys[row, : last + 1], np.float64), seen)
        np.testing.assert_allclose(mixed[row, 0], exact, atol=0.06)
        if last:  # rounding whole keys, the bias among them, is what this avoids
            coarse = attention(q[row, 0], wide(whole)[row, : last + 1], seen)
            assert np.abs(coarse - exact).max() > 5 * np.abs(mixed[row, 0] - exact).max()


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(14, 2, 64), (4, 4, 64), (8, 2, 128)])
@pytest.mark.parametrize("attend", [cached_attention, _through_products, _kernel], ids=["sums", "products", "kernel"])
def test_decoding_reads_the_rounded_entries(attend, heads, kv_heads, size):
    rows, capacity = len(START), 192
    q, k, v = (normals(i, rows, 1, n, size) for i, n in enumerate((heads, kv_heads, kv_heads)))
    k = k.at[1].set(0).at[2, 0, 0, 0].set(1e3)  # a vector of zeros, and an outlier
    keys, values = (filled(i, START, rows, capacity, kv_heads, size) for i in (3, 4))
    mixed, new_keys, new_values = attend(q, k, v, keys, values, jnp.asarray(START))
    for new, old, entry in ((new_keys, keys, k), (new_values, values, v)):
        expected = jax.tree.map(lambda b, u: b.at[np.arange(rows), START].set(u[:, 0]), old, quantized_entries(entry))
        jax.tree.map(np.testing.assert_array_equal, new, expected)
    for row, at in enumerate(START.tolist()):
        seen = (wide(new)[row, : at + 1] for new in (new_keys, new_values))
        np.testing.assert_allclose(mixed[row, 0], attention(q[row, 0], *seen), atol=1e-5)


def test_several_new_positions_see_one_another_rounded():
    start = np.array([0, 7], np.int32)
    q, k, v = normals(0, 2, 3, 4, 8), normals(1, 2, 3, 2, 8), normals(2, 2, 3, 2, 8)
    keys, values = (filled(i, start, 2, 16, 2, 8) for i in (3, 4))
    mixed, keys, values = cached_attention(q, k, v, keys, values, jnp.asarray(start))
    for row, first in enumerate(start.tolist()):
        for at in range(3):
            seen = (wide(x)[row, : first + at + 1] for x in (keys, values))
            np.testing.assert_allclose(mixed[row, at], attention(q[row, at], *seen), atol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_tpu_writes_numbers_and_scales_where_the_scatter_writes_them(head_dim):
    start = jnp.asarray([0, 255, 17, 128, 127], jnp.int32)
    keys, values = (quantized_entries(normals(i, 5, 256, 2, head_dim)) for i in (0, 1))
    k, v = (normals(i, 5, 1, 2, head_dim) for i in (2, 3))
    got = write_entry(keys, values, k, v, start, interpret=True)
    jax.tree.map(np.testing.assert_array_equal, got, (write(keys, k, start), write(values, v, start)))


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")  # from jax 0.12 on
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_kernel_lowers_for_an_nvidia_gpu(has_bias):
    like = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    cache = QuantizedEntries(like(4, 128, 2, 64, dtype=jnp.int8), like(4, 128, 2, 1, dtype=jnp.float32))
    new = like(4, 1, 14, 64), like(4, 1, 2, 64), like(4, 1, 2, 64)
    wide = partial(like, dtype=jnp.float32)
    bias = (wide(4, 1, 2, 64), wide(4, 1, 14, 64), wide(128, 64)) if has_bias else ()
    traced = jax.jit(decode_kernel).trace(*new, cache, cache, like(4, dtype=jnp.int32), *bias)
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:
        pytest.skip(f"this jax lowers for a GPU only where there is one: {error}")
    assert "triton" in text


LENGTHS = np.array([3, 5, 1, 6])
INT8 = Sampling(max_new_tokens=10, temperature=0.0, quantize_cache="int8")
STOPS = Sampling(max_new_tokens=10, stop_tokens=tuple(range(0, 97, 6)), quantize_cache="int8")


@pytest.fixture(scope="module")
def arrays(qwen2):
    tokens = np.random.default_rng(1).integers(0, qwen2.config.vocab_size, (4, 6))
    tokens = np.where(np.arange(6) < LENGTHS[:, None], tokens, 55)
    ids = jnp.asarray([11, 2, 5, 7], jnp.uint32)
    return ids, jnp.asarray(tokens, jnp.int32), jnp.asarray(LENGTHS, jnp.int32), jax.random.key(0)


def rounded(x, bias=None):
    center = 0.0 if bias is None else bias.rotated
    entries = quantized_entries(x - center)
    return entries.values.astype(jnp.float32) * entries.scale + center


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_greedy_decoding_is_the_full_forward_with_the_same_rounding(tiny, name, arrays, monkeypatch):
    """A prompt attends to itself as computed; each new token attends to rounded keys and values, its own too."""
    config, params = tiny(name)
    got = generate(config, params, *arrays, INT8)

    def attend(q, k, v, layer, bias):
        of_prompt = (np.arange(q.shape[1]) < LENGTHS[:, None])[:, :, None, None]
        of_cache = causal_attention(q, rounded(k, bias), rounded(v))
        return jnp.where(of_prompt, causal_attention(q, k, v), of_cache), layer

    def angles(model, positions, cache):
        found = cos_sin(config.rope, config.head_dim, positions)
        return Angles(*found, jnp.zeros(1) if config.qkv_bias else None)

    block = decoder._block.__wrapped__
    monkeypatch.setattr(decoder, "_attend", lambda start, packing: attend)
    monkeypatch.setattr(decoder.Decoder, "_angles", angles)
    monkeypatch.setattr(decoder, "_block", lambda *arguments: block(*arguments))  # a block traced before would be kept
    generated = LENGTHS[:, None] + np.arange(10)
    tokens = np.pad(np.asarray(arrays[1]), ((0, 0), (0, 10)))
    tokens[np.arange(4)[:, None], generated] = got.tokens
    scores = jax.jit(lambda params: logits(config, params, forward(config, params, jnp.asarray(tokens))[0]))(params)
    scores = jax.nn.log_softmax(scores)[np.arange(4)[:, None], generated - 1]
    np.testing.assert_array_equal(jnp.argmax(scores, axis=-1), got.tokens)
    logprobs = np.take_along_axis(np.asarray(scores), np.asarray(got.tokens)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(logprobs, got.logprobs, atol=1e-4)


@pytest.fixture(scope="module")
def pooled(qwen2, policy, v, arrays):
    """16 completions of several lengths, each with a slot of its own."""
    return generate(qwen2.config, policy(v), *arrays, STOPS, 4)


def test_the_cache_is_rounded_but_not_the_model(qwen2, policy, v, arrays, pooled):
    exact = generate(qwen2.config, policy(v), *arrays, Sampling(10, stop_tokens=STOPS.stop_tokens), 4)
    first = np.abs(pooled.logprobs[:, 0] - exact.logprobs[:, 0])
    assert first.max() <= 1e-6, "the first token follows from the prompt alone"
    same = np.asarray((pooled.tokens == exact.tokens).all(axis=1))
    apart = np.abs(np.exp(pooled.logprobs) - np.exp(exact.logprobs))[same]
    assert same.mean() > 0.5 and 1e-5 < apart.max() < 0.05


def test_refilled_slots_take_their_scales_along(qwen2, policy, v, arrays, pooled):
    """The samples of a prompt share its prefill, and each slot serves several completions."""
    got = generate(qwen2.config, policy(v), *arrays, STOPS, 4, 3)
    np.testing.assert_array_equal(got.tokens, pooled.tokens)
    np.testing.assert_allclose(got.logprobs, pooled.logprobs, atol=1e-5)


@pytest.mark.slow
def test_a_pool_that_shrinks_keeps_its_scales(qwen2, policy, v, arrays):
    shrinking = generate(qwen2.config, policy(v), *arrays, STOPS, 16)
    few = generate(qwen2.config, policy(v), *arrays, STOPS, 16, 17)
    np.testing.assert_array_equal(shrinking.tokens, few.tokens)
    np.testing.assert_allclose(shrinking.logprobs, few.logprobs, atol=1e-5)


def test_every_prompt_may_have_an_adapter_of_its_own(qwen2, policy, v, arrays):
    several = jnp.stack([v, -v, v, 2 * v])
    got = generate(qwen2.config, policy(several), *arrays, STOPS, 4, 5)
    for prompt, own in enumerate(several):
        alone = generate(qwen2.config, policy(own), *arrays, STOPS, 4)
        rows = slice(4 * prompt, 4 * prompt + 4)
        np.testing.assert_array_equal(got.tokens[rows], alone.tokens[rows])
        np.testing.assert_allclose(got.logprobs[rows], alone.logprobs[rows], atol=1e-5)


@pytest.mark.slow
def test_a_stream_reads_the_same_cache(qwen2, policy, v, arrays):
    whole = generate(qwen2.config, policy(v), *arrays, INT8)
    parts = list(stream(qwen2.config, policy(v), *arrays, INT8))
    np.testing.assert_array_equal(np.concatenate([part.tokens for part in parts], axis=1)[:, :10], whole.tokens)
    np.testing.assert_allclose(
        np.concatenate([part.logprobs for part in parts], axis=1)[:, :10], whole.logprobs, atol=1e-5
    )


def test_it_takes_half_the_bytes_and_the_scales(tiny):
    config = tiny("llama").config
    size = lambda scheme: sum(x.nbytes for x in jax.tree.leaves(KVCache.empty(config, 3, 128, jnp.bfloat16, scheme)))
    assert size("int8") == size("none") // 2 + 3 * 128 * config.num_layers * config.num_kv_heads * 2 * 4


def test_an_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="quantize_cache must be none or int8, got 'int4'"):
        Sampling(max_new_tokens=1, quantize_cache="int4")
