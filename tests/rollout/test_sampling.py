"""Choosing a token: the right distribution, the right kept set, noise that never repeats."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.rollout import Sampling, completion_keys, sample
from tinylora_jax.rollout.sampling import inverse_cdf, uniforms


@jax.jit
def draw(weights, uniform):
    return inverse_cdf(jnp.log(weights), uniform)[0]


LARGEST = 1 - 2.0**-24  # the largest float32 below 1


def grid(n):
    """Midpoints of n equal cells of [0, 1)."""
    return jnp.asarray((np.arange(n) + 0.5) / n, jnp.float32)


def softmax(x):
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max())
    return e / e.sum()


SHAPES = [(5, 1.0), (128, 1.0), (129, 3.0), (300, 0.0), (1000, 8.0), (300, 30.0)]


@pytest.mark.parametrize(("vocab", "spread"), SHAPES)
def test_inverse_cdf_follows_the_weights(vocab, spread):
    scores = spread * np.random.default_rng(vocab).standard_normal(vocab)
    p = softmax(scores)
    weights = jnp.asarray(np.exp(scores - scores.max()), jnp.float32)
    n = 4096
    rows = jnp.broadcast_to(weights, (n, vocab))

    # On a regular grid an inverse CDF is exact: every token is hit n·p times, give or take its two ends.
    picked = np.asarray(draw(rows, grid(n)))
    counts = np.bincount(picked, minlength=vocab)
    assert np.abs(counts - n * p).max() <= 1.01
    assert (np.diff(picked) >= 0).all(), "larger numbers must not give earlier tokens"

    # And with the noise really used: Pearson's chi-square over the likely tokens and the rest.
    noise = uniforms(completion_keys(jax.random.key(7), jnp.arange(n, dtype=jnp.uint32), 1), jnp.int32(3))
    counts = np.bincount(np.asarray(draw(rows, noise)), minlength=vocab)
    likely = n * p >= 5
    expected = np.append(n * p[likely], n * p[~likely].sum())
    observed = np.append(counts[likely], counts[~likely].sum())
    cells = expected > 1e-3
    statistic = ((observed - expected)[cells] ** 2 / expected[cells]).sum()
    freedom = max(1, cells.sum() - 1)
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8
    assert observed[~cells].sum() == 0


@pytest.mark.parametrize("vocab", [5, 100, 128, 129, 1000])
@pytest.mark.parametrize("zeros", [0.3, 0.95])
def test_a_token_of_zero_weight_is_never_picked(vocab, zeros):
    rng = np.random.default_rng(vocab)
    weights = np.exp(2 * rng.standard_normal((40, vocab))).astype(np.float32)
    weights[rng.random((40, vocab)) < zeros] = 0
    weights[np.arange(40), rng.integers(0, vocab, 40)] = 1.0
    weights[0], weights[1], weights[2] = 0, 0, 0
    weights[0, 0] = weights[1, -1] = weights[2, vocab // 2] = 1
    for row, w in enumerate(weights):
        edges = np.cumsum(w, dtype=np.float64)[:-1] / w.sum(dtype=np.float64)
        edges = rng.choice(edges, 150).astype(np.float32)
        near = [edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1))]
        noise = np.concatenate([np.float32([0, 2.0**-24, 0.5, 1 - 2.0**-22, 1 - 2.0**-23, LARGEST]), *near])
        noise = np.clip(noise, 0, np.float32(LARGEST))
        picked = np.asarray(draw(jnp.broadcast_to(jnp.asarray(w), (len(noise), vocab)), jnp.asarray(noise)))
        assert (w[picked] > 0).all(), (row, noise[w[picked] == 0])


def kept_by_loop(logits, sampling):
    """The kept set, one token at a time: top-k first, then top-p of what it left."""
    scaled = [x / sampling.temperature for x in np.asarray(logits, np.float64)]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if sampling.top_k:
        order = order[: sampling.top_k]
    total = sum(math.exp(scaled[i]) for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= sampling.top_p:
            break
        kept.append(i)
        mass += math.exp(scaled[i]) / total
    return sorted(kept), scaled


CUTS = [
    (0, 1.0, 1.0),
    (5, 1.0, 1.0),
    (0, 0.6, 1.0),
    (12, 0.8, 1.0),
    (12, 0.8, 0.5),
    (1, 1.0, 2.0),
    (100, 0.9, 1.5),
    (0, 1e-6, 1.0),
]


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), CUTS)
def test_truncation_keeps_and_renormalizes_the_right_tokens(top_k, top_p, temperature):
    sampling = Sampling(max_new_tokens=1, top_k=top_k, top_p=top_p, temperature=temperature)
    n, vocab = 8192, 40
    run = jax.jit(sample, static_argnums=2)
    for seed in range(3):
        logits = np.random.default_rng(seed).standard_normal(vocab).astype(np.float32)
        kept, scaled = kept_by_loop(logits, sampling)
        token, logprob = run(jnp.broadcast_to(jnp.asarray(logits), (n, vocab)), grid(n), sampling)
        counts = np.bincount(token, minlength=vocab)
        expected = np.zeros(vocab)
        expected[kept] = n * softmax(np.asarray(scaled)[kept])
        assert expected[kept].min() > 2, "the grid must be fine enough to see every kept token"
        assert np.flatnonzero(counts).tolist() == kept
        assert np.abs(counts - expected).max() <= 1.01
        # Log-probabilities are those of the whole distribution, before the cuts.
        np.testing.assert_allclose(logprob, np.log(softmax(scaled))[token], atol=1e-5)


def test_greedy_takes_the_best_token_and_reports_temperature_one():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((6, 40)), jnp.float32)
    for noise in (0.0, LARGEST):
        token, logprob = sample(logits, jnp.full(6, noise, jnp.float32), Sampling(max_new_tokens=1, temperature=0.0))
        np.testing.assert_array_equal(token, np.argmax(logits, axis=-1))
        np.testing.assert_allclose(logprob, [np.log(softmax(row)).max() for row in logits], atol=1e-6)


def test_extreme_logits_give_finite_log_probabilities():
    logits = jnp.asarray([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], jnp.float32)
    token, logprob = sample(logits, jnp.asarray([LARGEST, LARGEST], jnp.float32), Sampling(max_new_tokens=1))
    assert token.tolist() == [0, 2]
    np.testing.assert_allclose(logprob, [0.0, -math.log(3)], atol=1e-3)


def test_noise_never_repeats():
    # Steps × prompts × samples × token indices: a default or forgotten seed anywhere would collide.
    ids = jnp.asarray([0, 1, 2, 2**31, 2**32 - 1], jnp.uint32)
    step_keys = [jax.random.fold_in(jax.random.key(seed), step) for seed in (0, 1) for step in range(3)]
    keys = [completion_keys(key, ids, 4) for key in step_keys]
    raw = np.concatenate([jax.random.key_data(k) for k in keys])
    assert len(np.unique(raw, axis=0)) == len(raw) == 6 * 5 * 4
    noise = np.stack([[uniforms(k, jnp.int32(t)) for t in range(6)] for k in keys])
    assert len(np.unique(noise)) == noise.size
    assert noise.min() >= 0 and noise.max() < 1
    assert abs(noise.mean() - 0.5) < 4 / math.sqrt(12 * noise.size)
    for axis in (0, 1):  # neither steps nor tokens correlate
        a, b = np.moveaxis(noise, axis, 0)[:-1].ravel(), np.moveaxis(noise, axis, 0)[1:].ravel()
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(a.size)


def test_keys_depend_on_prompt_and_sample_not_on_place():
    key = jax.random.key(3)
    data = lambda ids, samples: np.asarray(
        jax.random.key_data(completion_keys(key, jnp.asarray(ids, jnp.uint32), samples))
    ).reshape(len(ids), samples, -1)
    whole = data([7, 3, 9], 4)
    np.testing.assert_array_equal(data([9, 7], 2), whole[[2, 0], :2])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"Sampling: {field} must"):
        dataclasses.replace(Sampling(max_new_tokens=4), **{field: value})
