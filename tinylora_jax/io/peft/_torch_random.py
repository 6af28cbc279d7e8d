"""Normal numbers as torch's CPU generator draws them, so that the seeds in PEFT's files work.

Torch's engine is the Mersenne Twister, which NumPy has, and `RandomState` promises its stream for ever. From its words
torch makes floats of 24 bits or doubles of 53, and from those normal numbers by the Box–Muller transform: one by one
below 16 numbers, in blocks of 16 from there on, whose last one overlaps if it must.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_BLOCK = 16


def normals(seed: int, shape: Sequence[int], std: float = 1.0) -> np.ndarray:
    """What `torch.normal(0, std, shape, generator=torch.Generator().manual_seed(seed))` returns, to about 1e-7.

    Args:
      seed: any integer; torch seeds its engine by the lowest 32 bits.
      shape: shape of the result.
      std: standard deviation.

    Returns:
      float32 numbers of that shape.

    >>> normals(42, (3,)).round(4).tolist()
    [0.3366999924182892, 0.12880000472068787, 0.2345000058412552]
    """
    count = math.prod(shape)
    engine = np.random.RandomState(seed & 0xFFFFFFFF)
    words = lambda number: engine.randint(0, 2**32, number, dtype=np.uint32)
    drawn = _few(words, count) if count < _BLOCK else _blocks(words, count)
    return (drawn * std).astype(np.float32).reshape(shape)


def _few(words, count: int) -> np.ndarray:
    """Pairs of doubles of 53 bits; the angle comes first, and −ln(1 − u₂) is the half of the radius squared."""
    pairs = -(-count // 2)
    high, low = words(4 * pairs).astype(np.uint64).reshape(-1, 2).T
    uniform = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
    angle, radius = 2 * np.pi * uniform[0::2], np.sqrt(-2 * np.log1p(-uniform[1::2]))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def _blocks(words, count: int) -> np.ndarray:
    """Blocks of 16 floats of 24 bits: eight radii, eight angles; a rest draws the last 16 anew."""
    uniform = (words(count) & np.uint32(2**24 - 1)) * 2.0**-24
    found = np.empty(count)
    whole = count - count % _BLOCK
    found[:whole] = _box_muller(uniform[:whole])
    if whole < count:
        found[-_BLOCK:] = _box_muller((words(_BLOCK) & np.uint32(2**24 - 1)) * 2.0**-24)
    return found


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    first, second = uniform.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)
    radius, angle = np.sqrt(-2 * np.log(1 - first)), 2 * np.pi * second
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
