"""Rotary position embeddings and the scalings of long-context checkpoints."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tinylora_jax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Computes angular frequencies per position, and the factor on cosines and sines.

    Args:
      rope: base and scaling of the frequencies.
      head_dim: width of a head, even.

    Returns:
      Frequencies in radians per position, float32 `[head_dim / 2]`, and the attention factor (1 except for `yarn`).
    """
    base = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        base = base / rope.factor
    elif rope.kind == "llama3":
        base = _llama3(rope, base)
    elif rope.kind == "yarn":
        base = _yarn(rope, base, head_dim)
    return base.astype(np.float32), _attention_factor(rope)


def _llama3(rope: Rope, base: np.ndarray) -> np.ndarray:
    """Divides low frequencies by `factor`, keeps high ones, and interpolates in between (Llama 3.1)."""
    turns = rope.original_max_positions * base / (2 * math.pi)  # rotations over the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)
    return (1 - blend) * base / rope.factor + blend * base


def _yarn(rope: Rope, base: np.ndarray, head_dim: int) -> np.ndarray:
    """Scales slow dimensions, keeps fast ones, with a ramp in between (YaRN, arXiv 2309.00071 §3.2)."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
    return ramp * base / rope.factor + (1 - ramp) * base


def _attention_factor(rope: Rope) -> float:
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


class Angles(NamedTuple):
    """Cosines and sines of the positions of a forward pass.

    Attributes:
      cos: cosines at the tokens' positions, float32 `[rows, seq, head_dim / 2]`.
      sin: sines at the tokens' positions, in the shape of `cos`.
      table: cosines, then sines, at every position of the cache, float32 `[capacity, head_dim]`; None if it is not
        needed, see `KeyBias`.
    """

    cos: jax.Array
    sin: jax.Array
    table: jax.Array | None = None


def cos_sin(
    rope: Rope, head_dim: int, positions: Int[Array, "rows seq"]
) -> tuple[Float[Array, "rows seq half"], Float[Array, "rows seq half"]]:
    """Computes cosines and sines of every position's angles, in float32."""
    inverse, factor = frequencies(rope, head_dim)
    angles = positions.astype(jnp.float32)[..., None] * inverse
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "rows seq heads head_dim"],
    cos: Float[Array, "rows seq half"],
    sin: Float[Array, "rows seq half"],
) -> Float[Array, "rows seq heads head_dim"]:
    """Rotates the pairs (i, i + head_dim/2) of every head; computed in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
