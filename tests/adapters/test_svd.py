"""The truncated SVD: right, with signs that do not depend on who computed it."""

import logging
import threading
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from threadpoolctl import threadpool_info

from tinylora_jax.adapters import svd as svd_module
from tinylora_jax.adapters import svd_host, truncated_svd
from tinylora_jax.adapters.svd import SVD, canonical_signs, jnp_svd
from tinylora_jax.adapters.svd_device import subspace_svd, tolerances


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


def update(svd, core):
    return np.einsum(
        "bor,br,rs,bis->boi", *(np.asarray(a, np.float64) for a in (svd.U, svd.S)), core, np.asarray(svd.V)
    )


def numpy_svd(W, rank):
    """NumPy's full decomposition in float64, with our signs."""
    U, S, Vt = np.linalg.svd(np.asarray(W, np.float64), full_matrices=False)
    return canonical_signs(
        SVD(*(jnp.asarray(x, jnp.float32) for x in (U[..., :rank], S[..., :rank], Vt[:, :rank].swapaxes(1, 2))))
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])  # a TPU's and everyone else's
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (1100, 320)])
def test_subspace_iteration_finds_the_exact_update(shape, dtype):
    W = with_spectrum(*shape, decaying(48), batch=2)
    with jax.enable_x64(dtype == "float64"):
        *svd, error = jax.device_get(subspace_svd(W, 2, dtype))
    assert error.max() <= tolerances(np.dtype(dtype))[1]
    exact, svd = numpy_svd(W, 2), canonical_signs(SVD(*(jnp.asarray(x, jnp.float32) for x in svd)))
    np.testing.assert_allclose(svd.S, exact.S, rtol=1e-5)
    core = np.random.default_rng(1).standard_normal((2, 2))
    error = np.linalg.norm(update(svd, core) - update(exact, core)) / np.linalg.norm(update(exact, core))
    assert error < (1e-3 if dtype == "float32" else 1e-6), "signs included: the same vector must give the same update"


def outlier(n):
    """One value a thousand times the others, among which the second stands out by a tenth."""
    return np.concatenate([[1000.0, 1.1], 1 - 0.5 * np.arange(n - 2) / n])


NASTY = {
    "one huge value": outlier(300),
    "a slow decay": 1 - 0.02 * np.sqrt(np.arange(300)),
    "a fast decay": 0.5 ** np.minimum(np.arange(300), 60),
    "a close third": np.append([1.0, 0.9, 0.898], 0.85 * decaying(297)),
}


@pytest.mark.parametrize("name", NASTY)
@pytest.mark.parametrize("method", ["exact", "subspace"])
def test_nasty_matrices_give_the_update_of_numpy(method, name):
    W = with_spectrum(400, 300, NASTY[name]).astype(jnp.bfloat16 if name.startswith("a ") else jnp.float32)
    exact, svd = numpy_svd(W, 2), truncated_svd(W, 2, method)
    for core in np.random.default_rng(1).standard_normal((4, 2, 2)):
        error = np.linalg.norm(update(svd, core) - update(exact, core)) / np.linalg.norm(update(exact, core))
        assert error < 1e-4


@pytest.mark.parametrize("method", ["exact", "subspace"])
@pytest.mark.parametrize("equal", [2, 3, 5])
def test_equal_leading_values_are_all_found(method, equal):
    """Lanczos from one vector finds one direction of them, and would give the next smaller value as the second."""
    W = with_spectrum(400, 300, np.append(np.full(equal, 2.0), decaying(300 - equal)))
    svd = truncated_svd(W, 3, method)
    expected = np.append(np.full(equal, 2.0), decaying(300 - equal))[:3]
    check_triplets(W, svd, 3, rtol=1e-5)
    np.testing.assert_allclose(svd.S[0], expected, rtol=1e-5)


def test_a_matrix_that_misses_goes_to_the_host_alone(caplog, monkeypatch):
    """A flat spectrum, which a few cycles do not resolve, between two matrices that are easy."""
    flat = with_spectrum(400, 300, 1 - 1e-4 * np.arange(300))
    easy = with_spectrum(400, 300, decaying(300), batch=2)
    W = jnp.stack([easy[0], flat[0], easy[1]])
    monkeypatch.setattr(svd_module, "subspace_svd", partial(subspace_svd, max_cycles=8))
    host, sent = svd_module.leading_triplets_of, []
    monkeypatch.setattr(svd_module, "leading_triplets_of", lambda some, rank: sent.append(some) or host(some, rank))
    with caplog.at_level(logging.WARNING, logger="tinylora_jax"):
        svd = truncated_svd(W, 2, "subspace")
    ((only,),) = sent
    np.testing.assert_array_equal(only, W[1])
    assert "1 of 3 matrices of 400 x 300 did not converge" in caplog.text
    for got, alone in zip(svd, truncated_svd(flat, 2, "exact"), strict=True):
        np.testing.assert_array_equal(got[1], alone[0])
    for place, index in ((0, 0), (2, 1)):  # what is done does not change while a neighbour goes on
        for got, alone in zip(svd, truncated_svd(easy, 2, "subspace"), strict=True):
            np.testing.assert_array_equal(got[place], alone[index])


@pytest.mark.slow
def test_values_that_lie_close_together_take_more_cycles_and_no_host():
    """Like those of large random weights: 60 cycles leave ten times the error that is accepted."""
    W = with_spectrum(1100, 1000, 1 - 3e-5 * np.arange(1000))
    with jax.enable_x64(True):
        enough, short = (float(subspace_svd(W, 2, "float64", **limit).error[0]) for limit in ({}, {"max_cycles": 60}))
    assert enough <= tolerances(np.dtype(np.float64))[1] < short


def test_a_matrix_that_is_not_finite_does_not_keep_the_others_waiting():
    """Weights that are broken are refused elsewhere; here they must not cost all the cycles that there are."""
    W = jnp.concatenate([with_spectrum(40, 30, decaying(30)), jnp.full((1, 40, 30), jnp.nan)])
    few, many = (subspace_svd(W, 2, "float32", max_cycles=count) for count in (60, 10**9))
    assert np.isnan(many.error[1]) and many.error[0] < 1e-4
    for got, same in zip(many, few, strict=True):
        np.testing.assert_array_equal(got, same)


def test_the_host_bounds_its_threads_and_tells_how_far_it_is(caplog, monkeypatch):
    monkeypatch.setattr(svd_host, "_PROGRESS_S", 0.0)
    seen, leading = set(), svd_host.leading_triplets

    def watched(W, rank):
        seen.update(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        seen.add(threading.current_thread().name)
        return leading(W, rank)

    monkeypatch.setattr(svd_host, "leading_triplets", watched)
    with caplog.at_level(logging.WARNING, logger="tinylora_jax"):
        truncated_svd(with_spectrum(40, 30, decaying(30), batch=12), 2, "exact")
    assert {thread for thread in seen if isinstance(thread, int)} == {1}
    assert len({thread for thread in seen if isinstance(thread, str)}) <= svd_host._WORKERS
    assert "decomposed 12 of 12 matrices of 40 x 30 on the host" in caplog.text


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
    with pytest.raises(ValueError, match="'subspace' must verify its result, so it cannot be jitted.*'jnp'"):
        jax.jit(lambda W: truncated_svd(W, 2, "subspace"))(jnp.ones((1, 8, 4)))
