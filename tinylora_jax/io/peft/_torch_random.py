"""Reproduces the normal numbers of torch's CPU generator, so that seeds in PEFT's files work.

Torch uses the Mersenne Twister, as does NumPy, whose `RandomState` guarantees an unchanging stream. From its words
torch makes 24-bit floats or 53-bit doubles, and from those normal numbers by the Box–Muller transform. Fewer than 16
numbers are generated one by one, more in blocks of 16, where the last block may overlap the previous one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_BLOCK = 16


def normals(seed: int, shape: Sequence[int], std: float = 1.0) -> np.ndarray:
    """Reproduces `torch.normal(0, std, shape, generator=torch.Generator().manual_seed(seed))` to about 1e-7.

    Args:
      seed: integer seed; torch uses its lowest 32 bits.
      shape: shape of the result.
      std: standard deviation.

    Returns:
      Normal numbers, float32 of the given shape.

    >>> normals(42, (3,)).round(4).tolist()
    [0.3366999924182892, 0.12880000472068787, 0.2345000058412552]
    """
    count = math.prod(shape)
    engine = np.random.RandomState(seed & 0xFFFFFFFF)
    words = lambda number: engine.randint(0, 2**32, number, dtype=np.uint32)
    drawn = _few(words, count) if count < _BLOCK else _blocks(words, count)
    return (drawn * std).astype(np.float32).reshape(shape)


def _few(words, count: int) -> np.ndarray:
    """Uses pairs of 53-bit doubles: the first gives the angle, and −ln(1 − u₂) is half the squared radius."""
    pairs = -(-count // 2)
    high, low = words(4 * pairs).astype(np.uint64).reshape(-1, 2).T
    uniform = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)) * 2.0**-53
    angle, radius = 2 * np.pi * uniform[0::2], np.sqrt(-2 * np.log1p(-uniform[1::2]))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)[:count]


def _blocks(words, count: int) -> np.ndarray:
    """Uses blocks of 16 24-bit floats, eight radii and eight angles; a remainder regenerates the last 16 numbers."""
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
