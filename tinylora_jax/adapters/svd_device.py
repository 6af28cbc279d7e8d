"""The leading singular triplets by batched matrix products, which suit accelerators."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from tinylora_jax.adapters.kernel import pieces

_HIGHEST = jax.lax.Precision.HIGHEST  # a GPU or TPU would otherwise multiply float32 in fewer bits
_BLOCK = 8  # smallest number of columns iterated together
_STEPS = 4  # blocks in a basis: for 4 × 8 columns a GPU decomposes a whole batch in one kernel
_SUMMED = 1024  # products summed by the matrix units; on an H100, sums of 8,960 products have an error of 3e-5
_MOST_CYCLES = 240  # after 60, Gaussian noise of 13,824 × 5,120, whose values lie close together, has an error of 3e-6


class Triplets(NamedTuple):
    """The leading triplets of a batch of matrices, with their errors.

    Attributes:
      U: left singular vectors, `[batch, rows, rank]`.
      S: singular values, `[batch, rank]`, descending.
      V: right singular vectors, `[batch, columns, rank]`.
      error: error of each matrix, `[batch]`: the largest ‖Wᵀu − s v‖ / s₁, plus the deviations of U and V from
        orthonormality; NaN where the iteration broke down.
    """

    U: Float[Array, "batch rows rank"]
    S: Float[Array, "batch rank"]
    V: Float[Array, "batch columns rank"]
    error: Float[Array, " batch"]


def work_dtype(of: jnp.dtype) -> np.dtype:
    """The dtype of the iteration: float64; on a TPU, which lacks it, at least float32.

    With float64, trace inside `jax.enable_x64(True)`.
    """
    return np.promote_types(of, np.float32) if jax.default_backend() == "tpu" else np.dtype(np.float64)


def tolerances(dtype: np.dtype) -> tuple[float, float]:
    """The error at which a matrix is finished, and the largest accepted error once it stops improving.

    An error e turns a vector by e / 2g, where g is the gap to the next singular value; both are relative to the first
    singular value. Gaps below 1e-3 are reported as ill-conditioned. Float32 reaches an error of a few 1e-6 at best.
    """
    return (1e-8, 1e-7) if dtype == np.float64 else (3e-6, 2e-5)


def mesh_of(W: Any) -> Mesh | None:
    """The mesh that a weight, or its shape, lies on; None for a single device."""
    sharding = getattr(W, "sharding", None)
    return sharding.mesh if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 else None


def spread(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch of matrices for `subspace_svd`: each device holds an equal share of whole matrices."""
    return NamedSharding(mesh, P(mesh.axis_names))


@partial(jax.jit, static_argnames=("rank", "dtype", "max_cycles", "mesh"))
def subspace_svd(
    W: Float[Array, "batch rows columns"],
    rank: int,
    dtype: str = "float32",
    max_cycles: int = _MOST_CYCLES,
    mesh: Mesh | None = None,
) -> Triplets:
    """Computes the leading `rank` triplets by block Krylov iteration with restarts.

    A cycle expands a block X to the orthonormalized basis X, AX, A²X, A³X with A = WᵀW (W Wᵀ if that is smaller), and
    keeps the best block in its span (Rayleigh-Ritz). It needs a third of the products of plain subspace iteration,
    and finds equal singular values together. A finished matrix no longer changes, so its triplets do not depend on
    the other matrices of the batch.

    Args:
      W: matrices of one shape, `[batch, rows, columns]`.
      rank: number of triplets to compute.
      dtype: dtype of the iteration, see `work_dtype`.
      max_cycles: largest number of cycles for a matrix.
      mesh: devices that share the batch, whose size they must divide; no device waits for another.

    Returns:
      The triplets in `dtype` with arbitrary signs, and the errors, which the caller must check.
    """
    if mesh is not None:
        own = partial(subspace_svd, rank=rank, dtype=dtype, max_cycles=max_cycles)
        place = P(mesh.axis_names)
        return jax.shard_map(own, mesh=mesh, in_specs=place, out_specs=place, check_vma=False)(W)
    if W.shape[1] < W.shape[2]:
        U, S, V, error = subspace_svd(W.swapaxes(1, 2), rank, dtype, max_cycles)
        return Triplets(V, S, U, error)
    dtype = np.dtype(dtype)
    # A bfloat16 W is multiplied by float32 vectors split into three bfloat16 pieces: that reads half the bytes and
    # uses the matrix units.
    W = W if W.dtype == jnp.bfloat16 and dtype == np.float32 else W.astype(dtype)
    columns = W.shape[2]
    width = min(columns, max(_BLOCK, rank + 4))
    steps = max(1, min(_STEPS, columns // width))
    done_at, accepted = tolerances(dtype)

    def cycle(X: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The next block, and the error of the current one."""

        def expand(step, carry):
            X, basis, images, error = carry
            WX = _product(W, X)
            Y = _product(W, WX, transposed=True)
            place = partial(jax.lax.dynamic_update_slice_in_dim, start_index=step * width, axis=2)
            basis, images = place(basis, X), place(images, WX)
            error = jnp.where(step == 0, _residual(X, WX, Y, rank), error)
            return _orthonormal(Y, basis), basis, images, error

        # One loop over a basis of full width, initially zero: with an unrolled loop, the GPU compiler tuned tilings for
        # about forty different products, which took most of a cold start.
        empty = jnp.zeros((*X.shape[:2], steps * width), dtype), jnp.zeros((*W.shape[:2], steps * width), dtype)
        carry = X, *empty, jnp.zeros(X.shape[:1], dtype)
        _, basis, images, error = jax.lax.fori_loop(0, steps, expand, carry)
        small = jnp.linalg.eigh(_einsum("brk,brl->bkl", images, images))[1][..., ::-1][..., :width]
        return _orthonormal(_einsum("bck,bkl->bcl", basis, small)), error

    def body(carry):
        count, X, best, finished = carry
        new, error = cycle(X)
        # ~(error > …) is true of NaN as well: what broke down once does not recover.
        finished = finished | ~(error > done_at) | ((error <= accepted) & (error > 0.5 * best))
        X = jnp.where(finished[:, None, None], X, new)
        return count + 1, X, jnp.minimum(error, best), finished

    start = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, columns, width), dtype), (*W.shape[::2], width))
    X = _orthonormal(start)
    nothing = jnp.full((W.shape[0],), jnp.inf, dtype), jnp.zeros((W.shape[0],), bool)
    unfinished = lambda carry: (carry[0] < max_cycles) & ~jnp.all(carry[3])
    X = jax.lax.while_loop(unfinished, body, (jnp.int32(0), X, *nothing))[1]
    return _triplets(W, X, rank)


def _triplets(W: jax.Array, X: jax.Array, rank: int) -> Triplets:
    """The triplets of W in the span of X, from `jnp.linalg.svd` of the small problem."""
    WX = _product(W, X)
    Q, R = jnp.linalg.qr(WX)  # orthonormal even where singular values are zero
    left, S, right = jnp.linalg.svd(R)
    U = _einsum("brk,bkl->brl", Q, left[..., :rank])
    V = _einsum("bck,blk->bcl", X, right[:, :rank])
    S = S[:, :rank]
    largest = jnp.maximum(S[:, 0], jnp.finfo(S.dtype).tiny)
    residual = _product(W, U, transposed=True) - V * S[:, None]
    error = jnp.max(jnp.linalg.norm(residual, axis=1), axis=-1) / largest
    return Triplets(U, S, V, error + _skew(U) + _skew(V))


def _skew(U: jax.Array) -> jax.Array:
    """The deviation of each matrix's columns from orthonormality."""
    return jnp.max(jnp.abs(_einsum("brk,brl->bkl", U, U) - jnp.eye(U.shape[2], dtype=U.dtype)), axis=(1, 2))


def _residual(X: jax.Array, WX: jax.Array, Y: jax.Array, rank: int) -> jax.Array:
    """The largest ‖Wᵀu − s v‖ / s₁ of the leading columns v of X, from W X and WᵀW X."""
    X, WX, Y = X[..., :rank], WX[..., :rank], Y[..., :rank]
    squares = jnp.sum(WX * WX, axis=1)
    S = jnp.sqrt(squares)
    largest = jnp.maximum(jnp.max(S, axis=1, keepdims=True), jnp.finfo(S.dtype).tiny ** 0.25)
    small = jnp.finfo(S.dtype).eps ** 0.5 * largest  # a zero singular value has no direction, so no error
    off = jnp.linalg.norm(Y - X * squares[:, None], axis=1) / (jnp.maximum(S, small) * largest)
    return jnp.max(off, axis=1)


def _orthonormal(Y: jax.Array, basis: jax.Array | None = None) -> jax.Array:
    """An orthonormal basis of the columns of each matrix, orthogonal to those of `basis`: three rounds of Cholesky QR.

    A column of zeros stays zero, and zero columns of `basis` have no effect.
    """
    eye = jnp.eye(Y.shape[2], dtype=Y.dtype)
    shifts = 100 * jnp.finfo(Y.dtype).eps * Y.shape[2] * jnp.array([1, 1, 0], Y.dtype)

    def one_round(index, Y):
        if basis is not None:
            Y = Y - _einsum("bck,bkl->bcl", basis, _einsum("bck,bcl->bkl", basis, Y))
        norms = jnp.linalg.norm(Y, axis=1, keepdims=True)
        Y = Y / jnp.maximum(norms, jnp.finfo(Y.dtype).tiny ** 0.5)
        gram = _einsum("bck,bcl->bkl", Y, Y)
        empty = jnp.diagonal(gram, axis1=1, axis2=2) < 0.5
        L = jnp.linalg.cholesky(gram + (shifts[index] + empty[:, None].astype(Y.dtype)) * eye)
        return jax.lax.linalg.triangular_solve(L, Y, lower=True, transpose_a=True)

    return jax.lax.fori_loop(0, 3, one_round, Y)


def _einsum(subscripts: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *arrays, precision=_HIGHEST)


def _product(W: jax.Array, X: jax.Array, transposed: bool = False) -> jax.Array:
    """W X, or Wᵀ X, in the full precision of X: long sums are split and then added outside the matrix units."""
    length = W.shape[1 if transposed else 2]
    parts = 1 if X.dtype == jnp.float64 else length // _part(length)
    split = lambda x, axis: x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    W, X = split(W, 1 if transposed else 2), split(X, 1)
    subscripts = "bgrc,bgrk->bgck" if transposed else "brgc,bgck->bgrk"
    if W.dtype != jnp.bfloat16:
        return jnp.sum(_einsum(subscripts, W, X), axis=1)
    side_by_side = jnp.concatenate(pieces(X, W.dtype, 3), axis=-1)
    found = jnp.sum(jnp.einsum(subscripts, W, side_by_side, preferred_element_type=jnp.float32), axis=1)
    return sum(jnp.split(found, 3, axis=-1))


def _part(length: int) -> int:
    """The largest size up to `_SUMMED` that divides a sum evenly; the whole length if that size is too small."""
    best = max(size for size in range(1, min(length, _SUMMED) + 1) if length % size == 0)
    return best if best >= 64 else length
