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
      config: the architecture.
      params: the tree of weights (see `tinylora_jax.io.hf._weights.parameter_names`).
      tokenizer: a transformers tokenizer, with its chat template if the source has one.
      stop_tokens: ids that end a completion, sorted.
      name: what to call the model: hub id, package source, or the file's or folder's name.
      hf_config: the folder's `config.json` as it is; None for a GGUF file.
    """

    config: ModelConfig
    params: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    stop_tokens: tuple[int, ...]
    name: str
    hf_config: Mapping[str, Any] | None = None
