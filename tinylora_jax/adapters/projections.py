"""The fixed random matrices P, identical on every back end, library version and machine.

A trained vector is useless without its P. Neither NumPy nor JAX guarantees the same normal deviates across
versions and devices. These matrices therefore come from SHA-256 in counter mode and the Box–Muller transform in
float64, which any language can reproduce.
"""

from __future__ import annotations

import hashlib

import numpy as np


def standard_normals(label: str, count: int) -> np.ndarray:
    """Draws standard normal numbers that depend only on a string.

    Block k is SHA-256(`label` + ":" + k) read as four big-endian 64-bit words. Each pair of words
    (a, b) gives u₁ = (⌊a / 2¹¹⌋ + 1) / 2⁵³ ∈ (0, 1], u₂ = ⌊b / 2¹¹⌋ / 2⁵³ ∈ [0, 1) and the two numbers
    √(−2 ln u₁) · cos 2πu₂ and √(−2 ln u₁) · sin 2πu₂.

    Args:
      label: string that serves as the seed.
      count: number of values to draw.

    Returns:
      float64 `[count]`.

    >>> standard_normals("0:layers/0/mlp/up_proj/kernel", 3).round(6).tolist()
    [0.061695, -0.111067, -0.227613]
    """
    blocks = -(-count // 4)
    stream = b"".join(hashlib.sha256(f"{label}:{k}".encode()).digest() for k in range(blocks))
    words = (np.frombuffer(stream, dtype=">u8").astype(np.uint64) >> np.uint64(11)).astype(np.float64)
    first, second = (words[0::2] + 1.0) / 2.0**53, words[1::2] / 2.0**53
    radius, angle = np.sqrt(-2.0 * np.log(first)), 2.0 * np.pi * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def projection(seed: int, module_name: str, u: int, rank: int) -> np.ndarray:
    """The matrices P of one module: independent N(0, 1/rank) entries.

    The paper does not specify the distribution; this is the one that PEFT uses.

    Args:
      seed: the adapter's seed.
      module_name: `Module.name`; every module has its own matrices.
      u: number of matrices.
      rank: number of rows and columns of each matrix.

    Returns:
      float32 `[u, rank, rank]`.
    """
    normals = standard_normals(f"{seed}:{module_name}", u * rank * rank)
    return (normals / np.sqrt(rank)).astype(np.float32).reshape(u, rank, rank)
