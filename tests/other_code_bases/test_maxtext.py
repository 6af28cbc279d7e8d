"""A tree as MaxText stacks it: one leaf for all layers, `[layers, in, heads, head_dim]`, under `nn.scan`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tinylora_jax import Target, TinyLoRA, apply, factorize, matmul, merge

LAYERS, WIDTH, HEADS, HEAD_DIM = 3, 12, 3, 4
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, WIDTH)), jnp.float32)


def dot_general(x, kernel, dimension_numbers, precision=None):
    """What `nn.DenseGeneral` multiplies with; takes kernels with an adapter, and arrays."""
    del precision
    return matmul(x, kernel, num_in=len(dimension_numbers[0][0]))


MAXTEXTS = partial(nn.DenseGeneral, use_bias=False)
UNMERGED = partial(MAXTEXTS, dot_general=dot_general, promote_dtype=lambda *arrays, **_: arrays)


class Attention(nn.Module):
    dense: type

    @nn.compact
    def __call__(self, x):
        q, k, v = (self.dense((HEADS, HEAD_DIM), name=name)(x) for name in ("query", "key", "value"))
        return self.dense(WIDTH, (-2, -1), name="out")(nn.dot_product_attention(q, k, v))


class MLP(nn.Module):
    dense: type

    @nn.compact
    def __call__(self, x):
        return self.dense(WIDTH, name="wo")(nn.silu(self.dense(20, name="wi_0")(x)) * self.dense(20, name="wi_1")(x))


class Layer(nn.Module):
    dense: type

    @nn.compact
    def __call__(self, x, _):
        x = x + Attention(self.dense, name="self_attention")(x)
        return x + MLP(self.dense, name="mlp")(x), None


def decoder(dense, scan_axis):
    """The layers, stacked along an axis of their weights (MaxText's `param_scan_axis`)."""
    return nn.scan(Layer, {"params": scan_axis}, split_rngs={"params": True}, length=LAYERS)(dense)


def targets(scan_axis):
    """The maps of every layer: in, then out, with the layers where they are stacked."""

    def stacked(*words):
        return " ".join((*words[:scan_axis], "layer", *words[scan_axis:]))

    return (
        Target("self_attention/(query|key|value)/kernel", stacked("in", "out", "out")),
        Target("self_attention/out/kernel", stacked("in", "in", "out")),
        Target("mlp/.*/kernel", stacked("in", "out")),
    )


def test_a_stack_of_layers(check_laws, matrix, random_weights):
    model, unmerged = decoder(MAXTEXTS, 0), decoder(UNMERGED, 0)
    params = random_weights(jax.eval_shape(model.init, jax.random.key(0), X, None)["params"])
    loss = lambda params, model=model: jnp.mean(model.apply({"params": params}, X, None)[0] ** 2)

    factors = factorize(params, TinyLoRA(u=2, n_tie=4, targets=targets(0)))
    merging = jax.jit(jax.value_and_grad(lambda v: loss(merge(params, factors, v))))
    # The layers come first, so that the loop over layers slices weights and updates alike.
    applying = jax.jit(jax.value_and_grad(lambda v: loss(apply(params, factors, v), unmerged)))

    names = [f"self_attention/{name}" for name in ("key", "query", "value", "out")]
    names += [f"mlp/{name}" for name in ("wi_0", "wi_1", "wo")]
    matrices = [
        matrix(f"{name}/kernel", (layer,), num_in=2 if name.endswith("out") else 1)
        for layer in range(LAYERS)
        for name in names
    ]
    check_laws(params, factors, matrices, loss, merging, applying)


def test_layers_on_the_second_axis_get_the_same_update(random_weights):
    second = decoder(MAXTEXTS, 1)
    params = random_weights(jax.eval_shape(second.init, jax.random.key(0), X, None)["params"])
    layers_first = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), params)
    assert params["self_attention"]["query"]["kernel"].shape == (WIDTH, LAYERS, HEADS, HEAD_DIM)

    merged = []
    for scan_axis, tree in enumerate((layers_first, params)):
        factors = factorize(tree, TinyLoRA(u=2, n_tie=4, targets=targets(scan_axis)))
        merged.append(merge(tree, factors, jnp.ones((factors.num_groups, 2))))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(jnp.moveaxis(a, 0, 1), b), *merged)
