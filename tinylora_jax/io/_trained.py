"""A trained adapter in any of the forms that are read: our own folder, or PEFT's TinyLoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors, Policy, TinyLoRA, combine, factorize, own_triplets
from tinylora_jax.io.adapter._file import AdapterReader, factors_of, read_adapter
from tinylora_jax.io.peft._tinylora import PeftError, is_peft, peft_factors, read_tinylora


@dataclass(frozen=True)
class SavedAdapter:
    """A trained adapter whose base model is not loaded yet.

    Attributes:
      folder: where it lies.
      v: the vector.
      base: name of the base model; None if the folder does not say.
      spec: rank, u, ties and adapted leaves.
      factors: gives the factors that v was trained with, from the base model's tree and a method for
        `truncated_svd`; refuses the tree of another model.
      dtype: dtype of the weights that v was trained on.
      about: the summary of its training; empty if there is none.
      kind: adapters of one base model and equal kind have the same factors.
      foreign: whether PEFT made the factors: their directions and P are then the file's, not ours.
    """

    folder: Path
    v: Float[Array, "groups u"]
    base: str | None
    spec: TinyLoRA
    factors: Callable[[Any, str], Factors]
    dtype: str = "float32"
    about: Mapping[str, Any] = field(default_factory=dict)
    kind: Hashable = None
    foreign: bool = False

    @property
    def template(self) -> str | None:
        """Name of the prompt template that it was trained with; None if the folder does not say."""
        config = self.about.get("config")
        name = config.get("template") if isinstance(config, dict) else None
        return name if isinstance(name, str) else None

    def own(self, params: Any, method: str = "auto") -> tuple[Factors, Float[Array, "groups u"]]:
        """Factors by our decomposition of the weights, and the vector: what our own files hold, see `own_triplets`.

        Raises:
          AdapterError, PeftError: the adapter is damaged, belongs to another model, or does not follow its weights'
            singular directions.
        """
        factors = self.factors(params, method)
        if not self.foreign:
            return factors, self.v
        try:
            return own_triplets(params, factors, self.v, method)
        except ValueError as error:
            raise PeftError(f"{self.folder} is not put in terms of the model's own factors: {error}") from error

    def policy(self, params: Any, method: str) -> Policy:
        """The base model's weights with the factors of this adapter."""
        return Policy(params, self.factors(params, method))


def open_adapter(folder: Path) -> SavedAdapter:
    """Reads an adapter without its base model; a folder with `adapter_config.json` is PEFT's.

    Raises:
      AdapterError, PeftError: a file is absent, damaged or altered, or holds something else.
    """
    if is_peft(folder):
        adapter = read_tinylora(folder)
        factors = lambda params, method: peft_factors(adapter, params)
        return SavedAdapter(folder, adapter.v, adapter.base, adapter.spec, factors, kind=folder.resolve(), foreign=True)
    spec, v, description = read_adapter(folder)
    factors = partial(factors_of, folder, spec, v, description)
    dtype = (description["base_fingerprint"] or {}).get("dtype")
    dtype = dtype if dtype in ("bfloat16", "float16") else "float32"
    about = description.get("about")
    about = about if isinstance(about, dict) else {}
    kind = spec, json.dumps(description["factors"], sort_keys=True)
    return SavedAdapter(folder, v, description["base"], spec, factors, dtype, about, kind)


def read_together(params: Any, adapters: Sequence[SavedAdapter]) -> tuple[Factors, list[np.ndarray]]:
    """Adapters of one base model, ours and PEFT's, for one batch.

    Args:
      params: the base model's tree.
      adapters: adapters of one rank that adapt the same leaves.

    Returns:
      Factors, and each adapter's vector of them, NumPy float32 `[groups, u]`, see `combine`.

    Raises:
      AdapterError, PeftError: an adapter is damaged or belongs to another base model.
      CombinationError: they cannot share a batch.
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
            reader = AdapterReader(params, factorize(params, first.spec))
            read = [(adapter.folder, reader.read(adapter.folder)) for adapter in alike]
            found |= {folder: (reader.factors, v) for folder, v in read}
    return combine([found[adapter.folder] for adapter in adapters])
