"""Saves trained parameters of any method to a folder, and loads them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinylora_jax.adapters import Adapted, FullPolicy, LoRAPolicy, OffsetPolicy, Policy
from tinylora_jax.adapters.policy import Trained
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.io._pretrained import Pretrained, load_pretrained
from tinylora_jax.io._trained import open_saved
from tinylora_jax.io.adapter._file import AdapterError, save_adapter
from tinylora_jax.io.adapter._offsets import save_offsets
from tinylora_jax.io.hf._export import write_model
from tinylora_jax.io.hf._hub_adapters import adapter_folder
from tinylora_jax.io.peft._lora import is_lora, read_lora, save_lora
from tinylora_jax.multihost import to_host


@dataclass(frozen=True)
class SavedPolicy:
    """Trained parameters whose base model is not loaded yet.

    Attributes:
      v: trained parameters, the argument of the policy.
      base: name of the base model; None if the folder does not state it.
      policy: function from the base model's tree and an SVD method to the policy; raises for the tree of another model.
    """

    v: Trained
    base: str | None
    policy: Callable[[Any, str], Adapted]


def save_trained(
    folder: Path,
    model: Pretrained,
    policy: Adapted,
    v: Trained,
    fingerprint: Mapping[str, Any],
    dtype: str = "bfloat16",
    **about: Any,
) -> Trained:
    """Writes trained parameters in a format that other tools can load too.

    TinyLoRA and LoRA-XS give `vector.bin` and `adapter.json`, offsets `offsets.safetensors` and `offsets.json`, LoRA a
    PEFT folder, and full fine-tuning a float32 model folder.

    Args:
      folder: output folder, created, or replaced if it holds the same kind.
      model: base model.
      policy: policy whose v was trained.
      v: trained parameters.
      fingerprint: fingerprint of the base weights, from `base_fingerprint`.
      dtype: dtype of `vector.bin`.
      **about: JSON-serializable summary of the training.

    Returns:
      v as stored in the folder.
    """
    _write(policy, folder, model, v, fingerprint, dtype, about)
    return open_trained(folder).v


_About = Mapping[str, Any]


@singledispatch
def _write(
    policy: Adapted, folder: Path, model: Pretrained, v: Trained, fingerprint: _About, dtype: str, about: _About
) -> None:
    """Writes v of a policy; new kinds of policies register their own writer."""
    raise TypeError(f"there is no file format for a {type(policy).__name__}")


@_write.register
def _write_vector(
    policy: Policy, folder: Path, model: Pretrained, v: Trained, fingerprint: _About, dtype: str, about: _About
) -> None:
    save_adapter(folder, to_host(policy.factors), jnp.asarray(v), model.name, dtype, fingerprint, **about)


@_write.register
def _write_matrices(
    policy: LoRAPolicy, folder: Path, model: Pretrained, v: Trained, fingerprint: _About, dtype: str, about: _About
) -> None:
    save_lora(folder, policy.spec, policy.matrices(v), model.name, fingerprint, **about)


@_write.register
def _write_offsets(
    policy: OffsetPolicy, folder: Path, model: Pretrained, v: Trained, fingerprint: _About, dtype: str, about: _About
) -> None:
    save_offsets(folder, v, model.name, fingerprint, **about)


@_write.register
def _write_weights(
    policy: FullPolicy, folder: Path, model: Pretrained, v: Trained, fingerprint: _About, dtype: str, about: _About
) -> None:
    fresh = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(fresh, ignore_errors=True)  # left by a run that was killed here
    fresh.mkdir(parents=True)
    write_model(fresh, model, lambda path, leaf: v[path])
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def open_trained(folder: Path | str, transfer: bool = False) -> SavedPolicy:
    """Opens a folder written by `save_trained`, a PEFT folder of LoRA or TinyLoRA, or a model folder.

    Args:
      folder: folder of the trained parameters, or their name on the hub, such as `hub:owner/name@revision`.
      transfer: whether parameters that were trained on a quantized base may be used with the same base in 16 bit.

    Raises:
      AdapterError, PeftError, ValueError: a file is absent, damaged, altered or of another kind.
      FileNotFoundError: the hub has no such adapter, or cannot be reached.
    """
    folder = adapter_folder(folder)
    if is_lora(folder):
        lora = read_lora(folder, transfer)
        return SavedPolicy(lora.v, lora.base, lora.policy)
    if (folder / "config.json").is_file():
        tree = load_pretrained(str(folder), jnp.float32).params
        v = leaves_by_path(tree)
        return SavedPolicy(v, None, lambda params, method: _full_policy(folder, params, v))
    adapter = open_saved(folder, transfer)
    return SavedPolicy(adapter.v, adapter.base, adapter.policy)


def _full_policy(folder: Path, params: Any, v: Mapping[str, jax.Array]) -> FullPolicy:
    expected = {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}
    found = {path: np.shape(leaf) for path, leaf in v.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        raise AdapterError(f"{folder} has weights of another architecture: {wrong[0][0]} and {len(wrong) - 1} more")
    return FullPolicy(params)
