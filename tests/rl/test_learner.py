"""From a graded rollout to the loss's input: what is masked, and the advantages of several rewards."""

import numpy as np
import optax
import pytest

from tinylora_jax import rl
from tinylora_jax.data import Prompt, PromptArrays
from tinylora_jax.rewards import Grade
from tinylora_jax.rollout import Completions
from tinylora_jax.training import GRPO, Plan, decoupled_advantages, group_advantages, init_state, sequence_shapes

N, G, T = 2, 3, 4
LENGTHS = np.array([2, 4, 4, 1, 4, 3], np.int32)
STOPPED = np.array([True, False, True, True, False, True])
PARTS = np.array([[1, 0, 1, 0, 0, 1], [0.5, 0.25, 0, 0.5, 0.5, 0.5]], np.float32)


def graded(weights):
    """A rollout of two prompts with three completions, two of which were cut off."""
    zeros = np.zeros((N * G, T), np.float32)
    completions = Completions(zeros.astype(np.int32), zeros, LENGTHS, STOPPED, np.int32(20))
    arrays = PromptArrays(np.arange(N, dtype=np.uint32), np.ones((N, 2), np.int32), np.ones(N, np.int32))
    parts = [tuple(map(float, column)) if weights else () for column in PARTS.T]
    grades = tuple(Grade(float(first), 1.0, None, each) for first, each in zip(PARTS[0], parts, strict=True))
    prompts = tuple(Prompt(i, (1,), "q", "a") for i in range(N))
    return rl.GradedRollout(prompts, arrays, completions, 1.0, ("",) * (N * G), grades, 1.0, weights)


@pytest.fixture
def batch(qwen2, policy, v):
    """The loss's input for weights of rewards and GRPO settings."""

    def make(weights=None, **settings):
        plan = Plan(qwen2.config, GRPO(**settings), 1.0, T, sequence_shapes(N, 2, G, T, 100))
        sgd = optax.sgd(1.0)
        return rl.Learner(plan, sgd).batch(init_state(v, sgd), policy, graded(weights or {}))

    return make


def test_only_completions_that_were_cut_off_are_masked(batch):
    whole, masked = batch(), batch(mask_truncated_completions=True)
    np.testing.assert_array_equal(whole.mask.sum(axis=-1).ravel(), LENGTHS)
    np.testing.assert_array_equal(masked.mask.sum(axis=-1).ravel(), np.where(STOPPED, LENGTHS, 0))
    np.testing.assert_array_equal(masked.advantages, whole.advantages)


def test_advantages_of_several_rewards(batch):
    weights = {"first": 1.0, "second": -0.5}
    parts = PARTS.reshape(2, N, G)
    total = parts[0] - 0.5 * parts[1]
    np.testing.assert_array_equal(batch().advantages, group_advantages(parts[0]))
    np.testing.assert_allclose(batch(weights).advantages, group_advantages(total), rtol=1e-6)
    each = decoupled_advantages(parts, (1.0, -0.5))
    found = batch(weights, multi_objective_aggregation="normalize_then_sum").advantages
    np.testing.assert_array_equal(found, each)
    assert np.abs(each - group_advantages(total)).max() > 0.05


def test_metrics_of_several_rewards_are_those_of_each():
    found = rl.rollout_metrics(graded({"first": 1.0, "second": -0.5}))
    assert found["reward/first"] == PARTS[0].mean() and found["reward/second"] == PARTS[1].mean()
    assert found["reward"] == pytest.approx((PARTS[0] - 0.5 * PARTS[1]).mean())
    assert not [name for name in rl.rollout_metrics(graded({})) if "/" in name]
