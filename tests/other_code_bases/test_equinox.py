"""Equinox models: pytrees with functions among their leaves, and weights laid out as in torch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax import Target, TinyLoRA, apply, factorize, matmul, merge

X = jnp.asarray(np.random.default_rng(1).standard_normal((7, 12)), jnp.float32)


class Block(eqx.Module):
    """As anyone would write it."""

    attention: eqx.nn.MultiheadAttention
    mlp: eqx.nn.MLP

    def __init__(self, key):
        for_attention, for_mlp = jax.random.split(key)
        self.attention = eqx.nn.MultiheadAttention(3, 12, key=for_attention)
        self.mlp = eqx.nn.MLP(12, 12, 20, depth=1, activation=jax.nn.gelu, key=for_mlp)

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        return x + jax.vmap(self.mlp)(x)


def loss_of(model):
    return jnp.mean(model(X) ** 2)


LINEAR_MAPS = Target("attention/.*_proj/weight|mlp/layers/.*/weight", "out in")


def test_a_model_of_equinox(check_laws, matrix, random_weights):
    model = random_weights(eqx.filter_eval_shape(Block, jax.random.key(0)))

    factors = factorize(model, TinyLoRA(u=2, n_tie=4, targets=(LINEAR_MAPS,)))
    # Equinox's layers multiply by arrays alone, so the weights are merged inside the compiled step.
    step = jax.jit(jax.value_and_grad(lambda v: loss_of(merge(model, factors, v))))

    attention = [f"attention/{name}_proj/weight" for name in ("key", "output", "query", "value")]
    mlp = [f"mlp/layers/{i}/weight" for i in range(2)]
    check_laws(model, factors, [matrix(path, torch=True) for path in attention + mlp], loss_of, step)


class Linear(eqx.Module):
    """A layer that takes a kernel with an adapter: it multiplies by `matmul`."""

    kernel: jax.Array
    bias: jax.Array

    def __init__(self, num_in, num_out, key):
        self.kernel, self.bias = jax.random.normal(key, (num_in, num_out)) * num_in**-0.5, jnp.ones(num_out)

    def __call__(self, x):
        return matmul(x, self.kernel) + self.bias


class MLP(eqx.Module):
    up: Linear
    down: Linear

    def __init__(self, key):
        for_up, for_down = jax.random.split(key)
        self.up, self.down = Linear(12, 20, for_up), Linear(20, 12, for_down)

    def __call__(self, x):
        return self.down(jax.nn.gelu(self.up(x)))


def test_a_layer_that_calls_matmul_runs_unmerged(check_laws, matrix, random_weights):
    model = random_weights(eqx.filter_eval_shape(MLP, jax.random.key(0)))

    factors = factorize(model, TinyLoRA(u=2, targets=("(up|down)/kernel",)))
    step = jax.jit(jax.value_and_grad(lambda v: loss_of(apply(model, factors, v))))

    check_laws(model, factors, [matrix("down/kernel"), matrix("up/kernel")], loss_of, step)


def test_a_target_that_matches_a_function_is_refused_by_name():
    model = eqx.filter_eval_shape(Block, jax.random.key(0))
    with pytest.raises(ValueError, match=r"mlp/activation has shape \(\), but its target's layout is 'in out'"):
        factorize(model, TinyLoRA(targets=("mlp/activation",)))
