"""One GRPO update: the papers' loss, its gradient in v alone, compiled once."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinylora_jax import Policy, TinyLoRA, factorize, init
from tinylora_jax.models import ModelConfig, init_params
from tinylora_jax.training import (
    GRPO,
    Batch,
    Optimizer,
    Plan,
    Update,
    init_state,
    pack,
    score,
    sequence_shapes,
)
from tinylora_jax.training.grpo import grpo_loss
from tinylora_jax.training.losses import token_weights

N, G, P, T = 4, 3, 5, 4
MAX_TOKENS = 16
FULL = GRPO(loss_type="dapo", clip_low=0.11, clip_high=0.17, kl_coef=0.3, tis_cap=1.1, remat="off")


def normals(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def make_batch(config, seed=0):
    """A rollout with completions of all lengths, one of them filtered out; NaN wherever nobody may look."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(1, T + 1, (N, G))
    ends[0, 0], ends[1, 1] = 0, T
    mask = np.arange(T) < ends[:, :, None]
    rollout = np.where(mask, -np.abs(normals(seed + 1, N, G, T)) - 3, np.nan)
    arrays = {
        "prompts": rng.integers(0, config.vocab_size, (N, P)).astype(np.int32),
        "lengths": np.array([5, 3, 1, 4], np.int32),
        "completions": np.where(mask, rng.integers(0, config.vocab_size, (N, G, T)), 0).astype(np.int32),
        "mask": mask,
        "rollout_logprobs": rollout.astype(np.float32),
        "advantages": normals(seed + 2, N, G),
    }
    return Batch(**arrays)


def plan_of(config, grpo=FULL, temperature=0.9, stream_tokens=10_000):
    return Plan(config, grpo, temperature, MAX_TOKENS, sequence_shapes(N, P, G, T, stream_tokens))


@pytest.fixture(scope="module")
def scored(qwen2, policy, v):
    """A batch whose old policy and reference differ from the current one, and its log-probabilities at v."""
    batch = make_batch(qwen2.config)
    at = lambda v: score(plan_of(qwen2.config), policy, v, batch)
    now, old, ref = at(v), at(0.6 * v), at(0.0 * v)
    near = lambda x: np.where(batch.mask, x + 0.3 * normals(7, N, G, T), np.float32("nan"))
    quiet = lambda x: np.where(batch.mask, x, np.float32("nan"))
    batch = dataclasses.replace(batch, rollout_logprobs=near(old), old_logprobs=quiet(old), ref_logprobs=quiet(ref))
    return batch, np.asarray(now, np.float64)


@partial(jax.jit, static_argnames="plan")
def compiled(v, plan, policy, microbatch):
    return jax.value_and_grad(grpo_loss, has_aux=True)(v, plan, policy, microbatch)


def loss_and_gradient(v, config, policy, batch, loss_type=FULL.loss_type):
    """((loss, sums), gradient) under `FULL`; loss types differ by their weights alone, so nothing recompiles."""
    weights = np.asarray(token_weights(jnp.asarray(batch.mask), loss_type, MAX_TOKENS))
    plan = plan_of(config)
    (microbatch,) = pack(batch, weights, plan.shapes)
    return compiled(v, plan, policy, microbatch)


def naive(grpo, logprobs, batch):
    """The loss and the metrics, one token at a time."""
    sums = dict.fromkeys(("kl", "clip_low", "clip_high", "delta_prob", "importance"), 0.0)
    old, rollout, ref = (
        np.asarray(x, np.float64) for x in (batch.old_logprobs, batch.rollout_logprobs, batch.ref_logprobs)
    )
    per_completion, total, tokens = [], 0.0, 0
    for i in range(N):
        for j in range(G):
            losses = []
            for t in range(T):
                if not batch.mask[i, j, t]:
                    continue
                advantage = float(batch.advantages[i, j])
                ratio = math.exp(logprobs[i, j, t] - old[i, j, t])
                clipped = min(max(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
                objective = min(ratio * advantage, clipped * advantage)
                tis = math.exp(old[i, j, t] - rollout[i, j, t])
                tis = min(tis, grpo.tis_cap) if grpo.tis_cap else 1.0
                d = ref[i, j, t] - logprobs[i, j, t]
                kl = math.exp(d) - d - 1
                losses.append(-tis * objective + grpo.kl_coef * kl)
                sums["kl"] += kl
                sums["importance"] += tis
                sums["clip_low"] += ratio < 1 - grpo.clip_low and advantage < 0
                sums["clip_high"] += ratio > 1 + grpo.clip_high and advantage > 0
                sums["delta_prob"] += abs(math.exp(old[i, j, t]) - math.exp(rollout[i, j, t]))
            per_completion.append(sum(losses) / len(losses) if losses else 0.0)
            total, tokens = total + sum(losses), tokens + len(losses)
    loss = {
        "grpo": sum(per_completion) / (N * G),
        "dapo": total / tokens,
        "dr_grpo": total / (N * G * MAX_TOKENS),
    }[grpo.loss_type]
    return loss, sums, tokens


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_the_loss_is_the_equation(qwen2, policy, v, scored, loss_type):
    batch, logprobs = scored
    (loss, sums), _ = loss_and_gradient(v, qwen2.config, policy, batch, loss_type)
    expected, expected_sums, _ = naive(dataclasses.replace(FULL, loss_type=loss_type), logprobs, batch)
    assert loss == pytest.approx(expected, abs=2e-5)
    for name, value in expected_sums.items():
        assert sums[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
    assert expected_sums["clip_low"] > 0 and expected_sums["clip_high"] > 0, "both bounds must be active"


def test_the_gradient_is_the_finite_difference(qwen2, policy, v, scored):
    batch, _ = scored
    value = lambda v: float(loss_and_gradient(v, qwen2.config, policy, batch)[0][0])
    _, gradient = loss_and_gradient(v, qwen2.config, policy, batch)
    assert gradient.dtype == jnp.float32
    step = 1e-3  # small: a token that crosses a clip bound inside the step spoils its difference
    difference = np.zeros(v.shape)
    for at in np.ndindex(*v.shape):
        e = jnp.zeros_like(v).at[at].set(step)
        difference[at] = (value(v + e) - value(v - e)) / (2 * step)
    assert np.abs(difference).max() > 0.05
    np.testing.assert_allclose(gradient, difference, rtol=0.02, atol=2e-3)


def test_the_first_update_takes_the_current_policy_as_the_old_one(qwen2, policy, v, scored):
    batch, logprobs = scored
    first = dataclasses.replace(batch, old_logprobs=None)
    given = dataclasses.replace(batch, old_logprobs=np.asarray(logprobs, np.float32))
    (loss, sums), gradient = loss_and_gradient(v, qwen2.config, policy, first)
    (same_loss, _), same_gradient = loss_and_gradient(v, qwen2.config, policy, given)
    assert loss == pytest.approx(float(same_loss), abs=1e-5)
    np.testing.assert_allclose(gradient, same_gradient, rtol=1e-3, atol=1e-5)
    assert np.abs(gradient).max() > 1e-2 and sums["clip_low"] == sums["clip_high"] == 0


def test_the_reference_policy_is_zero_and_the_size_of_streams_changes_nothing(qwen2, policy, v, scored):
    batch, now = scored
    base = Policy(policy.params, policy.factors)
    np.testing.assert_allclose(score(plan_of(qwen2.config, stream_tokens=1), base, v, batch), now, atol=2e-5)
    ref = score(plan_of(qwen2.config), base, 0.0 * v, batch)
    assert np.abs((ref - now)[np.asarray(batch.mask)]).max() > 0.05


SGD = optax.sgd(1.0)


@pytest.fixture(scope="module")
def sgd_step(qwen2):
    """An update that moves v by exactly minus its gradient."""
    return Update(dataclasses.replace(plan_of(qwen2.config), remat=True), SGD)


def test_a_step_is_one_move_along_the_gradient_compiled_once(qwen2, policy, v, scored, sgd_step):
    batch, logprobs = scored
    kept = [np.array(x) for x in jax.tree.leaves(policy)]
    state, metrics = sgd_step(init_state(v, SGD), policy, batch)
    (loss, sums), gradient = loss_and_gradient(v, qwen2.config, policy, batch)
    np.testing.assert_allclose(state.v - v, -gradient, rtol=1e-3, atol=1e-5)
    assert int(state.step) == 0, "steps count rollouts, and the caller advances them"

    expected, expected_sums, tokens = naive(FULL, logprobs, batch)
    assert metrics["loss"] == pytest.approx(expected, abs=2e-5)
    assert metrics["grad_norm"] == pytest.approx(float(np.linalg.norm(gradient)), rel=1e-3)
    assert metrics["v_norm"] == pytest.approx(float(np.linalg.norm(state.v)), rel=1e-5)
    for name, value in expected_sums.items():
        assert metrics[name] == pytest.approx(value / tokens, rel=1e-4, abs=1e-4), name
    assert metrics["entropy"] == pytest.approx(float(sums["entropy"]) / tokens, rel=1e-4)

    # Other data and the state that the step returned: no second compilation, and another result.
    other = make_batch(qwen2.config, seed=9)
    other = dataclasses.replace(other, old_logprobs=other.rollout_logprobs, ref_logprobs=other.rollout_logprobs)
    again, _ = sgd_step(state, policy, other)
    assert sgd_step.accumulate._cache_size() == 1 and sgd_step.apply._cache_size() == 1
    assert np.isfinite(again.v).all() and np.abs(again.v - state.v).max() > 1e-4
    for before, after in zip(kept, jax.tree.leaves(policy), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_split_batch_gives_the_same_update(qwen2, policy, v, scored, sgd_step):
    batch, _ = scored
    plan = plan_of(qwen2.config, stream_tokens=1)
    assert len(list(pack(batch, np.zeros((N, G, T), np.float32), plan.shapes))) > 1
    split = Update(plan, SGD)
    (whole, metrics), (microbatches, split_metrics) = (f(init_state(v, SGD), policy, batch) for f in (sgd_step, split))
    np.testing.assert_allclose(microbatches.v, whole.v, rtol=1e-4, atol=1e-5)
    for name, value in metrics.items():
        assert split_metrics[name] == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    assert split.accumulate._cache_size() == 1


def test_groups_without_signal_are_left_out_and_change_nothing(qwen2, policy, v, scored):
    batch, _ = scored
    advantages = np.array(batch.advantages)
    advantages[[0, 2]] = 0
    batch = dataclasses.replace(batch, advantages=advantages, ref_logprobs=None)
    plan = lambda skip: plan_of(qwen2.config, dataclasses.replace(FULL, kl_coef=0.0, skip_without_signal=skip))
    run = lambda skip: Update(plan(skip), SGD)(init_state(v, SGD), policy, batch)
    (state, metrics), (whole, whole_metrics) = run(True), run(False)
    np.testing.assert_allclose(state.v, whole.v, rtol=1e-4, atol=1e-6)
    assert metrics["loss"] == pytest.approx(float(whole_metrics["loss"]), abs=1e-5)
    assert np.abs(state.v - v).max() > 1e-2 and metrics["entropy"] != whole_metrics["entropy"]


def test_a_batch_without_any_signal_is_a_step_of_zero_gradient(qwen2, policy, v, scored):
    batch = dataclasses.replace(scored[0], advantages=np.zeros((N, G), np.float32), ref_logprobs=None)
    plan = plan_of(qwen2.config, dataclasses.replace(FULL, kl_coef=0.0))
    state, metrics = Update(plan, SGD)(init_state(v, SGD), policy, batch)
    np.testing.assert_array_equal(state.v, v)
    assert all(np.isfinite(x) for x in metrics.values())


def test_a_batch_whose_completions_are_all_masked_is_a_step_of_zero_gradient(qwen2, policy, v, scored, sgd_step):
    """As `mask_truncated_completions` leaves it when every completion was cut off."""
    state, metrics = sgd_step(
        init_state(v, SGD), policy, dataclasses.replace(scored[0], mask=np.zeros((N, G, T), bool))
    )
    np.testing.assert_array_equal(state.v, v)
    assert metrics["loss"] == 0 and all(np.isfinite(x) for x in metrics.values())


def test_nothing_to_learn_moves_nothing(qwen2, policy, v, scored, sgd_step):
    batch, now = scored
    # Equal rewards, and a policy that still is its reference: k3 and its gradient vanish.
    still = dataclasses.replace(
        batch, advantages=np.zeros((N, G), np.float32), ref_logprobs=np.asarray(now, np.float32)
    )
    state, metrics = sgd_step(init_state(v, SGD), policy, still)
    np.testing.assert_allclose(state.v, v, atol=1e-5)
    assert metrics["kl"] == pytest.approx(0, abs=1e-5)


def test_training_in_bfloat16_keeps_v_and_the_optimizer_in_float32_and_learns(qwen2, policy):
    half = Policy(jax.tree.map(lambda x: x.astype(jnp.bfloat16), policy.params), policy.factors)
    batch = make_batch(qwen2.config)
    zero = init(half.factors)
    plan = plan_of(qwen2.config, GRPO(), 1.0)
    rollout = score(plan, half, zero, batch)
    # One sample of every group is right.
    advantages = np.float32([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, 1.0, -0.5], [1.0, -0.5, -0.5]])
    batch = dataclasses.replace(batch, rollout_logprobs=rollout, advantages=advantages)
    optimizer = Optimizer(1e-2).transform()
    step = Update(plan, optimizer)
    state = init_state(zero, optimizer)
    for _ in range(5):
        with jax.numpy_dtype_promotion("standard"):  # the gradient of jax.nn.dot_product_attention mixes dtypes
            state, metrics = step(state, half, batch)
        assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}
        assert {str(x.dtype) for x in jax.tree.leaves(metrics)} == {"float32"}
    assert step.accumulate._cache_size() == 1
    after = score(plan, half, state.v, batch)
    gain = np.where(batch.mask, after - rollout, 0).sum(-1)
    assert (gain * np.asarray(advantages)).sum() > 0.05, "good completions must have become more likely than bad ones"


def test_only_v_is_differentiated():
    # The backward pass never forms dL/dW, so a step costs about two forwards and not three.
    config = ModelConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32
    )
    rng = np.random.default_rng(0)
    ids = lambda *s: rng.integers(0, 64, s).astype(np.int32)
    wide = lambda *s: np.ones(s, np.float32)
    mask = np.ones((2, 4, 16), bool)
    batch = Batch(ids(2, 16), np.full(2, 16, np.int32), ids(2, 4, 16), mask, -wide(2, 4, 16), wide(2, 4))
    plan = Plan(config, GRPO(remat="off"), 1.0, 16, sequence_shapes(2, 16, 4, 16, 10_000))
    (microbatch,) = pack(batch, wide(2, 4, 16), plan.shapes)
    params = jax.eval_shape(lambda: init_params(config))
    factors = jax.eval_shape(lambda params: factorize(params, TinyLoRA(n_tie=2)), params)

    def loss(v, params, factors, microbatch):
        return grpo_loss(v, plan, Policy(params, factors), microbatch)[0]

    def flops(f):
        compiled = jax.jit(f).lower(init(factors), params, factors, microbatch).compile()
        return compiled.cost_analysis()["flops"]

    forward = flops(loss)
    only_v = flops(jax.value_and_grad(loss)) / forward
    everything = flops(jax.value_and_grad(loss, argnums=(0, 1))) / forward
    assert 1.5 < only_v <= 2.3
    assert everything > 2.5, "the bound must be one that differentiating the weights would break"
