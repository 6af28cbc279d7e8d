"""Fingerprints of a base model and of factors: a few numbers per weight, tolerant of rounding.

Each number is a norm, or a product of the weight or its update with fixed directions. A weight in bfloat16 gives nearly
the same numbers as in float32, while another model's weight gives different ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors
from tinylora_jax.adapters.projections import standard_normals
from tinylora_jax.adapters.quantized import dense, scheme_of
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.multihost import to_host

NUM_SIGNED = 4
NUM_PROBES = 6
# Tolerance relative to a weight's norm. Rounding to bfloat16 changes a signed sum by about 1e-3, quantization to four
# bits by 5e-2.
_OTHER = 0.02
_ROUNDED = 1e-4  # larger than differences from the order of summation


@lru_cache(maxsize=64)
def _directions(side: str, size: int) -> np.ndarray:
    directions = standard_normals(f"probe:{side}", NUM_PROBES * size).reshape(NUM_PROBES, size)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def probes(factors: Factors) -> dict[str, list[list[float]]]:
    """Computes a few numbers per module that change with any change of its factors.

    The last number is ‖ΔW‖ for v = 1. The others are hᵤᵀ ΔW hᵥ · √(in · out) for fixed unit directions hᵤ and hᵥ, which
    have the same order of magnitude.

    Args:
      factors: factors of a model's weights.

    Returns:
      The numbers by leaf path, one row per layer.
    """
    result = {}
    for path, leaf in factors.leaves.items():
        U, S, V, P = (np.asarray(x, np.float64) for x in (leaf.U, leaf.S, leaf.V, leaf.P))
        middle = S[:, :, None] * P.sum(axis=1)
        size = np.linalg.norm(middle, axis=(1, 2))  # U and V are orthonormal
        left = np.einsum("lor,ko->lkr", U, _directions("out", U.shape[1]))
        right = np.einsum("lir,ki->lkr", V, _directions("in", V.shape[1]))
        values = np.einsum("lkr,lrs,lks->lk", left, middle, right) * np.sqrt(U.shape[1] * V.shape[1])
        result[path] = np.concatenate([values, size[:, None]], axis=1).tolist()
    return result


@lru_cache(maxsize=64)
def signs(label: str, size: int) -> np.ndarray:
    """Signs ±1, `[NUM_SIGNED, size]`: row k has the bits of SHA-256(`label:k:0`), SHA-256(`label:k:1`), …; 1 is +1."""
    digest = lambda k, block: hashlib.sha256(f"{label}:{k}:{block}".encode()).digest()
    rows = [b"".join(digest(k, block) for block in range(-(-size // 256))) for k in range(NUM_SIGNED)]
    return np.stack([np.unpackbits(np.frombuffer(row, np.uint8))[:size] for row in rows]).astype(np.int8) * 2 - 1


@jax.jit
def _numbers(W: Any, left: Float[Array, "k rows"], right: Float[Array, "k columns"]) -> Float[Array, " numbers"]:
    W = dense(W)
    W = W if W.dtype in (jnp.bfloat16, jnp.float16) else W.astype(jnp.float32)  # a float32 copy may not fit
    W = W.reshape(left.shape[1], right.shape[1])
    rows = jnp.matmul(left.astype(W.dtype), W, precision="highest", preferred_element_type=jnp.float32)
    size = jnp.sqrt(jnp.sum(jnp.sum(jnp.square(W.astype(jnp.float32)), axis=1)))
    return jnp.concatenate([size[None], jnp.sum(rows * right, axis=1)])


def base_fingerprint(params: Any) -> dict[str, Any]:
    """Computes the fingerprint of a tree of weights. In a multi-process run, all processes must call it.

    Args:
      params: weights of the base model.

    Returns:
      A JSON-serializable dict with the `dtype` of the weights (`mixed` if they have several), and `weights`, which maps
      each path to ‖W‖ and to sums aᵀ W b with fixed signs a and b, where all axes of W but the last are flattened. Of
      a quantized model, `dtype` is the dtype before quantization, and `quantize` names the scheme.
    """
    leaves = leaves_by_path(params)
    found = {}
    for path, W in leaves.items():
        columns = W.shape[-1] if W.shape else 1
        sides = signs("rows", W.size // max(columns, 1)), signs("columns", columns)
        found[path] = _numbers(W, *(side.astype(np.float32) for side in sides))
    dtypes = {str(W.dtype) for W in leaves.values()}
    rows = {path: [float(f"{x:.7g}") for x in row] for path, row in to_host(found).items()}
    scheme = scheme_of(params)
    about = {} if scheme == "none" else {"quantize": scheme}
    return {"dtype": dtypes.pop() if len(dtypes) == 1 else "mixed", **about, "weights": rows}


def differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compares two fingerprints.

    Returns:
      Paths of the weights that differ or are missing in one model, and of those that are only rounded differently.
    """
    theirs, ours = stored["weights"], found["weights"]
    other, rounded = sorted(set(theirs) ^ set(ours)), []
    for path in sorted(set(theirs) & set(ours)):
        row = np.asarray(ours[path])
        apart, size = np.max(np.abs(row - np.asarray(theirs[path], np.float64))), row[0]
        if not apart <= _OTHER * size:
            other.append(path)
        elif apart > _ROUNDED * size:
            rounded.append(path)
    return other, rounded
