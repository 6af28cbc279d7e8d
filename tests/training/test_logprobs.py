"""Log-probabilities of completions against log_softmax over everything."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.training import Batch, pack, packed_logprobs, sequence_shapes, unpack
from tinylora_jax.training.logprobs import token_logprobs


def plain(hidden, head, tokens, temperature):
    table = jax.nn.log_softmax(hidden.astype(jnp.float32) @ head.astype(jnp.float32) / temperature)
    return jnp.take_along_axis(table, tokens[:, None], axis=1)[:, 0], -jnp.sum(jnp.exp(table) * table, axis=-1)


ALL = jnp.ones(11, bool)


def case(dtype=jnp.float32, n=11, width=8, vocab=30):
    rng = np.random.default_rng(0)
    hidden, head = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((n, width), (width, vocab)))
    return (
        hidden,
        head,
        jnp.asarray(rng.integers(0, vocab, n), jnp.int32),
        jnp.asarray(rng.standard_normal(n), jnp.float32),
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [2048, 11, 4, 1])
def test_values_and_gradients_are_those_of_log_softmax(temperature, chunk):
    hidden, head, tokens, cotangent = case()
    wanted = jnp.ones(tokens.shape, bool)
    ours = lambda h: token_logprobs(h, head, tokens, wanted, temperature, chunk)
    theirs = lambda h: plain(h, head, tokens, temperature)
    for got, expected in zip(ours(hidden), theirs(hidden), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)
    pull = lambda f: jax.grad(lambda h: jnp.sum(f(h)[0] * cotangent))(hidden)
    np.testing.assert_allclose(pull(ours), pull(theirs), atol=1e-5)
    # The differentiated forward pass is another code path than the plain one.
    for got, expected in zip(jax.vjp(ours, hidden)[0], theirs(hidden), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_states_give_float32_logprobs_and_a_close_gradient():
    hidden, head, tokens, cotangent = case(jnp.bfloat16)
    logprob, entropy = token_logprobs(hidden, head, tokens, ALL, 1.0)
    expected = plain(hidden, head, tokens, 1.0)
    assert logprob.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprob, expected[0], atol=1e-4)
    np.testing.assert_allclose(entropy, expected[1], atol=1e-4)
    gradient = jax.grad(lambda h: jnp.sum(token_logprobs(h, head, tokens, ALL, 1.0)[0] * cotangent))(hidden)
    wide = jax.grad(lambda h: jnp.sum(plain(h, head, tokens, 1.0)[0] * cotangent))(hidden.astype(jnp.float32))
    assert gradient.dtype == jnp.bfloat16
    assert np.linalg.norm(gradient.astype(jnp.float32) - wide) < 0.02 * np.linalg.norm(wide)


def test_chunks_in_which_nothing_is_wanted_are_skipped():
    hidden, head, tokens, cotangent = case()
    wanted = jnp.asarray([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1], bool)  # chunks of three: the first and the third of four
    ours = lambda h: token_logprobs(h, head, tokens, wanted, 0.7, 3)
    expected = plain(hidden, head, tokens, 0.7)
    for run in (ours, lambda h: jax.vjp(ours, h)[0]):
        for got, full in zip(run(hidden), expected, strict=True):
            np.testing.assert_allclose(got[wanted], full[wanted], atol=1e-5)
            assert (got[:3] == 0).all() and (got[6:9] == 0).all() and (np.asarray(got)[[3, 5, 9]] != 0).all()
    pull = lambda f: jax.grad(lambda h: jnp.sum(jnp.where(wanted, f(h)[0] * cotangent, 0)))(hidden)
    np.testing.assert_allclose(pull(ours), pull(lambda h: plain(h, head, tokens, 0.7)), atol=1e-5)


def test_impossible_tokens_do_not_give_nan():
    hidden, head = jnp.asarray([[100.0, 0.0]]), jnp.asarray([[1.0, -1.0], [0.0, 0.0]])
    logprob, entropy = token_logprobs(hidden, head, jnp.asarray([1], jnp.int32), ALL[:1], 1.0)
    assert logprob[0] == pytest.approx(-200) and entropy[0] == pytest.approx(0, abs=1e-6)
    gradient = jax.grad(lambda h: token_logprobs(h, head, jnp.asarray([1], jnp.int32), ALL[:1], 1.0)[0].sum())(hidden)
    np.testing.assert_allclose(gradient, [[-2.0, 0.0]], atol=1e-5)


N, G, P, T = 3, 2, 5, 4
LENGTHS = np.array([5, 2, 1])


@pytest.fixture(scope="module")
def rows(qwen2):
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, qwen2.config.vocab_size, (N, P)).astype(np.int32)
    completions = rng.integers(0, qwen2.config.vocab_size, (N, G, T)).astype(np.int32)
    return np.where(np.arange(P) < LENGTHS[:, None], prompts, 3), completions


def packed(prompts, completions, lengths, ends, tokens=10_000, sequences=1):
    """Completions cut at `ends` `[N, G]`, as microbatches."""
    mask = np.arange(T) < ends[:, :, None]
    zeros = np.zeros(mask.shape, np.float32)
    batch = Batch(prompts, lengths.astype(np.int32), completions, mask, zeros, np.zeros(mask.shape[:2], np.float32))
    return batch, list(pack(batch, zeros, sequence_shapes(N, P, G, T, tokens), sequences))


@partial(jax.jit, static_argnames=("config", "temperature", "remat"))
def shared(config, policy, v, part, coefficients, temperature, remat):
    def value(v):
        logprobs, entropy = packed_logprobs(
            config, policy(v), part.tokens, part.packing, part.source >= 0, temperature, remat
        )
        return jnp.sum(jnp.where(part.source >= 0, logprobs * coefficients, 0)), (logprobs, entropy)

    return jax.value_and_grad(value, has_aux=True)(v)


@pytest.mark.parametrize(("tokens", "sequences"), [(10_000, 1), (1, 1), (1, 3)])
def test_packed_rows_are_the_plain_forward_of_concatenated_rows(qwen2, policy, v, rows, full_logits, tokens, sequences):
    temperature, remat = 0.7, True
    prompts, completions = rows
    coefficients = jnp.asarray(np.random.default_rng(1).standard_normal((N, G, T)), jnp.float32)
    whole = np.zeros((N * G, P + T), np.int32)
    for i in range(N):
        for j in range(G):
            whole[i * G + j, : LENGTHS[i] + T] = [*prompts[i, : LENGTHS[i]], *completions[i, j]]
    at = np.repeat(LENGTHS, G)[:, None] - 1 + np.arange(T)

    def value(v):
        table = jax.nn.log_softmax(full_logits(qwen2.config, policy(v), jnp.asarray(whole)) / temperature)
        table = table[jnp.arange(N * G)[:, None], at]
        chosen = jnp.take_along_axis(table, completions.reshape(N * G, T, 1), axis=-1)[..., 0].reshape(N, G, T)
        return jnp.sum(chosen * coefficients), (chosen, -jnp.sum(jnp.exp(table) * table, -1).reshape(N, G, T))

    (_, expected), expected_gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(v)
    ends = np.full((N, G), T)
    batch, packs = packed(prompts, completions, LENGTHS, ends, tokens, sequences)
    flat = np.asarray(coefficients).reshape(-1)
    outs = [
        shared(qwen2.config, policy, v, part, jnp.asarray(flat[np.maximum(part.source, 0)]), temperature, remat)
        for part in packs
    ]
    for kind in (0, 1):
        got = unpack(packs, [values[kind] for (_, values), _ in outs], batch)
        np.testing.assert_allclose(got, expected[kind], atol=5e-5)
    assert np.abs(expected_gradient).min() > 1e-3
    np.testing.assert_allclose(sum(g for _, g in outs), expected_gradient, rtol=1e-3, atol=1e-4)
