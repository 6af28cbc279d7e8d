"""Converts a Hugging Face `config.json` to a ModelConfig; unsupported fields are rejected by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tinylora_jax.io.hf._compressed import read_quantization
from tinylora_jax.io.hf._fields import MAX_SIZE, FieldReader
from tinylora_jax.models.config import ModelConfig, Rope

# The defaults of transformers for absent fields (transformers 5.23, configuration_*.py).
_QWEN: Mapping[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
    "max_position_embeddings": 32_768,
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "llama": {
        **_QWEN,
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
    },
}
_SIZES = tuple(_QWEN)
_MAX_LAYERS = 4096  # a name table is built per layer, so a bad config must not make it huge

# Fields that must have the value that leaves the model unchanged.
_FIXED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "use_mrope": False,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
}
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
_READ = (
    *_SIZES,
    *_FIXED,
    *_ROPE_FIELDS,
    "model_type",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "layer_types",
    "quantization_config",
)

# Fields of real checkpoints that do not affect logits: provenance, training, generation and API defaults.
_HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path architectures dtype
    is_llama_config name_or_path torch_dtype torchscript transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_bfloat16 use_cache attention_dropout chunk_size_feed_forward
    gradient_checkpointing initializer_range keys_to_ignore_at_inference max_window_layers
    output_attentions output_hidden_states return_dict sliding_window use_return_dict bos_token_id
    decoder_start_token_id eos_token_id pad_token_id sep_token_id tokenizer_class prefix
    finetuning_task id2label label2id num_labels problem_type task_specific_params bad_words_ids
    begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty
    max_length min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    temperature tf_legacy_loss top_k top_p typical_p
    """.split()
)

_ROPE_READ = frozenset(
    """
    rope_theta rope_type type factor original_max_position_embeddings low_freq_factor
    high_freq_factor beta_fast beta_slow attention_factor mscale mscale_all_dim
    """.split()
)
_ROPE_FIXED: Mapping[str, Any] = {"truncate": True, "partial_rotary_factor": 1.0}


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """Translates the contents of a Hugging Face `config.json` (qwen2, qwen3 or llama; SmolLM2 is llama).

    Absent fields take transformers' defaults for that model type. A field that affects the result and is not supported
    would silently give a different model, so it is rejected.

    Args:
      config: parsed JSON object, from transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`).

    Returns:
      The description of the architecture.

    Raises:
      ValueError: fields are unsupported, unknown or malformed; lists all of them by name.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _DEFAULTS:
        raise ValueError(f"model_type={family!r:.80} is not supported; expected one of {', '.join(_DEFAULTS)}")
    problems: list[str] = []
    reader = FieldReader(config, problems)
    reader.fixed(_FIXED)
    reader.unknown(_HARMLESS | frozenset(_READ))
    read_quantization(config, problems)
    sizes = _sizes(reader, _DEFAULTS[family])
    bias, mlp_bias = _attention_bias(reader, family), _mlp_bias(reader, family)
    _check_layer_types(reader, sizes["num_hidden_layers"])
    rope = _rope(reader, sizes["max_position_embeddings"])
    eps = reader.number("rms_norm_eps", 1e-6, low=0.0)
    tied = reader.flag("tie_word_embeddings", False)
    _check_heads(sizes, problems)
    if problems:
        raise ValueError(f"config of model_type {family!r} is not supported:\n  " + "\n  ".join(problems))
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        rms_norm_eps=eps,
        rope=rope,
        tie_embeddings=tied,
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=mlp_bias,
        qk_norm=family == "qwen3",
        max_positions=sizes["max_position_embeddings"],
    )


def _sizes(reader: FieldReader, defaults: Mapping[str, Any]) -> dict[str, int]:
    """Reads all sizes; null head counts and head_dim follow from other fields, as in transformers."""
    derived = ("num_key_value_heads", "head_dim")
    sizes = {}
    for name in _SIZES:
        if name not in derived:
            high = _MAX_LAYERS if name == "num_hidden_layers" else MAX_SIZE
            sizes[name] = reader.size(name, defaults[name], high)
    heads = sizes["num_attention_heads"]
    fallback = {"num_key_value_heads": heads, "head_dim": max(1, sizes["hidden_size"] // heads)}
    for name in derived:
        # Qwen3 declares `head_dim: int`: transformers rejects null there, and so does `size` below.
        nullable = name != "head_dim" or defaults[name] is None
        absent = reader.values.get(name, defaults[name]) is None and nullable
        sizes[name] = fallback[name] if absent else reader.size(name, defaults[name])
    return sizes


def _attention_bias(reader: FieldReader, family: str) -> bool:
    """Whether q, k, v and o all have biases; Qwen2 always has them on q, k and v, and never on o."""
    if family != "qwen2":
        return reader.flag("attention_bias", False)
    if reader.values.get("attention_bias") not in (None, True):
        reader.problems.append("attention_bias=False is not supported for qwen2, which always has biases on q, k, v")
    return False


def _mlp_bias(reader: FieldReader, family: str) -> bool:
    """Whether the maps of the MLP have biases, which only Llama can have."""
    if family == "llama" and reader.values.get("mlp_bias") is not None:
        return reader.flag("mlp_bias", False)
    reader.fixed({"mlp_bias": False})
    return False


def _check_layer_types(reader: FieldReader, num_layers: int) -> None:
    kinds = reader.values.get("layer_types")
    if kinds is None:
        return
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        reader.problems.append(f"layer_types={kinds!r:.120} is not supported; expected only 'full_attention'")
    elif len(kinds) != num_layers:
        reader.problems.append(f"layer_types: expected {num_layers} entries (num_hidden_layers), got {len(kinds)}")


def _check_heads(sizes: Mapping[str, int], problems: list[str]) -> None:
    heads, kv_heads, width = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]
    if heads % kv_heads:
        problems.append(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads}")
    if width % 2:
        problems.append(f"head_dim={width} must be even for rotary embeddings")


def _rope(reader: FieldReader, max_positions: int) -> Rope:
    """Reads the rotary embedding with transformers' precedence: rope_scaling, then rope_parameters."""
    values = reader.values.get("rope_scaling") or reader.values.get("rope_parameters") or {}
    if not isinstance(values, Mapping):
        reader.problems.append(f"rope_scaling/rope_parameters: expected an object, got {values!r:.80}")
        values = {}
    inner = FieldReader(values, reader.problems, where="rope: ")
    inner.unknown(_ROPE_READ | frozenset(_ROPE_FIXED))
    inner.fixed(_ROPE_FIXED)
    source = inner if "rope_theta" in values else reader
    # With a base of 1 or less, yarn divides by zero and every other kind is meaningless.
    theta = source.number("rope_theta", 10_000.0, low=1.0 + 1e-6)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=inner.number("factor", None, low=1e-6))
    if kind == "llama3":
        return _llama3(inner, theta, max_positions)
    if kind == "yarn":
        return _yarn(inner, theta, max_positions)
    reader.problems.append(f"RoPE type {kind!r:.80} is not supported; expected default, linear, llama3 or yarn")
    return Rope()


def _llama3(inner: FieldReader, theta: float, max_positions: int) -> Rope:
    low = inner.number("low_freq_factor", None, low=1e-6)
    high = inner.number("high_freq_factor", None, low=1e-6)
    if high <= low:
        inner.problems.append(f"rope: high_freq_factor={high:g} must be greater than low_freq_factor={low:g}")
    return Rope(
        theta=theta,
        kind="llama3",
        factor=inner.number("factor", None, low=1e-6),
        original_max_positions=inner.size("original_max_position_embeddings", max_positions),
        low_freq_factor=low,
        high_freq_factor=high,
    )


def _yarn(inner: FieldReader, theta: float, max_positions: int) -> Rope:
    given = {name: value for name, value in inner.values.items() if value is not None}
    known = FieldReader(given, inner.problems, inner.where)  # null means absent in yarn's optional fields
    original = known.size("original_max_position_embeddings", max_positions)
    factor = known.number("factor", max_positions / original, low=1e-6)
    fast, slow = known.number("beta_fast", 32.0, low=1e-6), known.number("beta_slow", 1.0, low=1e-6)
    if fast <= slow:
        inner.problems.append(f"rope: beta_fast={fast:g} must be greater than beta_slow={slow:g}")
    mscale = known.number("mscale", 0.0, low=0.0)
    mscale_all_dim = known.number("mscale_all_dim", 0.0, low=0.0)
    inferred = _yarn_mscale(factor, 1.0)
    if mscale and mscale_all_dim:
        inferred = _yarn_mscale(factor, mscale) / _yarn_mscale(factor, mscale_all_dim)
    return Rope(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=known.number("attention_factor", inferred, low=0.0),
    )


def _yarn_mscale(factor: float, scale: float) -> float:
    """YaRN's temperature: 0.1 · scale · ln(factor) + 1, or 1 without context extension."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
