"""PEFT folders: TinyLoRA both ways, and plain LoRA of rank r, which vLLM and SGLang load.

PEFT's ΔW is B · (Σᵢ vᵢ Pᵢ) · A with A `[r, in]` and B `[out, r]` in the file. So the paper's form fits as it is, with
A = Vᵀ, B = U Σ and our own P. Its tie groups are runs of equally many modules, which ours need not be: exported, every
module has its own copy of its group's v.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.flax import load_file  # NumPy's knows no bfloat16
from safetensors.numpy import save_file

from tinylora_jax.adapters import Factors, Target, TinyLoRA
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.adapters.tinylora import LeafFactors
from tinylora_jax.fetch import fetch

_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of a block, in torch's order
_PREFIX = "base_model.model."
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OUR_SEED = 42  # PEFT's own default; never used, since P is in the file


class PeftError(ValueError):
    """A PEFT folder cannot be written for these factors, or cannot be read faithfully."""


def _torch_name(path: str) -> str:
    """`layers/3/mlp/up_proj/kernel` as transformers calls the module: `model.layers.3.mlp.up_proj`."""
    parts = path.split("/")
    if parts[0] != "layers" or len(parts) != 5 or parts[-1] != "kernel" or parts[3] not in _MODULES:
        raise PeftError(f"{path} is not one of the linear maps of a block; PEFT files of others are not written")
    return ".".join(["model", *parts[:-1]])


def _path(name: str) -> str:
    return name.removeprefix("model.").replace(".", "/") + "/kernel"


def _in_order(names: Sequence[str]) -> list[str]:
    """Module names as `named_modules()` of transformers gives them."""
    return sorted(names, key=lambda name: (int(name.split(".")[2]), _MODULES.index(name.split(".")[-1])))


def _by_module(factors: Factors) -> dict[str, LeafFactors]:
    """The factors of each module, as arrays of the host, in PEFT's order."""
    leaves = {_torch_name(path): fetch(leaf) for path, leaf in factors.leaves.items()}
    return {name: leaves[name] for name in _in_order(list(leaves))}


def _write(
    folder: Path, base: str, modules: Sequence[str], config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    common = {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(modules),
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    (folder / _CONFIG).write_text(json.dumps({**config, **common}, indent=1) + "\n", encoding="utf-8")


def export_tinylora(folder: Path, factors: Factors, v: Float[Array, "groups u"], base: str) -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads as TinyLoRA (PEFT 0.19 or newer).

    Args:
      folder: created if absent.
      factors: that v was trained with.
      v: the vector.
      base: name of the base model for PEFT's config.

    Raises:
      PeftError: an adapted weight is not a linear map of a block.
    """
    modules, v, tensors = _by_module(factors), np.asarray(v, np.float32), {}
    for index, (name, leaf) in enumerate(modules.items()):
        tensors[f"{_PREFIX}{name}.tinylora_A"] = leaf.V[0].T
        tensors[f"{_PREFIX}{name}.tinylora_B"] = leaf.U[0] * leaf.S[0]
        tensors[f"{_PREFIX}{name}.tinylora_P"] = leaf.P[0]
        tensors[f"base_model.tinylora_v.{index}"] = v[leaf.groups[0]]
    config = {
        "peft_type": "TINYLORA",
        "r": factors.spec.rank,
        "u": factors.spec.u,
        "weight_tying": 0.0,
        "projection_seed": _OUR_SEED,
        "save_projection": True,
    }
    _write(folder, base, list(modules), config, tensors)


def export_lora(folder: Path, factors: Factors, v: Float[Array, "groups u"], base: str) -> None:
    """Writes a plain LoRA folder of the factors' rank: the same ΔW, without what made it small.

    Args:
      folder: created if absent.
      factors: that v was trained with.
      v: the vector.
      base: name of the base model for PEFT's config.

    Raises:
      PeftError: an adapted weight is not a linear map of a block.
    """
    modules, v, tensors = _by_module(factors), np.asarray(v, np.float64), {}
    for name, leaf in modules.items():
        R = np.einsum("u,uij->ij", v[leaf.groups[0]], leaf.P[0].astype(np.float64))
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = leaf.V[0].T
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = leaf.U[0].astype(np.float64) * leaf.S[0] @ R
    config = {"peft_type": "LORA", "r": factors.spec.rank, "lora_alpha": factors.spec.rank, "lora_dropout": 0.0}
    _write(folder, base, list(modules), config, tensors)


def import_tinylora(folder: Path, params: Any) -> tuple[Factors, Float[Array, "groups u"]]:
    """Reads a PEFT TinyLoRA folder.

    Args:
      folder: holds `adapter_config.json` and `adapter_model.safetensors`.
      params: the base model's tree, against which shapes are checked.

    Returns:
      Factors and v with the file's ΔW: U = B, S = 1, V = Aᵀ, and its P. The spec says what was read; to factorize
      anew by it gives other factors.

    Raises:
      PeftError: a file is absent or damaged, the folder holds something else, or its P cannot be known.
    """
    config = _read_config(folder)
    try:
        tensors = {name: np.asarray(x, np.float32) for name, x in load_file(folder / _WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise PeftError(f"{folder / _WEIGHTS} cannot be read: {error}") from error
    names = _in_order(_module_names(tensors, folder))
    groups = _groups(len(names), config["weight_tying"])
    vectors = {f"base_model.tinylora_v.{group}" for group in groups}
    stored = {name for name in tensors if ".tinylora_v." in name}
    if vectors != stored:
        raise PeftError(
            f"{folder}: {len(names)} modules at weight_tying={config['weight_tying']} have vectors"
            f" 0 to {max(groups)}, the file has {len(stored)}; some modules may be missing from it"
        )
    P = _projections(folder, config, tensors, names)
    leaves, shapes = {}, {path: leaf.shape for path, leaf in leaves_by_path(params).items()}
    for name, group, projection in zip(names, groups, P, strict=True):
        path = _path(name)
        A, B = (tensors.get(f"{_PREFIX}{name}.tinylora_{which}") for which in "AB")
        if A is None or B is None or A.shape[:1] != (config["r"],) or B.shape[1:] != (config["r"],):
            raise PeftError(f"{folder}: tinylora_A and _B of {name} are not of rank {config['r']}")
        if shapes.get(path) != (A.shape[1], B.shape[0]):
            found = shapes.get(path, "no such weight")
            raise PeftError(
                f"{folder}: {name} is {A.shape[1]} → {B.shape[0]}, the base model has {found}; load its own"
            )
        as_array = lambda x: jnp.asarray(x, jnp.float32)[None]
        ones = jnp.ones((1, config["r"]), jnp.float32)
        leaves[path] = LeafFactors(as_array(B), ones, as_array(A.T), as_array(projection), (group,), Target(path))
    v = np.stack([tensors[f"base_model.tinylora_v.{group}"] for group in range(max(groups) + 1)])
    if v.shape[1] != config["u"] or not np.isfinite(v).all():
        raise PeftError(f"{folder}: vectors of {v.shape[1]} numbers, expected {config['u']} finite ones")
    spec = TinyLoRA(config["r"], config["u"], groups.count(0), targets=tuple(leaves))
    return Factors(leaves, spec), jnp.asarray(v, jnp.float32)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    if not path.is_file():
        raise PeftError(f"{path} is missing; a PEFT adapter is a folder with {_CONFIG} and {_WEIGHTS}")
    try:
        config = json.loads(path.read_bytes())
        kind = config.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise PeftError(f"{path} is not a JSON object ({error}); copy it again") from error
    if kind != "TINYLORA":
        raise PeftError(f"{path}: peft_type {kind!r}, expected 'TINYLORA'")
    defaults = {"weight_tying": 0.0, "projection_seed": 42, "save_projection": True, "bias": "none"}
    config = defaults | config
    if not all(type(config.get(name)) is int and config[name] >= 1 for name in ("r", "u")):
        raise PeftError(f"{path}: r={config.get('r')!r}, u={config.get('u')!r}: expected integers >= 1")
    tying = config["weight_tying"]
    if isinstance(tying, bool) or not isinstance(tying, int | float) or not 0 <= tying <= 1:
        raise PeftError(f"{path}: weight_tying={tying!r}, expected 0 to 1")
    extra = [name for name in ("modules_to_save", "fan_in_fan_out") if config.get(name)]
    if extra or config["bias"] != "none":
        raise PeftError(f"{path}: {', '.join(extra) or 'bias'} set; only an adapter that is a ΔW alone is read")
    return config


def _module_names(tensors: Mapping[str, Any], folder: Path) -> list[str]:
    names = [name[len(_PREFIX) : -len(".tinylora_A")] for name in tensors if name.endswith(".tinylora_A")]
    known = lambda parts: parts[:2] == ["model", "layers"] and len(parts) == 5 and parts[2].isdigit()
    strange = [n for n in names if not (known(n.split(".")) and n.split(".")[-1] in _MODULES)]
    if strange or not names:
        raise PeftError(f"{folder}: expected linear maps of blocks, got {', '.join(strange[:3]) or 'no module'}")
    return names


def _groups(count: int, tying: float) -> list[int]:
    """PEFT's tie group of each of `count` modules: runs of equally many, the last with the remainder."""
    groups = max(1, round(count * (1 - tying)))
    size = max(1, count // groups)
    return [min(index // size, groups - 1) for index in range(count)]


def _projections(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[np.ndarray]:
    shape = (config["u"], config["r"], config["r"])
    stored = [tensors.get(f"{_PREFIX}{name}.tinylora_P") for name in names]
    if any(P is not None for P in stored):
        if any(P is None or P.shape != shape for P in stored):
            raise PeftError(f"{folder}: some tinylora_P are missing or not of shape {shape}")
        return stored
    version = str(config.get("peft_version") or "0.19")
    if [int(part) for part in version.split(".")[:2] if part.isdigit()] < [0, 20]:
        raise PeftError(f"{folder} has no tinylora_P, and PEFT {version} drew it from a seed that it did not keep")
    try:
        import torch
    except ImportError as error:
        raise PeftError(f"{folder} has no tinylora_P; to draw it again as PEFT does, pip install torch") from error
    seeded = lambda index: torch.Generator().manual_seed(config["projection_seed"] + index)
    std = config["r"] ** -0.5
    return [torch.normal(0.0, std, shape, generator=seeded(i)).numpy() for i in range(len(names))]
