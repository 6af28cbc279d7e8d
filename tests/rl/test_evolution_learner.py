"""A step of the evolution strategy: which row answers at which point, and the step that the rewards give."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinylora_jax import rl
from tinylora_jax.data import Prompt, PromptArrays
from tinylora_jax.rewards import Grade
from tinylora_jax.rollout import Completions
from tinylora_jax.training import DivergenceError, Evolution, Optimizer, init_state

PROMPTS, SAMPLES = 6, 2
TARGET = np.float32([[0.3, -0.2], [0.1, 0.4]])


def graded(rewards):
    """A rollout of the same prompts twice, with given rewards of its rows."""
    rows = len(rewards)
    zeros = np.zeros((rows * SAMPLES, 3), np.float32)
    lengths, stopped = np.full(rows * SAMPLES, 2, np.int32), np.ones(rows * SAMPLES, bool)
    completions = Completions(zeros.astype(np.int32), zeros, lengths, stopped, np.int32(99))
    arrays = PromptArrays(np.arange(rows, dtype=np.uint32), np.ones((rows, 2), np.int32), np.ones(rows, np.int32))
    grades = tuple(Grade(float(r), 1.0, None) for r in np.repeat(rewards, SAMPLES))
    prompts = tuple(Prompt(i % PROMPTS, (1,), "q", "a") for i in range(rows))
    return rl.GradedRollout(prompts, arrays, completions, 1.0, ("",) * len(grades), grades, 1.0)


def learner_of(optimizer, **settings):
    return rl.EvolutionLearner(Evolution(population=6, sigma=0.05, **settings), optimizer, seed=3)


def linear(rows):
    """A reward that is linear in v, plus the difficulty of the prompt."""
    difficulty = np.tile(np.linspace(-5, 5, PROMPTS), 2)
    return np.einsum("rij,ij->r", np.asarray(rows, np.float64), TARGET) + difficulty


def test_a_step_is_the_gradient_of_the_pairs_and_does_not_see_the_difficulty():
    sgd = optax.sgd(1.0)
    learner = learner_of(sgd, shaping="none")
    state = init_state(jnp.full((2, 2), 0.5), sgd)
    rows = np.asarray(learner.rows(state, PROMPTS), np.float64)
    assert rows.shape == (2 * PROMPTS, 2, 2)
    # Three pairs, each of which answers two prompts; the second half holds the opposite points.
    np.testing.assert_allclose(rows[:PROMPTS] + rows[PROMPTS:], 1.0, rtol=1e-5)
    np.testing.assert_array_equal(rows[0::2], rows[1::2])
    assert len(np.unique(rows.reshape(12, -1), axis=0)) == 6
    noise = (rows[:PROMPTS:2] - 0.5) / 0.05
    expected = 0.5 + np.einsum("pij,p->ij", noise, np.einsum("pij,ij->p", noise, TARGET)) / 3
    after, metrics = learner.update(state, graded(linear(rows)))
    np.testing.assert_allclose(after.v, expected, rtol=1e-3)
    assert int(after.step) == 1 and metrics["pairs_that_differ"] == 1
    assert not np.isclose(learner.rows(after, PROMPTS)[0] - after.v, rows[0] - 0.5).any(), "noise is repeated"


@pytest.mark.parametrize("shaping", ["standardized", "ranks"])
def test_it_finds_the_best_point(shaping):
    adam = Optimizer(0.05).transform()
    learner, state = learner_of(adam, shaping=shaping), init_state(jnp.zeros((2, 2)), adam)
    for _ in range(60):
        rows = np.asarray(learner.rows(state, PROMPTS))
        state, _ = learner.update(state, graded(-np.square(rows - TARGET).sum(axis=(1, 2))))
    assert np.square(state.v - TARGET).sum() < 0.1 * np.square(TARGET).sum()


def test_equal_rewards_move_nothing_and_an_infinite_step_is_an_error():
    sgd = optax.sgd(1.0)
    learner, state = learner_of(sgd), init_state(jnp.zeros((2, 2)), sgd)
    after, metrics = learner.update(state, graded(np.ones(2 * PROMPTS)))
    np.testing.assert_array_equal(after.v, 0.0)
    assert metrics["pairs_that_differ"] == 0 and "groups_without_signal" not in metrics
    with pytest.raises(DivergenceError):
        learner_of(optax.sgd(1e38)).update(state, graded(np.repeat([1e6, -1e6], PROMPTS)))
    with pytest.raises(ValueError, match="population=6 has 3 pairs, which do not divide 4 prompts"):
        learner.rows(state, 4)


def test_a_question_that_is_answered_at_two_points_counts_once_in_the_standard_error():
    sgd = optax.sgd(1.0)
    learner, state = learner_of(sgd), init_state(jnp.zeros((2, 2)), sgd)
    plus, minus = np.array([3.0, 1, 4, 1, 5, 9]), np.array([2.0, 6, 5, 3, 5, 8])
    _, metrics = learner.update(state, graded(np.concatenate([plus, minus])))
    assert metrics["reward"] == pytest.approx(np.mean([plus, minus]))
    assert metrics["reward_se"] == pytest.approx(np.std((plus + minus) / 2, ddof=1) / 6**0.5)
