"""Writes trained offsets as PEFT folders: LoRA with a bias for outputs, LN tuning for norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinylora_jax.adapters.offsets import Vectors
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.io.peft._export import torch_name, write_folder
from tinylora_jax.io.peft._tinylora import PREFIX, PeftError, in_order
from tinylora_jax.multihost import to_host


def export_output_offsets(folder: Path, params: Any, v: Vectors, base: str) -> None:
    """Writes LoRA of rank 1 whose matrices are zero and whose `lora_B` has the offset as bias (`lora_bias` of PEFT).

    vLLM and SGLang do not support such biases.

    Args:
      folder: output folder, created if absent.
      params: weights of the base model.
      v: trained vectors by leaf path, float32.
      base: name of the base model for PEFT's config.

    Raises:
      PeftError: an offset is not that of a linear map of a block.
    """
    if scales := [path for path in v if path.endswith("scale")]:
        raise PeftError(f"LoRA has no form for the scale of a norm ({scales[0]}); use peft-ln-tuning or merged")
    leaves, names = leaves_by_path(params), {torch_name(path): path for path in v}
    tensors = {}
    for name in in_order(list(names)):
        num_in, num_out = leaves[names[name]].shape
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.zeros((1, num_in), np.float32)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.zeros((num_out, 1), np.float32)
        tensors[f"{PREFIX}{name}.lora_B.bias"] = np.asarray(to_host(v[names[name]]), np.float32)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "lora_dropout": 0.0, "lora_bias": True}
    write_folder(folder, base, in_order(list(names)), config, tensors)


def export_ln_tuning(folder: Path, params: Any, v: Vectors, base: str) -> None:
    """Writes the trained scales of norms as LN tuning of PEFT, which stores whole scales.

    Args:
      folder: output folder, created if absent.
      params: weights of the base model.
      v: trained vectors by leaf path, float32.
      base: name of the base model for PEFT's config.

    Raises:
      PeftError: an offset is not that of a norm.
    """
    if others := [path for path in v if not path.endswith("scale")]:
        raise PeftError(f"LN tuning has no form for an offset of outputs ({others[0]}); use peft-lora or merged")
    leaves, tensors, names = leaves_by_path(params), {}, []
    for path, vector in to_host(v).items():
        names.append(".".join(["model", *path.split("/")[:-1]]))
        scale = np.asarray(to_host(leaves[path]), np.float32) + vector
        tensors[f"{PREFIX}{names[-1]}.ln_tuning_layers.weight"] = scale
    write_folder(folder, base, names, {"peft_type": "LN_TUNING"}, tensors, of_maps=False)
