"""The natural gradient: gradients of prompts apart, their matrix, and a step of known KL divergence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinylora_jax.adapters import LoRA, LoRAPolicy
from tinylora_jax.training import GRPO, Batch, Optimizer, Plan, Update, init_state, sequence_shapes
from tinylora_jax.training.losses import token_weights
from tinylora_jax.training.natural import fisher_matrix

N, G, P, T = 4, 3, 5, 4
NATURAL = Optimizer(1.0, method="natural", kl_radius=1e-3, b1=0.0, max_grad_norm=0.0)


@pytest.fixture(scope="module")
def batch(qwen2):
    """A rollout with completions of all lengths, and one prompt without signal."""
    rng = np.random.default_rng(0)
    mask = np.arange(T) < rng.integers(1, T + 1, (N, G, 1))
    advantages = rng.standard_normal((N, G)).astype(np.float32)
    advantages[2] = 0
    ids = lambda *shape: rng.integers(0, qwen2.config.vocab_size, shape).astype(np.int32)
    logprobs = -np.abs(rng.standard_normal(mask.shape)).astype(np.float32)
    return Batch(ids(N, P), np.array([5, 3, 1, 4], np.int32), ids(N, G, T), mask, logprobs, advantages)


def plan_of(config, stream_tokens=10_000, prompts=N):
    shapes = sequence_shapes(N, P, G, T, stream_tokens)
    return Plan(config, GRPO(loss_type="dapo", tis_cap=0.0, remat="off"), 1.0, T, shapes, prompts=prompts)


@pytest.fixture(scope="module")
def update(qwen2):
    return Update(plan_of(qwen2.config), NATURAL.transform())


@pytest.fixture(scope="module")
def totals(update, policy, v, batch):
    """Loss, sums, and the gradients of prompts."""
    return update.gradient(v, policy, batch)


def test_gradients_of_prompts_are_those_of_each_prompt_alone(qwen2, policy, v, batch, totals):
    one = Update(plan_of(qwen2.config), optax.sgd(1.0))
    loss, _, apart = totals
    alone_loss = 0.0
    for prompt in range(N):
        advantages = np.where(np.arange(N)[:, None] == prompt, batch.advantages, 0)
        value, _, alone = one.gradient(v, policy, dataclasses.replace(batch, advantages=advantages))
        np.testing.assert_allclose(apart[prompt], alone, rtol=1e-3, atol=1e-6)
        alone_loss += float(value)
    assert float(loss) == pytest.approx(alone_loss, abs=1e-5)
    np.testing.assert_array_equal(apart[2], 0.0)
    assert all(np.abs(apart[prompt]).max() > 1e-3 for prompt in (0, 1, 3))
    np.testing.assert_allclose(apart.sum(0), one.gradient(v, policy, batch)[2], rtol=1e-3, atol=1e-6)


def test_the_packing_changes_nothing(qwen2, policy, v, batch, totals):
    """Of the short sequences each holds parts of a few prompts: a matrix of their sums would differ."""
    split = Update(plan_of(qwen2.config, stream_tokens=1), NATURAL.transform())
    _, sums, apart = split.gradient(v, policy, batch)
    np.testing.assert_allclose(apart, totals[2], rtol=1e-3, atol=1e-6)
    assert float(sums["power"]) == pytest.approx(float(totals[1]["power"]), rel=1e-5)
    coefficients = np.asarray(token_weights(batch.mask, "dapo", T)) * batch.advantages[..., None]
    assert float(sums["power"]) == pytest.approx(float((coefficients**2).sum()), rel=1e-5)


def reference(gradients, powers, settings, v):
    """Every step written out in float64: averages, damping, radius."""
    size, v = v.size, v.astype(np.float64)
    fisher, momentum, seen = np.zeros((size, size)), np.zeros(size), 0
    for index, (apart, power) in enumerate(zip(gradients, powers, strict=True)):
        if power:
            fisher = settings.fisher_decay * fisher + (1 - settings.fisher_decay) * apart.T @ apart / power
            seen += 1
        momentum = settings.b1 * momentum + (1 - settings.b1) * apart.sum(axis=0)
        F = fisher / (1 - settings.fisher_decay**seen)
        damped = F + settings.damping * np.trace(F) / size * np.eye(size)
        direction = np.linalg.inv(damped) @ (momentum / (1 - settings.b1 ** (index + 1)))
        scale = float(settings.learning_rates()(index))
        if settings.kl_radius:
            share = scale / settings.learning_rate
            length = direction @ damped @ direction
            scale = share * np.sqrt(2 * settings.kl_radius / length) if length else 0.0
        v = v - scale * direction
    return v


def steps(gradients, powers, settings, v):
    """The same by the transformation."""
    transform = settings.transform()
    state = transform.init(v)
    with jax.numpy_dtype_promotion("standard"):
        for apart, power in zip(gradients, powers, strict=True):
            fisher = fisher_matrix(jnp.asarray(apart.reshape(len(apart), -1)), jnp.float32(power))
            updates, state = transform.update(jnp.asarray(apart.sum(axis=0)), state, v, fisher=fisher)
            v = optax.apply_updates(v, updates)
    return v, state


@pytest.mark.parametrize(
    "settings",
    [
        NATURAL,
        dataclasses.replace(NATURAL, kl_radius=0.0, learning_rate=0.3, damping=1.0),
        dataclasses.replace(NATURAL, schedule="linear", total_updates=9, warmup_updates=2, b1=0.8, fisher_decay=0.5),
    ],
)
def test_steps_are_the_formula_with_the_full_matrix(settings):
    rng = np.random.default_rng(1)
    gradients = rng.standard_normal((6, 5, 3, 2)).astype(np.float32) * np.float32([[1, 10], [0.1, 1], [3, 0.3]])
    powers = [2.0, 0.5, 0.0, 1.0, 3.0, 1.0]
    gradients[2] = 0  # a batch without signal
    v = rng.standard_normal((3, 2)).astype(np.float32)
    found, state = steps(gradients, powers, settings, jnp.asarray(v))
    expected = reference(gradients.reshape(6, 5, 6), powers, settings, v.ravel())
    np.testing.assert_allclose(np.ravel(found), expected, rtol=1e-3, atol=1e-4)
    assert int(jax.tree.leaves(state)[0]) == 6 and int(jax.tree.leaves(state)[1]) == 5


def test_without_any_signal_nothing_moves_and_nothing_is_forgotten():
    some = np.random.default_rng(2).standard_normal((1, 5, 3)).astype(np.float32)
    v, state = steps(some, [1.0], NATURAL, jnp.zeros(3))
    none = np.concatenate([some, np.zeros((2, 5, 3), np.float32)])
    later, after = steps(none, [1.0, 0.0, 0.0], NATURAL, jnp.zeros(3))
    np.testing.assert_array_equal(later, v)
    matrices = [next(x for x in jax.tree.leaves(each) if x.ndim == 2) for each in (state, after)]
    np.testing.assert_array_equal(*matrices)
    first, _ = steps(np.zeros((1, 5, 3), np.float32), [0.0], NATURAL, jnp.ones(3))
    np.testing.assert_array_equal(first, 1.0)


def test_the_matrix_is_the_fisher_matrix_of_a_token():
    """A softmax policy whose Fisher matrix is known; groups of 4 completions of 1 to 30 tokens, weights as for grpo."""
    rng = np.random.default_rng(3)
    probabilities = np.array([0.6, 0.3, 0.1])
    scores = (np.eye(3) - probabilities)[:, :2]  # of ln softmax(v, 0) by the two numbers of v
    expected = np.einsum("k,ki,kj->ij", probabilities, scores, scores)
    gradients, power = [], 0.0
    for _ in range(4000):
        lengths = rng.integers(1, 31, 4)
        advantages = rng.permutation([1.0, 1.0, -1.0, -1.0])
        tokens = [scores[rng.choice(3, n, p=probabilities)].sum(axis=0) for n in lengths]
        gradients.append(sum(a / n * s for a, n, s in zip(advantages, lengths, tokens, strict=True)))
        power += float((advantages**2 / lengths).sum())  # n tokens of weight 1/n
    found = fisher_matrix(jnp.asarray(np.array(gradients), jnp.float32), jnp.float32(power))
    np.testing.assert_allclose(found, expected, atol=0.1 * expected.max())


def test_a_quadratic_of_bad_condition_takes_few_steps():
    """Adam with the best of five rates is far away where the natural gradient has arrived."""
    turn, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((5, 5)))
    H = turn @ np.diag(10.0 ** np.arange(-2, 3)) @ turn.T
    root = np.linalg.cholesky(H)
    noise = np.concatenate([root.T, -root.T])  # Σ_p g_p g_pᵀ = 2 H, without a mean
    loss = lambda v: float(0.5 * v @ H @ v)

    def run(settings, count):
        transform, v = settings.transform(), jnp.ones(5)
        state = transform.init(v)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(count):
                gradient = H @ np.asarray(v)
                apart = jnp.asarray(noise + gradient / len(noise), jnp.float32)
                extra = {"fisher": fisher_matrix(apart, jnp.float32(2.0))} if settings.needs_fisher else {}
                updates, state = transform.update(apart.sum(axis=0), state, v, **extra)
                v = optax.apply_updates(v, updates)
        return loss(np.asarray(v, np.float64))

    best = min(run(Optimizer(rate, max_grad_norm=0.0), 8) for rate in (0.01, 0.03, 0.1, 0.3, 1.0))
    plain = dataclasses.replace(NATURAL, kl_radius=0.0, damping=1e-3, fisher_decay=0.0)
    assert run(plain, 8) < 1e-3 * best


def test_a_step_has_its_kl_divergence_and_does_not_depend_on_the_scale_of_v(update, policy, v, batch, totals):
    state, metrics = update(init_state(v, update.optimizer), policy, batch)
    step = np.ravel(state.v - v)
    fisher = np.asarray(fisher_matrix(totals[2].reshape(N, -1), totals[1]["power"]), np.float64)
    kl = 0.5 * step @ fisher @ step
    assert 0.5 * NATURAL.kl_radius < kl <= NATURAL.kl_radius * 1.001
    assert metrics["step_kl"] == pytest.approx(kl, rel=1e-2) and "power" not in metrics
    # In other units of v it is the same step, which plain gradients would not take.
    other = update.with_optimizer(update.optimizer, lambda w: 4.0 * w)
    scaled, _ = other(init_state(v / 4, update.optimizer), policy, batch)
    np.testing.assert_allclose(4 * scaled.v, state.v, rtol=1e-3, atol=1e-5)


def test_a_step_compiles_once(update, policy, v, batch):
    state, _ = update(init_state(v, update.optimizer), policy, batch)
    update(state, policy, batch)
    assert update.accumulate._cache_size() == 1 and update.apply._cache_size() == 1
    assert {str(x.dtype) for x in jax.tree.leaves(state)} == {"float32", "int32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "newton"}, "'newton'.*'adam' or 'natural'"),
        ({"kl_radius": -1.0}, "kl_radius"),
        ({"damping": 0.0}, "damping must be at least 0.001, got 0.0"),
        ({"fisher_decay": 1.0}, "fisher_decay"),
        ({"weight_decay": 0.1}, "weight_decay=0.1 needs method 'adam'"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"Optimizer: .*{message}"):
        dataclasses.replace(NATURAL, **change)


def test_what_has_no_gradients_of_prompts_is_refused(qwen2, policy, v, batch, update):
    with pytest.raises(ValueError, match="at most 4,096, got 4,097"):
        init_state(jnp.zeros((4097, 1)), NATURAL.transform())
    lora = LoRAPolicy(qwen2.params, LoRA(rank=1))
    with pytest.raises(ValueError, match="may differ between tokens.*got LoRAPolicy"):
        update.gradient(lora.init(), lora, batch)
    other = Update(plan_of(qwen2.config, prompts=N + 1), NATURAL.transform())
    with pytest.raises(ValueError, match="Plan.prompts=5 prompts, got 4"):
        other.gradient(v, policy, batch)
    with pytest.raises(ValueError, match="all have the method 'natural', or none"):
        update.with_optimizer(Optimizer(1.0).transform())
