"""Steering vectors, biases and scales of norms as policies of any tree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tinylora_jax.adapters import (
    LoRA,
    Offsets,
    Shifted,
    Target,
    TinyLoRA,
    adapt,
    biases,
    fuse,
    fused_matmul,
    joint_spec,
    lora_xs,
    matmul,
    norm_scales,
    rescale,
    select_rows,
    steering,
)
from tinylora_jax.io.hf import quantize_maps

SHAPES = {"a": (6, 10), "c": (6, 2, 5), "d": (3, 6, 10)}
TARGETS = (Target("a/kernel"), Target("c/kernel", "in out out"), Target("d/kernel", "layer in out"))
BOTH = Offsets((*TARGETS, "norm/scale"), "both")
X = jax.random.normal(jax.random.key(1), (4, 3, 6))


@pytest.fixture(scope="module")
def tree():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    bias = {"a": (10,), "c": (2, 5), "d": (3, 10)}
    maps = {
        name: {"kernel": jax.random.normal(key, shape), "bias": jnp.ones(bias[name])}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }
    return maps | {"norm": {"scale": jnp.linspace(0.5, 1.5, 6)}}


def filled(v, scale=0.3):
    rng = np.random.default_rng(7)
    return jax.tree.map(lambda x: jnp.asarray(scale * rng.standard_normal(x.shape), jnp.float32), v)


def test_an_offset_is_added_to_the_outputs_and_to_the_scale(tree):
    """Against NumPy in float64."""
    policy = adapt(tree, BOTH)
    v = filled(policy.init())
    weights, x = policy(v), np.asarray(X, np.float64)
    for name in ("a", "c"):
        W = np.asarray(tree[name]["kernel"], np.float64)
        expected = np.tensordot(x, W, 1) + np.asarray(v[f"{name}/kernel"], np.float64).reshape(W.shape[1:])
        np.testing.assert_allclose(matmul(X, weights[name]["kernel"]), expected, rtol=1e-5, atol=1e-5)
    expected = x * (np.asarray(tree["norm"]["scale"], np.float64) + v["norm/scale"])
    np.testing.assert_allclose(rescale(X, weights["norm"]["scale"], jnp.float32), expected, rtol=1e-6, atol=1e-6)
    layers = jax.lax.map(lambda kernel: matmul(X, kernel), weights["d"]["kernel"])
    for i in range(3):
        expected = np.tensordot(x, np.asarray(tree["d"]["kernel"][i], np.float64), 1) + np.asarray(v["d/kernel"][i])
        np.testing.assert_allclose(layers[i], expected, rtol=1e-5, atol=1e-5)


def test_a_merged_offset_is_in_the_bias_or_in_the_scale(tree):
    policy = adapt(tree, BOTH)
    v = filled(policy.init())
    apart, merged = policy(v), policy.merged(v)
    for name in ("a", "c"):
        ours = matmul(X, apart[name]["kernel"]) + tree[name]["bias"]
        np.testing.assert_allclose(ours, matmul(X, merged[name]["kernel"]) + merged[name]["bias"], rtol=1e-5, atol=1e-5)
    ours = rescale(X, apart["norm"]["scale"], jnp.float32)
    np.testing.assert_allclose(ours, X * merged["norm"]["scale"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(merged["d"]["bias"], 1 + v["d/kernel"], rtol=1e-6)
    without = {**tree, "a": {"kernel": tree["a"]["kernel"]}}
    with pytest.raises(ValueError, match="1 kernels have no bias .*a/kernel"):
        adapt(without, BOTH).merged(v)


@pytest.mark.parametrize("rows", [False, True])
def test_the_gradient_is_that_of_finite_differences(tree, rows):
    policy = adapt(tree, BOTH)
    v = filled(policy.init())
    v = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x, 0.5 * x]), v) if rows else v

    def loss(v, x=X):
        weights = policy(jax.tree.map(jnp.asarray, v))  # finite differences are NumPy arrays
        normal = rescale(x, weights["norm"]["scale"], jnp.float32)
        parts = [jnp.sum(jnp.sin(matmul(normal, weights[name]["kernel"]))) for name in ("a", "c")]
        return sum(parts)

    check_grads(loss, (v,), 1, modes=["rev"], atol=2e-2, rtol=2e-2)
    with_x = jax.grad(loss, argnums=1)(v, X)
    merged = jax.grad(lambda x: loss(v, x))(X)
    np.testing.assert_allclose(with_x, merged, rtol=1e-5, atol=1e-5)
    grad = jax.grad(loss)(v)
    assert all(x.dtype == jnp.float32 and np.abs(x).max() > 1e-2 for path, x in grad.items() if path != "d/kernel")


def test_every_row_has_its_own_offset(tree):
    policy = adapt(tree, BOTH)
    v = filled(policy.init())
    rows = policy(jax.tree.map(lambda x: jnp.stack([0 * x, x, -x, 3 * x]), v))
    again = select_rows(rows, jnp.array([1, 1, 2, 0]))
    for factor, row in ((1, 0), (1, 1), (-1, 2), (0, 3)):
        own = policy(jax.tree.map(lambda x, f=factor: f * x, v))
        for name in ("a", "c"):
            expected = matmul(X[row], own[name]["kernel"])
            np.testing.assert_allclose(matmul(X, again[name]["kernel"])[row], expected, rtol=1e-6, atol=1e-6)
        expected = rescale(X[row], own["norm"]["scale"], jnp.float32)
        np.testing.assert_array_equal(rescale(X, again["norm"]["scale"], jnp.float32)[row], expected)
    stacked = jax.lax.map(lambda kernel: matmul(X, kernel), rows["d"]["kernel"])
    own = jax.lax.map(lambda kernel: matmul(X[1], kernel), policy(v)["d"]["kernel"])
    np.testing.assert_allclose(stacked[:, 1], own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize("rows", [False, True])
def test_fused_kernels_give_the_same(dtype, scheme, rows):
    keys = jax.random.split(jax.random.key(2), 3)
    names = ("q_proj", "k_proj", "v_proj")
    attn = {n: {"kernel": jax.random.normal(k, (6, 10)).astype(dtype)} for n, k in zip(names, keys, strict=True)}
    params = quantize_maps({"layers": {0: {"self_attn": attn}}}, scheme)
    policy = adapt(params, Offsets((".*[qv]_proj/kernel",)))
    v = filled(policy.init())
    v = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x, 0.5 * x]), v) if rows else v
    kernels = [policy(v)["layers"][0]["self_attn"][name]["kernel"] for name in names]
    assert [isinstance(kernel, Shifted) for kernel in kernels] == [True, False, True]
    x = X.astype(dtype)
    for fused, kernel in zip(fused_matmul(x, fuse(kernels)), kernels, strict=True):
        np.testing.assert_array_equal(fused.astype(jnp.float32), matmul(x, kernel).astype(jnp.float32))


def test_a_small_offset_survives_bfloat16():
    """Added to a product in bfloat16, 2^-10 of it would be lost; before the rounding it decides where that goes."""
    W = jnp.eye(4, dtype=jnp.bfloat16)
    x = jnp.full((1, 4), 1.0, jnp.bfloat16) + jnp.array([[0, 2**-7, 0, 2**-7]], jnp.bfloat16)
    kernel = Shifted(jnp.concatenate([W, W * 2**-8]), jnp.array([0, 0, 2**-10, -(2**-10)], jnp.float32))
    x = jnp.concatenate([x, jnp.ones((1, 4), jnp.bfloat16)], axis=-1)  # products halfway between two bfloat16 numbers
    ours, plain = matmul(x, kernel), matmul(x, kernel.base)
    assert np.any(ours != plain)
    halfway = np.asarray(x, np.float64) @ np.asarray(kernel.base, np.float64) + np.asarray(kernel.offset, np.float64)
    np.testing.assert_array_equal(ours, jnp.asarray(halfway, jnp.float32).astype(jnp.bfloat16))
    scale = jnp.ones((4,), jnp.bfloat16)
    moved = rescale(jnp.full((1, 4), 1.5), Shifted(scale, jnp.full((4,), 2**-9 * 1.5)), jnp.bfloat16)
    assert np.all(moved > 1.5), "the scale itself would be 1 again"


def test_without_offsets_the_programs_are_as_before():
    x, scale, W = jnp.ones((2, 3, 6)), jnp.ones((6,), jnp.bfloat16), jnp.ones((6, 4), jnp.bfloat16)
    ours = jax.make_jaxpr(lambda x, scale: rescale(x, scale, jnp.bfloat16))(x, scale)
    assert str(ours) == str(jax.make_jaxpr(lambda x, scale: x.astype(jnp.bfloat16) * scale)(x, scale))
    product = jax.make_jaxpr(lambda x, W: matmul(x, W))(x.astype(jnp.bfloat16), W)
    assert [eqn.primitive.name for eqn in product.eqns] == ["dot_general"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (steering(), "target .*down_proj.* matches no leaf"),
        (Offsets(("a/bias",)), "a/bias is neither a kernel nor the scale of a norm"),
        (biases(("norm/scale",)), "norm/scale is a norm's scale, but this trains offsets of outputs"),
        (norm_scales(("a/kernel",)), "a/kernel is a kernel, but this trains the scales of norms; end .* norm/scale"),
        (Offsets(("a/kernel",), "layers"), "a/kernel is not the output of a layer, .* end .* in down_proj/kernel"),
        (biases(("c/kernel",)), r"c/kernel has shape \(6, 2, 5\), but its target's layout is 'in out'"),
        (biases((Target("a/kernel", "out in"),)), "a/kernel is laid out 'out in'"),
    ],
)
def test_a_spec_that_does_not_fit(tree, spec, message):
    with pytest.raises(ValueError, match=message):
        adapt(tree, spec)


@pytest.mark.parametrize("bad", [{"a/kernel": jnp.zeros(10)}, {}, {"a/kernel": jnp.zeros((2, 2, 10))}])
def test_vectors_of_another_tree(tree, bad):
    with pytest.raises(ValueError, match="offsets do not fit this tree"):
        adapt(tree, BOTH)(bad)


def test_sets_of_offsets_are_points_of_one_space(tree):
    some, norms = biases(TARGETS[:1]), norm_scales(("norm/scale",))
    whole = adapt(tree, joint_spec(some, [some, norms]))
    for spec in (some, norms):
        own = whole.within(spec)
        v = filled(own.init())
        ours, theirs = whole(whole.point(own, v)), own(v)
        kernels = [weights["a"]["kernel"] for weights in (ours, theirs)]
        np.testing.assert_array_equal(*(matmul(X, kernel) for kernel in kernels))
        scales = [rescale(X, weights["norm"]["scale"], jnp.float32) for weights in (ours, theirs)]
        np.testing.assert_array_equal(*scales)
    with pytest.raises(ValueError, match="outside those of all members: c/kernel"):
        whole.within(biases(TARGETS[1:2]))
    assert joint_spec(TinyLoRA(rank=3), [TinyLoRA(rank=3, u=2)]) == lora_xs(3)
    for members in ([some, TinyLoRA()], [LoRA()]):
        with pytest.raises(ValueError, match="not points of one space"):
            joint_spec(TinyLoRA(), members)


def test_a_frozen_matrix_depends_on_its_path_and_seed_alone():
    tree = {"a": jax.random.normal(jax.random.key(0), (6, 10)), "b": jax.random.normal(jax.random.key(1), (10, 6))}
    policy = adapt(tree, LoRA(rank=3, targets=("a", "b"), freeze_a=True))
    v = filled(policy.init())
    assert {path: set(pair) for path, pair in v.items()} == {"a": {"left"}, "b": {"left"}}
    assert policy.num_params == 3 * 16
    alone = adapt(tree, LoRA(rank=3, targets=("b",), freeze_a=True))
    np.testing.assert_array_equal(policy.merged(v)["b"], alone.merged({"b": v["b"]})["b"])
    other = adapt(tree, LoRA(rank=3, targets=("a", "b"), freeze_a=True, seed=1))
    assert np.abs(policy.merged(v)["a"] - other.merged(v)["a"]).max() > 0.1
    A = np.asarray(policy.matrices(v)["a"]["right"], np.float64)
    assert np.abs(A).max() <= 6**-0.5 and np.std(A) == pytest.approx(6**-0.5 / 3**0.5, rel=0.4)
    update = 16.0 / 3 * A @ np.asarray(v["a"]["left"], np.float64).T
    np.testing.assert_allclose(policy.merged(v)["a"], np.asarray(tree["a"]) + update, rtol=1e-5, atol=1e-5)
