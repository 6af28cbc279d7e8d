"""A pretrained model in memory: architecture, weights and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinylora_jax.models.config import ModelConfig


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, ready to use.

    Attributes:
      config: architecture of the model.
      params: tree of weights (see `tinylora_jax.io.hf._weights.parameter_names`).
      tokenizer: transformers tokenizer, with the chat template if the source has one.
      stop_tokens: sorted ids of the tokens that end a completion.
      name: name of the model: hub id, package source, or name of the file or folder.
      hf_config: unchanged content of the folder's `config.json`; None for a GGUF file.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]
    name: str
    hf_config: Mapping[str, Any] | None = None
