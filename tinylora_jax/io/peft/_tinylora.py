"""Reads PEFT's TinyLoRA folders; `_export.py` writes them.

PEFT's ΔW is B · (Σᵢ vᵢ Pᵢ) · A, where the file contains A `[r, in]` and B `[out, r]`: the singular vectors of the
weight, each times √Σ. Its tie groups are runs of equal length, except that the last one includes the remainder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors, Target, TinyLoRA
from tinylora_jax.adapters.factors import LeafFactors
from tinylora_jax.adapters.quantized import dense
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.files import parse_json
from tinylora_jax.hub import join_revision
from tinylora_jax.io.hf._hub import read_json
from tinylora_jax.io.hf._safetensors import open_safetensors, read_metadata
from tinylora_jax.io.hf._weights import LazyTensor
from tinylora_jax.io.peft._torch_random import normals
from tinylora_jax.multihost import to_host

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # in a block, in torch's order
_KNOWN = re.compile(rf"model\.layers\.(0|[1-9]\d{{0,5}})\.(self_attn|mlp)\.({'|'.join(MODULES)})")
PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SPEC = "tinylora_jax.spec"  # name in the header of the weights under which an export keeps the spec
SPEC_FIELDS = ("rank", "u", "n_tie", "tying", "seed", "projection")
_DEFAULTS = {
    "weight_tying": 0.0,
    "projection_seed": 42,
    "save_projection": True,
    "bias": "none",
    "base_model_name_or_path": None,
    "revision": None,
}
_MAX_CONFIG_BYTES = 2**20  # a list of all modules takes about 10 KB
_MAX_PROJECTION = 2**20  # numbers of one module's P
_LEAST_ALIGNMENT = 0.5  # about 1 for the same weights in another precision, and about 0 for other weights


class PeftError(ValueError):
    """A PEFT folder cannot be written for these factors, or cannot be read exactly."""


def tree_path(name: str) -> str:
    """The leaf path of a module: `model.layers.3.mlp.up_proj` becomes `layers/3/mlp/up_proj/kernel`."""
    return name.removeprefix("model.").replace(".", "/") + "/kernel"


def is_module(name: str) -> bool:
    """Whether a name belongs to one of the linear maps of a block."""
    return _KNOWN.fullmatch(name) is not None


def in_order(names: Sequence[str]) -> list[str]:
    """Sorts module names into the order of transformers' `named_modules()`."""
    return sorted(names, key=lambda name: (int(name.split(".")[2]), MODULES.index(name.split(".")[-1])))


@dataclass(frozen=True)
class PeftTinyLoRA:
    """A PEFT TinyLoRA folder with consistent names and shapes; only v is in memory.

    Attributes:
      folder: folder of the adapter.
      config: checked content of `adapter_config.json`.
      modules: torch names of the adapted modules, in PEFT's order.
      groups: tie group of each module.
      stored_projections: whether P is in the file; otherwise it is generated as in PEFT.
      v: trained vector, float32 `[groups, u]`.
    """

    folder: Path
    config: Mapping[str, Any]
    modules: tuple[str, ...]
    groups: tuple[int, ...]
    stored_projections: bool
    v: Float[Array, "groups u"]

    @property
    def spec(self) -> TinyLoRA:
        """The equivalent spec. `factorize` gives other factors for it, and splits PEFT's last tie group."""
        targets = tuple(Target(re.escape(tree_path(name))) for name in self.modules)
        return TinyLoRA(self.config["r"], self.config["u"], self.groups.count(0), targets=targets)

    @property
    def base(self) -> str | None:
        """The name of the base model, if the folder states it."""
        name, revision = self.config["base_model_name_or_path"], self.config["revision"]
        return join_revision(name, revision) if isinstance(name, str) and isinstance(revision, str) else name


def written_spec(folder: Path) -> TinyLoRA | None:
    """The spec of the adapter from which `export_tinylora` wrote a folder; None for a folder of PEFT's own."""
    try:
        written = parse_json(read_metadata(folder / WEIGHTS).get(SPEC, "null"))
        if written is None:
            return None
        targets = tuple(Target(re.escape(path)) for path in written.pop("leaves"))
        return TinyLoRA(**{name: written[name] for name in SPEC_FIELDS}, targets=targets)
    except (ValueError, TypeError, KeyError, AttributeError):  # written by another version; the numbers are in the file
        return None


def is_peft(folder: Path) -> bool:
    """Whether a folder has PEFT's layout."""
    return (folder / CONFIG).is_file()


def import_tinylora(folder: Path, params: Any) -> tuple[Factors, Float[Array, "groups u"]]:
    """Reads a PEFT TinyLoRA folder.

    Args:
      folder: folder with `adapter_config.json` and `adapter_model.safetensors`.
      params: weights of the base model.

    Returns:
      Factors and v that give the file's ΔW, see `peft_factors`.

    Raises:
      PeftError: the folder is damaged, of another kind or for another model, or its P cannot be reproduced.
    """
    adapter = read_tinylora(folder)
    return peft_factors(adapter, params), adapter.v


def read_tinylora(folder: Path) -> PeftTinyLoRA:
    """Reads a PEFT TinyLoRA folder without its base model.

    Args:
      folder: folder with `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
      PeftError: a file is absent or damaged, the folder is of another kind, or its P cannot be reproduced.
    """
    config = _read_config(folder)
    with _open(folder) as tensors:
        names = in_order(_module_names(tensors, folder))
        groups = _groups(len(names), config["weight_tying"])
        vectors = [f"base_model.tinylora_v.{group}" for group in range(max(groups) + 1)]
        stored = {name for name in tensors if ".tinylora_v." in name}
        if set(vectors) != stored:
            raise PeftError(
                f"{folder}: {len(names)} modules with weight_tying={config['weight_tying']} need vectors"
                f" 0 to {max(groups)}, but the file has {len(stored)} vectors; some modules may be missing from it"
            )
        has_P = _check_projections(folder, config, tensors, names)
        known = {*vectors, *(f"{PREFIX}{name}.tinylora_{which}" for name in names for which in "ABP")}
        if strange := sorted(set(tensors) - known):
            raise PeftError(f"{folder} contains {', '.join(strange[:3])}, expected only updates of linear maps")
        if wrong := [name for name in vectors if tensors[name].shape != (config["u"],)]:
            raise PeftError(f"{folder}: {wrong[0]} has shape {tensors[wrong[0]].shape}, expected ({config['u']},)")
        v = jnp.stack([_finite(folder, name, tensors[name]) for name in vectors])
    return PeftTinyLoRA(folder, config, tuple(names), tuple(groups), has_P, v)


def peft_factors(adapter: PeftTinyLoRA, params: Any) -> Factors:
    """Builds the factors of a folder that `read_tinylora` read.

    Args:
      adapter: adapter from `read_tinylora`.
      params: weights of the base model.

    Returns:
      Factors with U = B, S = 1, V = Aᵀ, and P. Their spec only describes them; `factorize` gives other factors for it.

    Raises:
      PeftError: the adapter belongs to another model, or contains numbers that are not finite.
    """
    folder, rank, u = adapter.folder, adapter.config["r"], adapter.config["u"]
    weights, leaves, foreign = leaves_by_path(params), {}, []
    with _open(folder) as tensors:
        _check_shapes(adapter, tensors, {path: weight.shape for path, weight in weights.items()})
        for index, (name, group) in enumerate(zip(adapter.modules, adapter.groups, strict=True)):
            read = lambda which, key=f"{PREFIX}{name}.tinylora_": _finite(folder, key + which, tensors[key + which])
            A, B, path = read("A"), read("B"), tree_path(name)
            if not _alignment(weights[path], A, B) >= _LEAST_ALIGNMENT:
                foreign.append(name)
            seed = adapter.config["projection_seed"] + index
            P = read("P") if adapter.stored_projections else normals(seed, (u, rank, rank), rank**-0.5)
            parts = (jnp.asarray(x, jnp.float32)[None] for x in (B, np.ones(rank), A.T, P))
            leaves[path] = LeafFactors(*parts, (group,), Target(re.escape(path)))
    if foreign:
        raise PeftError(
            f"{folder} was trained on {adapter.base!r}, whose singular directions differ from this model's in"
            f" {len(foreign)} of {len(leaves)} weights ({', '.join(foreign[:3])}, …); load it with its own base model"
        )
    return Factors(leaves, adapter.spec)


@contextmanager
def _open(folder: Path) -> Iterator[dict[str, LazyTensor]]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise PeftError(f"{path} is missing; a PEFT adapter is a folder with {CONFIG} and {WEIGHTS}")
    with open_safetensors(path) as tensors:
        yield tensors


def _finite(folder: Path, name: str, tensor: LazyTensor) -> np.ndarray:
    values = np.asarray(tensor.read(), np.float32)
    if not np.isfinite(values).all():
        raise PeftError(f"{folder}: {name} holds numbers that are not finite; train the adapter again")
    return values


def _check_shapes(
    adapter: PeftTinyLoRA, tensors: Mapping[str, LazyTensor], weights: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises an error if A and B do not fit the base model, before any of them is read."""
    rank = adapter.config["r"]
    for name in adapter.modules:
        fan_in, fan_out = weights.get(tree_path(name), (None, None))
        if fan_in is None:
            raise PeftError(f"{adapter.folder} adapts {name}, which the base model lacks; load it with its own model")
        for which, expected in (("A", (rank, fan_in)), ("B", (fan_out, rank))):
            tensor = tensors.get(f"{PREFIX}{name}.tinylora_{which}")
            found = "none" if tensor is None else tensor.shape
            if found != expected:
                raise PeftError(
                    f"{adapter.folder}: tinylora_{which} of {name} has shape {found}, but the base model needs"
                    f" {expected} at rank {rank}; load it with its own model"
                )


def _alignment(W: Any, A: Float[np.ndarray, "r in"], B: Float[np.ndarray, "out r"]) -> float:
    """The share of ‖W Aᵀ‖ in the span of B, with A orthonormalized: 1 for singular directions of W."""
    rows, columns = np.linalg.qr(A.T)[0], np.linalg.qr(B)[0]
    image = np.asarray(to_host(_image(W, rows.astype(W.dtype))), np.float32)
    size = np.linalg.norm(image)
    return float(np.linalg.norm(columns.T @ image) / size) if size else 1.0


@jax.jit
def _image(W: Any, rows: Float[Array, "in r"]) -> Float[Array, "out r"]:
    return dense(W).T @ rows


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise PeftError(f"{path} is missing; a PEFT adapter is a folder with {CONFIG} and {WEIGHTS}")
    config = _DEFAULTS | read_json(path, _MAX_CONFIG_BYTES)
    if config.get("peft_type") != "TINYLORA":
        hint = "; LoRA adapters can be evaluated, and merged with PEFT" if config.get("peft_type") == "LORA" else ""
        raise PeftError(f"{path}: peft_type {config.get('peft_type')!r:.60}, expected 'TINYLORA'{hint}")
    integer = lambda name: type(config.get(name)) is int
    wrong = [name for name in ("r", "u") if not (integer(name) and 1 <= config[name] <= _MAX_PROJECTION)]
    wrong += [] if wrong or config["u"] * config["r"] ** 2 <= _MAX_PROJECTION else ["u"]
    wrong += [] if integer("projection_seed") and abs(config["projection_seed"]) < 2**62 else ["projection_seed"]
    tying, base = config["weight_tying"], config["base_model_name_or_path"]
    wrong += [] if type(tying) in (int, float) and 0 <= tying <= 1 else ["weight_tying"]
    wrong += [] if base is None or isinstance(base, str) else ["base_model_name_or_path"]
    if wrong:
        found = ", ".join(f"{name}={config.get(name)!r:.60}" for name in wrong)
        raise PeftError(
            f"{path}: {found}; expected integers r, u >= 1 with u · r² at most {_MAX_PROJECTION}, an integer"
            " projection_seed, weight_tying from 0 to 1 and a name or null as base_model_name_or_path"
        )
    extra = [name for name in ("modules_to_save", "fan_in_fan_out") if config.get(name)]
    if extra or config["bias"] != "none":
        raise PeftError(f"{path}: {', '.join(extra) or 'bias'} set; only adapters that consist of ΔW are supported")
    return config | {"weight_tying": float(tying)}


def _module_names(tensors: Mapping[str, Any], folder: Path) -> list[str]:
    names = [name[len(PREFIX) : -len(".tinylora_A")] for name in tensors if name.endswith(".tinylora_A")]
    strange = [name for name in names if not _KNOWN.fullmatch(name)]
    if strange or not names:
        raise PeftError(f"{folder}: expected linear maps of blocks, got {', '.join(strange[:3])[:200] or 'no module'}")
    return names


def _groups(count: int, tying: float) -> list[int]:
    """PEFT's tie group of each of `count` modules: runs of equal length, the last including the remainder."""
    groups = max(1, round(count * (1 - tying)))
    size = max(1, count // groups)
    return [min(index // size, groups - 1) for index in range(count)]


def _check_projections(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, LazyTensor], names: Sequence[str]
) -> bool:
    """Whether P is in the file; raises an error if it is incomplete there, or can be neither read nor generated."""
    shape = (config["u"], config["r"], config["r"])
    stored = [tensors.get(f"{PREFIX}{name}.tinylora_P") for name in names]
    if any(P is not None for P in stored):
        if any(P is None or P.shape != shape for P in stored):
            raise PeftError(f"{folder}: some tinylora_P are missing or not of shape {shape}")
        return True
    version = str(config.get("peft_version") or "0.19")
    if [int(part) for part in re.findall(r"\d{1,9}", version)[:2]] < [0, 20]:
        raise PeftError(f"{folder} has no tinylora_P, and PEFT {version:.20} did not store the seed that generated it")
    return False
