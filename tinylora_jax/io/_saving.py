"""What was trained, by whatever method, as a folder and back."""

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

from tinylora_jax.adapters import Adapted, FullPolicy, LoRAPolicy, Policy
from tinylora_jax.adapters.policy import Trained
from tinylora_jax.adapters.targets import leaves_by_path
from tinylora_jax.io._pretrained import Pretrained, load_pretrained
from tinylora_jax.io._trained import open_adapter
from tinylora_jax.io.adapter._file import AdapterError, save_adapter
from tinylora_jax.io.hf._export import write_model
from tinylora_jax.io.peft._lora import is_lora, read_lora, save_lora
from tinylora_jax.multihost import to_host


@dataclass(frozen=True)
class SavedPolicy:
    """What was trained, before its base model is loaded.

    Attributes:
      v: what `policy` gives the weights at.
      base: name of the base model; None if the folder does not say.
      policy: from the base model's tree and a method for `truncated_svd`; refuses the tree of another model.
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
    """Writes what was trained in the form that others load too.

    TinyLoRA and LoRA-XS: `vector.bin` and `adapter.json`; LoRA: a PEFT folder; all weights: a model folder in float32.

    Args:
      folder: made, or replaced if it holds the same kind.
      model: the base model.
      policy: policy whose v was trained.
      v: what was trained.
      fingerprint: fingerprint of the base weights, from `base_fingerprint`.
      dtype: dtype of `vector.bin`.
      **about: JSON-serializable; a summary of the training.

    Returns:
      v as the folder holds it.
    """
    _write(policy, folder, model, v, fingerprint, dtype, about)
    return open_trained(folder).v


_About = Mapping[str, Any]


@singledispatch
def _write(
    policy: Adapted, folder: Path, model: Pretrained, v: Trained, fingerprint: _About, dtype: str, about: _About
) -> None:
    """Writes v of a policy; a further kind of policy registers its own way."""
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
    save_lora(folder, policy.spec, v, model.name, fingerprint, **about)


@_write.register
def _write_weights(
    policy: FullPolicy, folder: Path, model: Pretrained, v: Trained, fingerprint: _About, dtype: str, about: _About
) -> None:
    fresh = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed here
    fresh.mkdir(parents=True)
    write_model(fresh, model, lambda path, leaf: v[path])
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def open_trained(folder: Path) -> SavedPolicy:
    """Opens what `save_trained` wrote, a PEFT folder of LoRA or TinyLoRA, or a model folder.

    Raises:
      AdapterError, PeftError, ValueError: a file is absent, damaged or altered, or holds something else.
    """
    if is_lora(folder):
        lora = read_lora(folder)
        return SavedPolicy(lora.v, lora.base, lora.policy)
    if (folder / "config.json").is_file():
        tree = load_pretrained(str(folder), jnp.float32).params
        v = leaves_by_path(tree)
        return SavedPolicy(v, None, lambda params, method: _full_policy(folder, params, v))
    adapter = open_adapter(folder)
    return SavedPolicy(adapter.v, adapter.base, adapter.policy)


def _full_policy(folder: Path, params: Any, v: Mapping[str, jax.Array]) -> FullPolicy:
    expected = {path: np.shape(leaf) for path, leaf in leaves_by_path(params).items()}
    found = {path: np.shape(leaf) for path, leaf in v.items()}
    if expected != found:
        wrong = sorted(set(expected.items()) ^ set(found.items()))
        raise AdapterError(f"{folder} holds another architecture's weights: {wrong[0][0]} and {len(wrong) - 1} more")
    return FullPolicy(params)
