"""The evolution strategy: its gradient against the true one, its noise, and the shaping of differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax import rl
from tinylora_jax.training import (
    Evolution,
    antithetic_points,
    evolution_gradient,
    search_noise,
    shaped_differences,
)

SIGMA = 0.1


def estimated(reward, v, pairs, seed=0):
    """The gradient of the negative reward, from rewards at all points."""
    noise = search_noise(jax.random.key(seed), pairs, v.shape)
    rewards = jax.vmap(jax.vmap(reward))(antithetic_points(v, noise, SIGMA))
    return evolution_gradient(rewards[0] - rewards[1], noise, SIGMA), np.asarray(noise, np.float64)


def test_the_gradient_of_a_quadratic_reward():
    """Antithetic pairs cancel the curvature: the estimate is 1/n Σ ε εᵀ ∇F, and so becomes −∇F."""
    rng = np.random.default_rng(0)
    a, root = rng.standard_normal((3, 2)), rng.standard_normal((6, 6))
    v = jnp.asarray(rng.standard_normal((3, 2)), jnp.float32)
    A = jnp.asarray(root @ root.T, jnp.float32)
    reward = lambda x: jnp.sum(jnp.asarray(a, jnp.float32) * x) - 0.5 * x.ravel() @ A @ x.ravel()
    true = np.asarray(a).ravel() - np.asarray(A) @ np.asarray(v).ravel()
    found, noise = estimated(reward, v, 16)
    flat = noise.reshape(16, 6)
    np.testing.assert_allclose(np.ravel(found), -(flat.T @ flat / 16) @ true, rtol=1e-2, atol=0.02)
    many, _ = estimated(reward, v, 20_000)
    np.testing.assert_allclose(np.ravel(many), -true, atol=0.05 * np.linalg.norm(true))


def test_the_noise_is_never_repeated_and_does_not_depend_on_the_population():
    draws = {
        (seed, step): np.asarray(search_noise(rl.step_key(seed, "search", step), 8, (3, 2)))
        for seed in (0, 1)
        for step in range(4)
    }
    rows = np.concatenate([draw.reshape(8, -1) for draw in draws.values()])
    assert len(np.unique(rows, axis=0)) == len(rows) == 64
    again = search_noise(rl.step_key(0, "search", 2), 3, (3, 2))
    np.testing.assert_array_equal(again, draws[0, 2][:3])
    assert abs(rows.mean()) < 0.2 and 0.8 < rows.std() < 1.2
    purposes = [jax.random.key_data(rl.step_key(0, name, 2)).tolist() for name in ("train", "eval", "search")]
    assert len(set(map(tuple, purposes))) == 3


def test_points_are_antithetic():
    v, noise = jnp.ones((2, 2)), search_noise(jax.random.key(0), 4, (2, 2))
    plus, minus = antithetic_points(v, noise, SIGMA)
    np.testing.assert_allclose(plus + minus, np.broadcast_to(2 * v, plus.shape), rtol=1e-6)
    np.testing.assert_allclose(plus - v, SIGMA * noise, atol=1e-6)


def test_shaping():
    d = jnp.asarray([0.5, 0.0, -0.25, 0.25, -4.0, 0.0])
    np.testing.assert_array_equal(shaped_differences(d, "none"), d)
    standardized = shaped_differences(d, "standardized")
    assert float(jnp.mean(standardized**2)) == pytest.approx(1.0, rel=1e-5)
    np.testing.assert_allclose(shaped_differences(1000 * d, "standardized"), standardized, rtol=1e-5)
    # Sizes 0, 0, ¼, ¼, ½, 4 have the ranks 1½, 1½, 3½, 3½, 5, 6.
    ranks = np.array([5, 0, -3.5, 3.5, -6, 0]) / 6
    np.testing.assert_allclose(shaped_differences(d, "ranks"), ranks, rtol=1e-6)
    for shaping in ("none", "standardized", "ranks"):
        np.testing.assert_array_equal(shaped_differences(jnp.zeros(4), shaping), 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({"population": n}, f"population must be even and at least 2, got {n}") for n in (0, 3, -2)],
        *[({"sigma": x}, "sigma must be finite and > 0") for x in (0.0, -1.0, float("nan"))],
        ({"shaping": "rank"}, "'rank'.*'standardized' or 'ranks' or 'none'"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"Evolution: .*{message}"):
        Evolution(**change)
