"""An NNX model that is not ours, as the tree it is: a module of NNX is a pytree of its variables."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tinylora_jax import Target, TinyLoRA, apply, factorize, matmul, merge

X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 12)), jnp.float32)


class Block(nnx.Module):
    """As anyone would write it."""

    def __init__(self, linear, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(num_heads=3, in_features=12, decode=False, rngs=rngs)
        self.up, self.down = linear(12, 20, rngs=rngs), linear(20, 12, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(x)))


def loss_of(model):
    return jnp.mean(model(X) ** 2)


ATTENTION = (
    Target("attention/(query|key|value)/kernel", "in out out"),  # [width, heads, head_dim]
    Target("attention/out/kernel", "in in out"),  # [heads, head_dim, width]
)
MLP = (Target("(up|down)/kernel"),)


def test_a_model_of_nnx(check_laws, matrix, random_weights):
    model = random_weights(nnx.eval_shape(lambda: Block(nnx.Linear, nnx.Rngs(0))))

    factors = factorize(model, TinyLoRA(u=2, n_tie=4, targets=ATTENTION + MLP))
    # NNX's attention multiplies by arrays alone, so the weights are merged inside the compiled step.
    step = jax.jit(jax.value_and_grad(lambda v: loss_of(merge(model, factors, v))))

    attention = [matrix(f"attention/{name}/kernel") for name in ("key", "query", "value")]
    rest = [matrix("attention/out/kernel", num_in=2), matrix("down/kernel"), matrix("up/kernel")]
    check_laws(model, factors, attention + rest, loss_of, step)


class Linear(nnx.Linear):
    """A layer that takes a kernel with an adapter: it multiplies by `matmul`."""

    def __call__(self, x):
        return matmul(x, self.kernel.get_value()) + self.bias.get_value()


def test_a_layer_that_calls_matmul_runs_unmerged(check_laws, matrix, random_weights):
    model = random_weights(nnx.eval_shape(lambda: Block(Linear, nnx.Rngs(0))))

    factors = factorize(model, TinyLoRA(u=2, targets=MLP))
    step = jax.jit(jax.value_and_grad(lambda v: loss_of(apply(model, factors, v))))

    check_laws(model, factors, [matrix("down/kernel"), matrix("up/kernel")], loss_of, step)


def test_a_state_and_its_pure_dict_have_the_factors_of_the_model(random_weights):
    model = random_weights(nnx.eval_shape(lambda: Block(nnx.Linear, nnx.Rngs(0))))
    spec = TinyLoRA(u=2, n_tie=4, targets=ATTENTION + MLP)
    graph, state = nnx.split(model)
    expected = factorize(model, spec)
    v = jnp.ones((expected.num_groups, 2))
    for tree in (state, nnx.to_pure_dict(state)):
        factors = factorize(tree, spec)
        assert jax.tree.structure(factors) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, factors, expected)
    merged = nnx.merge(graph, merge(state, factors, v))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(merged), nnx.state(merge(model, factors, v)))
