"""Reads and writes LoRA in PEFT's format, which vLLM and SGLang load too.

PEFT stores A `[r, in]` and B `[out, r]` of every module and scales by `lora_alpha / r`, as `adapters.lora` does. The
additional file `training.json` contains the fingerprint of the base model, so that loading onto another one fails, and
a summary of the training. Folders from PEFT without this file can be read too. If A was frozen, the folder contains it
as well, because PEFT needs it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tinylora_jax.adapters import LoRA, LoRAPolicy, Target
from tinylora_jax.adapters.lora import Matrices, frozen_right
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.files import is_number, write_atomically
from tinylora_jax.hub import join_revision
from tinylora_jax.io.adapter._file import check_base
from tinylora_jax.io.hf._hub import read_json
from tinylora_jax.io.hf._quantizing import as_trained
from tinylora_jax.io.hf._safetensors import open_safetensors
from tinylora_jax.io.peft._export import torch_name, write_folder
from tinylora_jax.io.peft._tinylora import CONFIG, PREFIX, WEIGHTS, PeftError, in_order, is_module, tree_path
from tinylora_jax.multihost import to_host

_TRAINING = "training.json"
_MAX_JSON_BYTES = 2**20
_MOST_RANK = 2**16
_SIDES = {"right": "A", "left": "B"}
# Settings that would change ΔW and are not supported.
_UNSUPPORTED = (
    *("use_rslora", "use_dora", "modules_to_save", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("layer_replication", "trainable_token_indices", "use_qalora"),
)


@dataclass(frozen=True)
class LoRAFolder:
    """A LoRA adapter whose base model is not loaded yet.

    Attributes:
      folder: folder of the adapter.
      spec: rank, alpha and adapted leaves.
      v: LoRA matrices, float32, by leaf path.
      sizes: numbers of inputs and outputs, by leaf path.
      base: name of the base model; None if the folder does not state it.
      training: content of `training.json`; empty if there is none.
      transfer: whether a quantized base in training may be replaced by the same base in 16 bit.
    """

    folder: Path
    spec: LoRA
    v: Matrices
    sizes: Mapping[str, tuple[int, int]]
    base: str | None
    training: Mapping[str, Any]
    transfer: bool = False

    def policy(self, params: Any, method: str = "auto") -> LoRAPolicy:
        """Builds the policy of the base model and this adapter's spec; `method` is not used by LoRA.

        Raises:
          AdapterError, PeftError: the adapter belongs to another model.
        """
        shapes = {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}
        for path, expected in self.sizes.items():
            if shapes.get(path) != expected:
                found = shapes.get(path, "no such weight")
                raise PeftError(f"{self.folder} adapts {path} of shape {expected}, but the base model has {found}")
        fingerprint = self.training.get("base_fingerprint")
        if fingerprint is not None:
            check_base(
                {"base": self.base, "base_fingerprint": fingerprint}, as_trained(params, fingerprint, self.transfer)
            )
        return LoRAPolicy(params, self.spec)


def save_lora(
    folder: Path, spec: LoRA, v: Matrices, base: str, fingerprint: Mapping[str, Any] | None = None, **about: Any
) -> None:
    """Writes a folder that `PeftModel.from_pretrained` loads.

    Args:
      folder: output folder, created if absent.
      spec: spec of v.
      v: both LoRA matrices of linear maps of blocks, float32, by leaf path.
      base: name of the base model.
      fingerprint: fingerprint of the base weights, from `base_fingerprint`.
      **about: JSON-serializable summary of the training.

    Raises:
      PeftError: an adapted weight is not a linear map of a block.
    """
    pairs = {torch_name(path): to_host(pair) for path, pair in v.items()}
    names = in_order(list(pairs))
    tensors = {
        f"{PREFIX}{name}.lora_{letter}.weight": pairs[name][side].T if side == "right" else pairs[name][side]
        for name in names
        for side, letter in _SIDES.items()
    }
    config = {"peft_type": "LORA", "r": spec.rank, "lora_alpha": spec.alpha, "lora_dropout": 0.0}
    write_folder(folder, base, names, config, tensors)
    training = {"base_fingerprint": fingerprint, "about": about} | ({"frozen_a": spec.seed} if spec.freeze_a else {})
    write_atomically(folder / _TRAINING, json.dumps(training, indent=1) + "\n")


def is_lora(folder: Path) -> bool:
    """Whether a folder contains a LoRA adapter in PEFT's layout."""
    path = folder / CONFIG
    return path.is_file() and read_json(path, _MAX_JSON_BYTES).get("peft_type") == "LORA"


def read_lora(folder: Path, transfer: bool = False) -> LoRAFolder:
    """Reads a LoRA folder without its base model; for `transfer` see `open_adapter`.

    Raises:
      PeftError: a file is absent or damaged, or the folder is not a plain LoRA adapter of linear maps.
      ValueError: the file of weights is truncated or corrupt.
    """
    config = read_json(folder / CONFIG, _MAX_JSON_BYTES)
    rank, alpha, base = config.get("r"), config.get("lora_alpha", 8), config.get("base_model_name_or_path")
    if type(rank) is not int or not 1 <= rank <= _MOST_RANK:
        raise PeftError(f"{folder / CONFIG}: r={rank!r:.60}, expected an integer from 1 to {_MOST_RANK}")
    if not (is_number(alpha) and alpha > 0):
        raise PeftError(f"{folder / CONFIG}: lora_alpha={alpha!r:.60}, expected a number above 0")
    if base is not None and not isinstance(base, str):
        raise PeftError(f"{folder / CONFIG}: base_model_name_or_path={base!r:.60}, expected a name or null")
    revision = config.get("revision")
    base = join_revision(base, revision) if isinstance(base, str) and isinstance(revision, str) else base
    extra = [name for name in _UNSUPPORTED if config.get(name)]
    if extra or config.get("bias", "none") != "none":
        raise PeftError(f"{folder / CONFIG}: {', '.join(extra) or 'bias'} set; only plain LoRA is supported")
    if not (folder / WEIGHTS).is_file():
        raise PeftError(f"{folder / WEIGHTS} is missing; a PEFT adapter is a folder with {CONFIG} and {WEIGHTS}")
    v = _read_matrices(folder, rank)
    targets = tuple(Target(re.escape(path)) for path in v)
    training = folder / _TRAINING
    kept = read_json(training, _MAX_JSON_BYTES) if training.is_file() else {}
    sizes = {path: (pair["right"].shape[0], pair["left"].shape[0]) for path, pair in v.items()}
    spec = LoRA(rank, float(alpha), targets)
    if (seed := _frozen_seed(kept, v)) is not None:
        spec, v = replace(spec, seed=seed, freeze_a=True), {path: {"left": pair["left"]} for path, pair in v.items()}
    return LoRAFolder(folder, spec, v, sizes, base, kept, transfer)


def _frozen_seed(training: Mapping[str, Any], v: Matrices) -> int | None:
    """The seed of the frozen matrices A; None if A was trained, or another generator drew what is in the file."""
    seed = training.get("frozen_a")
    if type(seed) is not int or not 0 <= seed < 2**32:
        return None
    drawn = lambda path, A: frozen_right(path, seed, (), *A.shape)
    same = all(np.array_equal(drawn(path, pair["right"]), pair["right"]) for path, pair in v.items())
    return seed if same else None


def _read_matrices(folder: Path, rank: int) -> Matrices:
    found: dict[str, dict[str, Any]] = {}
    with open_safetensors(folder / WEIGHTS) as tensors:
        for name, tensor in tensors.items():
            match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", name)
            if match is None or not is_module(match[1]):
                raise PeftError(f"{folder} contains {name[:100]}, expected only LoRA matrices of linear maps of blocks")
            rank_axis = 0 if match[2] == "A" else 1
            if len(tensor.shape) != 2 or tensor.shape[rank_axis] != rank:
                raise PeftError(f"{folder}: {name} has shape {tensor.shape}, expected rank {rank} on axis {rank_axis}")
            values = np.asarray(tensor.read(), np.float32)
            if not np.isfinite(values).all():
                raise PeftError(f"{folder}: {name} holds numbers that are not finite; train the adapter again")
            side = "right" if match[2] == "A" else "left"
            found.setdefault(match[1], {})[side] = jnp.asarray(values.T if side == "right" else values)
    half = [name for name, pair in found.items() if len(pair) < 2]
    if half or not found:
        raise PeftError(f"{folder}: {', '.join(half[:3]) or 'the file'} has no pair of lora_A and lora_B")
    return {tree_path(name): found[name] for name in in_order(list(found))}
