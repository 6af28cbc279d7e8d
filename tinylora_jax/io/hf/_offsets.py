"""Writes a model with trained offsets in its biases and norms, for transformers, vLLM and SGLang."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from tinylora_jax.adapters.offsets import Vectors, bias_of
from tinylora_jax.adapters.quantized import exact
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.io._model import Pretrained
from tinylora_jax.io.hf._export import describe_config, write_model
from tinylora_jax.models.config import ModelConfig

_QKV, _MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")


def place_of(path: str) -> str:
    """The leaf to which a merged model adds the offset of a leaf: the bias beside a kernel, or the scale itself."""
    return bias_of(path) if path.endswith("kernel") else path


def biased_config(config: ModelConfig, paths: Collection[str]) -> ModelConfig:
    """The architecture with biases for the given kernels, and for as few others as transformers allows.

    Qwen2 has biases of q, k and v only. With further ones it becomes a Llama, which may have biases of all four maps
    of attention, and of all three maps of the MLP.

    Raises:
      ValueError: no supported model type of transformers has these biases.
    """
    maps = {path.split("/")[-2] for path in paths if path.endswith("kernel")}
    qkv, o = config.qkv_bias or bool(maps & set(_QKV)), config.o_bias or "o_proj" in maps
    mlp = config.mlp_bias or bool(maps & set(_MLP))
    if config.qk_norm and mlp:
        raise ValueError(
            f"merged cannot contain the offsets of {', '.join(sorted(maps & set(_MLP)))}: Qwen3 has no such biases in"
            " transformers; peft-lora contains them"
        )
    as_qwen2 = config.qkv_bias and not (o or mlp)
    attention = (qkv, o) if as_qwen2 else (qkv or o,) * 2
    return replace(config, qkv_bias=attention[0], o_bias=attention[1], mlp_bias=mlp)


def biased_model(model: Pretrained, paths: Collection[str]) -> Pretrained:
    """The same model with a bias beside each of the given kernels; new biases are zero.

    Raises:
      ValueError: no supported model type of transformers has these biases.
    """
    config = biased_config(model.config, paths)
    if config == model.config:
        return model

    def block(layer: Any) -> Any:
        grown = {name: dict(group) for name, group in layer.items()}
        has = dict.fromkeys(_QKV, config.qkv_bias) | {"o_proj": config.o_bias} | dict.fromkeys(_MLP, config.mlp_bias)
        for name, wanted in has.items():
            group = grown["mlp" if name in _MLP else "self_attn"]
            if wanted and "bias" not in group[name]:
                kernel = group[name]["kernel"]
                group[name] = {**group[name], "bias": jnp.zeros(kernel.shape[-1:], kernel.dtype)}
        return grown

    layers = {index: block(layer) for index, layer in model.params["layers"].items()}
    return replace(model, config=config, params={**model.params, "layers": layers}, hf_config=describe_config(config))


def export_offsets(folder: Path, model: Pretrained, v: Vectors, dtype: DTypeLike = jnp.float32) -> float:
    """Writes a model whose biases and scales contain the offsets; see `write_model`.

    Args:
      folder: existing, empty folder.
      model: base model.
      v: trained vectors by leaf path, float32.
      dtype: dtype of the file: `float32` or `bfloat16`.

    Returns:
      The rounding error of the offsets, as a share of their size: 0 if they are kept, 1 if they are lost.

    Raises:
      ValueError: no supported model type of transformers has these biases.
    """
    model = biased_model(model, v)
    by_place = {place_of(path): vector for path, vector in v.items()}
    leaves = leaves_by_path(model.params)

    def merged(path: str, leaf: Any) -> jax.Array:
        if path not in by_place:
            return exact(leaf)
        return leaf.astype(jnp.float32) + by_place[path].reshape(leaf.shape)

    write_model(folder, model, merged, dtype)
    lost, whole = 0.0, 0.0
    rounded = lambda x: x.astype(dtype).astype(jnp.float32)
    for place, vector in by_place.items():
        kept = rounded(merged(place, leaves[place])) - rounded(leaves[place])
        lost += float(jnp.sum((kept - vector.reshape(kept.shape)) ** 2))
        whole += float(jnp.sum(vector**2))
    return math.sqrt(lost / whole) if whole else 0.0
