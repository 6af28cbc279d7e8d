"""Supervised fine-tuning, and the gradient of what is not TinyLoRA: against log_softmax over whole sequences."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinylora_jax import init
from tinylora_jax.adapters import Full, LoRA, adapt
from tinylora_jax.models import forward, logits
from tinylora_jax.training import GRPO, SFT_OBJECTIVE, Plan, Update, init_state, sequence_shapes, solutions_batch

P, T = 5, 6
PROMPTS = np.array([[3, 5, 7, 9, 11], [13, 2, 4, 0, 0], [8, 0, 0, 0, 0]], np.int32)
LENGTHS = np.array([5, 3, 1], np.int32)
SOLUTIONS = [(21, 22, 23), (31, 32, 33, 34, 35, 36), (41,)]
TOKENS = sum(map(len, SOLUTIONS))


SGD = optax.sgd(1.0)


def plan_of(config, stream_tokens=10_000):
    grpo = GRPO(loss_type="dapo", skip_without_signal=False, remat="off")
    return Plan(config, grpo, 1.0, T, sequence_shapes(3, P, 1, T, stream_tokens))


def batch():
    return solutions_batch(PROMPTS, LENGTHS, SOLUTIONS, T)


def naive_loss(config, params):
    """Mean over all tokens of the solutions of −ln π, one sequence a row, padded on the right."""
    rows = [[*prompt[:length], *solution] for prompt, length, solution in zip(PROMPTS, LENGTHS, SOLUTIONS, strict=True)]
    padded = jnp.array([row + [0] * (max(map(len, rows)) - len(row)) for row in rows], jnp.int32)
    tables = jax.nn.log_softmax(logits(config, params, forward(config, params, padded)[0]))
    total = jnp.zeros(())
    for table, length, solution in zip(tables, LENGTHS, SOLUTIONS, strict=True):
        places = np.arange(length - 1, length - 1 + len(solution))
        total -= jnp.sum(table[places, np.array(solution)])
    return total / TOKENS


@pytest.mark.parametrize("stream_tokens", [10_000, 1])
def test_the_loss_is_the_mean_over_the_solutions_tokens(qwen2, policy, v, stream_tokens):
    loss, sums, _ = Update(plan_of(qwen2.config, stream_tokens), SGD, SFT_OBJECTIVE).gradient(v, policy, batch())
    assert loss == pytest.approx(float(jax.jit(partial(naive_loss, qwen2.config))(policy(v))), abs=1e-5)
    assert sums["tokens"] == TOKENS


@pytest.mark.parametrize("kind", ["tinylora", "lora", "full"])
# A tied head, and one of its own.
@pytest.mark.parametrize("model", [pytest.param("qwen2", marks=pytest.mark.slow), "llama"])
def test_the_gradient_is_that_of_the_naive_loss(tiny, policy, kind, model):
    config, params = tiny(model)
    spec = {"tinylora": policy.factors.spec, "lora": LoRA(rank=3), "full": Full()}[kind]
    adapted = adapt(params, spec)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    v = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), adapted.init())
    _, _, ours = Update(plan_of(config), SGD, SFT_OBJECTIVE).gradient(v, adapted, batch())
    theirs = jax.jit(jax.grad(lambda v: naive_loss(config, adapted.merged(v))))(v)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3 * float(jnp.abs(b).max()) + 1e-6, err_msg=str(path))
        assert jnp.any(b != 0), path


@pytest.mark.parametrize("spec", [LoRA(rank=2), Full()])
def test_steps_learn_the_solutions(qwen2, spec):
    policy, optimizer = adapt(qwen2.params, spec), optax.adam(3e-2)
    step, state = Update(plan_of(qwen2.config), optimizer, SFT_OBJECTIVE), None
    state, losses = init_state(policy.init(), optimizer), []
    for _ in range(8):
        state, metrics = step(state, policy, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0] and metrics["grad_norm"] > 0
    assert step.accumulate._cache_size() == 1


def test_the_same_gradient_through_another_point(qwen2, policy, v):
    """What is trained may be anything of which the policy's v is a function."""
    matrix = jax.random.normal(jax.random.key(0), (v.size, 3))
    point = lambda w: (matrix @ w).reshape(v.shape)
    w, sgd = jnp.array([0.1, -0.2, 0.3]), optax.sgd(1.0)
    step = Update(plan_of(qwen2.config), sgd, SFT_OBJECTIVE, point)
    state, _ = step(init_state(w, sgd), policy, batch())
    theirs = jax.jit(jax.grad(lambda w: naive_loss(qwen2.config, policy(point(w)))))(w)
    np.testing.assert_allclose(w - state.v, theirs, rtol=1e-3, atol=1e-5)


def test_the_head_is_frozen_for_an_adapter(qwen2, policy):
    assert not policy.trains_head
    assert init(policy.factors).dtype == jnp.float32
    masked = dataclasses.replace(batch(), mask=np.zeros((3, 1, T), bool))
    loss, sums, gradient = Update(plan_of(qwen2.config), SGD, SFT_OBJECTIVE).gradient(policy.init(), policy, masked)
    assert loss == 0 and sums["tokens"] == 0 and not np.any(gradient)
