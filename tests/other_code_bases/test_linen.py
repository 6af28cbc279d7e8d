"""A Flax Linen model: attention whose kernels have an axis of heads, and an MLP."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tinylora_jax import Target, TinyLoRA, apply, factorize, matmul, merge

X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 12)), jnp.float32)


class Block(nn.Module):
    """As anyone would write it."""

    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(num_heads=3, kernel_init=self.kernel_init, name="attention")(x, x)
        hidden = nn.gelu(nn.Dense(20, kernel_init=self.kernel_init, name="up")(x))
        return x + nn.Dense(12, kernel_init=self.kernel_init, name="down")(hidden)


SPEC = TinyLoRA(
    u=2,
    n_tie=4,
    targets=(
        Target("attention/(query|key|value)/kernel", "in out out"),  # [width, heads, head_dim]
        Target("attention/out/kernel", "in in out"),  # [heads, head_dim, width]
        "(up|down)/kernel",
    ),
)


def test_a_model_of_flax_linen(check_laws, matrix, random_weights):
    model = Block()
    params = random_weights(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    loss = lambda params: jnp.mean(model.apply({"params": params}, X) ** 2)

    factors = factorize(params, SPEC)
    # Linen's attention multiplies by arrays alone, so the weights are merged inside the compiled step.
    step = jax.jit(jax.value_and_grad(lambda v: loss(merge(params, factors, v))))

    attention = [matrix(f"attention/{name}/kernel") for name in ("key", "query", "value")]
    rest = [matrix("attention/out/kernel", num_in=2), matrix("down/kernel"), matrix("up/kernel")]
    check_laws(params, factors, attention + rest, loss, step)


def test_boxes_of_linen_change_nothing(random_weights):
    boxed = Block(nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    params = random_weights(jax.eval_shape(boxed.init, jax.random.key(0), X)["params"])
    assert isinstance(params["up"]["kernel"], nn.Partitioned)

    factors, expected = factorize(params, SPEC), factorize(nn.unbox(params), SPEC)
    assert jax.tree.structure(factors) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, factors, expected)
    v = jnp.ones((factors.num_groups, 2))
    merged = merge(params, factors, v)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(merged), merge(nn.unbox(params), factors, v))


def dot_general(x, kernel, dimension_numbers, precision=None):
    """What `nn.Dense` and `nn.DenseGeneral` multiply with; takes kernels with an adapter, and arrays."""
    del precision
    return matmul(x, kernel, num_in=len(dimension_numbers[0][0]))


class MLP(nn.Module):
    """Both of its maps take kernels with an adapter."""

    @nn.compact
    def __call__(self, x):
        as_they_are = lambda *arrays, **_: arrays
        up = nn.DenseGeneral((4, 5), dot_general=dot_general, promote_dtype=as_they_are, name="up")
        down = nn.DenseGeneral(12, (-2, -1), dot_general=dot_general, promote_dtype=as_they_are, name="down")
        return down(nn.gelu(up(x)))


def test_dense_layers_of_linen_run_unmerged(check_laws, matrix, random_weights):
    model = MLP()
    params = random_weights(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    loss = lambda params: jnp.mean(model.apply({"params": params}, X) ** 2)

    spec = TinyLoRA(u=2, targets=(Target("up/kernel", "in out out"), Target("down/kernel", "in in out")))
    factors = factorize(params, spec)
    step = jax.jit(jax.value_and_grad(lambda v: loss(apply(params, factors, v))))

    check_laws(params, factors, [matrix("up/kernel"), matrix("down/kernel", num_in=2)], loss, step)
