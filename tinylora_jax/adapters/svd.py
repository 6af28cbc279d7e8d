"""Truncated SVD of many matrices, with the same signs on every back end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters.svd_device import mesh_of, subspace_svd, tolerances, work_dtype
from tinylora_jax.adapters.svd_host import leading_triplets_of
from tinylora_jax.multihost import to_host

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
SVD_METHODS = ("auto", "exact", "subspace", "jnp")

# Gap as a share of the largest singular value: closer neighbours may mix until ΔW differs by 1e-3. On SmolLM2's 210
# weights, float32 methods differ from NumPy's ΔW by at most 7.5e-7 / gap (experiments.benchmarks.portability).
_CLOSE = 1e-3
_EVEN = 1e-3  # share of a column's largest entry
_HIGHEST = jax.lax.Precision.HIGHEST  # a GPU or TPU would otherwise multiply float32 in fewer bits


class SVD(NamedTuple):
    """The leading singular triplets of a batch of matrices: W ≈ U · diag(S) · Vᵀ."""

    U: Float[Array, "batch rows rank"]
    S: Float[Array, "batch rank"]
    V: Float[Array, "batch columns rank"]


def canonical_signs(svd: SVD) -> SVD:
    """Flips pairs of singular vectors so that the largest entry of each column of U is positive.

    A singular pair is determined only up to a common sign, and back ends choose different signs.
    """
    at = jnp.argmax(jnp.abs(svd.U), axis=1, keepdims=True)
    sign = jnp.where(jnp.take_along_axis(svd.U, at, axis=1) < 0, -1.0, 1.0).astype(svd.U.dtype)
    return SVD(svd.U * sign, svd.S, svd.V * sign)


@partial(jax.jit, static_argnames="rank")
def jnp_svd(W: Float[Array, "batch rows columns"], rank: int) -> SVD:
    """The leading `rank` triplets from the full decomposition by `jnp.linalg.svd`, in float32 or better.

    On a GPU it mixes neighbouring vectors by 2.5e-5 / gap, and refining with other GPU decompositions does not help.
    """
    U, S, Vt = jnp.linalg.svd(W.astype(np.promote_types(W.dtype, np.float32)), full_matrices=False)
    return canonical_signs(SVD(U[..., :rank], S[..., :rank], Vt[..., :rank, :].swapaxes(-1, -2)))


def host_svd(W: Float[Array, "batch rows columns"], rank: int) -> SVD:
    """The leading `rank` triplets by LAPACK and ARPACK in float64, on the host: see `svd_host`."""
    return _joined(leading_triplets_of(list(to_host(W)), rank), np.promote_types(W.dtype, np.float32))


def _joined(found: Sequence[tuple[np.ndarray, ...]], dtype: np.dtype) -> SVD:
    """Joins the triplets of several matrices into one batch."""
    return canonical_signs(SVD(*(jnp.asarray(np.stack(parts), dtype) for parts in zip(*found, strict=True))))


def _on_device(run: Callable[..., T], W: Any, rank: int) -> T:
    """Calls `run`, which is `subspace_svd` or its `lower`, with the arguments that these weights need."""
    dtype, mesh = work_dtype(W.dtype), mesh_of(W)
    with jax.enable_x64(bool(jax.config.jax_enable_x64) or dtype == np.float64):
        return run(W, rank, dtype.name, mesh=mesh)


def _device_svd(W: Float[Array, "batch rows columns"], rank: int) -> SVD:
    """The leading `rank` triplets by `subspace_svd`; matrices that do not converge are decomposed on the host."""
    dtype = work_dtype(W.dtype)
    *found, error = (np.array(part) for part in to_host(_on_device(subspace_svd, W, rank)))
    out = np.promote_types(W.dtype, np.float32)
    missed = np.flatnonzero(~(error <= tolerances(dtype)[1]))  # NaN included
    if missed.size:
        _LOG.warning(
            "%d of %d matrices of %d x %d did not converge on the device (largest error %.1e);"
            " decomposing these on the host",
            *(missed.size, *W.shape, np.max(error[missed])),
        )
        again = leading_triplets_of([np.asarray(to_host(W[i])) for i in missed], rank)
        for part, exact in zip(found, zip(*again, strict=True), strict=True):
            part[missed] = np.stack(exact)
    return canonical_signs(SVD(*(jnp.asarray(part, out) for part in found)))


def is_ill_conditioned(svd: SVD, rank: int) -> bool:
    """Whether another float32 computation may find different singular vectors, and so a different ΔW.

    Rounding mixes the vectors of neighbouring singular values in proportion to 1 / gap. The sign of a column of U is
    ambiguous if its largest positive and negative entries are about equal.

    Args:
      svd: decomposition of one matrix as NumPy arrays, with `rank + 1` triplets if the matrix has that many.
      rank: number of triplets in use.
    """
    S, U = np.append(svd.S, 0.0)[: rank + 1], svd.U[:, :rank]
    if S[0] == 0:
        return False  # the update is zero for any vectors
    highest, lowest = U.max(axis=0), -U.min(axis=0)
    margins = np.abs(highest - lowest) / np.maximum(highest, lowest)
    return bool(np.any(S[:-1] - S[1:] < _CLOSE * S[0]) or np.any(margins < _EVEN))


def mismatch(W: Float[Array, "rows columns"], svd: SVD) -> float:
    """Measures how far triplets are from singular triplets of a matrix: 0 if exact, about 1 if unrelated.

    It is the largest of ‖W v − s u‖ and ‖Wᵀ u − s v‖ relative to the largest s, and of the deviations of U and V from
    orthonormality.
    """
    return float(to_host(_mismatch(W, *(np.asarray(x, np.float32) for x in svd))))


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
      W: matrices `[batch, rows, columns]` of any float dtype.
      rank: number of triplets, at most the smaller side.
      method: SVD method. `exact` uses LAPACK in float64 on the host and gives the same result on every machine.
        `subspace` is faster on an accelerator and uses float64 except on a TPU; each result is verified by its
        residual, and a matrix that misses the tolerance is decomposed exactly. `jnp` is the back end's
        `jnp.linalg.svd` in float32. `auto` is `exact` on a CPU and `subspace` elsewhere. Inside a jitted function,
        where the host cannot be used, `exact` and `auto` mean `jnp`.

    Returns:
      The triplets with canonical signs, in float32 (float64 for float64 input).

    Raises:
      ValueError: the method is `subspace` inside a jitted function, where its residual cannot be checked.
    """
    if isinstance(W, jax.core.Tracer):
        if method == "subspace":
            raise ValueError("SVD method 'subspace' must verify its result, so it cannot be jitted; use 'jnp' instead")
        method = "jnp"
    method = _resolved(method)
    if method == "jnp":
        return jnp_svd(W, rank)
    return host_svd(W, rank) if method == "exact" else _device_svd(W, rank)


def lower_svds(shapes: Iterable[tuple[jax.ShapeDtypeStruct, int]], method: str) -> Iterator[jax.stages.Lowered]:
    """Lowers the programs that `truncated_svd` runs for these shapes and ranks; the exact method has none."""
    method = _resolved(method)
    for W, rank in shapes if method != "exact" else ():
        yield jnp_svd.lower(W, rank) if method == "jnp" else _on_device(subspace_svd.lower, W, rank)


def compile_svds(shapes: Iterable[tuple[jax.ShapeDtypeStruct, int]], method: str) -> None:
    """Compiles in parallel the programs of `truncated_svd` for these shapes and ranks; on a GPU each takes seconds."""
    with ThreadPoolExecutor() as pool:
        for compiled in [pool.submit(lowered.compile) for lowered in lower_svds(shapes, method)]:
            compiled.result()


def _resolved(method: str) -> str:
    if method not in SVD_METHODS:
        raise ValueError(f"SVD method {method!r}: expected one of {', '.join(SVD_METHODS)}")
    if method != "auto":
        return method
    return "exact" if jax.default_backend() == "cpu" else "subspace"
