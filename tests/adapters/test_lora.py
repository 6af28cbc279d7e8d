"""LoRA and full fine-tuning as policies, and the adapters that share one space."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import (
    Adapted,
    Full,
    FullPolicy,
    LoRA,
    LoRAPolicy,
    Policy,
    Target,
    TinyLoRA,
    adapt,
    apply,
    coordinates,
    delta,
    factorize,
    init,
    init_lora,
    lora_xs,
    matmul,
    retie,
)

KEY = jax.random.key(0)
SHAPES = {"a": (6, 10), "b": (10, 6), "c": (6, 2, 5), "d": (3, 6, 10)}
TARGETS = (Target("a|b"), Target("c", "in out out"), Target("d", "layer in out"))


@pytest.fixture(scope="module")
def tree():
    keys = jax.random.split(KEY, len(SHAPES))
    return {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)} | {
        "norm": jnp.ones((6,))
    }


def filled(v, scale=0.3):
    """The same structure with random numbers everywhere."""
    leaves, structure = jax.tree.flatten(v)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    return structure.unflatten(scale * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True))


def policies(tree):
    return {
        "tinylora": adapt(tree, TinyLoRA(n_tie=2, targets=TARGETS)),
        "lora_xs": adapt(tree, lora_xs(2, TARGETS)),
        "lora": adapt(tree, LoRA(rank=3, targets=TARGETS)),
        "full": adapt(tree, Full()),
    }


@pytest.mark.parametrize("kind", ["tinylora", "lora_xs", "lora", "full"])
def test_every_policy_starts_at_the_base_model(tree, kind):
    policy = policies(tree)[kind]
    assert isinstance(policy, Adapted)
    v = policy.init()
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(v))
    assert sum(x.size for x in jax.tree.leaves(v)) == policy.num_params
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), policy.merged(v), tree)


@pytest.mark.parametrize("kind", ["tinylora", "lora_xs", "lora", "full"])
def test_unmerged_is_merged(tree, kind):
    policy = policies(tree)[kind]
    v = filled(policy.init())
    x = jax.random.normal(jax.random.key(1), (4, 6))
    apart, merged = policy(v), policy.merged(v)
    for name in ("a", "c"):
        np.testing.assert_allclose(matmul(x, apart[name]), matmul(x, merged[name]), rtol=1e-4, atol=1e-4)
        assert np.abs(matmul(x, merged[name]) - matmul(x, tree[name])).max() > 1e-2


def test_the_update_of_lora_is_the_equation(tree):
    policy = adapt(tree, LoRA(rank=3, alpha=7.0, targets=TARGETS))
    v = filled(policy.init())
    for name, shape in SHAPES.items():
        A, B = np.asarray(v[name]["right"], np.float64), np.asarray(v[name]["left"], np.float64)
        update = (7.0 / 3 * A @ np.swapaxes(B, -1, -2)).reshape(shape)
        np.testing.assert_allclose(policy.merged(v)[name], np.asarray(tree[name]) + update, rtol=1e-5, atol=1e-5)


def test_lora_starts_as_peft_does(tree):
    spec = LoRA(rank=64, targets=(Target("a"),))
    matrices = init_lora(tree, spec)["a"]
    assert not np.any(matrices["left"]) and matrices["right"].shape == (6, 64)
    bound = 6**-0.5
    assert 0.9 * bound < np.abs(matrices["right"]).max() <= bound
    assert np.std(matrices["right"]) == pytest.approx(bound / 3**0.5, rel=0.1)
    assert np.any(init_lora(tree, LoRA(rank=64, targets=(Target("a"),), seed=1))["a"]["right"] != matrices["right"])


def test_the_gradient_reaches_both_matrices(tree):
    policy = adapt(tree, LoRA(rank=3, targets=TARGETS))
    x = jax.random.normal(jax.random.key(1), (4, 6))

    def loss(transform, v):
        return jnp.sum(matmul(x, transform(v)["a"]) ** 3)

    v = filled(policy.init())
    ours, theirs = (jax.grad(lambda v, t=t: loss(t, v))(v)["a"] for t in (policy, policy.merged))
    for side in ("left", "right"):
        np.testing.assert_allclose(ours[side], theirs[side], rtol=2e-3, atol=1e-3)
        assert np.abs(theirs[side]).max() > 0.1


def test_full_keeps_the_dtypes_of_computation(tree):
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    policy = adapt(half, Full())
    assert isinstance(policy, FullPolicy) and policy.trains_head and not policy.rows_apart
    moved = jax.tree.map(lambda x: x + 1e-5, policy.init())
    assert moved["a"].dtype == jnp.float32 and policy(moved)["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "matrices, message",
    [({}, "4 LoRA matrices do not fit .* the first has none"), ({"a": {}}, "4 LoRA matrices do not fit")],
)
def test_matrices_of_another_tree(tree, matrices, message):
    with pytest.raises(ValueError, match=message):
        LoRAPolicy(tree, LoRA(rank=3, targets=TARGETS))(matrices)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": True}, {"alpha": 0.0}, {"alpha": float("nan")}, {"seed": -1}])
def test_a_spec_out_of_range(bad):
    with pytest.raises(ValueError, match=f"LoRA needs .*{next(iter(bad))}"):
        LoRA(**bad)


def test_lora_refuses_a_torch_layout(tree):
    with pytest.raises(ValueError, match="laid out 'out in'"):
        adapt(tree, LoRA(targets=(Target("a", "out in"),)))


def test_lora_xs_is_the_equation(tree):
    """ΔW = U Σ R Vᵀ, and R is the vector itself."""
    factors = factorize(tree, lora_xs(2, TARGETS))
    assert factors.num_params == 4 * 6 and factors.num_groups == 6
    v = filled(init(factors))
    for path, update in delta(factors, v).items():
        leaf = factors.leaves[path]
        for layer, group in enumerate(leaf.groups):
            R = np.asarray(v[group]).reshape(2, 2)
            U, S, V = (np.asarray(x[layer], np.float64) for x in (leaf.U, leaf.S, leaf.V))
            np.testing.assert_allclose(update[layer], U * S @ R @ V.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tying, n_tie, u", [("tiled", 1, 1), ("tiled", 6, 3), ("structured", 2, 2), ("tiled", 4, 1)])
def test_all_adapters_of_a_rank_lie_in_one_space(tree, tying, n_tie, u):
    free = factorize(tree, lora_xs(2, TARGETS))
    factors = retie(tree, free, TinyLoRA(u=u, n_tie=n_tie, tying=tying, targets=TARGETS, seed=5))
    v = filled(init(factors))
    ours, theirs = delta(free, coordinates(free, factors, v)), delta(factors, v)
    for path in theirs:
        np.testing.assert_allclose(ours[path], theirs[path], rtol=1e-5, atol=1e-6)
        assert np.abs(theirs[path]).max() > 1e-2
    rows = jnp.stack([v, 2 * v])
    np.testing.assert_allclose(coordinates(free, factors, rows)[1], 2 * coordinates(free, factors, v), rtol=1e-6)


def test_an_adapter_of_some_modules_lies_in_the_space_of_all(tree):
    free, spec = factorize(tree, lora_xs(2, TARGETS)), TinyLoRA(u=2, n_tie=2, targets=TARGETS[:1], seed=5)
    factors, alone = retie(tree, free, spec), factorize(tree, spec)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), factors, alone)
    v = filled(init(alone))
    ours, theirs = delta(free, coordinates(free, factors, v)), delta(alone, v)
    assert set(theirs) < set(ours)
    for path, update in ours.items():
        if path in theirs:
            np.testing.assert_allclose(update, theirs[path], rtol=1e-5, atol=1e-6)
        else:
            assert not np.any(update)
    with pytest.raises(ValueError, match="targets outside them"):
        retie(tree, alone, TinyLoRA(targets=TARGETS))


def test_retied_factors_are_those_of_factorize(tree):
    spec = TinyLoRA(u=2, n_tie=3, tying="structured", targets=TARGETS, seed=3)
    ours, theirs = retie(tree, factorize(tree, lora_xs(2, TARGETS)), spec), factorize(tree, spec)
    assert ours.spec == theirs.spec
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), ours, theirs)
    with pytest.raises(ValueError, match="do not fit rank 3"):
        retie(tree, theirs, TinyLoRA(rank=3, targets=TARGETS))


def test_standard_projections_need_all_numbers():
    with pytest.raises(ValueError, match="needs u = 4, got 3"):
        TinyLoRA(rank=2, u=3, projection="standard")
    with pytest.raises(ValueError, match="expected 'random' or 'standard'"):
        TinyLoRA(projection="gaussian")


def test_the_vector_is_never_rounded(tree):
    """A TPU multiplies float32 by rounding it to bfloat16 unless it is told not to."""
    factors = factorize(tree, TinyLoRA(n_tie=2, targets=TARGETS))
    for transform in (lambda v: apply(tree, factors, v), lambda v: delta(factors, v)):
        text = jax.jit(transform).lower(init(factors)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert products and all("HIGHEST" in line for line in products)
    assert isinstance(adapt(tree, TinyLoRA(targets=TARGETS)), Policy)
