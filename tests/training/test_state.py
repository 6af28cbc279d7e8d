"""The optimizer and the state it moves."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinylora_jax.training import Optimizer, init_state


def rates(**settings):
    optimizer = Optimizer(learning_rate=0.1, **settings)
    schedule = optimizer.learning_rates()
    return [float(schedule(i)) for i in range(settings.get("total_updates", 1) + 3)]


def test_constant():
    assert rates(total_updates=5) == pytest.approx([0.1] * 8)


def test_linear_decays_to_zero_at_the_end():
    assert rates(schedule="linear", total_updates=5) == pytest.approx(
        [0.1 * max(0, 1 - i / 5) for i in range(8)], abs=1e-7
    )


def test_cosine_decays_to_zero_at_the_end():
    expected = [0.05 * (1 + math.cos(math.pi * min(i, 6) / 6)) for i in range(9)]
    assert rates(schedule="cosine", total_updates=6) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_evenly_from_above_zero_to_the_peak(schedule):
    got = rates(schedule=schedule, warmup_updates=4, total_updates=10)
    assert got[:5] == pytest.approx([0.1 * (i + 1) / 5 for i in range(5)])
    rest = rates(schedule=schedule, total_updates=6)
    assert got[4:] == pytest.approx(rest[: len(got) - 4], abs=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *[({"learning_rate": x}, "learning_rate") for x in (0.0, -1.0, math.nan, math.inf)],
        ({"schedule": "step"}, "'step'.*'constant', 'linear' or 'cosine'"),
        ({"warmup_updates": 3, "total_updates": 2}, "warmup_updates=3.*total_updates=2"),
        ({"warmup_updates": -1}, "warmup_updates=-1"),
        *[({"max_grad_norm": x}, "max_grad_norm") for x in (-1.0, math.nan, math.inf)],
        ({"precision": "float16"}, "'float16'.*'float32' or 'bfloat16'"),
    ],
)
def test_impossible_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=f"Optimizer: .*{message}"):
        Optimizer(**{"learning_rate": 0.1, **change})


def adamw(gradients, v, settings):
    """Loshchilov and Hutter's algorithm with clipping by the global norm, in float64."""
    m, s, v = np.zeros_like(v), np.zeros_like(v), v.astype(np.float64)
    b1, b2 = settings.b1, settings.b2
    schedule = settings.learning_rates()
    for i, g in enumerate(gradients):
        norm = np.sqrt((g**2).sum())
        if settings.max_grad_norm and norm > settings.max_grad_norm:
            g = g * settings.max_grad_norm / norm
        m, s = b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2
        direction = (m / (1 - b1 ** (i + 1))) / (np.sqrt(s / (1 - b2 ** (i + 1))) + 1e-8)
        v = v - float(schedule(i)) * (direction + settings.weight_decay * v)
    return v


@pytest.mark.parametrize(
    "settings",
    [
        Optimizer(0.05, max_grad_norm=0.0),
        Optimizer(
            0.05, "linear", warmup_updates=2, total_updates=6, weight_decay=0.1, b1=0.8, b2=0.95, max_grad_norm=0.5
        ),
    ],
)
def test_updates_are_adamw(settings):
    rng = np.random.default_rng(0)
    v = rng.standard_normal((3, 2))
    gradients = rng.standard_normal((6, 3, 2)) * np.array([0.01, 3, 1, 0.1, 10, 1])[:, None, None]
    transform = settings.transform()
    state = init_state(jnp.asarray(v, jnp.float32), transform)
    now, opt_state = state.v, state.opt_state
    with jax.numpy_dtype_promotion("standard"):
        for g in gradients:
            updates, opt_state = transform.update(jnp.asarray(g, jnp.float32), opt_state, now)
            now = now + updates
    np.testing.assert_allclose(now, adamw(gradients, v, settings), rtol=1e-4, atol=1e-5)


def test_the_state_is_float32_and_tiny():
    state = init_state(jnp.zeros((13, 1), jnp.bfloat16), Optimizer(1e-4).transform())
    leaves = jax.tree.leaves(state)
    assert {str(x.dtype) for x in leaves} == {"float32", "int32"}
    assert sum(x.nbytes for x in leaves) < 1024


def test_v_in_bfloat16_has_its_values_after_every_update():
    rng = np.random.default_rng(0)
    v = jnp.asarray(rng.standard_normal((200, 3)) * np.exp(rng.uniform(-20, 5, (200, 3))), jnp.float32)
    exact, rounded = Optimizer(0.05).transform(), Optimizer(0.05, precision="bfloat16").transform()
    state = init_state(v.astype(jnp.bfloat16), rounded)
    alone = exact.update
    for seed in range(5):
        gradient = jnp.asarray(np.random.default_rng(seed).standard_normal(v.shape), jnp.float32)
        with jax.numpy_dtype_promotion("standard"):
            wanted = optax.apply_updates(state.v, alone(gradient, state.opt_state[:-1], state.v)[0])
            updates, opt_state = jax.jit(rounded.update)(gradient, state.opt_state, state.v)
        state = type(state)(optax.apply_updates(state.v, updates), opt_state, state.step)
        np.testing.assert_array_equal(state.v, state.v.astype(jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_allclose(state.v, wanted, rtol=2.0**-8, atol=1e-6)
    assert state.v.dtype == jnp.float32


def test_v_in_bfloat16_loses_small_updates():
    v = jnp.full((3, 1), 1.0)
    ends = {}
    for precision in ("float32", "bfloat16"):
        optimizer = Optimizer(1e-3, precision=precision).transform()
        state = init_state(v, optimizer)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = optimizer.update(jnp.ones_like(v), state.opt_state, state.v)
        ends[precision] = np.asarray(optax.apply_updates(state.v, updates))
    np.testing.assert_allclose(ends["float32"], 0.999, atol=1e-6)
    np.testing.assert_array_equal(ends["bfloat16"], 1.0)  # half of the last bit there is 2e-3
