"""Reads the GGUF container: metadata and lazily dequantized tensors, from an untrusted file.

`gguf.GGUFReader` trusts the counts in the header: an array that claims 2^60 elements makes it loop forever, and each
element of a valid array costs a NumPy object. So the header is parsed here, and each length is checked against the
remaining bytes. `gguf.dequantize` handles the block formats.
"""

from __future__ import annotations

import math
import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

from tinylora_jax.files import kind_of
from tinylora_jax.io.hf._weights import LazyTensor

_VERSIONS = (2, 3)
_ALIGNMENT = 32
_JOINED = 65536  # bytes of joined rows that are dequantized at once
_STRING, _ARRAY, _BOOL, _FLOAT32 = 8, 9, 7, 6
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
# Far above any real file (Qwen: 40 keys, 300 tensors, 152 thousand strings), and still harmless.
_MAX_KEYS, _MAX_TENSORS, _MAX_STRINGS, _MAX_DIMS = 2**16, 2**17, 2**22, 4


@dataclass(frozen=True)
class GGUFFile:
    """The contents of a GGUF file.

    Attributes:
      metadata: metadata by key: scalars as Python values, string arrays as lists, number arrays as NumPy arrays.
      tensors: tensors by GGUF name, with shapes in torch's convention; `read` dequantizes to float32.
    """

    metadata: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]


class _Cursor:
    """Reads little-endian values from a byte array, never past its end."""

    def __init__(self, data: np.ndarray):
        self.data, self.offset, self.strings = data, 0, 0

    def take(self, count: int, what: str) -> np.ndarray:
        """The next `count` bytes."""
        left = len(self.data) - self.offset
        if count > left:
            raise ValueError(f"truncated at byte {self.offset}: {what} needs {count} bytes, {left} are left")
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def scalar(self, form: str, what: str) -> Any:
        """One number in `struct` notation."""
        return struct.unpack(form, self.take(struct.calcsize(form), what).tobytes())[0]

    def string(self, what: str) -> str:
        """A length, followed by that many bytes of UTF-8."""
        raw = self.take(self.scalar("<Q", what), what).tobytes()
        return raw.decode("utf-8")

    def count(self, what: str, limit: int) -> int:
        """A 64-bit count, at most `limit`."""
        value = self.scalar("<Q", what)
        if value > limit:
            raise ValueError(f"{what} is {value}, expected at most {limit}")
        return value

    def value(self, kind: int, what: str) -> Any:
        """A metadata value of GGUF type `kind`."""
        if kind in _SCALARS:
            number = self.scalar(_SCALARS[kind], what)
            # The writer rounded a decimal such as 1e-6 to float32; its shortest decimal restores the number.
            return float(str(np.float32(number))) if kind == _FLOAT32 else number
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise ValueError(f"{what} has the unknown type {kind}")
        inner = self.scalar("<I", what)
        if inner == _STRING:
            count = self.count(f"the length of {what}", _MAX_STRINGS - self.strings)
            self.strings += count
            return [self.string(what) for _ in range(count)]
        if inner not in _SCALARS:
            raise ValueError(f"{what} is an array of type {inner}, expected numbers or strings")
        dtype = np.dtype(bool if inner == _BOOL else _SCALARS[inner])
        count = self.count(f"the length of {what}", len(self.data))
        return self.take(count * dtype.itemsize, what).view(dtype)


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Reads the header of a GGUF file (version 2 or 3, little-endian) and maps its tensors.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not GGUF, is truncated, or is inconsistent; the message says where.
    """
    try:
        mode = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{os.fspath(path)} is missing; expected a .gguf file") from error
    if not stat.S_ISREG(mode):
        raise ValueError(f"{os.fspath(path)} is {kind_of(mode)}; expected a .gguf file")
    if Path(path).stat().st_size < 4:
        raise ValueError(f"{os.fspath(path)} is not a GGUF file: it is {Path(path).stat().st_size} bytes long")
    cursor = _Cursor(np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray))
    try:
        return _parse(cursor)
    except (ValueError, struct.error) as error:
        raise ValueError(f"{os.fspath(path)} is not a readable GGUF file: {error}; download it again") from error


def _parse(cursor: _Cursor) -> GGUFFile:
    magic = cursor.take(4, "the magic number").tobytes()
    if magic != b"GGUF":
        raise ValueError(f"expected it to start with b'GGUF', got {magic!r}")
    version = cursor.scalar("<I", "the version")
    if version not in _VERSIONS:
        raise ValueError(f"GGUF version is {version}, expected 2 or 3 (little-endian)")
    num_tensors = cursor.count("the number of tensors", _MAX_TENSORS)
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count("the number of metadata keys", _MAX_KEYS)):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"the metadata key {key!r} appears twice")
        metadata[key] = cursor.value(cursor.scalar("<I", key), key)
    infos: dict[str, tuple[tuple[int, ...], GGMLQuantizationType, int]] = {}
    for _ in range(num_tensors):
        name, info = _tensor_info(cursor)
        if name in infos:
            raise ValueError(f"the tensor {name!r} appears twice")
        infos[name] = info
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, expected a power of two")
    start = _aligned(cursor.offset, alignment)
    _check_padding(cursor.data, cursor.offset, start, "the header")
    tensors = {name: _lazy(cursor.data, name, start, *info) for name, info in infos.items()}
    _check_tiling(cursor.data, start, alignment, infos)
    return GGUFFile(metadata, tensors)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _check_padding(data: np.ndarray, begin: int, end: int, what: str) -> None:
    if data[begin:end].any():
        raise ValueError(f"the padding after {what}, bytes {begin} to {end}, is not zero: bytes were added or lost")


def _check_tiling(
    data: np.ndarray, start: int, alignment: int, infos: Mapping[str, tuple[tuple[int, ...], GGMLQuantizationType, int]]
) -> None:
    """Raises an error unless the tensors follow each other up to the end of the file.

    The format allows only zeros as alignment padding between them, so inserted, lost or added bytes are detected.
    """
    end = start
    for name, (shape, kind, offset) in sorted(infos.items(), key=lambda item: item[1][2]):
        expected = _aligned(end - start, alignment)
        if offset != expected:
            raise ValueError(f"{name} begins at byte {offset} of the tensors, expected {expected}")
        _check_padding(data, end, start + offset, f"the tensor before {name}")
        end = start + offset + _num_bytes(shape, kind)
    if infos and len(data) not in (end, start + _aligned(end - start, alignment)):
        raise ValueError(f"the tensors end at byte {end}, but the file has {len(data)} bytes: some were added")
    _check_padding(data, end, len(data), "the tensors")


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[tuple[int, ...], GGMLQuantizationType, int]]:
    name = cursor.string("a tensor name")
    num_dims = cursor.scalar("<I", name)
    if not 1 <= num_dims <= _MAX_DIMS:
        raise ValueError(f"{name} has {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
    dims = [cursor.scalar("<Q", name) for _ in range(num_dims)]
    kind = cursor.scalar("<I", name)
    offset = cursor.scalar("<Q", name)
    if kind not in set(GGMLQuantizationType):
        raise ValueError(f"{name} has the unknown tensor type {kind}")
    # GGUF lists the fastest-varying dimension first, NumPy and torch list it last.
    return name, (tuple(reversed(dims)), GGMLQuantizationType(kind), offset)


def _num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * block_bytes


def _lazy(
    data: np.ndarray, name: str, start: int, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
) -> LazyTensor:
    if kind not in GGML_QUANT_SIZES:
        raise ValueError(f"{name} has the tensor type {kind.name}, which the gguf library does not support")
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise ValueError(
            f"{name} has shape {shape}, expected positive sizes and rows of whole {kind.name} blocks ({block})"
        )
    row_bytes = shape[-1] // block * block_bytes
    begin = start + offset
    end = begin + _num_bytes(shape, kind)
    if end > len(data):
        raise ValueError(f"truncated: {name} ends at byte {end}, but the file has {len(data)} bytes")

    def read() -> np.ndarray:
        # `dequantize` processes sixteen rows at a time; with rows of 500 bytes, Python overhead would dominate.
        count = (end - begin) // row_bytes
        joined = next(k for k in range(max(1, min(count, _JOINED // row_bytes)), 0, -1) if count % k == 0)
        try:
            return np.asarray(dequantize(data[begin:end].reshape(-1, joined * row_bytes), kind)).reshape(shape)
        except NotImplementedError as error:
            raise ValueError(f"{name} has the tensor type {kind.name}, which cannot be dequantized") from error

    return LazyTensor(shape, read)
