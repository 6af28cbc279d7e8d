"""The leading singular triplets by LAPACK and ARPACK, in float64 on the host."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np
import scipy.linalg
from jaxtyping import Float
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

_LOG = logging.getLogger(__name__)

Triplets = tuple[np.ndarray, np.ndarray, np.ndarray]
"""U `[rows, rank]`, S `[rank]`, V `[columns, rank]` in float64."""

_WORKERS = 4  # several runs may share a host, and each worker holds one matrix in float64: 0.5 GB for a 7B model
_DENSE = 256  # columns up to which all eigenvectors cost less than Lanczos steps
_ALONE = 1e-9  # relative margin by which the residual's largest value may exceed the last wanted value
_TIGHT = 1e-11  # residual relative to its eigenvalue: vectors are accurate to 1e-8 for a relative gap of 1e-3
_LOOSE = 1e-3  # accuracy needed for the largest value of the residual matrix
_PROGRESS_S = 10.0


def leading_triplets_of(matrices: Sequence[Float[np.ndarray, "rows columns"]], rank: int) -> list[Triplets]:
    """Computes the leading triplets of each matrix, a few matrices in parallel with one BLAS thread each.

    Each matrix gets one thread because BLAS threads spin while they wait for each other: three runs on a 64-core
    host would spend all their time spinning.

    Args:
      matrices: real matrices of any float dtype.
      rank: number of triplets, at most the smaller side.

    Returns:
      The triplets of each matrix; NaN for a matrix that is not finite.
    """
    from threadpoolctl import threadpool_limits  # imported here so that `import tinylora_jax` needs only JAX

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found: list[Triplets | None] = [None] * len(matrices)
    told = time.monotonic()
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(_WORKERS, cores)) as pool:
        places = {pool.submit(leading_triplets, W, rank): place for place, W in enumerate(matrices)}
        for count, done in enumerate(as_completed(places), start=1):
            found[places[done]] = done.result()
            if time.monotonic() - told > _PROGRESS_S:
                told = time.monotonic()
                shape = " x ".join(map(str, matrices[0].shape))
                _LOG.warning("decomposed %d of %d matrices of %s on the host", count, len(matrices), shape)
    return found


def leading_triplets(W: Float[np.ndarray, "rows columns"], rank: int) -> Triplets:
    """The leading triplets of one matrix, in float64.

    Finds the leading eigenvectors of W Wᵀ or WᵀW, whichever is smaller, then solves the small problem of W in their
    span. Float64 has enough precision for the squared matrix: float32 vectors are correct to the last digit.
    """
    if W.shape[0] < W.shape[1]:
        U, S, V = leading_triplets(W.T, rank)
        return V, S, U
    rows, columns = W.shape
    W = np.ascontiguousarray(W, np.float64)
    if not np.isfinite(W).all():  # LAPACK would never return; the caller names the weight
        return tuple(np.full(shape, np.nan) for shape in ((rows, rank), (rank,), (columns, rank)))
    basis = None if columns <= max(_DENSE, 10 * rank) else _lanczos(W, rank)
    if basis is None:
        basis = scipy.linalg.eigh(W.T @ W, subset_by_index=(columns - rank, columns - 1), overwrite_a=True)[1]
    U, S, turn = np.linalg.svd(W @ basis, full_matrices=False)  # orthonormal even where singular values are zero
    return U, S, basis @ turn.T


def _lanczos(W: Float[np.ndarray, "rows columns"], rank: int) -> np.ndarray | None:
    """The leading eigenvectors of WᵀW by ARPACK; None where it fails or one of several equal values was missed.

    Lanczos from one start vector finds only one direction of a multidimensional eigenspace. As a check, the largest
    value of W without the directions found is computed too: it must not exceed the last wanted value.
    """
    columns = W.shape[1]
    start = np.random.default_rng(0).standard_normal(columns)
    square = lambda x: W.T @ (W @ x)
    exactly, loosely = {"v0": start, "tol": _TIGHT}, {"v0": start, "tol": _LOOSE, "ncv": min(8, columns)}
    try:
        values, basis = eigsh(_operator(square, columns), rank, which="LA", **exactly)
        without = lambda x: x - basis @ (basis.T @ x)
        left = eigsh(_operator(lambda x: without(square(without(x))), columns), 1, which="LA", **loosely)[0]
    except ArpackError:  # no convergence, or no usable start vector (a matrix of zeros)
        return None
    return basis if left[0] <= (1 + _ALONE) * values[0] else None


def _operator(product, columns: int) -> LinearOperator:
    flat = lambda x: product(x.reshape(-1))
    return LinearOperator((columns, columns), matvec=flat, dtype=np.float64)
