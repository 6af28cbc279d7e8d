"""A trained adapter in any of the forms that are read: our own folder, or PEFT's TinyLoRA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors, Policy
from tinylora_jax.io.adapter_file import factors_of, read_adapter
from tinylora_jax.io.peft import is_peft, peft_factors, read_tinylora


@dataclass(frozen=True)
class Trained:
    """A trained adapter whose base model is not loaded yet.

    Attributes:
      v: the vector.
      base: name of the base model; None if the folder does not say.
      factors: gives the factors that v was trained with, from the base model's tree and a method for
        `truncated_svd`; refuses the tree of another model.
      dtype: of the weights that v was trained on.
    """

    v: Float[Array, "groups u"]
    base: str | None
    factors: Callable[[Any, str], Factors]
    dtype: str = "float32"

    def policy(self, params: Any, method: str) -> Policy:
        """The base model's weights with the factors of this adapter."""
        return Policy(params, self.factors(params, method))


def open_adapter(folder: Path) -> Trained:
    """Reads an adapter without its base model; a folder with `adapter_config.json` is PEFT's.

    Raises:
      AdapterError, PeftError: a file is absent, damaged or altered, or holds something else.
    """
    if is_peft(folder):
        adapter = read_tinylora(folder)
        return Trained(adapter.v, adapter.base, lambda params, method: peft_factors(adapter, params))
    spec, v, description = read_adapter(folder)
    factors = partial(factors_of, folder, spec, v, description)
    dtype = (description["base_fingerprint"] or {}).get("dtype")
    return Trained(v, description["base"], factors, dtype if dtype in ("bfloat16", "float16") else "float32")
