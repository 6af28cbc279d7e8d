"""Reads and writes safetensors files one tensor at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from tinylora_jax.files import open_regular, parse_json, replacing
from tinylora_jax.io.hf._weights import LazyTensor

_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
INTEGERS = ("I8", "I32", "I64")  # those of quantized models
_MAX_HEADER_BYTES = 2**24  # a hundred times a large model's header; parsed JSON takes up to 30 times its size


@contextmanager
def open_safetensors(path: Path, integers: bool = False) -> Iterator[dict[str, LazyTensor]]:
    """Opens a file; its tensors are readable inside the `with` block.

    Args:
      path: path of the file.
      integers: whether the file may hold integers, as a quantized model does.

    Yields:
      Lazy tensors by name.

    Raises:
      ValueError: the file is truncated or corrupt, or contains tensors of another dtype.
    """
    _check_size(path)
    try:
        file = safe_open(os.fspath(path), framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a valid safetensors file ({error}); download it again") from error
    with file as opened:
        yield {name: _tensor(opened, name, path, integers) for name in opened.keys()}


def _tensor(file: Any, name: str, path: Path, integers: bool) -> LazyTensor:
    view = file.get_slice(name)
    if view.get_dtype() not in (*_FLOATS, *(INTEGERS if integers else ())):
        raise ValueError(
            f"{path}: {name} has dtype {view.get_dtype()}, expected one of {', '.join(_FLOATS)}; "
            "quantized checkpoints without a supported quantization_config in config.json are not supported; load the "
            "original model, and set quantize='int8'"
        )
    return LazyTensor(
        tuple(view.get_shape()),
        lambda: _read(lambda: file.get_tensor(name), name, path),
        lambda index: _read(lambda: view[index], name, path),
        view.get_dtype(),
    )


def _read(read: Callable[[], np.ndarray], name: str, path: Path) -> np.ndarray:
    try:
        return read()
    except SafetensorError as error:
        raise ValueError(f"{path}: cannot read {name} ({error}); download the file again") from error


def _check_size(path: Path) -> None:
    """Compares the file's length with its header, because the most common damage is an incomplete download."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"{path} is truncated or not safetensors: expected a header of {length} bytes, "
                f"got a file of {size} bytes; download it again"
            )
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: the header has {length} bytes, expected at most {_MAX_HEADER_BYTES}")
        raw = file.read(length)
    try:
        header = parse_json(raw)
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(f"{path}: the safetensors header does not parse ({error}); download it again") from error
    if size != expected:
        raise ValueError(f"{path} is truncated or corrupt: expected {expected} bytes, got {size}; download it again")


def read_metadata(path: Path) -> dict[str, str]:
    """Reads the texts in a file's header, by name.

    Raises:
      ValueError: the file is truncated or corrupt.
    """
    _check_size(path)
    try:
        with safe_open(os.fspath(path), framework="numpy") as opened:
            return dict(opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a valid safetensors file ({error}); download it again") from error


def write_safetensors(
    path: Path, tensors: Mapping[str, LazyTensor], dtype: DTypeLike, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to a file, one at a time, all rounded to one dtype.

    Args:
      path: path of the file.
      tensors: lazy tensors by name, in torch's layout.
      dtype: dtype of the file: `float32`, `bfloat16`, `float16` or `float64`.
      metadata: further texts for the header, by name.

    Raises:
      OSError: the file cannot be written; the message names it.
      ValueError: a tensor does not have the announced shape.
    """
    dtype = jnp.dtype(dtype)
    code = next(code for code, name in _FLOATS.items() if name == dtype.name)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + dtype.itemsize * math.prod(tensor.shape)
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # the format aligns the data after the header
    try:
        with replacing(path) as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            for name, tensor in tensors.items():
                values = np.asarray(tensor.read(), dtype, order="C")
                if values.shape != tensor.shape:
                    raise ValueError(f"{name}: expected {tensor.shape}, got {values.shape}")
                file.write(values.reshape(-1).view(np.uint8).data)
    except OSError as error:
        raise OSError(f"{error.strerror or error}; free space or choose another folder") from error
