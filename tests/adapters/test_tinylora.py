"""The update itself, against the paper's equation written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import (
    AdaptedKernel,
    Target,
    TinyLoRA,
    apply,
    delta,
    factorize,
    fuse,
    fused_matmul,
    init,
    kernel,
    matmul,
    merge,
)
from tinylora_jax.adapters.projections import projection

# Every layout: the leaf's shape, how to read the torch-oriented W of one layer, and how to put ΔW back.
LAYOUTS = {
    "in out": ((6, 10), lambda x, i: x.T, lambda d: d[0].T),
    "out in": ((10, 6), lambda x, i: x, lambda d: d[0]),
    "in out out": ((6, 2, 5), lambda x, i: x.reshape(6, 10).T, lambda d: d[0].T.reshape(6, 2, 5)),
    "in in out": ((2, 3, 10), lambda x, i: x.reshape(6, 10).T, lambda d: d[0].T.reshape(2, 3, 10)),
    "layer in out": ((3, 6, 10), lambda x, i: x[i].T, lambda d: np.stack([w.T for w in d])),
    "layer in out out": (
        (3, 6, 2, 5),
        lambda x, i: x[i].reshape(6, 10).T,
        lambda d: np.stack([w.T.reshape(6, 2, 5) for w in d]),
    ),
    "layer in in out": (
        (3, 2, 3, 10),
        lambda x, i: x[i].reshape(6, 10).T,
        lambda d: np.stack([w.T.reshape(2, 3, 10) for w in d]),
    ),
    "layer out in": ((3, 10, 6), lambda x, i: x[i], lambda d: np.stack(d)),
    "in layer out": ((6, 3, 10), lambda x, i: x[:, i].T, lambda d: np.stack([w.T for w in d], axis=1)),
    "out in out": (
        (2, 6, 5),
        lambda x, i: x.transpose(0, 2, 1).reshape(10, 6),
        lambda d: d[0].reshape(2, 5, 6).transpose(0, 2, 1),
    ),
}
APPLICABLE = [
    layout for layout in LAYOUTS if layout in ("in out", "in out out", "in in out") or layout.startswith("layer in")
]


def paper_delta(W, v, P):
    """ΔW = U Σ (Σᵢ vᵢ Pᵢ) Vᵀ for one W [out, in], one term at a time, with the documented signs."""
    W, P = np.asarray(W, np.float64), np.asarray(P, np.float64)
    u, rank, _ = P.shape
    U, S, Vt = np.linalg.svd(W)
    total = np.zeros_like(W)
    for a in range(rank):
        flip_a = np.sign(U[np.argmax(np.abs(U[:, a])), a])
        for b in range(rank):
            flip_b = np.sign(U[np.argmax(np.abs(U[:, b])), b])
            for i in range(u):
                total += S[a] * float(v[i]) * P[i, a, b] * np.outer(flip_a * U[:, a], flip_b * Vt[b])
    return total


def random_tree(layout, leaves=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = LAYOUTS[layout][0]
    tree = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name in "abc"[:leaves]}
    return {**tree, "norm": jnp.ones((6,))}


def random_vector(factors, seed=1, rows=()):
    shape = (*rows, factors.num_groups, factors.spec.u)
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make(layout, **spec):
    tree = random_tree(layout)
    factors = factorize(tree, TinyLoRA(targets=(Target("[abc]", layout),), **spec))
    return tree, factors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rank", "u", "n_tie"), [(2, 1, 2), (3, 4, 1)])
def test_update_is_the_papers_equation(layout, rank, u, n_tie):
    tree, factors = make(layout, rank=rank, u=u, n_tie=n_tie, seed=9)
    v = random_vector(factors)
    updates, merged = delta(factors, v), merge(tree, factors, v)
    _, read, restore = LAYOUTS[layout]
    layers = 3 if "layer" in layout else 1
    assert set(updates) == set("abc")
    for position, name in enumerate("abc"):
        expected = []
        for layer in range(layers):
            # Depth first: layer 0 of a, b, c, then layer 1 of a, b, c, …
            group = (layer * 3 + position) // n_tie
            label = f"{name}[{layer}]" if "layer" in layout else name
            W = read(np.asarray(tree[name]), layer)
            expected.append(paper_delta(W, v[group], projection(9, label, u, rank)))
        np.testing.assert_allclose(updates[name], np.stack(expected), rtol=2e-5, atol=5e-5)
        np.testing.assert_allclose(merged[name] - tree[name], restore(expected), rtol=2e-5, atol=5e-5)
    assert merged["norm"] is tree["norm"]


def contract(x, W, num_in):
    """x · W over all input axes, in float64."""
    x, W = np.asarray(x, np.float64), np.asarray(W, np.float64)
    return np.tensordot(x, W, axes=num_in)


@pytest.mark.parametrize("layout", APPLICABLE)
def test_unmerged_product_is_the_merged_one(layout):
    tree, factors = make(layout, rank=2, u=3, n_tie=2)
    v = random_vector(factors)
    adapted, merged = apply(tree, factors, v), merge(tree, factors, v)
    words = layout.split()
    num_in = words.count("in")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 5, *((6,) if num_in == 1 else (2, 3)))), jnp.float32)
    for name in "abc":
        if "layer" in words:
            _, got = jax.lax.scan(lambda c, kernel: (c, matmul(x, kernel, num_in)), 0, adapted[name])
            expected = np.stack([contract(x, W, num_in) for W in merged[name]])
        else:
            got, expected = matmul(x, adapted[name], num_in), contract(x, merged[name], num_in)
        np.testing.assert_allclose(got, expected, atol=5e-5)
    assert adapted["norm"] is tree["norm"]


@pytest.mark.parametrize("layout", APPLICABLE)
def test_a_vector_per_row_is_each_vector_alone(layout):
    tree, factors = make(layout, rank=2, u=2, n_tie=2)
    v = random_vector(factors, rows=(4,))
    words = layout.split()
    num_in = words.count("in")
    x = jnp.asarray(np.random.default_rng(2).standard_normal((4, 5, *((6,) if num_in == 1 else (2, 3)))), jnp.float32)

    def products(kernel, x):
        if "layer" not in words:
            return matmul(x, kernel, num_in)[None]
        return jax.lax.scan(lambda c, k: (c, matmul(x, k, num_in)), 0, kernel)[1]

    together = {name: products(kernel, x) for name, kernel in apply(tree, factors, v).items() if name != "norm"}
    for row in range(4):
        alone = merge(tree, factors, v[row])
        for name, got in together.items():
            layers = alone[name] if "layer" in words else alone[name][None]
            np.testing.assert_allclose(got[:, row], [contract(x[row], W, num_in) for W in layers], atol=5e-5)


def test_rows_without_a_sequence_axis_work_too():
    tree, factors = make("in out", u=2)
    v = random_vector(factors, rows=(3,))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((3, 6)), jnp.float32)
    got = matmul(x, apply(tree, factors, v)["a"])
    expected = [contract(x[i], merge(tree, factors, v[i])["a"], 1) for i in range(3)]
    np.testing.assert_allclose(got, expected, atol=5e-5)


def test_a_population_is_a_vmap():
    tree, factors = make("in out", u=2)
    v = random_vector(factors, rows=(3,))
    x = jnp.ones((5, 6))
    got = jax.vmap(lambda v: matmul(x, apply(tree, factors, v)["b"]))(v)
    np.testing.assert_allclose(got, [contract(x, merge(tree, factors, one)["b"], 1) for one in v], atol=5e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_is_the_identity(dtype):
    tree = jax.tree.map(lambda x: x.astype(dtype), random_tree("in out"))
    factors = factorize(tree, TinyLoRA(targets=("[abc]",), u=3, n_tie=2))
    v = init(factors)
    assert v.dtype == jnp.float32 and v.shape == (2, 3)
    merged, adapted = merge(tree, factors, v), apply(tree, factors, v)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 6)), dtype)
    for name in "abc":
        assert merged[name].dtype == dtype
        np.testing.assert_array_equal(merged[name], tree[name])
        np.testing.assert_array_equal(matmul(x, adapted[name]), matmul(x, tree[name]))


def test_update_is_linear_in_v():
    _, factors = make("layer in out", rank=2, u=3, n_tie=2)
    a, b = random_vector(factors, 1), random_vector(factors, 2)
    left, da, db = (delta(factors, v) for v in (2.0 * a - 0.5 * b, a, b))
    for name in left:
        np.testing.assert_allclose(left[name], 2 * da[name] - 0.5 * db[name], atol=2e-5)


def test_rank_two_has_four_directions_a_module_but_tied_modules_have_more():
    # PAPER: Σ vᵢ Pᵢ has r² degrees of freedom, so u > 4 untied adds none; P differs by module, so tied it does.
    def directions(n_tie):
        tree = random_tree("in out")
        factors = factorize(tree, TinyLoRA(targets=("[abc]",), rank=2, u=7, n_tie=n_tie))
        basis = np.eye(factors.num_params, dtype=np.float32).reshape(-1, factors.num_groups, 7)
        rows = [np.concatenate([np.ravel(d) for d in delta(factors, jnp.asarray(v)).values()]) for v in basis]
        return np.linalg.matrix_rank(np.stack(rows), tol=1e-4)

    assert directions(1) == 3 * 4
    assert directions(3) == 7


def test_bounded_batches_change_nothing():
    tree = {**random_tree("layer in out"), "d": random_tree("in out")["a"].T}
    spec = TinyLoRA(targets=(Target("[abc]", "layer in out"), Target("d")), n_tie=4)
    whole = factorize(tree, spec)
    for bound in (1, 2 * 4 * 60, 4 * 4 * 60 + 3):
        part = factorize(tree, spec, max_batch_bytes=bound)
        assert jax.tree.structure(part) == jax.tree.structure(whole)
        for got, expected in zip(jax.tree.leaves(part), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_subspace_factors_give_the_same_update():
    rng = np.random.default_rng(0)
    decay = np.exp(-0.3 * np.arange(24))[:, None]
    tree = {
        "a": jnp.asarray(
            np.linalg.qr(rng.standard_normal((40, 24)))[0] @ (decay * rng.standard_normal((24, 32))), jnp.float32
        )
    }
    spec = TinyLoRA(targets=("a",), u=2)
    v = jnp.ones((1, 2))
    exact, fast = (delta(factorize(tree, spec, method), v)["a"] for method in ("exact", "subspace"))
    assert np.linalg.norm(fast - exact) < 1e-3 * np.linalg.norm(exact)


@pytest.fixture(params=[False, True], ids=["added", "in one product"])
def one_product(request, monkeypatch):
    """Both ways to an adapted product of 16 bits; the second is taken on a GPU."""
    monkeypatch.setattr(kernel, "_in_one_product", lambda x, W: request.param and x.dtype == jnp.bfloat16)


@pytest.mark.usefixtures("one_product")
def test_an_adapted_product_in_bfloat16_is_rounded_once():
    rng = np.random.default_rng(5)
    tree = {"a": jnp.asarray(rng.standard_normal((64, 200)), jnp.bfloat16)}
    factors = factorize(tree, TinyLoRA(rank=3, u=2, targets=("a",)))
    x = jnp.asarray(rng.standard_normal((5, 7, 64)), jnp.bfloat16)
    v = jnp.asarray(rng.standard_normal((5, *init(factors).shape)), jnp.float32)  # one adapter a row
    got = np.asarray(jax.jit(matmul)(x, apply(tree, factors, v)["a"]), np.float64)
    W = np.asarray(tree["a"], np.float64)
    for row in range(5):
        leaf, R = factors.leaves["a"], np.einsum("u,uij->ij", v[row, 0], factors.leaves["a"].P[0])
        # V is multiplied in the activations' 16 bits; the rest is float32.
        skinny = np.asarray(x[row], np.float64) @ np.asarray(leaf.V[0].astype(jnp.bfloat16), np.float64)
        update = skinny @ R.T @ np.diag(leaf.S[0]) @ np.asarray(leaf.U[0], np.float64).T
        truth = np.asarray(x[row], np.float64) @ W + update
        np.testing.assert_allclose(got[row], truth, rtol=2.0**-8, atol=1e-3)
        assert np.abs(update).max() > 1


@pytest.mark.usefixtures("one_product")
def test_bfloat16_weights_keep_an_update_that_merging_would_round_away():
    rng = np.random.default_rng(4)
    W = jnp.asarray(rng.uniform(1.0, 1.9, (64, 48)) * rng.choice([-1, 1], (64, 48)), jnp.bfloat16)
    tree = {"a": W}
    factors = factorize(tree, TinyLoRA(targets=("a",)))
    assert {x.dtype for x in jax.tree.leaves(factors)} == {np.dtype(np.float32)}
    v = jnp.ones_like(init(factors))
    v = v * 2.0**-10 / jnp.max(jnp.abs(delta(factors, v)["a"]))  # half a bfloat16 step of W is 2⁻⁸
    np.testing.assert_array_equal(merge(tree, factors, v)["a"], W)

    adapted = apply(tree, factors, v)["a"]
    assert adapted.core.dtype == jnp.float32 and adapted.base.dtype == jnp.bfloat16
    x = jnp.asarray(rng.standard_normal((200, 64)), jnp.float32)
    expected = contract(x, delta(factors, v)["a"][0].T, 1)
    np.testing.assert_allclose(matmul(x, adapted) - matmul(x, W), expected, atol=2e-5)
    assert np.abs(expected).max() > 1e-3

    rounded = x.astype(jnp.bfloat16)
    with_update, without = (np.asarray(matmul(rounded, k), np.float64) for k in (adapted, W))
    truth = contract(rounded, np.asarray(W, np.float64) + np.asarray(delta(factors, v)["a"][0].T, np.float64), 1)
    assert (with_update != without).any()
    # Bias of the outputs along the update: rounding noise averages out, a lost update does not.
    along = expected / (expected**2).sum()
    assert abs(((with_update - truth) * along).sum()) < 0.5
    assert abs(((without - truth) * along).sum()) > 0.5


@pytest.mark.parametrize("rows", [0, 5], ids=["one adapter", "one a row"])
@pytest.mark.parametrize("wide", [False, True], ids=["added", "rows of the product"])
def test_fused_kernels_give_what_each_gives_alone(wide, rows, monkeypatch):
    """In 16 bits, where an update far below a step of the product must still shift it on average."""
    rng = np.random.default_rng(6)
    tree = {name: jnp.asarray(rng.standard_normal((64, 256)), jnp.bfloat16) for name in "ab"}
    factors = factorize(tree, TinyLoRA(targets=("a", "b")))
    v = jnp.asarray(rng.standard_normal((rows, *init(factors).shape) if rows else init(factors).shape), jnp.float32)
    v = v * 2.0**-9 / jnp.max(jnp.abs(delta(factors, v[0] if rows else v)["a"]))
    kernels = list(apply(tree, factors, v).values())
    x = jnp.asarray(rng.standard_normal((5, 40, 64)), jnp.bfloat16)
    alone = [np.asarray(matmul(x, each), np.float64) for each in kernels]
    monkeypatch.setattr(kernel, "_in_one_product", lambda x, W: wide)
    monkeypatch.setattr(kernel, "_WIDE_FROM", 64)
    joined = fuse(kernels)
    assert (joined.right is not None) == wide
    for name, got, expected in zip("ab", fused_matmul(x, joined), alone, strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2.0**-7, atol=1e-2)
        # Rounding noise averages out along the update; an update that was lost does not.
        plain = np.asarray(x, np.float64) @ np.asarray(tree[name], np.float64)
        update = expected_update(x, factors, v, name)
        share = ((np.asarray(got, np.float64) - plain) * update).sum() / (update**2).sum()
        assert abs(share - 1) < 0.5


def expected_update(x, factors, v, name):
    """x ΔW in float64, for one vector or one a row."""
    one = lambda x, v: np.asarray(x, np.float64) @ np.asarray(delta(factors, v)[name][0].T, np.float64)
    return np.stack([one(x[i], v[i] if v.ndim == 3 else v) for i in range(len(x))])


def test_factors_and_kernels_pass_through_jit_and_grad():
    tree, factors = make("in out", u=2, n_tie=2)
    v = random_vector(factors)
    x = jnp.ones((3, 6))
    loss = lambda v, factors: sum(jnp.sum(matmul(x, apply(tree, factors, v)[n]) ** 2) for n in "abc")
    gradient = jax.jit(jax.grad(loss))(v, factors)
    assert gradient.dtype == jnp.float32
    wide = lambda v: sum(
        (contract(x, merge(tree, factors, jnp.asarray(v, jnp.float32))[n], 1) ** 2).sum() for n in "abc"
    )
    for g in range(v.shape[0]):
        for i in range(2):
            e = np.zeros(v.shape)
            e[g, i] = 1e-2
            np.testing.assert_allclose(gradient[g, i], (wide(v + e) - wide(v - e)) / 2e-2, rtol=2e-3)


@pytest.mark.parametrize("field", ["rank", "u", "n_tie"])
@pytest.mark.parametrize("value", [0, -1, True])
def test_sizes_must_be_positive_integers(field, value):
    with pytest.raises(ValueError, match=f"{field} >= 1"):
        TinyLoRA(**{field: value})


def test_other_bad_specs_are_refused():
    with pytest.raises(ValueError, match="'tied'.*'tiled' or 'structured'"):
        TinyLoRA(tying="tied")
    with pytest.raises(ValueError, match="target"):
        TinyLoRA(targets=())


def test_specs_are_hashable_and_equal_by_value():
    assert hash(TinyLoRA(targets=("a",))) == hash(TinyLoRA(targets=(Target("a"),)))
    assert TinyLoRA(targets=("a",)) == TinyLoRA(targets=(Target("a"),))
    assert TinyLoRA(seed=1) != TinyLoRA(seed=2)


def test_rank_above_the_smaller_side_names_the_modules():
    tree = {"wide": jnp.ones((3, 9)), "fine": jnp.ones((5, 5)), "tall": jnp.ones((9, 2))}
    with pytest.raises(ValueError) as error:
        factorize(tree, TinyLoRA(rank=4, targets=("wide|fine|tall",)))
    message = str(error.value)
    assert "wide (3, 9)" in message and "tall (9, 2)" in message and "fine" not in message and "rank 4" in message


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (2, 1), (3, 2)])
def test_a_vector_of_the_wrong_shape_is_refused(shape):
    tree, factors = make("in out", u=2, n_tie=2)
    for call in (lambda v: apply(tree, factors, v), lambda v: merge(tree, factors, v), lambda v: delta(factors, v)):
        with pytest.raises(ValueError, match=rf"\({shape[0]}, {shape[1]}\).*\(2, 2\)"):
            call(jnp.zeros(shape))


def test_rows_of_vectors_cannot_be_merged():
    tree, factors = make("in out", u=2, n_tie=2)
    with pytest.raises(Exception, match=r"\(3, 2, 2\)|groups u"):
        merge(tree, factors, jnp.zeros((3, 2, 2)))


@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - set(APPLICABLE)))
def test_layouts_that_cannot_stay_unmerged_are_refused_by_name(layout):
    tree, factors = make(layout)
    with pytest.raises(ValueError, match=f"a has layout '{layout}'.*merge"):
        apply(tree, factors, init(factors))


def test_a_leaf_without_adapter_is_left_alone():
    tree, factors = make("in out")
    adapted = apply({**tree, "extra": jnp.ones(3)}, factors, init(factors))
    assert isinstance(adapted["a"], AdaptedKernel) and not isinstance(adapted["extra"], AdaptedKernel)


def test_the_backward_pass_multiplies_bfloat16_by_bfloat16():
    # A float32 cotangent would cost a float32 copy of every weight and matrix units at a fraction of their speed.
    tree = {"a": jnp.asarray(np.random.default_rng(0).standard_normal((64, 48)), jnp.bfloat16)}
    factors = factorize(tree, TinyLoRA(targets=("a",)))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((8, 64)), jnp.bfloat16)
    v = jnp.full_like(init(factors), 0.5)

    def loss(x, v, tree):
        return jnp.sum(matmul(x, apply(tree, factors, v)["a"]).astype(jnp.float32) ** 2)

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, v, tree).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line and "64x48x" in line]
    assert len(dots) == 2, "one product with W forward and one back"
    for line in dots:
        assert "64x48xf32" not in line and "8x48xf32>, " not in line, line

    # And its values are those of the same product in float64.
    dx, dv = jax.grad(loss, argnums=(0, 1))(x, v, tree)
    W = np.asarray(tree["a"], np.float64)
    D = np.asarray(delta(factors, jnp.ones_like(v))["a"][0].T, np.float64)
    wide = np.asarray(x, np.float64)
    y = wide @ (W + 0.5 * D)
    np.testing.assert_allclose(dv[0, 0], 2 * (y * (wide @ D)).sum(), rtol=0.01)
    expected = 2 * y @ (W + 0.5 * D).T
    assert np.linalg.norm(np.asarray(dx, np.float64) - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("transform", [apply, merge])
def test_another_tree_is_refused(transform):
    W = jnp.asarray(np.random.default_rng(0).standard_normal((6, 10)), jnp.float32)
    factors = factorize({"q": W}, TinyLoRA(targets=("q",)))
    v = init(factors)
    with pytest.raises(ValueError, match=r"q has \[layers, out, in\] = \[1, 6, 10\], expected \[1, 10, 6\]"):
        transform({"q": W.T}, factors, v)  # of equal size: a reshape would fit it
    with pytest.raises(ValueError, match="q is missing"):
        transform({"z": W}, factors, v)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    W = np.ones((2, 6, 10), np.float32)
    W[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"1 weights are not finite: q\[1\]"):
        factorize({"q": jnp.asarray(W)}, TinyLoRA(targets=(Target("q", "layer in out"),)))


def test_only_floats_are_adapted():
    with pytest.raises(ValueError, match=r"floating-point weights can be adapted, got q \(int8\)"):
        factorize({"q": jnp.ones((6, 10), jnp.int8)}, TinyLoRA(targets=("q",)))


@pytest.mark.parametrize("wrong", [{"targets": "q_proj"}, {"seed": -1}, {"seed": 1.5}, {"u": 10**12}])
def test_specs_that_mean_nothing_are_refused(wrong):
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):  # TypeError: the type-checking hook
        TinyLoRA(**wrong)


class Box:
    """What some frameworks keep a weight in; JAX knows nothing of it, so it is a leaf."""

    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize("use", [apply, merge])
def test_factors_of_other_weights_are_refused(use):
    tree = lambda seed: {"a": {"up_proj": {"kernel": jax.random.normal(jax.random.key(seed), (64, 96))}}}
    one, other = tree(0), tree(1)
    factors = factorize(one, TinyLoRA(targets=(".*kernel",)))
    v = jnp.ones((factors.num_groups, factors.spec.u))
    with pytest.raises(ValueError, match="factors belong to other weights: .*a/up_proj/kernel.*factorize this tree"):
        use(other, factors, v)
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        use(jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), one), factors, v)
    jax.jit(use)(other, factors, v)  # of what is not known yet nothing is said
    jax.jit(lambda v: use(one, factors, v))(v)
    with pytest.raises(ValueError, match="factors belong to other weights"):
        jax.jit(lambda v: use(other, factors, v))(v)


def test_a_box_is_called_by_its_name():
    tree = {"a": {"up_proj": {"kernel": jax.random.normal(jax.random.key(0), (64, 96))}}}
    factors = factorize(tree, TinyLoRA(targets=(".*kernel",)))
    boxed = jax.tree.map(Box, tree)
    with pytest.raises(ValueError, match="a/up_proj/kernel is a Box, expected an array; unwrap it first"):
        apply(boxed, factors, jnp.ones((factors.num_groups, factors.spec.u)))
