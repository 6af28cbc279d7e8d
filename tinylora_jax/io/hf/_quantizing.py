"""Quantizes the linear maps of a model while they are read, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from tinylora_jax.adapters.quantized import QuantizedKernel, coarse_channels, quantize, quantized_shape, scheme_of
from tinylora_jax.adapters.svd_device import mesh_of
from tinylora_jax.adapters.targets import map_by_path
from tinylora_jax.io.hf._lazy import LazyTensor, check_floating
from tinylora_jax.models.sharding import param_shardings
from tinylora_jax.multihost import to_host

_ROWS = 256  # channels quantized together, so that their float32 copies stay in the processor's cache
_MOST_LISTED = 5


def is_map(path: Sequence[Any]) -> bool:
    """Whether a path of the parameter tree is one of the seven linear maps of a block."""
    return path[0] == "layers" and path[-1] == "kernel"


def stored_leaf(
    integers: Callable[[slice], tuple[np.ndarray, np.ndarray]], like: QuantizedKernel, places: Any
) -> QuantizedKernel:
    """Reads one linear map that is quantized in the file; each process reads only the channels of its own devices.

    Args:
      integers: function of a slice of outputs, see `LazyTensor`.
      like: shapes of the result.
      places: `QuantizedKernel` of shardings, or of None for the default device.
    """

    @cache
    def read(start: int | None, stop: int | None) -> QuantizedKernel:
        values, scale = integers(slice(start, stop))
        # Copied to new contiguous buffers: JAX on CPU may alias its input, and a memory-mapped file can change.
        arrays: Any = {"values": np.array(values.T, like.values.dtype, order="C"), "scale": np.array(scale.T)}
        return replace(like, **arrays, inputs=None)

    ones = lambda: np.ones((like.shape[0], 1), np.float32)  # the format has no scales of inputs
    return _placed(lambda part: read(part.start, part.stop), ones, like, places)


def quantized_leaf(name: str, tensor: LazyTensor, like: QuantizedKernel, places: Any) -> tuple[QuantizedKernel, int]:
    """Reads one linear map as integers; each process reads only the channels of its own devices.

    Args:
      name: name of the tensor, for messages.
      tensor: tensor in torch's layout `[out, in]`.
      like: shapes of the result.
      places: `QuantizedKernel` of shardings, or of None for the default device.

    Returns:
      The kernel, and the number of its channels in `coarse_channels`.

    Raises:
      ValueError: the tensor is not floating-point, not finite, or so large that it overflows.
    """
    read_part = tensor.read_part
    whole = read_part is None or like.inputs is not None  # scales of inputs depend on all outputs
    found: dict[tuple[int | None, int | None], tuple[Any, int]] = {}

    def channels(part: slice) -> Any:
        key = (None, None) if whole else (part.start, part.stop)
        if key not in found:
            W = tensor.read() if read_part is None else read_part((slice(*key), slice(None)))
            found[key] = _quantized(name, W, like)
        kernel = found[key][0]
        return replace(kernel, values=kernel.values[:, part], scale=kernel.scale[:, part]) if whole else kernel

    if places.values is None and (shape := channels(slice(None)).shape) != like.shape:
        raise ValueError(f"{name}: expected {like.shape} after reading, got {shape}")
    kernel = _placed(channels, lambda: channels(slice(None)).inputs, like, places)
    return kernel, sum(coarse for _, coarse in found.values())


def _placed(
    channels: Callable[[slice], Any], inputs: Callable[[], np.ndarray], like: QuantizedKernel, places: Any
) -> QuantizedKernel:
    """Places one linear map on its devices, each of which asks only for its own outputs.

    Args:
      channels: function from a slice of outputs to their kernel on the host.
      inputs: function that returns the scales of all inputs, float32 `[in, 1]`; called only if the scheme has them.
      like: shapes of the result.
      places: `QuantizedKernel` of shardings, or of None for the default device.
    """
    if places.values is None:
        whole = replace(channels(slice(None)), inputs=like.inputs and inputs())
        return jax.tree.map(jnp.asarray, whole)
    place: Any = jax.make_array_from_callback
    values = place(like.shape, places.values, lambda at: channels(at[1]).values[at[0]])
    scale = place(like.scale.shape, places.scale, lambda at: channels(at[1]).scale)
    scale_of_inputs = like.inputs and place(like.inputs.shape, places.inputs, lambda at: inputs()[at[0]])
    return QuantizedKernel(values, scale, scale_of_inputs, like.dtype)


def _quantized(name: str, W: np.ndarray, like: QuantizedKernel) -> tuple[Any, int]:
    """Quantizes some outputs `[out, in]`, or all of them in int4; returns a kernel on the host and its coarse channels.

    Raises:
      ValueError: the weights are not floating-point, not finite, or so large that they overflow.
    """
    check_floating(name, W)
    rows = _ROWS if like.inputs is None else len(W)
    parts, coarse = [], 0
    for start in range(0, len(W), rows):
        # Rounded to the model's dtype first: a model that is already in memory gives the same integers.
        with np.errstate(over="ignore"):  # refused below
            part = W[start : start + rows].astype(like.dtype).astype(np.float32).T
        parts.append(quantize(part, like.scheme))
        coarse += coarse_channels(part, parts[-1][0])
    values, scale = (np.concatenate([part[i] for part in parts], axis=1) for i in (0, 1))
    if not np.isfinite(scale).all():
        if (bad := np.flatnonzero(~np.isfinite(W).all(axis=1))).size:
            problem = f"numbers that are not finite, such as in row {bad[0]}; download the model again"
        else:
            largest = float(np.max(np.abs(W.astype(np.float64))))
            problem = f"numbers as large as {largest:.2g}, which overflow in {like.scheme} of {like.dtype} weights"
            problem += "; load the model in float32 with quantize='none' to see them, or download it again"
        raise ValueError(f"{name} holds {problem}")
    arrays: Any = (np.ascontiguousarray(values), scale, parts[0][2])
    return replace(like, **dict(zip(("values", "scale", "inputs"), arrays, strict=True))), coarse


def quantize_maps(params: Any, scheme: str) -> Any:
    """Quantizes the linear maps of a model in memory: the same weights as from a file that is read with `quantize`.

    Args:
      params: parameter tree of the decoder.
      scheme: `int8` or `int4`; `none` returns the tree unchanged.
    """
    if scheme == "none":
        return params

    def quantized(path: str, W: jax.Array) -> Any:
        if not is_map(path.split("/")):
            return W
        like = quantized_shape(W.shape, scheme, W.dtype)
        return jax.tree.map(jnp.asarray, _quantized(path, np.asarray(to_host(W)).T, like)[0])

    mesh = mesh_of(jax.tree.leaves(params)[0])
    tree = map_by_path(quantized, params)
    return tree if mesh is None else jax.device_put(tree, param_shardings(mesh, tree))


def as_trained(params: Any, fingerprint: Mapping[str, Any] | None, transfer: bool) -> Any:
    """The weights on which something was trained, from the weights on which it is to be used.

    Args:
      params: weights of the base model.
      fingerprint: `base_fingerprint` of the base model in training; None if unknown.
      transfer: whether weights in 16 bit may take the place of quantized ones.
    """
    scheme = (fingerprint or {}).get("quantize", "none")
    return quantize_maps(params, scheme) if transfer and scheme_of(params) == "none" else params


def warn_of_outliers(coarse: Mapping[str, int], source: str) -> None:
    """Reports the weights in which single large numbers take the precision of all others in their channel, worst first.

    Args:
      coarse: number of such channels by name of the tensor, see `coarse_channels`.
      source: name of the model's file.
    """
    worst = sorted(((count, name) for name, count in coarse.items() if count), reverse=True)
    if worst:
        listed = ", ".join(f"{name} ({count})" for count, name in worst[:_MOST_LISTED])
        logging.warning(
            "%s: %d output channels have an outlier so large that quantization rounds most of their weights to zero:"
            " %s%s. Compare the model's score with that of quantize='none'",
            *(source, sum(count for count, _ in worst), listed, ", …" if len(worst) > _MOST_LISTED else ""),
        )
