"""GGUF models of the llama, qwen2 and qwen3 architectures: config, tensors and tokenizer."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from tinylora_jax.io.gguf._file import GGUFFile, read_gguf
from tinylora_jax.io.gguf._tokenizer import build_tokenizer, end_tokens
from tinylora_jax.io.hf._config import parse_config
from tinylora_jax.io.hf._weights import LazyTensor
from tinylora_jax.models.config import ModelConfig, Rope
from tinylora_jax.models.rope import frequencies

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_LLAMA3_FACTORS = "rope_freqs.weight"
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAME = re.compile(r"(?:blk\.(0|[1-9]\d{0,5})\.)?(\w+)\.(weight|bias)")
# Metadata below the architecture's prefix -> config.json field.
_FIELDS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_REQUIRED = (
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
_SCALING = {
    "rope.scaling.type": "rope_type",
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_CHECKED = ("vocab_size", "attention.value_length", "rope.dimension_count")
# The layout key records where the converter found the weights; finetuned means that the scaling was trained.
_HARMLESS = ("tensor_data_layout", "rope.scaling.finetuned", "expert_count", "expert_used_count")


@dataclass(frozen=True)
class GGUFModel:
    """A model in a GGUF file.

    Attributes:
      config: architecture of the model.
      tensors: lazy tensors with Hugging Face names and layout.
      tokenizer: tokenizer built from the same file.
      stop_tokens: end-of-sequence and end-of-turn ids named in the metadata and the vocabulary.
    """

    config: ModelConfig
    tensors: Mapping[str, LazyTensor]
    tokenizer: PreTrainedTokenizerFast
    stop_tokens: tuple[int, ...]


def load_gguf(path: str | os.PathLike[str]) -> GGUFModel:
    """Reads the config, tensor table and tokenizer of a GGUF file; tensors stay on disk until they are read.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, or its metadata are not supported; the message says which.
    """
    file = read_gguf(path)
    try:
        config = gguf_config(file)
        tensors = _hf_tensors(file, config)
        tokenizer = build_tokenizer(file.metadata)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    return GGUFModel(config, tensors, tokenizer, end_tokens(file.metadata))


def gguf_config(file: GGUFFile) -> ModelConfig:
    """Derives the architecture from a GGUF file's metadata and tensor table.

    Raises:
      ValueError: metadata keys are missing, inconsistent or not supported; lists all of them.
    """
    metadata = file.metadata
    family = metadata.get("general.architecture")
    if family not in _ARCHITECTURES:
        raise ValueError(
            f"general.architecture={family!r:.60} is not supported; expected one of {', '.join(_ARCHITECTURES)}"
        )
    own = {key.removeprefix(f"{family}."): value for key, value in metadata.items() if key.startswith(f"{family}.")}
    problems = _problems(file, own)
    vocabulary = file.tensors.get("token_embd.weight")
    if vocabulary is None:
        problems.append("the tensor token_embd.weight is missing")
    if problems:
        raise ValueError("the GGUF metadata are not supported:\n  " + "\n  ".join(problems))
    fields = {name: own[key] for key, name in _FIELDS.items() if key in own}
    scaling = {name: own[key] for key, name in _SCALING.items() if key in own}
    if scaling.get("rope_type", "none") == "none":
        scaling = {}
    config = parse_config(
        fields
        | {
            "model_type": family,
            "vocab_size": vocabulary.shape[0],
            # GGUF omits these if they follow from other keys; transformers' defaults must not be used instead.
            "num_key_value_heads": own.get("attention.head_count_kv"),
            "head_dim": own.get("attention.key_length", own["embedding_length"] // own["attention.head_count"]),
            "rope_scaling": scaling,
            "tie_word_embeddings": "output.weight" not in file.tensors,
        }
    )
    if family != "qwen2":
        names = file.tensors.keys()
        config = replace(config, qkv_bias="blk.0.attn_q.bias" in names, o_bias="blk.0.attn_output.bias" in names)
    _check_sizes(own, config)
    if _LLAMA3_FACTORS in file.tensors:
        config = replace(config, rope=_llama3_rope(config, file.tensors[_LLAMA3_FACTORS]))
    return config


def _problems(file: GGUFFile, own: Mapping[str, Any]) -> list[str]:
    known = {*_FIELDS, *_SCALING, *_CHECKED, *_HARMLESS}
    problems = [f"{key}={value!r:.60} is not a known key" for key, value in own.items() if key not in known]
    problems += [f"{key} is missing" for key in _REQUIRED if key not in own]
    sizes = ("embedding_length", "attention.head_count")
    problems += [
        f"{key}={own[key]!r:.60}: expected one positive integer for all layers"
        for key in sizes
        if key in own and not (isinstance(own[key], int) and own[key] > 0)
    ]
    if own.get("expert_count", 0) != 0:
        problems.append(f"expert_count={own['expert_count']!r:.60}: mixtures of experts are not supported")
    if own.get("rope.scaling.type", "none") not in ("none", "linear", "yarn"):
        problems.append(
            f"rope.scaling.type={own['rope.scaling.type']!r:.60} is not supported; expected none, linear or yarn"
        )
    if file.metadata.get("general.type", "model") != "model":
        problems.append(f"general.type={file.metadata['general.type']!r:.60} is not supported; expected 'model'")
    if file.metadata.get("split.count", 1) not in (0, 1):
        problems.append(
            f"split.count={file.metadata['split.count']!r:.60}: merge the parts first (llama-gguf-split --merge)"
        )
    return problems


def _check_sizes(own: Mapping[str, Any], config: ModelConfig) -> None:
    expected = (config.vocab_size, config.head_dim, config.head_dim)
    wrong = [
        f"{key}={own[key]!r:.60}, expected {size}"
        for key, size in zip(_CHECKED, expected, strict=True)
        if key in own and own[key] != size
    ]
    if wrong:
        raise ValueError("the GGUF metadata are inconsistent: " + "; ".join(wrong))


def _llama3_rope(config: ModelConfig, factors: LazyTensor) -> Rope:
    """Recognizes the Llama 3 scaling from the stored frequency divisors.

    The metadata do not mention this scaling; `rope_freqs.weight` holds a divisor for each frequency. The largest
    divisor is the factor. With the constants of every Llama 3 release (1, 4, 8192), it must reproduce all divisors.
    """
    divisors = factors.read().astype(np.float64).ravel()
    if config.rope.kind != "default":
        raise ValueError(f"{_LLAMA3_FACTORS} together with rope.scaling.type={config.rope.kind!r} is not supported")
    if divisors.shape != (config.head_dim // 2,) or not np.all(np.isfinite(divisors)) or divisors.min() < 1:
        raise ValueError(
            f"{_LLAMA3_FACTORS}: expected {config.head_dim // 2} divisors of at least 1, got shape {factors.shape}"
        )
    rope = replace(config.rope, kind="llama3", factor=float(divisors.max()), original_max_positions=8192)
    plain, _ = frequencies(config.rope, config.head_dim)
    scaled, _ = frequencies(rope, config.head_dim)
    if not np.allclose(plain / scaled, divisors, rtol=1e-4):
        raise ValueError(
            f"{_LLAMA3_FACTORS} holds frequency divisors that are not Llama 3's "
            "(low 1, high 4, original context 8192, "
            f"factor {rope.factor:g}); such a rope scaling is not supported"
        )
    return rope


def _hf_tensors(file: GGUFFile, config: ModelConfig) -> dict[str, LazyTensor]:
    """Renames tensors and undoes llama.cpp's permutation; unknown names are kept and reported later."""
    llama = file.metadata["general.architecture"] == "llama"
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    tensors = {}
    for name, tensor in file.tensors.items():
        match = _NAME.fullmatch(name)
        layer, part, suffix = match.groups() if match else (None, "", "")
        table = _TOP if layer is None else _BLOCK
        if part not in table:
            if name != _LLAMA3_FACTORS:
                tensors[name] = tensor
            continue
        target = table[part] if layer is None else f"model.layers.{layer}.{table[part]}"
        if llama and layer is not None and part in heads:
            tensor = _unpermute(tensor, heads[part], name)
        tensors[f"{target}.{suffix}"] = tensor
    return tensors


def _unpermute(tensor: LazyTensor, heads: int, name: str) -> LazyTensor:
    """Undoes the reordering of q and k rows for llama.cpp's rotary embedding.

    In this architecture llama.cpp rotates adjacent pairs (2i, 2i+1), and Hugging Face pairs (i, i + d/2). So the
    converter moves row (half, i) of each head to (i, half).
    """
    rows = tensor.shape[0]
    if rows % (2 * heads):
        raise ValueError(f"{name}: expected rows in pairs for {heads} heads, got shape {tensor.shape}")

    def read() -> np.ndarray:
        values = tensor.read()
        split = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
        return split.swapaxes(1, 2).reshape(values.shape)

    return LazyTensor(tensor.shape, read)
