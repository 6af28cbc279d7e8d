"""A tensor in a file, read on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file with a known shape, whose values are read on demand.

    Attributes:
      shape: stored shape, in torch's convention (a linear layer is [out, in]).
      read: function that returns the values as a floating-point NumPy array of that shape.
      read_part: function that reads a part, given one slice per dimension; None if only the whole can be read.
      dtype: name of the stored dtype in the safetensors format, such as `BF16`; empty in other formats.
      integers: function of a slice of outputs, for a linear map that is quantized in the file. It returns integers,
        int8 `[out, in]`, and scales, float32 `[out, 1]`. None for other tensors.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    read_part: Callable[[tuple[slice, ...]], np.ndarray] | None = None
    dtype: str = ""
    integers: Callable[[slice], tuple[np.ndarray, np.ndarray]] | None = None


def check_floating(name: str, values: np.ndarray) -> None:
    """Raises a `ValueError` for a tensor that is not floating-point."""
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(
            f"{name}: expected floating-point numbers, got {values.dtype}; quantized files are not supported, but"
            " quantize='int8' quantizes a model while it is read"
        )
