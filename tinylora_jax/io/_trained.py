"""Reads a trained adapter in any supported format: this project's folders, or PEFT's TinyLoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import (
    Factors,
    OffsetPolicy,
    Policy,
    Space,
    TinyLoRA,
    Trained,
    combine,
    factorize,
    own_triplets,
    retied,
)
from tinylora_jax.adapters.offsets import union
from tinylora_jax.io.adapter._description import AdapterError
from tinylora_jax.io.adapter._file import AdapterReader, factors_of, read_adapter
from tinylora_jax.io.adapter._offsets import SavedOffsets, is_offsets, read_offsets, template_of
from tinylora_jax.io.hf._hub_adapters import adapter_folder
from tinylora_jax.io.hf._quantizing import as_trained
from tinylora_jax.io.peft._tinylora import PeftError, is_peft, peft_factors, read_tinylora, written_spec


@dataclass(frozen=True)
class SavedAdapter:
    """A trained adapter whose base model is not loaded yet.

    Attributes:
      folder: folder of the adapter.
      v: trained vector, float32 `[groups, u]`.
      base: name of the base model; None if the folder does not state it.
      spec: rank, u, tying and adapted leaves.
      factors: function from the base model's tree and an SVD method to the factors with which v was trained; raises for
        the tree of another model.
      dtype: dtype of the weights on which v was trained.
      quantize: storage of the weights on which v was trained, as for `load_pretrained`.
      about: summary of the training; empty if there is none.
      kind: key that is equal for adapters of one base model with the same factors.
      source: function from the base model's tree to the tree from which the factors are computed; another one only for
        an adapter that is transferred from a quantized base.
      foreign: whether PEFT created the factors, so that directions and P come from the file.
      written: spec from which an export wrote a PEFT folder; None for other folders.
    """

    folder: Path
    v: Float[Array, "groups u"]
    base: str | None
    spec: TinyLoRA
    factors: Callable[[Any, str], Factors]
    dtype: str = "float32"
    quantize: str = "none"
    about: Mapping[str, Any] = field(default_factory=dict)
    kind: Hashable = None
    source: Callable[[Any], Any] = lambda params: params
    foreign: bool = False
    written: TinyLoRA | None = None

    @property
    def template(self) -> str | None:
        """Name of the prompt template used in training; None if the folder does not state it."""
        return template_of(self.about)

    @property
    def shape(self) -> tuple[str, Hashable]:
        """Words for what a batch can contain together with it, and a key that is then equal: rank and leaves."""
        return f"rank {self.spec.rank} and {len(self.spec.targets)} weights", (self.spec.rank, set(self.spec.targets))

    def own(self, params: Any, method: str = "auto") -> tuple[Factors, Float[Array, "groups u"]]:
        """Factors from this library's decomposition of the weights, and the vector, see `own_triplets`.

        Raises:
          AdapterError, PeftError: the adapter is damaged, belongs to another model, or does not use the singular
            directions of the weights.
        """
        factors = self.factors(params, method)
        if not self.foreign:
            return factors, self.v
        if self.written is not None and (found := retied(params, factors, self.v, self.written, method)) is not None:
            return found
        try:
            return own_triplets(params, factors, self.v, method)
        except ValueError as error:
            raise PeftError(f"{self.folder} cannot be expressed in the model's own factors: {error}") from error

    def policy(self, params: Any, method: str) -> Policy:
        """Builds the policy of the base model's weights and this adapter's factors."""
        return Policy(params, self.factors(params, method))


def open_saved(folder: Path | str, transfer: bool = False) -> SavedAdapter | SavedOffsets:
    """Opens what `open_adapter` opens, or trained offsets; both can share a batch with others of their kind.

    Raises:
      AdapterError, PeftError, FileNotFoundError: as for `open_adapter`.
    """
    found = adapter_folder(folder)
    return read_offsets(found, transfer) if is_offsets(found) else open_adapter(found, transfer)


def open_adapter(folder: Path | str, transfer: bool = False) -> SavedAdapter:
    """Reads an adapter without its base model; a folder with `adapter_config.json` is a PEFT folder.

    Args:
      folder: folder of the adapter, or its name on the hub, such as `hub:owner/name@revision`.
      transfer: whether an adapter that was trained on a quantized base may be used with the same base in 16 bit. It
        gives the same ΔW there: its factors are computed from the weights quantized again.

    Raises:
      AdapterError, PeftError: a file is absent, damaged, altered or of another kind.
      FileNotFoundError: the hub has no such adapter, or cannot be reached.
    """
    folder = adapter_folder(folder)
    if is_offsets(folder):
        raise AdapterError(
            f"{folder} holds offsets (steering, bias or norm), but a TinyLoRA adapter is expected here; evaluate,"
            " generate and export accept offsets"
        )
    if is_peft(folder):
        adapter = read_tinylora(folder)
        factors = lambda params, method: peft_factors(adapter, params)
        parts = (folder, adapter.v, adapter.base, adapter.spec, factors)
        return SavedAdapter(*parts, kind=folder.resolve(), foreign=True, written=written_spec(folder))
    spec, v, description = read_adapter(folder)
    fingerprint = description["base_fingerprint"] or {}
    dtype, quantize = fingerprint.get("dtype"), fingerprint.get("quantize", "none")

    source = lambda params: as_trained(params, fingerprint, transfer)
    factors = lambda params, method: factors_of(folder, spec, v, description, source(params), method)

    dtype = dtype if dtype in ("bfloat16", "float16") else "float32"
    about = description.get("about")
    about = about if isinstance(about, dict) else {}
    kind = spec, json.dumps(description["factors"], sort_keys=True), quantize
    return SavedAdapter(folder, v, description["base"], spec, factors, dtype, quantize, about, kind, source=source)


def policy_together(params: Any, adapters: Sequence[SavedAdapter | SavedOffsets]) -> tuple[Space, list[Trained]]:
    """Reads several adapters of one base model, or several sets of offsets, for use in one batch.

    Args:
      params: weights of the base model.
      adapters: adapters of equal `shape`.

    Returns:
      The policy whose space contains them, and each one's v in it, as NumPy arrays.

    Raises:
      AdapterError, PeftError, CombinationError: as for `read_together`.
    """
    offsets = [adapter for adapter in adapters if isinstance(adapter, SavedOffsets)]
    if not offsets:
        factors, vectors = read_together(params, [each for each in adapters if isinstance(each, SavedAdapter)])
        return Policy(params, factors), vectors
    policies = [adapter.policy(params) for adapter in offsets]
    joint = OffsetPolicy(params, union([policy.spec for policy in policies]))
    points = [joint.point(policy, adapter.v) for policy, adapter in zip(policies, offsets, strict=True)]
    return joint, [jax.tree.map(np.asarray, point) for point in points]


def read_together(params: Any, adapters: Sequence[SavedAdapter]) -> tuple[Factors, list[np.ndarray]]:
    """Reads several adapters of one base model, in either format, for use in one batch.

    Args:
      params: weights of the base model.
      adapters: adapters with the same rank and adapted leaves.

    Returns:
      Common factors, and each adapter's vector for them, NumPy float32 `[groups, u]`; see `combine`.

    Raises:
      AdapterError, PeftError: an adapter is damaged or belongs to another base model.
      CombinationError: the adapters cannot share a batch.
    """
    kinds: dict[Hashable, list[SavedAdapter]] = {}
    for adapter in adapters:
        kinds.setdefault(adapter.kind, []).append(adapter)
    found: dict[Path, tuple[Factors, Any]] = {}
    for alike in kinds.values():
        first = alike[0]
        if first.foreign:
            pair = first.own(params) if len(kinds) > 1 else (first.factors(params, "auto"), first.v)
            found |= {adapter.folder: pair for adapter in alike}
        else:
            weights = first.source(params)
            reader = AdapterReader(weights, factorize(weights, first.spec))
            read = [(adapter.folder, reader.read(adapter.folder)) for adapter in alike]
            found |= {folder: (reader.factors, v) for folder, v in read}
    return combine([found[adapter.folder] for adapter in adapters])
