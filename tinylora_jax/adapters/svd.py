"""Truncated SVD of many matrices, with signs that every back end agrees on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from absl import logging
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

from tinylora_jax.adapters.kernel import pieces
from tinylora_jax.fetch import fetch

SVD_METHODS = ("auto", "exact", "subspace", "jnp")

# Of the largest singular value: closer neighbours may mix until ΔW differs by 1e-3. On SmolLM2's 210 weights, methods
# in float32 miss NumPy's ΔW by at most 7.5e-7 over the gap (python -m experiments.benchmarks.portability).
_CLOSE = 1e-3
_EVEN = 1e-3  # of the largest entry of a column
_SMALL = 1024  # OpenBLAS's threads spin while they wait: where others use the cores, 210 matrices of 576 took 50 times
_HIGHEST = jax.lax.Precision.HIGHEST  # a GPU or TPU would otherwise multiply float32 in fewer bits


class SVD(NamedTuple):
    """The leading singular triplets of a batch of matrices: W ≈ U · diag(S) · Vᵀ."""

    U: Float[Array, "batch rows rank"]
    S: Float[Array, "batch rank"]
    V: Float[Array, "batch columns rank"]


def canonical_signs(svd: SVD) -> SVD:
    """Flips pairs of singular vectors so that the largest entry of each column of U is positive.

    A singular pair is determined only up to a common sign, and back ends choose differently.
    """
    at = jnp.argmax(jnp.abs(svd.U), axis=1, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(svd.U, at, axis=1) < 0, -1.0, 1.0).astype(svd.U.dtype)
    return SVD(svd.U * sign, svd.S, svd.V * sign)


@partial(jax.jit, static_argnames="rank")
def jnp_svd(W: Float[Array, "batch rows columns"], rank: int) -> SVD:
    """The leading `rank` triplets from the full decomposition, `jnp.linalg.svd`, in float32 or better.

    A GPU's mixes neighbours by 2.5e-5 over their gap, and a refinement by its other decompositions does not help.
    """
    U, S, Vt = jnp.linalg.svd(W.astype(np.promote_types(W.dtype, np.float32)), full_matrices=False)
    return canonical_signs(SVD(U[..., :rank], S[..., :rank], Vt[..., :rank, :].swapaxes(-1, -2)))


def host_svd(W: Float[Array, "batch rows columns"], rank: int) -> SVD:
    """The leading `rank` triplets by LAPACK in float64, on the host, one matrix after the other.

    The leading eigenvectors of W Wᵀ or WᵀW, whichever is smaller, then the small problem of W in their span. Float64
    bears the square, and the tenth of the work of a full decomposition in float32 gives all digits of the vectors.
    """
    dtype = np.promote_types(W.dtype, np.float32)
    threads = 1 if min(W.shape[1:]) <= _SMALL else None
    with threadpool_limits(threads, user_api="blas"):
        found = [_leading_triplets(np.asarray(w, np.float64), rank) for w in fetch(W)]
    return canonical_signs(SVD(*(jnp.asarray(np.stack(parts), dtype) for parts in zip(*found, strict=True))))


def _leading_triplets(W: Float[np.ndarray, "rows columns"], rank: int) -> SVD:
    if W.shape[0] < W.shape[1]:
        U, S, V = _leading_triplets(W.T, rank)
        return SVD(V, S, U)
    columns = W.shape[1]
    if not np.isfinite(W).all():  # LAPACK would not come back from it; the caller names the weight
        return SVD(*(np.full(shape, np.nan) for shape in ((W.shape[0], rank), (rank,), (columns, rank))))
    basis = scipy.linalg.eigh(W.T @ W, subset_by_index=(columns - rank, columns - 1), overwrite_a=True)[1]
    U, S, turn = np.linalg.svd(W @ basis, full_matrices=False)  # orthonormal also where singular values are zero
    return SVD(U, S, basis @ turn.T)


def _block(W: jax.Array, rank: int) -> int:
    """In how many directions the leading ones are looked for."""
    return min(*W.shape[1:], max(32, 8 * rank))


def _product_with(W: jax.Array, subscripts: str, X: jax.Array) -> jax.Array:
    """einsum(W, X) exact to float32. A bfloat16 W meets X in three bfloat16 pieces: half the bytes, matrix units."""
    if W.dtype != jnp.bfloat16:
        return jnp.einsum(subscripts, W, X, precision=_HIGHEST)
    side_by_side = jnp.concatenate(pieces(X, W.dtype, 3), axis=-1)
    return sum(jnp.split(jnp.einsum(subscripts, W, side_by_side, preferred_element_type=jnp.float32), 3, axis=-1))


@partial(jax.jit, static_argnames=("rank", "max_iterations"))
def subspace_svd(
    W: Float[Array, "batch rows columns"], rank: int, tolerance: float = 3e-6, max_iterations: int = 300
) -> tuple[SVD, Float[Array, " batch"]]:
    """The leading `rank` triplets by block subspace iteration: matrix products instead of a full SVD.

    Iterates Q ← orth(W · orth(Wᵀ Q)) on a block wider than `rank`, then solves the small problem Qᵀ W. Everything
    is products of whole batches and factorizations of [block, block], which is what accelerators are good at.

    Args:
      W: the matrices.
      rank: triplets wanted.
      tolerance: stop once no residual ‖W v − s u‖ is above this fraction of the largest singular value.
      max_iterations: give up after so many products with W Wᵀ.

    Returns:
      The triplets and each matrix's error, which the caller must check: the largest relative residual ‖W v − s u‖ / s₁,
      plus what U lacks of being orthonormal.
    """
    W = W if W.dtype == jnp.bfloat16 else W.astype(np.promote_types(W.dtype, np.float32))
    batch, rows, _ = W.shape
    block = _block(W, rank)
    product = partial(jnp.einsum, precision=_HIGHEST)
    onto_rows = partial(_product_with, W, "brc,bck->brk")  # W X
    onto_columns = partial(_product_with, W, "brc,brk->bck")  # Wᵀ X

    def orthonormal(Y):  # Cholesky QR: shifted for a first rough pass, then exact
        for shift in (1e-6, 0.0):
            gram = product("brk,brl->bkl", Y, Y)
            size = jnp.trace(gram, axis1=1, axis2=2)[:, None, None]
            L = jnp.linalg.cholesky(gram + shift * size * jnp.eye(block, dtype=gram.dtype))
            Y = jax.lax.linalg.triangular_solve(L, Y, lower=True, transpose_a=True)
        return Y

    def solve(Q):
        small = onto_columns(Q)
        squares, Z = jnp.linalg.eigh(product("bck,bcl->bkl", small, small))
        Z = Z[..., ::-1][..., :rank]
        S = jnp.sqrt(jnp.maximum(squares[..., ::-1], 0))[..., :rank]
        U, V = product("brk,bkl->brl", Q, Z), product("bck,bkl->bcl", small, Z) / jnp.maximum(S[:, None], 1e-30)
        residual = onto_rows(V) - U * S[:, None]
        worst = jnp.max(jnp.linalg.norm(residual, axis=1), axis=-1) / jnp.maximum(S[:, 0], 1e-30)
        skew = jnp.max(jnp.abs(product("brk,brl->bkl", U, U) - jnp.eye(rank, dtype=U.dtype)), axis=(1, 2))
        return SVD(U, S, V), worst + skew

    def improve(_, Q):
        return orthonormal(onto_rows(orthonormal(onto_columns(Q))))

    def iterate(carry):
        count, Q, _ = carry
        Q = jax.lax.fori_loop(0, 4, improve, Q)
        return count + 4, Q, solve(Q)[1]

    start = jax.random.normal(jax.random.key(0), (1, rows, block), np.promote_types(W.dtype, np.float32))
    Q = orthonormal(jnp.broadcast_to(start, (batch, rows, block)))
    unfinished = lambda carry: (carry[0] < max_iterations) & jnp.any(carry[2] > tolerance)
    _, Q, _ = jax.lax.while_loop(unfinished, iterate, (0, Q, jnp.full((batch,), jnp.inf, start.dtype)))
    svd, residual = solve(Q)
    return canonical_signs(svd), residual


def is_undetermined(svd: SVD, rank: int) -> bool:
    """Whether another computation in float32 may find other singular vectors of a matrix, so that ΔW is another.

    The vectors of neighbouring singular values mix by rounding over gap, and a column of U whose largest entries of
    either sign are about equal has no sure sign.

    Args:
      svd: of one matrix, NumPy arrays without a batch axis: one triplet more than `rank`, if the matrix has so many.
      rank: triplets in use.
    """
    S, U = np.append(svd.S, 0.0)[: rank + 1], svd.U[:, :rank]
    if S[0] == 0:
        return False  # the update is zero whatever the vectors
    highest, lowest = U.max(axis=0), -U.min(axis=0)
    margins = np.abs(highest - lowest) / np.maximum(highest, lowest)
    return bool(np.any(S[:-1] - S[1:] < _CLOSE * S[0]) or np.any(margins < _EVEN))


def mismatch(W: Float[Array, "rows columns"], svd: SVD) -> float:
    """How far triplets are from being singular ones of a matrix: 0 if they are, of the order of 1 if they are not.

    The largest of ‖W v − s u‖ and ‖Wᵀ u − s v‖ over the largest s, and what U and V lack of being orthonormal.
    """
    return float(fetch(_mismatch(W, *(np.asarray(x, np.float32) for x in svd))))


@jax.jit
def _mismatch(W: jax.Array, U: jax.Array, S: jax.Array, V: jax.Array) -> jax.Array:
    W = W.astype(jnp.float32)
    product = partial(jnp.matmul, precision=_HIGHEST)
    largest = jnp.maximum(jnp.max(S), 1e-30)
    off = [jnp.max(jnp.linalg.norm(x, axis=0)) / largest for x in (product(W, V) - U * S, product(W.T, U) - V * S)]
    skew = [jnp.max(jnp.abs(product(x.T, x) - jnp.eye(len(S), dtype=x.dtype))) for x in (U, V)]
    return jnp.max(jnp.stack(off + skew))


def truncated_svd(W: Float[Array, "batch rows columns"], rank: int, method: str = "auto") -> SVD:
    """The leading `rank` singular triplets of a batch of equally shaped matrices.

    Args:
      W: the matrices, any float dtype.
      rank: triplets wanted, at most the smaller side.
      method: `exact` (by LAPACK in float64, on the host: the same on every machine), `subspace` (faster on an
        accelerator; each result is verified by its residual, and a batch with one above 2e-5 is decomposed exactly,
        as is one that lies on several CPU devices),
        `jnp` (`jnp.linalg.svd` of the back end, in float32), or `auto`: `exact` on a CPU, `subspace` elsewhere. In a
        jitted function, which the host cannot enter, `exact` and `auto` are `jnp`.

    Returns:
      The triplets with canonical signs, float32 (float64 for float64 input).

    Raises:
      ValueError: `subspace` in a jitted function, where its residual cannot be looked at.
    """
    if isinstance(W, jax.core.Tracer):
        if method == "subspace":
            raise ValueError("SVD method 'subspace' in a jitted function: its result must be verified; use 'jnp' there")
        method = "jnp"
    method = _resolved(method)
    if method == "jnp":
        return jnp_svd(W, rank)
    if method == "exact" or _on_several_cpus(W):
        return host_svd(W, rank)
    svd, residual = subspace_svd(W, rank)
    worst = float(jnp.max(residual))
    if worst <= 2e-5:
        return svd
    logging.warning("subspace iteration left a residual of %.1e on shape %s; using the exact SVD", worst, W.shape)
    return host_svd(W, rank)


def _on_several_cpus(W: jax.Array) -> bool:
    """Where the subspace method would wait for ever: LAPACK fills the threads that its all-reduces need to meet."""
    if isinstance(W, jax.core.Tracer) or not isinstance(W, jax.Array):
        return False
    devices = W.sharding.device_set
    return len(devices) > 1 and all(device.platform == "cpu" for device in devices)


def lower_svds(shapes: Iterable[tuple[jax.ShapeDtypeStruct, int]], method: str) -> Iterator[jax.stages.Lowered]:
    """What `truncated_svd` runs for these weights and ranks, lowered; of the exact method nothing is compiled."""
    program = {"exact": None, "subspace": subspace_svd, "jnp": jnp_svd}[_resolved(method)]
    return (program.lower(W, rank) for W, rank in shapes if program)


def compile_svds(shapes: Iterable[tuple[jax.ShapeDtypeStruct, int]], method: str) -> None:
    """Compiles what `truncated_svd` runs for these weights and ranks, side by side: for a GPU each takes seconds."""
    with ThreadPoolExecutor() as pool:
        for compiled in [pool.submit(lowered.compile) for lowered in lower_svds(shapes, method)]:
            compiled.result()


def _resolved(method: str) -> str:
    if method not in SVD_METHODS:
        raise ValueError(f"SVD method {method!r}: expected one of {', '.join(SVD_METHODS)}")
    if method != "auto":
        return method
    return "exact" if jax.default_backend() == "cpu" else "subspace"
