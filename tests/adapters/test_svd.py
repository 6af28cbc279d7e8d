"""The truncated SVD: right, with signs that do not depend on who computed it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinylora_jax.adapters import truncated_svd
from tinylora_jax.adapters.svd import SVD, canonical_signs, jnp_svd, subspace_svd


def with_spectrum(rows, columns, spectrum, batch=1, seed=0):
    """Random matrices with given singular values."""
    rng = np.random.default_rng(seed)
    orthogonal = lambda n: np.linalg.qr(rng.standard_normal((n, len(spectrum))))[0]
    return jnp.asarray(
        np.stack([orthogonal(rows) * spectrum @ orthogonal(columns).T for _ in range(batch)]), jnp.float32
    )


def decaying(n):
    return np.exp(-0.15 * np.arange(n)) + 0.05


def check_triplets(W, svd, rank, rtol):
    """Against NumPy in float64, without using any sign or rotation: S, orthonormality, W V = U S, Wᵀ U = V S."""
    W, U, S, V = (np.asarray(x, np.float64) for x in (W, *svd))
    for w, u, s, v in zip(W, U, S, V, strict=True):
        expected = np.linalg.svd(w, compute_uv=False)[:rank]
        np.testing.assert_allclose(s, expected, rtol=rtol, atol=rtol * expected[0])
        np.testing.assert_allclose(u.T @ u, np.eye(rank), atol=1e-5)
        np.testing.assert_allclose(v.T @ v, np.eye(rank), atol=1e-5)
        np.testing.assert_allclose(w @ v, u * s, atol=3e-5 * expected[0])
        np.testing.assert_allclose(w.T @ u, v * s, atol=3e-5 * expected[0])


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 24, 3), (24, 40, 2), (5, 5, 5), (1, 9, 1), (9, 1, 1)])
@pytest.mark.parametrize("method", ["exact", "subspace", "jnp"])
def test_triplets_agree_with_numpy(rows, columns, rank, method):
    W = with_spectrum(rows, columns, decaying(min(rows, columns)), batch=2)
    check_triplets(W, truncated_svd(W, rank, method), rank, rtol=1e-5)


def test_in_a_jitted_function_it_is_that_of_jnp():
    W = with_spectrum(24, 40, decaying(24), batch=2)
    expected = truncated_svd(W, 2, "jnp")
    for method in ("auto", "exact"):
        for got, want in zip(jax.jit(lambda W, how=method: truncated_svd(W, 2, how))(W), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_close_neighbours_are_exact_too(shape):
    """A gap of 2e-3, over which a decomposition in float32 is off by 3e-4."""
    W = with_spectrum(*shape, np.append([1.0, 0.802, 0.8], 0.7 * decaying(197)))
    U, S, Vt = np.linalg.svd(np.asarray(W[0], np.float64), full_matrices=False)
    expected = canonical_signs(SVD(*(jnp.asarray(x[None], jnp.float32) for x in (U[:, :2], S[:2], Vt[:2].T))))
    for got, want in zip(truncated_svd(W, 2, "exact"), expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-7)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48)])
def test_subspace_iteration_finds_the_exact_update(shape):
    W = with_spectrum(*shape, decaying(48), batch=2)
    svd, residual = subspace_svd(W, 2)
    assert float(residual.max()) <= 2e-5
    exact = jnp_svd(W, 2)
    np.testing.assert_allclose(svd.S, exact.S, rtol=1e-5)
    core = np.random.default_rng(1).standard_normal((2, 2)).astype(np.float32)
    update = lambda x: np.einsum("bor,br,rs,bis->boi", *(np.asarray(a) for a in (x.U, x.S)), core, np.asarray(x.V))
    error = np.linalg.norm(update(svd) - update(exact)) / np.linalg.norm(update(exact))
    assert error < 1e-3, "signs included: the same vector must give the same update"


def test_a_flat_spectrum_falls_back_to_the_exact_decomposition(caplog):
    W = with_spectrum(120, 100, 1 - 1e-4 * np.arange(100))
    assert float(subspace_svd(W, 2, max_iterations=40)[1].max()) > 2e-5, "the case must be one where iteration fails"
    with caplog.at_level(logging.WARNING, logger="absl"):
        svd = truncated_svd(W, 2, "subspace")
    for got, expected in zip(svd, truncated_svd(W, 2, "exact"), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert "subspace iteration" in caplog.text


@pytest.mark.parametrize("method", ["exact", "subspace"])
@pytest.mark.parametrize("spectrum", [np.zeros(12), np.eye(12)[0] * 3.0])
def test_rank_deficient_matrices_give_finite_factors(method, spectrum):
    W = with_spectrum(20, 12, spectrum)
    svd = truncated_svd(W, 2, method)
    assert all(np.isfinite(x).all() for x in svd)
    rebuilt = np.einsum("bor,br,bir->boi", *(np.asarray(x) for x in svd))
    np.testing.assert_allclose(rebuilt, W, atol=1e-5)


def test_signs_do_not_depend_on_the_back_end():
    svd = jnp_svd(with_spectrum(12, 20, decaying(12), batch=2), 4)
    for signs in ([1, -1, 1, -1], [-1, -1, -1, -1]):
        flip = jnp.asarray(signs, jnp.float32)
        again = canonical_signs(SVD(svd.U * flip, svd.S, svd.V * flip))
        for got, expected in zip(again, svd, strict=True):
            np.testing.assert_array_equal(got, expected)
    largest = np.take_along_axis(np.asarray(svd.U), np.abs(svd.U).argmax(axis=1, keepdims=True), axis=1)
    assert (largest > 0).all()


@pytest.mark.parametrize("method", ["exact", "subspace"])
def test_bfloat16_weights_are_decomposed_in_float32(method):
    W = with_spectrum(24, 40, decaying(24)).astype(jnp.bfloat16)
    svd = truncated_svd(W, 2, method)
    for got, expected in zip(svd, truncated_svd(W.astype(jnp.float32), 2, method), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=0, atol=0 if method == "exact" else 2e-6)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="'randomized'.*auto, exact, subspace, jnp"):
        truncated_svd(jnp.ones((1, 3, 3)), 1, "randomized")


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("method", ["auto", "exact", "jnp"])
def test_inside_jit_no_value_is_looked_at_on_any_back_end(backend, method, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    W = jax.ShapeDtypeStruct((3, 20, 12), jnp.bfloat16)
    svd = jax.eval_shape(lambda W: truncated_svd(W, 2, method), W)
    assert [x.shape for x in svd] == [(3, 20, 2), (3, 2), (3, 12, 2)]
    assert all(x.dtype == jnp.float32 for x in svd)


def test_subspace_iteration_cannot_be_verified_inside_jit():
    with pytest.raises(ValueError, match="'subspace' in a jitted function.*'jnp'"):
        jax.jit(lambda W: truncated_svd(W, 2, "subspace"))(jnp.ones((1, 8, 4)))
