"""Reads models that are quantized already, in the format `compressed-tensors`.

Integers and scales stay as they are in the file. A linear map W = diag(s) · Q, `[out, in]`, has the scales s in
`weight_scale`, `[out, 1]`. In the format `pack-quantized` the integers Q are in `weight_packed`: each int32 holds
32 / bits of them, the first input in its lowest bits. Each is stored plus 2^(bits - 1), so that it is not negative.
`weight_shape` is `[out, in]`. In `int-quantized` and `naive-quantized` the integers are `weight`, int8.

See `compressors/pack_quantized/helpers.py` and `compressors/naive_quantized/base.py` of compressed-tensors 0.20.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinylora_jax.io.hf._fields import FieldReader
from tinylora_jax.io.hf._hub import open_tensors
from tinylora_jax.io.hf._lazy import LazyTensor
from tinylora_jax.io.hf._quantizing import is_map
from tinylora_jax.io.hf._safetensors import INTEGERS
from tinylora_jax.io.hf._weights import parameter_names
from tinylora_jax.models.config import ModelConfig

_PACKED = {"pack-quantized": True, "int-quantized": False, "naive-quantized": False}
_INSTEAD = "load the original model, and set quantize='int8' to quantize it while it is read"
_MOST_LISTED = 20
# dtypes of each tensor in safetensors' names. A scale in float64 would be rounded.
_DTYPES = {
    "weight_packed": ("I32",),
    "weight": ("I8",),
    "weight_scale": ("F16", "BF16", "F32"),
    "weight_shape": ("I64", "I32"),
}
# Fields that do not affect the weights: provenance, calibration, and hints for other loaders.
_HARMLESS = frozenset("version global_compression_ratio run_compressed dequantize use_optimized_inference".split())
_HARMLESS_OF_WEIGHTS = frozenset("observer observer_kwargs scale_dtype zp_dtype".split())


@dataclass(frozen=True)
class Stored:
    """How a file stores the linear maps of the blocks.

    Attributes:
      bits: number of bits of an integer, 8 or 4.
      packed: whether several integers share a word of 32 bits.
    """

    bits: int
    packed: bool

    @property
    def scheme(self) -> str:
        """The entry of `SCHEMES`."""
        return f"int{self.bits}"

    def parts(self, num_out: int, num_in: int) -> dict[str, tuple[int, ...]]:
        """The expected shapes of the tensors of a linear map, by the end of their names; the integers come first."""
        scale = {"weight_scale": (num_out, 1)}
        if not self.packed:
            return {"weight": (num_out, num_in), **scale}
        return {"weight_packed": (num_out, -(-num_in * self.bits // 32)), **scale, "weight_shape": (2,)}


def read_quantization(config: Mapping[str, Any], problems: list[str]) -> Stored | None:
    """Reads `quantization_config`; ignoring it would load other numbers than the file's.

    Args:
      config: parsed `config.json`.
      problems: list to which all that cannot be served is added, by name.

    Returns:
      The storage of the weights; None if they are not quantized, or if problems were added.
    """
    given = config.get("quantization_config")
    if given is None:
        return None
    where = "quantization_config"
    method = given.get("quant_method") if isinstance(given, Mapping) else given
    if not isinstance(given, Mapping) or method != "compressed-tensors":
        problems.append(f"{where}: weights quantized by {method!r:.80} are not supported; {_INSTEAD}")
        return None
    found: list[str] = []
    stored = _read_format(FieldReader(given, found, f"{where}."))
    if found:
        problems += [*found, f"{where}: only symmetric integers with one scale per output are read; {_INSTEAD}"]
    return None if found else stored


def _read_format(reader: FieldReader) -> Stored | None:
    """Reads everything inside `quantization_config`, and adds what cannot be served to the reader's problems."""
    values, problems, where = reader.values, reader.problems, reader.where
    reader.fixed({"kv_cache_scheme": None, "moe_sparsity_config": None})
    ours = ("quant_method", "config_groups", "format", "quantization_status", "ignore", "kv_cache_scheme")
    reader.unknown(_HARMLESS | {*ours, "moe_sparsity_config", "sparsity_config", "transform_config"})
    if values.get("quantization_status") not in (None, "compressed", "frozen"):
        problems.append(f"{where}quantization_status={values['quantization_status']!r:.80}: expected 'compressed'")
    sparsity = values.get("sparsity_config")
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format") == "dense"):
        problems.append(f"{where}sparsity_config={sparsity!r:.80} is not supported; expected dense weights")
    if values.get("transform_config"):
        problems.append(f"{where}transform_config={values['transform_config']!r:.80} is not supported; expected none")
    ignored = values.get("ignore")
    if not isinstance(ignored, list) or not ignored or not all(map(_is_head, ignored)):
        # Matched as text: a pattern from a file is never run.
        problems.append(f"{where}ignore={ignored!r:.80}: expected ['lm_head'], because only the blocks are quantized")
    form, groups = values.get("format"), values.get("config_groups")
    if not isinstance(form, str) or form not in _PACKED:
        problems.append(f"{where}format={form!r:.80} is not supported; expected one of {', '.join(_PACKED)}")
    if not isinstance(groups, Mapping) or len(groups) != 1 or not isinstance(next(iter(groups.values())), Mapping):
        problems.append(f"{where}config_groups={groups!r:.80}: expected one group, an object with targets and weights")
        return None
    ((name, group),) = groups.items()
    inner = FieldReader(group, problems, f"{where}config_groups.{name!s:.40}.")
    inner.fixed({"targets": ["Linear"], "input_activations": None, "output_activations": None, "format": form})
    inner.unknown(frozenset(("targets", "input_activations", "output_activations", "format", "weights")))
    if not isinstance(group.get("weights"), Mapping):
        problems.append(f"{inner.where}weights: expected an object, got {group.get('weights')!r:.80}")
        return None
    bits = _read_bits(FieldReader(group["weights"], problems, f"{inner.where}weights."))
    packed = _PACKED.get(form) if isinstance(form, str) else None
    if bits == 4 and packed is False:
        problems.append(f"{where}format={form!r} with 4 bits is not supported; expected 'pack-quantized'")
    return None if bits is None or packed is None else Stored(bits, packed)


def _read_bits(reader: FieldReader) -> int | None:
    """Reads the scheme of the weights, and returns its number of bits; None if it cannot be served."""
    values, problems, where = reader.values, reader.problems, reader.where
    reader.fixed({"type": "int", "symmetric": True, "dynamic": False, "block_structure": None})
    ours = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "block_structure", "actorder")
    reader.unknown(_HARMLESS_OF_WEIGHTS | frozenset(ours))
    strategy, size = values.get("strategy"), values.get("group_size")
    by_channel = strategy == "channel" or (strategy is None and size == -1)
    if not by_channel or size not in (None, -1):
        problems.append(f"{where}strategy={strategy!r:.40}, group_size={size!r:.40}: expected 'channel', not in groups")
    if values.get("actorder") not in (None, False, "weight", "static"):  # these only change how integers were chosen
        problems.append(f"{where}actorder={values['actorder']!r:.80} is not supported; expected none, or 'weight'")
    bits = values.get("num_bits", 8)
    if isinstance(bits, bool) or bits not in (8, 4):
        problems.append(f"{where}num_bits={bits!r:.80} is not supported; expected 8 or 4")
        return None
    return int(bits)


def _is_head(ignored: Any) -> bool:
    """Whether an entry of `ignore` names the output head: `lm_head`, or a common pattern such as `re:.*lm_head`."""
    return isinstance(ignored, str) and re.fullmatch(r"lm_head|re:\^?(\.\*)?lm_head(\.\*)?\$?", ignored) is not None


def stored_scheme(hf_config: Mapping[str, Any], config: ModelConfig, quantize: str) -> str:
    """The storage of a model's linear maps in memory: that of the file if it is quantized already.

    Args:
      hf_config: parsed `config.json`, which `parse_config` accepts.
      config: architecture of the model.
      quantize: requested entry of `SCHEMES`; `none` accepts any file.

    Returns:
      The entry of `SCHEMES` with which the weights are loaded.

    Raises:
      ValueError: the file has another storage than the requested one, or int4 does not fit the sizes.
    """
    stored = read_quantization(hf_config, [])
    if stored is None:
        return quantize
    if quantize not in ("none", stored.scheme):
        raise ValueError(
            f"the weights are quantized in {stored.scheme}, but quantize={quantize!r} is requested; omit it to use them"
            f" as they are, or load the original model to quantize it in {quantize}"
        )
    odd = [size for size in (config.hidden_size, config.intermediate_size) if size % 2]
    if stored.bits == 4 and odd:
        raise ValueError(f"int4 needs an even number of inputs, because two share a byte, got {odd[0]}; {_INSTEAD}")
    return stored.scheme


@contextmanager
def open_compressed(folder: Path, config: ModelConfig, stored: Stored) -> Iterator[dict[str, LazyTensor]]:
    """`open_tensors` for a folder with quantized weights: a linear map is one tensor again, with `integers`.

    All names, shapes, dtypes and scales are checked before any integer is read.

    Args:
      folder: folder in the Hugging Face layout.
      config: architecture that the tensors must match.
      stored: storage of the linear maps.

    Raises:
      FileNotFoundError, ValueError: as for `open_tensors`, or tensors of linear maps are missing or wrong; lists them.
    """
    with open_tensors(folder, integers=True) as tensors:
        found, problems = dict(tensors), list[str]()
        for name, (path, shape) in parameter_names(config).items():
            if is_map(path):
                problems += _join(found, name.removesuffix(".weight"), stored, *shape)
            elif name in found and found[name].dtype in INTEGERS:
                problems.append(f"{name}: expected floating-point numbers, got {found[name].dtype}")
        if problems:
            rest = [f"... and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
            lines = "\n  ".join(problems[:_MOST_LISTED] + rest)
            raise ValueError(
                f"{folder}: the {stored.scheme} weights do not match config.json; download the model again, or"
                f" {_INSTEAD}:\n  {lines}"
            )
        yield found


def _join(tensors: dict[str, LazyTensor], module: str, stored: Stored, num_in: int, num_out: int) -> list[str]:
    """Replaces the tensors of a linear map by one with `integers`; returns what is wrong with them instead, if any."""
    parts = stored.parts(num_out, num_in)
    given = {part: tensors.pop(f"{module}.{part}", None) for part in parts}
    problems = [line for part, tensor in given.items() for line in _problem(part, tensor, parts[part])]
    found = {part: tensor for part, tensor in given.items() if tensor is not None}
    scale = None if problems else _read_scale(found, num_out, num_in, problems)
    if scale is not None:
        tensors[f"{module}.weight"] = _lazy(next(iter(found.values())), scale, stored, num_in)
    return [f"{module}.{line}" for line in problems]


def _problem(part: str, tensor: LazyTensor | None, shape: tuple[int, ...]) -> list[str]:
    """What a file's header says against a tensor, in one line or none."""
    if tensor is None:
        return [f"{part}: missing, expected {shape}"]
    if tuple(tensor.shape) != shape:
        return [f"{part}: expected the shape {shape}, got {tuple(tensor.shape)}"]
    if tensor.dtype not in _DTYPES[part]:
        return [f"{part}: expected {' or '.join(_DTYPES[part])}, got {tensor.dtype}"]
    return []


def _read_scale(given: Mapping[str, LazyTensor], num_out: int, num_in: int, problems: list[str]) -> np.ndarray | None:
    """Reads the scales of a linear map, float32 `[out, 1]`; adds bad ones to `problems`, and another `weight_shape`."""
    scale = given["weight_scale"].read().astype(np.float32)
    bad = np.flatnonzero(~(np.isfinite(scale) & (scale > 0)))
    if bad.size:
        value = scale.ravel()[bad[0]]
        problems.append(f"weight_scale: {bad.size} scales are not positive and finite, such as {value} in row {bad[0]}")
    if "weight_shape" in given and (shape := given["weight_shape"].read().tolist()) != [num_out, num_in]:
        problems.append(f"weight_shape: expected {[num_out, num_in]} (from config.json), got {shape}")
    return None if problems else scale


def _lazy(tensor: LazyTensor, scale: np.ndarray, stored: Stored, num_in: int) -> LazyTensor:
    """A linear map whose integers are read on demand, with their scales."""
    read_part = tensor.read_part or (lambda index: tensor.read()[index])

    def integers(outputs: slice) -> tuple[np.ndarray, np.ndarray]:
        values = read_part((outputs, slice(None)))
        return (unpack(values, stored.bits, num_in) if stored.packed else values), scale[outputs]

    def floats() -> np.ndarray:
        values, scales = integers(slice(None))
        return values.astype(np.float32) * scales

    return LazyTensor((len(scale), num_in), floats, integers=integers)


def unpack(words: np.ndarray, bits: int, num_in: int) -> np.ndarray:
    """Takes integers out of words: the first input in the lowest bits, each plus 2^(bits - 1).

    Args:
      words: int32 `[out, ceil(in · bits / 32)]`.
      bits: number of bits of an integer, 8 or 4.
      num_in: number of inputs.

    Returns:
      Integers, int8 `[out, in]`.

    >>> unpack(np.array([[0x7F80]], np.int32), 8, 2), unpack(np.array([[0xF08]], np.int32), 4, 3)
    (array([[ 0, -1]], dtype=int8), array([[ 0, -8,  7]], dtype=int8))
    """
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 4:
        data = np.stack([data & 15, data >> 4], axis=-1).reshape(len(words), -1)
    return (data[:, :num_in] - np.uint8(2 ** (bits - 1))).view(np.int8)
