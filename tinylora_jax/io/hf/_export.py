"""Writes a model folder that transformers, vLLM and SGLang load; the inverse of `load_pretrained`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors
from tinylora_jax.adapters.quantized import exact
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.adapters.tinylora import merge_leaf
from tinylora_jax.files import write_atomically
from tinylora_jax.io._model import Pretrained
from tinylora_jax.io.hf._safetensors import write_safetensors
from tinylora_jax.io.hf._weights import LazyTensor, name_tensors
from tinylora_jax.models.config import ModelConfig, Rope

_MAX_SHARD_BYTES = 5 * 10**9  # the limit of transformers
_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


def describe_config(config: ModelConfig) -> dict[str, Any]:
    """Converts an architecture to the contents of a `config.json`; the inverse of `parse_config`.

    Raises:
      ValueError: no supported model type of transformers has these biases and norms.
    """
    if config.qk_norm:
        family = "qwen3"
    else:
        family = "qwen2" if config.qkv_bias and not (config.o_bias or config.mlp_bias) else "llama"
    if (config.qkv_bias != config.o_bias and family != "qwen2") or (config.mlp_bias and family != "llama"):
        raise ValueError(
            f"a model with qkv_bias={config.qkv_bias}, o_bias={config.o_bias}, mlp_bias={config.mlp_bias} and"
            f" qk_norm={config.qk_norm} is none of {', '.join(_CLASSES)}, so transformers cannot load it"
        )
    bias = {} if family == "qwen2" else {"attention_bias": config.qkv_bias}
    bias |= {"mlp_bias": True} if config.mlp_bias else {}
    return {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "rope_scaling": _describe_rope(config.rope),
        "tie_word_embeddings": config.tie_embeddings,
        **bias,
    }


def _describe_rope(rope: Rope) -> dict[str, Any] | None:
    scaling = {"rope_type": rope.kind, "factor": rope.factor}
    original = {"original_max_position_embeddings": rope.original_max_positions}
    if rope.kind == "default":
        return None
    if rope.kind == "linear":
        return scaling
    if rope.kind == "llama3":
        return scaling | original | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    attention = {} if rope.attention_factor is None else {"attention_factor": rope.attention_factor}
    return scaling | original | attention | {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}


def export_merged(
    folder: Path, model: Pretrained, factors: Factors, v: Float[Array, "groups u"], dtype: DTypeLike = jnp.float32
) -> None:
    """Writes a model with weights W + ΔW, merging one weight at a time; see `write_model`.

    Args:
      folder: existing, empty folder.
      model: base model.
      factors: factors with which v was trained.
      v: trained vector, float32 `[groups, u]`.
      dtype: dtype of the file: `float32`, or `bfloat16`, see `rounding_loss`.
    """
    wide = lambda leaf: exact(leaf).astype(np.promote_types(leaf.dtype, np.float32))

    def merged(path: str, leaf: Any) -> jax.Array:
        return merge_leaf(wide(leaf), factors.leaves[path], v) if path in factors.leaves else exact(leaf)

    write_model(folder, model, merged, dtype)


def write_model(
    folder: Path,
    model: Pretrained,
    change: Callable[[str, Any], Any] = lambda path, leaf: leaf,
    dtype: DTypeLike = jnp.float32,
) -> None:
    """Writes weights, config, tokenizer and stop tokens: a folder that transformers and `load_pretrained` load.

    `generation_config.json` contains only the stop tokens. So `generate` of transformers with `do_sample=False` is the
    same greedy decoding as in the adapter's evaluation.

    Args:
      folder: existing, empty folder.
      model: base model.
      change: function of a path such as `layers/3/mlp/up_proj/kernel` and a weight, applied when the weight is written.
      dtype: dtype of the file.
    """
    _write_shards(folder, name_tensors(model.config, model.params, change), dtype)
    tokens = _special_tokens(model)
    dropped = ("dtype", "quantization_config")  # of the source: the weights written here have their own
    given = {k: x for k, x in (model.hf_config or describe_config(model.config)).items() if k not in dropped}
    _write_json(folder / "config.json", tokens | given | {"torch_dtype": jnp.dtype(dtype).name})
    _write_json(folder / "generation_config.json", tokens | {"eos_token_id": list(model.stop_tokens)})
    model.tokenizer.save_pretrained(folder)


def rounding_loss(params: Any, factors: Factors, v: Float[Array, "groups u"], dtype: DTypeLike) -> float:
    """Computes the rounding error of the update, ‖(W + ΔW)ᵣ − Wᵣ − ΔW‖ / ‖ΔW‖, where r means rounded.

    Args:
      params: weights of the base model.
      factors: factors with which v was trained.
      v: trained vector, float32 `[groups, u]`.
      dtype: dtype to which weights are rounded.

    Returns:
      The relative error over all adapted weights: 0 if the update is kept or zero, 1 if the error is as large as the
      update.
    """
    lost, whole = 0.0, 0.0
    weights = leaves_by_path(params)
    for path, part in factors.leaves.items():
        W = exact(weights[path]).astype(np.promote_types(weights[path].dtype, np.float32))
        merged = merge_leaf(W, part, v)
        # Not jitted, because XLA may remove a rounding that is immediately undone.
        kept = merged.astype(dtype).astype(W.dtype) - W.astype(dtype).astype(W.dtype)
        lost += float(jnp.sum((kept - (merged - W)) ** 2))
        whole += float(jnp.sum((merged - W) ** 2))
    return math.sqrt(lost / whole) if whole else 0.0


def _special_tokens(model: Pretrained) -> dict[str, Any]:
    ids = {f"{role}_token_id": getattr(model.tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    return {name: token for name, token in ids.items() if token is not None}


def _write_shards(folder: Path, tensors: Mapping[str, LazyTensor], dtype: DTypeLike) -> None:
    """Writes one file, or several files and an index."""
    size = lambda name: jnp.dtype(dtype).itemsize * math.prod(tensors[name].shape)
    shards: list[list[str]] = [[]]
    for name in tensors:
        if shards[-1] and sum(map(size, shards[-1])) + size(name) > _MAX_SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    files = [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        write_safetensors(folder / file, {name: tensors[name] for name in names}, dtype)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": sum(map(size, tensors))}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(values, indent=2) + "\n")
