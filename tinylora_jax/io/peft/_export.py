"""Writes PEFT folders: TinyLoRA, and plain LoRA of rank r, which vLLM and SGLang load.

PEFT's ΔW is B · (Σᵢ vᵢ Pᵢ) · A, so the paper's form fits directly, with A = Vᵀ, B = U Σ and this library's P. PEFT's
tie groups are runs of equal length, which may not match. So in an export every module has its own copy of v.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors
from tinylora_jax.adapters.factors import LeafFactors
from tinylora_jax.files import write_atomically
from tinylora_jax.hub import HUB_ID, split_revision
from tinylora_jax.io.hf._safetensors import write_safetensors
from tinylora_jax.io.hf._weights import LazyTensor
from tinylora_jax.io.peft._tinylora import CONFIG, MODULES, PREFIX, SPEC, SPEC_FIELDS, WEIGHTS, PeftError, in_order
from tinylora_jax.multihost import to_host

_OUR_SEED = 42  # PEFT's default; never used, because P is in the file


def torch_name(path: str) -> str:
    """The transformers name of a module: `layers/3/mlp/up_proj/kernel` becomes `model.layers.3.mlp.up_proj`."""
    parts = path.split("/")
    if parts[0] != "layers" or len(parts) != 5 or parts[-1] != "kernel" or parts[3] not in MODULES:
        raise PeftError(f"{path} is not one of the linear maps of a block; PEFT export supports only those")
    return ".".join(["model", *parts[:-1]])


def _by_module(factors: Factors) -> dict[str, LeafFactors]:
    """The factors of each module as host arrays, in PEFT's order."""
    leaves = {torch_name(path): to_host(leaf) for path, leaf in factors.leaves.items()}
    return {name: leaves[name] for name in in_order(list(leaves))}


def write_folder(
    folder: Path,
    base: str,
    modules: Sequence[str],
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
    of_maps: bool = True,
) -> None:
    """Writes a PEFT folder with the common fields and the given config, tensors and texts for their file's header.

    The fields of linear maps are written if `of_maps`; LN tuning has none of them.
    """
    name, revision = split_revision(base) if HUB_ID.fullmatch(base) else (base, None)
    common = {
        "base_model_name_or_path": name,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "target_modules": list(modules),
    }
    common |= {"bias": "none", "fan_in_fan_out": False} if of_maps else {}
    folder.mkdir(parents=True, exist_ok=True)
    lazy = {name: LazyTensor(x.shape, lambda x=x: x) for name, x in tensors.items()}
    write_safetensors(folder / WEIGHTS, lazy, "float32", metadata)
    write_atomically(folder / CONFIG, json.dumps({**config, **common}, indent=1) + "\n")


def export_tinylora(folder: Path, factors: Factors, v: Float[Array, "groups u"], base: str) -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads as TinyLoRA (PEFT 0.19 or newer).

    Args:
      folder: output folder, created if absent.
      factors: factors with which v was trained.
      v: trained vector, float32 `[groups, u]`.
      base: name of the base model for PEFT's config.

    Raises:
      PeftError: an adapted weight is not a linear map of a block.
    """
    modules, v, tensors = _by_module(factors), np.asarray(v, np.float32), {}
    for index, (name, leaf) in enumerate(modules.items()):
        tensors[f"{PREFIX}{name}.tinylora_A"] = leaf.V[0].T
        tensors[f"{PREFIX}{name}.tinylora_B"] = leaf.U[0] * leaf.S[0]
        tensors[f"{PREFIX}{name}.tinylora_P"] = leaf.P[0]
        tensors[f"base_model.tinylora_v.{index}"] = v[leaf.groups[0]]
    config = {
        "peft_type": "TINYLORA",
        "r": factors.spec.rank,
        "u": factors.spec.u,
        "weight_tying": 0.0,
        "projection_seed": _OUR_SEED,
        "save_projection": True,
    }
    # PEFT ignores the header; with it, `SavedAdapter.own` finds the few numbers again.
    written = {name: getattr(factors.spec, name) for name in SPEC_FIELDS} | {"leaves": list(factors.leaves)}
    write_folder(folder, base, list(modules), config, tensors, {SPEC: json.dumps(written)})


def export_lora(folder: Path, factors: Factors, v: Float[Array, "groups u"], base: str) -> None:
    """Writes a plain LoRA folder of the factors' rank: the same ΔW, but in a larger file.

    Args:
      folder: output folder, created if absent.
      factors: factors with which v was trained.
      v: trained vector, float32 `[groups, u]`.
      base: name of the base model for PEFT's config.

    Raises:
      PeftError: an adapted weight is not a linear map of a block.
    """
    modules, v, tensors = _by_module(factors), np.asarray(v, np.float64), {}
    for name, leaf in modules.items():
        R = np.einsum("u,uij->ij", v[leaf.groups[0]], leaf.P[0].astype(np.float64))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = leaf.V[0].T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = leaf.U[0].astype(np.float64) * leaf.S[0] @ R
    config = {"peft_type": "LORA", "r": factors.spec.rank, "lora_alpha": factors.spec.rank, "lora_dropout": 0.0}
    write_folder(folder, base, list(modules), config, tensors)
