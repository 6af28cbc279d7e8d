"""Quantizes the linear maps of a model while they are read, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
      ValueError: the tensor is not floating-point, or not finite.
    """
    found: dict[tuple[int | None, int | None], tuple[np.ndarray, np.ndarray, int]] = {}

    def channels(part: slice) -> tuple[np.ndarray, np.ndarray, int]:
        key = (part.start, part.stop)
        if key not in found:
            whole = tensor.read_part is None
            values = tensor.read() if whole else tensor.read_part((part, slice(None)))
            found[key] = _quantized(name, values[part] if whole else values, like)
        return found[key]

    if places.values is None:
        values, scale, coarse = channels(slice(None))
        _check_shape(name, values, like)
        return QuantizedKernel(jnp.asarray(values), jnp.asarray(scale), like.dtype), coarse
    place = jax.make_array_from_callback
    values = place(like.shape, places.values, lambda at: channels(at[1])[0][at[0]])
    scale = place(like.scale.shape, places.scale, lambda at: channels(at[1])[1])
    return QuantizedKernel(values, scale, like.dtype), sum(coarse for *_, coarse in found.values())


def _quantized(name: str, W: np.ndarray, like: QuantizedKernel) -> tuple[np.ndarray, np.ndarray, int]:
    """Quantizes some channels `[out, in]`: values `[in, out]`, scales `[1, out]` and the number of coarse channels."""
    check_floating(name, W)
    values, scale = np.empty(W.shape, jnp.dtype(like.values.dtype)), np.empty((len(W), 1), np.float32)
    coarse = 0
    for start in range(0, len(W), _ROWS):
        # Rounded to the model's dtype first: a model that is already in memory gives the same integers.
        rows = W[start : start + _ROWS].astype(like.dtype).astype(np.float32)
        values[start : start + _ROWS], scale[start : start + _ROWS] = quantize(rows, like.scheme, (1,))
        coarse += coarse_channels(rows, values[start : start + _ROWS], (1,))
    if not np.isfinite(scale).all():
        bad = int(np.flatnonzero(~np.isfinite(scale[:, 0]))[0])
        raise ValueError(f"{name} holds numbers that are not finite, such as in row {bad}; download the model again")
    return np.ascontiguousarray(values.T), np.ascontiguousarray(scale.T), coarse


def _check_shape(name: str, values: np.ndarray, like: QuantizedKernel) -> None:
    if values.shape != like.shape:
        raise ValueError(f"{name}: expected {like.shape} after reading, got {values.shape}")


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
        values, scale, _ = _quantized(path, np.asarray(to_host(W)).T, like)
        return QuantizedKernel(jnp.asarray(values), jnp.asarray(scale), like.dtype)

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
