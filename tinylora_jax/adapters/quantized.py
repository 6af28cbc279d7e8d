"""A frozen kernel in few bits: integers with scales outside the product.

    W ≈ diag(a) · Q · diag(s),    y = ((x·diag(a))·Q)·diag(s),    dx = ((dy·diag(s))·Qᵀ)·diag(a)

int8 needs only s, a scale per output channel. int4 has a scale a per input too, which bfloat16 represents. XLA's TPU
compiler fuses the conversion of Q into either product, so that no 16-bit copy of W exists. Scales of groups of inputs
are more accurate, but not constant along the sum: the compiler then writes a 16-bit copy of W first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

SCHEMES = ("none", "int8", "int4")
"""The ways to store a frozen kernel; `none` keeps its floating-point numbers."""

_LEVELS = {"int8": 127, "int4": 7}  # symmetric: -128 and -8 are not used
_ITERATIONS = 8
_MOST_INPUT_SCALE = 2.0**10


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedKernel:
    """A frozen kernel W = values · scale, as accepted by `matmul` in place of an array.

    Attributes:
      values: Q, int8 or int4 `[*layers, *in, *out]`.
      scale: s, float32, with the shape of `values` but 1 on every input axis.
      inputs: a, float32, with the shape of `values` but 1 on every output axis; None in int8, where it is 1.
      dtype: dtype of the weight before quantization, to which `dense` converts.
    """

    values: jax.Array
    scale: jax.Array
    inputs: jax.Array | None
    dtype: np.dtype = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """The number of axes of W."""
        return len(self.values.shape)

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.values.shape)

    @property
    def sharding(self) -> Any:
        """The sharding of `values`; None if they are only a shape without one."""
        return getattr(self.values, "sharding", None)

    @property
    def scheme(self) -> str:
        """The entry of `SCHEMES`."""
        return str(jnp.dtype(self.values.dtype))


def is_quantized(leaf: Any) -> bool:
    """Whether a node of a tree of weights is a `QuantizedKernel`: the `is_leaf` of JAX's tree functions."""
    return isinstance(leaf, QuantizedKernel)


def dense(kernel: Any, dtype: DTypeLike | None = None) -> Any:
    """Converts a kernel to an array; an array stays as it is.

    Args:
      kernel: array or `QuantizedKernel`.
      dtype: dtype of a quantized kernel's weights; None for the dtype before quantization, float32 for exact weights.
    """
    if not is_quantized(kernel):
        return kernel
    wide = kernel.values.astype(jnp.float32) * kernel.scale
    wide = wide if kernel.inputs is None else wide * kernel.inputs
    return wide.astype(kernel.dtype if dtype is None else dtype)


def exact(kernel: Any) -> Any:
    """The weights that `matmul` really uses, without rounding: float32 for a quantized kernel."""
    return dense(kernel, jnp.float32)


def scheme_of(params: Any) -> str:
    """The scheme of a tree of weights: `none`, or that of its quantized kernels."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantized)
    return next((leaf.scheme for leaf in leaves if is_quantized(leaf)), "none")


def check_scheme(scheme: str) -> str:
    """Returns a known scheme.

    Raises:
      ValueError: the scheme is unknown.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown quantization {scheme!r}: expected {' or '.join(SCHEMES)}")
    return scheme


def quantized_shape(shape: Sequence[int], scheme: str, dtype: DTypeLike, num_in: int = 1) -> Any:
    """The `jax.ShapeDtypeStruct` of a kernel, or a `QuantizedKernel` of two of them.

    Args:
      shape: shape `[*in, *out]` of the kernel.
      scheme: entry of `SCHEMES`.
      dtype: dtype of the weight before quantization.
      num_in: number of input axes.

    Raises:
      ValueError: the scheme is unknown, or int4 has an odd number of inputs, of which two share a byte.
    """
    if check_scheme(scheme) == "none":
        return jax.ShapeDtypeStruct(tuple(shape), dtype)
    num_inputs = math.prod(shape[:num_in])
    if scheme == "int4" and num_inputs % 2:
        raise ValueError(f"int4 needs an even number of inputs, because two share a byte, got {num_inputs}; use int8")
    make: Any = jax.ShapeDtypeStruct
    scale = make((*(1,) * num_in, *shape[num_in:]), jnp.float32)
    inputs = make((*shape[:num_in], *(1,) * (len(shape) - num_in)), jnp.float32) if scheme == "int4" else None
    return QuantizedKernel(make(tuple(shape), jnp.dtype(scheme)), scale, inputs, jnp.dtype(dtype))


def _input_scales(W: np.ndarray) -> np.ndarray:
    """Scales `[in, 1]`, so that all inputs of W / a have similar weights, relative to those of each output.

    Sinkhorn's iteration on the squares of W finds scales of inputs and outputs with which every row and every column
    has the mean square 1. Those of the outputs are not used: the largest weight gives them.
    """
    squares, columns = np.square(W), np.ones(W.shape[1], np.float32)
    tiny = np.float32(1e-30)
    for _ in range(_ITERATIONS):
        rows = squares @ (1 / columns) / np.float32(W.shape[1]) + tiny
        columns = (1 / rows) @ squares / np.float32(W.shape[0]) + tiny
    scales = np.clip(np.sqrt(rows / np.median(rows)), 1 / _MOST_INPUT_SCALE, _MOST_INPUT_SCALE)
    return scales.astype(jnp.bfloat16).astype(np.float32)[:, None]


def quantize(W: np.ndarray, scheme: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Rounds a weight to integers with scales, on the host; in int8 the result is the same on every machine.

    s = max |W / a| / 127 in int8 and / 7 in int4, for every output. Smaller scales, which clip the largest weights,
    have less squared error in int4, but agree less with the model.

    Args:
      W: floating-point weight `[in, out]`.
      scheme: `int8` or `int4`.

    Returns:
      Integers `[in, out]`, the scales s, float32 `[1, out]`, and the scales a, float32 `[in, 1]`; None in int8. The
      scales s of weights that are not finite are not finite either.
    """
    W, levels = W.astype(np.float32), _LEVELS[scheme]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # the caller refuses scales that are not finite
        inputs = _input_scales(W) if scheme == "int4" else None
        W = W if inputs is None else W / inputs
        scale = np.max(np.abs(W), axis=0, keepdims=True) / np.float32(levels)
        # Weights of zero, or so small that dividing by their scale would overflow, become zeros.
        scale = np.where(scale <= np.float32(1e-30), np.float32(1.0), scale)
        values = np.rint(W / scale).astype(np.int8)
    return values.astype(jnp.dtype(scheme)), scale, inputs


def coarse_channels(W: np.ndarray, values: np.ndarray) -> int:
    """Number of outputs with a weight so large that more than half of their other weights are rounded to zero."""
    given = np.count_nonzero(W, axis=0)
    return int(np.count_nonzero(2 * np.count_nonzero(values, axis=0) < given))


def _output_scales(kernel: QuantizedKernel, num_in: int) -> jax.Array:
    """s as `[*out]`."""
    return kernel.scale.reshape(kernel.scale.shape[num_in:])


def _scaled(x: jax.Array, kernel: QuantizedKernel, num_in: int) -> jax.Array:
    """x·diag(a) in the dtype of x."""
    if kernel.inputs is None:
        return x
    return x * kernel.inputs.reshape(kernel.inputs.shape[:num_in]).astype(x.dtype)


def contract(x: Any, W: Any, num_in: int, dtype: DTypeLike | None = None) -> jax.Array:
    """x·W over the trailing axes of x and the `num_in` leading axes of the array W; `dtype` None keeps theirs."""
    axes = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
    return jax.lax.dot_general(x, W, (axes, ((), ())), preferred_element_type=dtype)


def quantized_product(x: Any, kernel: QuantizedKernel, num_in: int) -> jax.Array:
    """x·W in float32, for the trailing axes of x and the leading axes of W."""
    product = contract(_scaled(x, kernel, num_in), kernel.values.astype(x.dtype), num_in, jnp.float32)
    return product * _output_scales(kernel, num_in)


def quantized_gradient(g: Any, kernel: QuantizedKernel, num_in: int) -> jax.Array:
    """The gradient of x in x·W from that of the product, in the dtype of `g`."""
    num_out = kernel.ndim - num_in
    axes = (tuple(range(g.ndim - num_out, g.ndim)), tuple(range(num_in, kernel.ndim)))
    scaled = (g.astype(jnp.float32) * _output_scales(kernel, num_in)).astype(g.dtype)
    values = kernel.values.astype(g.dtype)
    dx = jax.lax.dot_general(scaled, values, (axes, ((), ())), preferred_element_type=g.dtype)
    return _scaled(dx, kernel, num_in)


def float_product(x: jax.Array, W: Any, num_in: int) -> jax.Array:
    """x·W in float32, for an array or a quantized kernel."""
    if is_quantized(W):
        return quantized_product(x, W, num_in)
    return contract(x, W, num_in, jnp.float32)


def product_gradients(x: jax.Array, W: Any, num_in: int, g: jax.Array) -> tuple[jax.Array, Any]:
    """The gradients of x and W in x·W, in the dtype of x; integers have none."""
    if is_quantized(W):
        return quantized_gradient(g, W, num_in), None
    return jax.vjp(lambda x, W: contract(x, W, num_in, x.dtype), x, W)[1](g)


def joined(kernels: Sequence[QuantizedKernel], columns: int) -> QuantizedKernel:
    """The columns of several int8 kernels `[in, out]` as one kernel, padded with zeros to a number of columns."""
    missing = columns - sum(kernel.shape[1] for kernel in kernels)
    values = jnp.concatenate([kernel.values for kernel in kernels], axis=1)
    scale = jnp.concatenate([kernel.scale for kernel in kernels], axis=1)
    pad = lambda x: jnp.pad(x, ((0, 0), (0, missing)))
    return QuantizedKernel(pad(values), pad(scale), None, kernels[0].dtype)
