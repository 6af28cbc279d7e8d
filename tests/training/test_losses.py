"""The losses against loops over prompts, samples and tokens, written from the papers' equations."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.training import GRPO, group_advantages
from tinylora_jax.training.losses import (
    LOSS_TYPES,
    cispo,
    clipped_surrogate,
    importance_weights,
    k3,
    sequence_log_ratio,
    token_weights,
)

N, G, T = 3, 4, 6
WHERE = pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["host", "device"])


def normals(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def mask():
    """Completions of every length from 0 (a filtered one) to T."""
    lengths = np.random.default_rng(0).integers(1, T + 1, (N, G))
    lengths[0, 0], lengths[1, 1], lengths[2, 2] = 0, T, 1
    return np.arange(T) < lengths[:, :, None]


@WHERE
@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_are_the_equation(normalize_std, array):
    rewards = normals(0, N, G)
    got = group_advantages(array(rewards), normalize_std)
    assert isinstance(got, type(array(rewards))) and got.dtype == np.float32
    for i in range(N):
        mean = sum(map(float, rewards[i])) / G
        std = math.sqrt(sum((float(r) - mean) ** 2 for r in rewards[i]) / (G - 1))
        for j in range(G):
            expected = float(rewards[i, j]) - mean
            if normalize_std:
                expected /= std + 1e-4
            assert got[i, j] == pytest.approx(expected, abs=1e-5)


@WHERE
@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_group_of_equal_rewards_teaches_nothing(normalize_std, reward, array):
    got = group_advantages(array(np.full((2, 8), reward, np.float32)), normalize_std)
    # Rounding of the mean must not be blown up by the division, and such groups are skipped.
    assert (np.asarray(got) == 0).all()


@pytest.mark.parametrize("normalize_std", [True, False])
def test_advantages_sum_to_zero_and_ignore_the_other_groups(normalize_std):
    rewards = normals(1, N, G)
    got = np.asarray(group_advantages(jnp.asarray(rewards), normalize_std))
    np.testing.assert_allclose(got.sum(axis=1), 0, atol=1e-5)
    np.testing.assert_allclose(group_advantages(jnp.asarray(rewards[1:2]), normalize_std)[0], got[1], atol=1e-6)
    np.testing.assert_allclose(group_advantages(jnp.asarray(rewards + 5), normalize_std), got, atol=1e-4)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (0.05, 0.5), (0.0, 0.0)])
def test_the_surrogate_is_the_clipped_minimum(low, high):
    logprobs, old, advantages = 0.4 * normals(0, N, G, T), 0.4 * normals(1, N, G, T), normals(2, N, G)
    loss, at_low, at_high = clipped_surrogate(
        jnp.asarray(logprobs - old), jnp.asarray(advantages[:, :, None]), low, high
    )
    lows = highs = 0
    for i, j, t in np.ndindex(N, G, T):
        ratio = math.exp(float(logprobs[i, j, t]) - float(old[i, j, t]))
        advantage = float(advantages[i, j])
        clipped = min(max(ratio, 1 - low), 1 + high)
        assert loss[i, j, t] == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-5)
        # A bound is active where it, and not the ratio, decides: exactly where the gradient vanishes.
        active = clipped * advantage < ratio * advantage
        assert bool(at_low[i, j, t]) == (active and ratio < 1)
        assert bool(at_high[i, j, t]) == (active and ratio > 1)
        lows, highs = lows + bool(at_low[i, j, t]), highs + bool(at_high[i, j, t])
    assert lows > 3 and highs > 3


def test_clipped_tokens_have_no_gradient_and_the_others_have_theirs():
    logprobs, old, advantages = (
        jnp.asarray(0.4 * normals(s, *shape)) for s, shape in ((0, (N, G, T)), (1, (N, G, T)), (2, (N, G)))
    )
    loss = lambda x: clipped_surrogate(x - old, advantages[:, :, None], 0.1, 0.3)[0].sum()
    _, low, high = clipped_surrogate(logprobs - old, advantages[:, :, None], 0.1, 0.3)
    expected = np.where(low | high, 0, -np.exp(logprobs - old) * np.asarray(advantages)[:, :, None])
    np.testing.assert_allclose(jax.grad(loss)(logprobs), expected, atol=1e-6)


def totals(x):
    """The sum over a completion for each of its tokens, in an array `[prompts, samples, seq]`."""
    return jnp.broadcast_to(x.sum(axis=-1, keepdims=True), x.shape)


@pytest.mark.parametrize("cap", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_importance_weights_are_bounded_ratios(cap, mode):
    log_ratio = normals(0, N, G, T) / 2
    got = importance_weights(jnp.asarray(log_ratio), cap, mode, totals)
    bounded = 0
    for at in np.ndindex(N, G, T):
        ratio = math.exp(math.fsum(map(float, log_ratio[at[:2]])) if "sequence" in mode else float(log_ratio[at]))
        expected = (0.0 if "mask" in mode else cap) if ratio > cap else ratio
        assert got[at] == pytest.approx(expected, rel=1e-5)
        bounded += ratio > cap
    assert 0 < bounded < N * G * T


def test_the_weight_of_a_sequence_does_not_overflow():
    ratio = jnp.full((1, 1, T), 90.0)
    assert (importance_weights(ratio, 2.0, "sequence_truncate", totals) == 2).all()
    assert (importance_weights(ratio, 2.0, "sequence_mask", totals) == 0).all()


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens(mask):
    log_ratio = normals(0, N, G, T)
    got = sequence_log_ratio(jnp.asarray(log_ratio), jnp.asarray(mask), totals)
    for i, j, t in np.ndindex(N, G, T):
        kept = [math.exp(float(x)) for x in log_ratio[i, j][mask[i, j]]]
        assert math.exp(float(got[i, j, t])) == pytest.approx(math.prod(kept) ** (1 / max(len(kept), 1)), rel=1e-5)


def test_cispo_bounds_the_weight_and_keeps_the_gradient_of_every_token():
    logprobs, old, advantages = normals(0, N, G, T), normals(1, N, G, T), normals(2, N, G)[:, :, None]
    loss = lambda x: cispo(x, x - old, jnp.asarray(advantages), 0.3)
    value, low, high = loss(jnp.asarray(logprobs))
    weight = np.minimum(np.exp(logprobs - old), 1.3)
    np.testing.assert_allclose(value, -weight * advantages * logprobs, rtol=1e-4)
    np.testing.assert_allclose(
        jax.grad(lambda x: loss(x)[0].sum())(jnp.asarray(logprobs)), -weight * advantages, rtol=1e-4
    )
    np.testing.assert_array_equal(high, np.exp(logprobs - old) > 1.3)
    assert not np.asarray(low).any() and 3 < np.asarray(high).sum() < high.size - 3


def test_k3_is_the_estimator_and_its_mean_is_the_kl():
    logprobs, ref = normals(0, N, G, T), normals(1, N, G, T)
    got = k3(jnp.asarray(logprobs), jnp.asarray(ref))
    for at in np.ndindex(N, G, T):
        d = float(ref[at]) - float(logprobs[at])
        assert got[at] == pytest.approx(math.exp(d) - d - 1, rel=1e-4, abs=1e-6)
    assert np.asarray(got).min() >= 0

    # Over a whole vocabulary its expectation under π is KL(π ‖ π_ref).
    log_softmax = lambda x: x - np.log(np.exp(x).sum())
    p, q = log_softmax(normals(2, 50)), log_softmax(normals(3, 50))
    estimate = k3(jnp.asarray(p).reshape(1, 1, 50), jnp.asarray(q).reshape(1, 1, 50))[0, 0]
    assert (np.exp(p) * estimate).sum() == pytest.approx((np.exp(p) * (p - q)).sum(), rel=1e-4)


@WHERE
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_weights_average_as_the_equations_do(loss_type, mask, array):
    values = normals(0, N, G, T)
    weights = token_weights(array(mask), loss_type, 32)
    assert isinstance(weights, type(array(mask))) and weights.dtype == np.float32
    got = float((weights * values).sum())
    per_completion, tokens, total = [], 0, 0.0
    for i in range(N):
        for j in range(G):
            kept = [float(values[i, j, t]) for t in range(T) if mask[i, j, t]]
            per_completion.append(sum(kept) / len(kept) if kept else 0.0)
            tokens, total = tokens + len(kept), total + sum(kept)
    expected = {
        "grpo": sum(per_completion) / (N * G),
        "dapo": total / tokens,
        "cispo": total / tokens,
        "dr_grpo": total / (N * G * 32),
        "luspo": total / (N * G),
    }[loss_type]
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_batch_without_tokens_has_weights_of_zero(loss_type):
    assert (np.asarray(token_weights(jnp.zeros((2, 2, 3), bool), loss_type, 8)) == 0).all()


def test_unknown_loss_types_are_refused():
    with pytest.raises(ValueError, match="'ppo'.*'grpo' or 'dapo' or 'dr_grpo'"):
        token_weights(jnp.ones((1, 1, 1), bool), "ppo", 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_type": "ppo"}, "loss_type 'ppo': expected 'grpo' or"),
        ({"importance_sampling_level": "group"}, "importance_sampling_level 'group': expected 'token' or 'sequence'"),
        ({"tis_mode": "truncate"}, "tis_mode 'truncate': expected 'token_truncate'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation 'sum': expected 'sum_then_normalize'"),
        ({"multi_objective_aggregation": "normalize_then_sum", "normalize_std": False}, ".*set it to True"),
        *[({name: -0.1}, name) for name in ("clip_low", "clip_high", "kl_coef", "tis_cap")],
        *[({name: math.nan}, name) for name in ("clip_low", "clip_high", "kl_coef", "tis_cap")],
        ({"updates_per_rollout": 0}, "updates_per_rollout"),
        ({"stream_tokens": 0}, "stream_tokens"),
        ({"remat": "maybe"}, "remat 'maybe'"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"GRPO: {message}"):
        GRPO(**change)
