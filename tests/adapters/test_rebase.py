"""Adapters of another make, or of several, in terms of the same singular triplets: the updates stay what they are."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import CombinationError, TinyLoRA, combine, delta, factorize, init, own_triplets
from tinylora_jax.adapters.rebase import places_of, rebase, with_projections

SIZES = {"a": (12, 9), "b": (7, 15), "c": (12, 9), "d": (8, 8), "e": (7, 15)}
DEGENERATE = np.array([3.0, 2.0, 2.0, 1.0, 1.0, 0.5, 0.4])  # two directions at the cut of rank 2


def matrix(rows, columns, seed, spectrum=None):
    rng = np.random.default_rng(seed)
    U, S, Vt = np.linalg.svd(rng.standard_normal((rows, columns)), full_matrices=False)
    return jnp.asarray(U * (S if spectrum is None else spectrum) @ Vt, jnp.float32)


def tree(**spectra):
    return {name: matrix(*size, seed, spectra.get(name)) for seed, (name, size) in enumerate(SIZES.items())}


def spec(**changes):
    return TinyLoRA(**{"targets": tuple(SIZES), "n_tie": 2} | changes)


def vector(factors, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(init(factors).shape), jnp.float32)


def foreign(params, factors, turned=(), noise=0.0, angle=0.6435):
    """As PEFT has them: other signs, √Σ on either side, other P; for some modules two neighbours turned."""
    rng, leaves = np.random.default_rng(9), {}
    for path, leaf in factors.leaves.items():
        U, S, Vt = np.linalg.svd(np.asarray(params[path], np.float64).T, full_matrices=False)
        if path in turned:
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            U[:, 1:3], Vt[1:3] = U[:, 1:3] @ turn, turn.T @ Vt[1:3]
        signs, root = rng.choice([-1.0, 1.0], 2), np.sqrt(S[:2])
        parts = (U[:, :2] * signs * root, np.ones(2), Vt[:2].T * signs * root, rng.standard_normal(leaf.P.shape[1:]))
        parts = [x + noise * rng.standard_normal(x.shape) for x in parts]
        new = dict(zip("USVP", (jnp.asarray(x, jnp.float32)[None] for x in parts), strict=True))
        leaves[path] = dataclasses.replace(leaf, **new)
    return dataclasses.replace(factors, leaves=leaves)


def assert_same(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for path, update in one.items():
        assert np.linalg.norm(update - other[path]) <= tolerance * np.linalg.norm(update), path


def test_another_make_is_one_of_ours():
    params = tree()
    given = foreign(params, factorize(params, spec(u=3)))
    v = vector(given)
    own, same = own_triplets(params, given, v)
    assert_same(delta(given, v), delta(own, same))
    again = factorize(params, own.spec)
    assert own.ill_conditioned == ()
    for path, leaf in own.leaves.items():
        assert leaf.groups == again.leaves[path].groups
        for x in "USV":
            np.testing.assert_array_equal(getattr(leaf, x), getattr(again.leaves[path], x))
        assert np.abs(leaf.P - again.leaves[path].P).max() > 0.1


def test_directions_that_the_weight_leaves_open_are_kept():
    params = tree(b=DEGENERATE)
    given = foreign(params, factorize(params, spec()), turned=("b",))
    v = vector(given)
    own, same = own_triplets(params, given, v)
    assert_same(delta(given, v), delta(own, same))
    assert own.ill_conditioned == ("b",)
    assert rebase(given, factorize(params, spec()))[1]["b"] > 0.05, "the case must be one where it matters"
    np.testing.assert_allclose(own.leaves["b"].U[0].T @ own.leaves["b"].U[0], np.eye(2), atol=1e-5)


def test_directions_that_float32_leaves_loose_are_kept():
    """As far as decompositions in float32 differ at a gap of half a percent: logits feel it, the weight allows it."""
    params = tree(b=np.array([1.0, 0.805, 0.8, 0.5, 0.4, 0.3, 0.2]))
    given = foreign(params, factorize(params, spec()), turned=("b",), angle=5e-5)
    v = vector(given)
    own, same = own_triplets(params, given, v)
    assert factorize(params, spec()).ill_conditioned == () and own.ill_conditioned == ("b",)
    assert_same(delta(given, v), delta(own, same), tolerance=2e-6)


def test_rounded_directions_are_kept_and_strange_ones_refused():
    params = tree()
    rounded = foreign(params, factorize(params, spec()), noise=1e-3)
    own, same = own_triplets(params, rounded, vector(rounded))
    assert_same(delta(rounded, vector(rounded)), delta(own, same))
    assert set(own.ill_conditioned) == set(SIZES)
    strange = foreign(params, factorize(params, spec()), noise=0.2)
    with pytest.raises(ValueError, match="not the leading singular triplets of the weight"):
        own_triplets(params, strange, vector(strange))


def test_a_weight_of_low_rank_loses_nothing():
    params = tree(d=np.array([2.0, *np.zeros(7)]), a=np.zeros(9))
    given = foreign(params, factorize(params, spec()))
    v = vector(given)
    own, same = own_triplets(params, given, v)
    assert np.isfinite(own.leaves["d"].P).all() and np.isfinite(own.leaves["a"].P).all()
    for path, update in delta(given, v).items():
        np.testing.assert_allclose(delta(own, same)[path], update, atol=1e-5)


def test_a_last_group_with_the_remainder_becomes_several():
    params = tree()
    given = foreign(params, factorize(params, spec()))
    joined = {path: dataclasses.replace(leaf, groups=(min(leaf.groups[0], 1),)) for path, leaf in given.leaves.items()}
    given = dataclasses.replace(given, leaves=joined)  # groups of 2 and 3, as PEFT ties five modules in two groups
    v = jnp.asarray([[0.5], [-2.0]])
    own, same = own_triplets(params, given, v)
    assert same.tolist() == [[0.5], [-2.0], [-2.0]]
    assert_same(delta(given, v), delta(own, same))
    apart = {path: dataclasses.replace(leaf, groups=(i,)) for i, (path, leaf) in enumerate(given.leaves.items())}
    with pytest.raises(ValueError, match="ties modules that have different vectors"):
        own_triplets(params, dataclasses.replace(given, leaves=apart), jnp.ones((5, 1)))


def test_several_adapters_share_factors():
    params = tree()
    one, two = (factorize(params, x) for x in (spec(u=2, seed=1), spec(n_tie=3, tying="structured")))
    adapters = [(one, vector(one)), (two, vector(two, 1)), (one, vector(one, 2))]
    given = foreign(params, one)
    adapters.append(own_triplets(params, given, vector(given, 3)))
    factors, vectors = combine(adapters)
    # A vector is R of every module.
    assert {v.shape for v in vectors} == {(factors.num_groups, factors.spec.u)} == {(5, 2**2)}
    for (its, v), wide in zip(adapters, vectors, strict=True):
        assert_same(delta(its, jnp.asarray(v)), delta(factors, jnp.asarray(wide)))


def test_one_kind_stays_what_it_is():
    factors = factorize(tree(), spec())
    same, vectors = combine([(factors, vector(factors)), (factors, vector(factors, 1))])
    assert same is factors
    np.testing.assert_array_equal(vectors[1], vector(factors, 1))


def test_what_cannot_be_shared_is_said():
    params, v = tree(b=DEGENERATE), jnp.ones((3, 1))
    factors = factorize(params, spec())
    turned = own_triplets(params, foreign(params, factors, turned=("b",)), v)
    others = {
        r"different shapes: U and V of a have .* and ": (factorize(params, spec(rank=3)), v),
        "adapt different weights, among others e": (factorize(params, spec(targets=tuple("abcd"))), v[:2]),
        "different singular directions for 1 of 5 weights .b,": turned,
    }
    for message, other in others.items():
        with pytest.raises(CombinationError, match=message):
            combine([(factors, v), other])


def test_projections_go_where_they_are_named():
    factors = factorize(tree(), spec(u=2))
    P = np.ones((2, 2, 2), np.float32)
    new = with_projections(factors, {"c": P})
    np.testing.assert_array_equal(new.leaves["c"].P[0], P)
    assert all(new.leaves[path] is factors.leaves[path] for path in "abde")
    assert list(places_of(factors)) == list("abcde")
    with pytest.raises(ValueError, match="no such module"):
        with_projections(factors, {"x": P})
    with pytest.raises(ValueError, match=r"P has shape \(1, 2, 2\), expected \(2, 2, 2\)"):
        with_projections(factors, {"c": P[:1]})
