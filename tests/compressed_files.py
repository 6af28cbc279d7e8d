"""Writes models in the format compressed-tensors, from the format's definition alone."""

import json
import re

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

MAPS = re.compile(r"(model\.layers\.\d+\.\w+\.(q|k|v|o|gate|up|down)_proj)\.weight")


def describe(bits, form="pack-quantized", **changes):
    """The `quantization_config` that compressed-tensors 0.20 writes; `changes` are of the weights' scheme."""
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "strategy": "channel",
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "scale_dtype": None,
        "zp_dtype": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {"targets": ["Linear"], "weights": weights | changes, "format": form}
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group | {"input_activations": None, "output_activations": None}},
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "global_compression_ratio": None,
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.0",
    }


def pack(values, bits):
    """int32 words of integers `[out, in]`: a row is one long number, whose lowest bits are its first integer."""
    rows = []
    for row in values.tolist():
        number = sum((value + 2 ** (bits - 1)) << (bits * i) for i, value in enumerate(row))
        words = [(number >> 32 * i) & (2**32 - 1) for i in range(-(-len(row) * bits // 32))]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return np.array(rows, np.int32)


def quantized(W, bits, dtype=ml_dtypes.bfloat16):
    """Integers from -2^(bits - 1), which this project's own quantization does not use, and scales in 16 bit."""
    top = 2 ** (bits - 1)
    scale = (np.abs(W).max(axis=1, keepdims=True) / (top - 0.5)).astype(dtype)
    values = np.clip(np.rint(W / scale.astype(np.float32)), -top, top - 1).astype(np.int8)
    values[:, 0] = -top
    return values, scale


def compress(source, target, bits, form="pack-quantized", dtype=ml_dtypes.bfloat16, shards=1):
    """Writes the model in the folder `source` to the folder `target`, quantized.

    Returns:
      Integers and scales, by name of the linear map.
    """
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": describe(bits, form)}))
    tensors, found = load_file(source / "model.safetensors"), {}
    for name in list(tensors):
        if match := MAPS.fullmatch(name):
            W = tensors.pop(name).astype(np.float32)
            values, scale = found[match[1]] = quantized(W, bits, dtype)
            tensors[f"{name}_scale"] = scale
            if form == "pack-quantized":
                tensors |= {f"{name}_packed": pack(values, bits), f"{name}_shape": np.array(W.shape, np.int64)}
            else:
                tensors[name] = values
    write(target, tensors, shards)
    return found


def write(folder, tensors, shards=1):
    """Writes tensors as one file, or as several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    place = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
