"""Laws of quantized kernels: the error bound, and every product against the dequantized weight in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tinylora_jax.adapters import (
    AdaptedKernel,
    LoRA,
    LoRAPolicy,
    QuantizedKernel,
    Target,
    TinyLoRA,
    apply,
    can_fuse,
    dense,
    factorize,
    fuse,
    fused_matmul,
    init,
    leaves_by_path,
    matmul,
    merge,
    scheme_of,
)
from tinylora_jax.adapters.quantized import coarse_channels, exact, quantize, quantized_shape

SCHEMES = ("int8", "int4")
RNG = np.random.default_rng(0)


def random_weight(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def quantized(W, scheme, num_in=1, dtype=np.float32):
    into, out = W.shape[:num_in], W.shape[num_in:]
    values, scale, inputs = quantize(W.reshape(np.prod(into), -1), scheme)
    inputs = None if inputs is None else jnp.asarray(inputs.reshape(*into, *(1 for _ in out)))
    scale = jnp.asarray(scale.reshape(*(1 for _ in into), *out))
    return QuantizedKernel(jnp.asarray(values.reshape(W.shape)), scale, inputs, np.dtype(dtype))


def wide(kernel):
    """The oracle's weight: integers times scales in float64."""
    inputs = 1 if kernel.inputs is None else np.asarray(kernel.inputs, np.float64)
    return np.asarray(kernel.values.astype(jnp.int8), np.float64) * np.asarray(kernel.scale, np.float64) * inputs


WEIGHTS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-1e4, 1e4, width=32)
)


@settings(max_examples=50, deadline=None)
@given(WEIGHTS, st.sampled_from(SCHEMES))
def test_quantization_misses_by_at_most_half_a_step(W, scheme):
    kernel = quantized(W, scheme)
    step = np.asarray(kernel.scale, np.float64) * (1 if kernel.inputs is None else np.asarray(kernel.inputs))
    assert np.all(np.abs(wide(kernel) - W) <= step / 2 * (1 + 1e-5))
    np.testing.assert_array_equal(wide(kernel)[:, ~W.any(axis=0)], 0)  # a channel of zeros is legal and stays so
    if scheme == "int4":
        np.testing.assert_array_equal(kernel.inputs, kernel.inputs.astype(jnp.bfloat16).astype(np.float32))


def test_int4_gives_inputs_of_different_size_their_own_scale():
    W = random_weight(64, 32) * np.exp2(np.arange(64) % 7)[:, None].astype(np.float32)
    kernel = quantized(W, "int4")
    inputs = np.asarray(kernel.inputs)[:, 0] / np.exp2(np.arange(64) % 7)
    assert inputs.max() <= 2 * inputs.min()
    error = np.linalg.norm(wide(kernel) - W, axis=1) / np.linalg.norm(W, axis=1)
    assert error.max() < 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("shape", "num_in"), [((12, 10), 1), ((12, 2, 5), 1), ((3, 4, 10), 2)])
def test_the_product_and_its_gradient_are_those_of_the_dequantized_weight(scheme, shape, num_in):
    kernel = quantized(random_weight(*shape), scheme, num_in)
    x = jnp.asarray(random_weight(4, 6, *shape[:num_in], seed=1))
    g = random_weight(4, 6, *shape[num_in:], seed=2)
    W, axes = wide(kernel), list(range(-num_in, 0))
    y, pull = jax.vjp(lambda x: matmul(x, kernel, num_in), x)
    np.testing.assert_allclose(y, np.tensordot(x, W, (axes, list(range(num_in)))), atol=1e-5)
    outer = list(range(num_in, len(shape)))
    np.testing.assert_allclose(pull(g)[0], np.tensordot(g, W, (list(range(2, g.ndim)), outer)), atol=1e-5)


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_an_adapted_kernel(scheme, rows):
    """By finite differences of a NumPy oracle, which forms W + ΔW."""
    W = quantized(random_weight(12, 8), scheme)
    right, left = random_weight(12, 2, seed=3), random_weight(8, 2, seed=4)
    core = random_weight(*((rows,) if rows else ()), 2, 2, seed=5)
    x, g = random_weight(3, 5, 12, seed=6), random_weight(3, 5, 8, seed=7)

    def oracle(x, core):
        cores = np.broadcast_to(core, (3, 2, 2)).astype(np.float64)
        return sum(float(np.sum((x[i] @ (wide(W) + right @ cores[i] @ left.T)) * g[i])) for i in range(3))

    adapted = lambda core: AdaptedKernel(W, jnp.asarray(right), core, jnp.asarray(left))
    value = lambda x, core: jnp.sum(matmul(x, adapted(core)) * g)
    found, (dx, d_core) = jax.value_and_grad(value, (0, 1))(jnp.asarray(x), jnp.asarray(core))
    np.testing.assert_allclose(found, oracle(x, core), rtol=1e-4)
    for argument, gradient in ((0, dx), (1, d_core)):
        arguments = [np.asarray(x, np.float64), np.asarray(core, np.float64)]
        for at in list(np.ndindex(gradient.shape))[:: max(1, gradient.size // 7)]:
            step = np.zeros(gradient.shape)
            step[at] = 1e-3
            ends = [oracle(*(a + s * step if i == argument else a for i, a in enumerate(arguments))) for s in (1, -1)]
            np.testing.assert_allclose(gradient[at], (ends[0] - ends[1]) / 2e-3, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_joined_kernels_are_the_same_maps(adapted, dtype):
    params = {name: {"kernel": quantized(random_weight(16, n, seed=n), "int8", 1, dtype)} for name, n in SIZES.items()}
    if adapted:
        factors = factorize(params, TinyLoRA(targets=(Target(".*kernel"),), n_tie=2))
        params = apply(params, factors, init(factors) + 0.3)
    assert not can_fuse([quantized(random_weight(16, 4), "int4")] * 2), "each has its own scales of the inputs"
    kernels, x = [leaf["kernel"] for leaf in params.values()], jnp.asarray(random_weight(3, 1, 16), dtype)
    together = jax.jit(lambda x, kernels: fused_matmul(x, fuse(kernels)))(x, kernels)
    for y, kernel in zip(together, kernels, strict=True):
        assert y.dtype == dtype
        bound = 1e-5 if dtype == "float32" else 0.05
        np.testing.assert_allclose(y.astype(np.float32), matmul(x, kernel).astype(np.float32), atol=bound)


SIZES = {"q": 7, "k": 3, "v": 5}


def tree(scheme, layers=None):
    kernels = [quantized(random_weight(24, 20, seed=i), scheme, 1, jnp.bfloat16) for i in range(layers or 1)]
    kernel = kernels[0] if layers is None else jax.tree.map(lambda *parts: jnp.stack(parts), *kernels)
    return {"up_proj": {"kernel": kernel}}


@pytest.mark.parametrize("layers", [None, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_come_from_the_weights_in_use(scheme, layers):
    params = tree(scheme, layers)
    spec = TinyLoRA(targets=(Target(".*kernel", "in out" if layers is None else "layer in out"),))
    floats = jax.tree.map(exact, params, is_leaf=lambda x: isinstance(x, QuantizedKernel))
    assert floats["up_proj"]["kernel"].dtype == jnp.float32
    ours, theirs = factorize(params, spec), factorize(floats, spec)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    v = init(ours) + 0.2
    merged, expected = merge(params, ours, v), merge(floats, theirs, v)
    assert merged["up_proj"]["kernel"].dtype == jnp.bfloat16
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), merged, expected)


def test_one_leaf_with_the_shape_of_its_weight():
    params = tree("int8")
    (path,) = leaves_by_path(params)
    kernel = leaves_by_path(params)[path]
    assert path == "up_proj/kernel" and kernel.shape == (24, 20) and kernel.dtype == jnp.bfloat16
    assert scheme_of(params) == "int8" and scheme_of(merge_nothing(params)) == "none"
    like = quantized_shape((24, 20), "int8", jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), like) == jax.tree.map(lambda x: (x.shape, x.dtype), kernel)


def merge_nothing(params):
    return jax.tree.map(dense, params, is_leaf=lambda x: isinstance(x, QuantizedKernel))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lora_on_a_quantized_base(scheme):
    params = tree(scheme)
    policy = LoRAPolicy(params, LoRA(rank=2, targets=(Target(".*kernel"),)))
    v = jax.tree.map(lambda x: x + 0.1, policy.init())
    x = jnp.asarray(random_weight(3, 24), jnp.float32)
    unmerged = matmul(x, policy(v)["up_proj"]["kernel"])
    np.testing.assert_allclose(unmerged, x @ policy.merged(v)["up_proj"]["kernel"].astype(jnp.float32), atol=0.1)


def test_weights_that_no_scale_fits():
    W = random_weight(8, 4)
    W[2, 1], W[3, 2] = np.nan, np.inf
    for scheme in SCHEMES:
        assert not np.isfinite(quantize(W, scheme)[1]).all()
    outlier = random_weight(64, 4)
    outlier[5, 3] = 1e4
    assert coarse_channels(outlier, quantize(outlier, "int8")[0]) == 1
    for scheme in SCHEMES:
        assert coarse_channels(random_weight(64, 4), quantize(random_weight(64, 4), scheme)[0]) == 0
    with pytest.raises(ValueError, match="even number of inputs.*got 7; use int8"):
        quantized_shape((7, 4), "int4", jnp.bfloat16)
    with pytest.raises(ValueError, match="unknown quantization 'int3': expected none or int8 or int4"):
        quantized_shape((8, 4), "int3", jnp.bfloat16)
