"""On-policy distillation: advantages of tokens, and the gradient of the reverse KL divergence that they give."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinylora_jax import rl
from tinylora_jax.training import GRPO, Batch, Plan, Update, score, sequence_shapes

N, G, P = 25, 4, 5  # at least as many completions as tokens in the vocabulary


@pytest.fixture(scope="module")
def every_token(qwen2):
    """A rollout in which one prompt, given many times, is answered once by each token of the vocabulary."""
    size = qwen2.config.vocab_size
    prompts = np.random.default_rng(0).integers(0, size, P).astype(np.int32)
    completions, ones = np.arange(N * G, dtype=np.int32).reshape(N, G, 1), np.ones((N, G, 1), np.float32)
    mask = completions < size
    return Batch(np.tile(prompts, (N, 1)), np.full(N, P, np.int32), completions % size, mask, -ones, ones[..., 0])


@pytest.fixture(scope="module")
def update(plan):
    return Update(plan, optax.sgd(1.0))


@pytest.fixture(scope="module")
def plan(qwen2):
    grpo = GRPO(loss_type="dapo", tis_cap=0.0, remat="off")
    return Plan(qwen2.config, grpo, 1.0, 1, sequence_shapes(N, P, G, 1, 10_000))


def test_the_mean_over_tokens_is_the_gradient_of_the_reverse_kl_divergence(
    qwen2, policy, v, plan, update, every_token, full_logits
):
    teacher = -0.7 * v
    size = qwen2.config.vocab_size
    student, target = (score(plan, policy, at, every_token) for at in (v, teacher))
    assert np.exp(student)[every_token.mask].sum() == pytest.approx(1.0, abs=1e-4)
    advantages = rl.distillation_advantages(target, student, every_token.mask)
    # The loss is a mean over all tokens, each of which stands for its probability.
    batch = dataclasses.replace(every_token, advantages=size * np.exp(student) * advantages)
    loss, _, gradient = update.gradient(v, policy, batch)

    def divergence(v):
        at = lambda v: jax.nn.log_softmax(full_logits(qwen2.config, policy(v), jnp.asarray(batch.prompts))[0, -1])
        own, other = at(v), jax.lax.stop_gradient(at(teacher))
        return jnp.sum(jnp.exp(own) * (own - other))

    expected, slope = jax.value_and_grad(divergence)(v)
    assert float(loss) == pytest.approx(float(expected), rel=1e-3) and expected > 0.01
    np.testing.assert_allclose(gradient, slope, rtol=1e-2, atol=1e-4)
    assert np.abs(slope).max() > 1e-2


def test_equal_advantages_of_tokens_are_those_of_their_completion(policy, v, update, every_token):
    advantages = np.random.default_rng(1).standard_normal(every_token.advantages.shape).astype(np.float32)
    advantages[0, :7] = 0
    found = [
        update.gradient(v, policy, dataclasses.replace(every_token, advantages=each))
        for each in (advantages, advantages[..., None])
    ]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_advantages_are_zero_outside_the_mask():
    mask = np.array([[[True, False]]])
    teacher, student = np.float32([[[-1.0, -3.0]]]), np.float32([[[-2.5, np.nan]]])
    np.testing.assert_array_equal(rl.distillation_advantages(teacher, student, mask), [[[1.5, 0.0]]])
