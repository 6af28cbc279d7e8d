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

_WORKERS = 4  # several runs may share a host, and each worker holds one matrix in float64: 0.5 GB of a 7B
_DENSE = 256  # columns up to which all eigenvectors cost less than Lanczos steps
_ALONE = 1e-9  # relative to the last value wanted: what is left of the matrix may exceed it by this much
_TIGHT = 1e-11  # a residual, relative to its eigenvalue: vectors are right to 1e-8 over a gap of 1e-3
_LOOSE = 1e-3  # how well the largest value of what is left is needed
_PROGRESS_S = 10.0


def leading_triplets_of(matrices: Sequence[Float[np.ndarray, "rows columns"]], rank: int) -> list[Triplets]:
    """The leading triplets of each matrix, a few matrices side by side with one BLAS thread each.

    One thread a matrix: the threads of a BLAS spin while they wait for each other, and three runs on a host of 64
    cores then do nothing else.

    Args:
      matrices: real matrices of any float dtype.
      rank: number of triplets, at most the smaller side.

    Returns:
      For each matrix its triplets; NaN for a matrix that is not finite.
    """
    from threadpoolctl import threadpool_limits  # here: `import tinylora_jax` needs nothing that JAX does not

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

    They are the leading eigenvectors of W Wᵀ or WᵀW, whichever is smaller, then the small problem of W in their span.
    Float64 bears the square: all digits of float32 vectors come out right.
    """
    if W.shape[0] < W.shape[1]:
        U, S, V = leading_triplets(W.T, rank)
        return V, S, U
    rows, columns = W.shape
    W = np.ascontiguousarray(W, np.float64)
    if not np.isfinite(W).all():  # LAPACK would not come back from it; the caller names the weight
        return tuple(np.full(shape, np.nan) for shape in ((rows, rank), (rank,), (columns, rank)))
    basis = None if columns <= max(_DENSE, 10 * rank) else _lanczos(W, rank)
    if basis is None:
        basis = scipy.linalg.eigh(W.T @ W, subset_by_index=(columns - rank, columns - 1), overwrite_a=True)[1]
    U, S, turn = np.linalg.svd(W @ basis, full_matrices=False)  # orthonormal also where singular values are zero
    return U, S, basis @ turn.T


def _lanczos(W: Float[np.ndarray, "rows columns"], rank: int) -> np.ndarray | None:
    """The leading eigenvectors of WᵀW by ARPACK; None where it fails or one of several equal values was missed.

    Lanczos from one vector sees one direction of an eigenspace of several. What is left of W without the directions
    found is asked for its largest value too: it must not exceed the last one wanted.
    """
    columns = W.shape[1]
    start = np.random.default_rng(0).standard_normal(columns)
    square = lambda x: W.T @ (W @ x)
    exactly, loosely = {"v0": start, "tol": _TIGHT}, {"v0": start, "tol": _LOOSE, "ncv": min(8, columns)}
    try:
        values, basis = eigsh(_operator(square, columns), rank, which="LA", **exactly)
        without = lambda x: x - basis @ (basis.T @ x)
        left = eigsh(_operator(lambda x: without(square(without(x))), columns), 1, which="LA", **loosely)[0]
    except ArpackError:  # no convergence, or nothing to start from: a matrix of zeros
        return None
    return basis if left[0] <= (1 + _ALONE) * values[0] else None


def _operator(product, columns: int) -> LinearOperator:
    flat = lambda x: product(x.reshape(-1))
    return LinearOperator((columns, columns), matvec=flat, dtype=np.float64)
