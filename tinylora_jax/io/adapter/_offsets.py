"""Reads and writes trained offsets: steering vectors, biases and the scales of norms.

`offsets.safetensors` contains one float32 vector per leaf path, and nothing else. `offsets.json` contains the SHA-256
of that file, the fingerprint of the base model, so that loading onto another one fails, and a summary of the training.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tinylora_jax.adapters import OffsetPolicy, Offsets, Target
from tinylora_jax.adapters.offsets import Vectors
from tinylora_jax.files import parse_json, write_atomically
from tinylora_jax.io.adapter._description import MAX_JSON_BYTES, AdapterError, check_fingerprint, read_at_most
from tinylora_jax.io.adapter._file import check_base
from tinylora_jax.io.hf._quantizing import as_trained
from tinylora_jax.multihost import to_host

OFFSETS = "offsets.json"
_TENSORS = "offsets.safetensors"
_FORMAT, _VERSION = "tinylora_jax offsets", 1
_MAX_BYTES = 2**31  # of the vectors; those of all maps of a 70B model take 15 MB


@dataclass(frozen=True)
class SavedOffsets:
    """Trained offsets whose base model is not loaded yet.

    Attributes:
      folder: folder of the adapter.
      v: vectors, float32, by leaf path.
      base: name of the base model; None if the folder does not state it.
      fingerprint: `base_fingerprint` of the base model; None if unknown.
      transfer: whether a quantized base in training may be replaced by the same base in 16 bit.
      about: summary of the training; empty if there is none.
    """

    folder: Path
    v: Vectors
    base: str | None
    fingerprint: Mapping[str, Any] | None = None
    transfer: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> Offsets:
        """The spec that selects exactly the leaves of the folder."""
        targets = tuple(Target(re.escape(path)) for path in self.v)
        return Offsets(targets, "both")

    @property
    def dtype(self) -> str:
        """The dtype of the weights on which v was trained."""
        found = (self.fingerprint or {}).get("dtype")
        return found if found in ("bfloat16", "float16") else "float32"

    @property
    def quantize(self) -> str:
        """The storage of the weights on which v was trained, as for `load_pretrained`."""
        return (self.fingerprint or {}).get("quantize", "none")

    @property
    def template(self) -> str | None:
        """Name of the prompt template used in training; None if the folder does not state it."""
        return template_of(self.about)

    @property
    def shape(self) -> tuple[str, Any]:
        """Words for what a batch can contain together with it, and a key that is then equal: any offsets."""
        return "offsets", "offsets"

    def policy(self, params: Any, method: str = "auto") -> OffsetPolicy:
        """Builds the policy of the base model and these vectors; `method` is not used.

        Raises:
          AdapterError: the adapter belongs to another model.
        """
        policy = OffsetPolicy(params, self.spec)
        try:
            expected = {path: x.shape for path, x in policy.init().items()}
        except ValueError as error:
            raise AdapterError(f"{self.folder} does not fit this model: {error}") from error
        wrong = [path for path, x in self.v.items() if expected[path] != x.shape]
        if wrong:
            found = f"{self.v[wrong[0]].shape}, but the base model needs {expected[wrong[0]]}"
            raise AdapterError(f"{self.folder}: the offset of {wrong[0]} has shape {found}; load its own base model")
        if self.fingerprint is not None:
            weights = as_trained(params, self.fingerprint, self.transfer)
            check_base({"base": self.base, "base_fingerprint": self.fingerprint}, weights)
        return policy


def template_of(about: Mapping[str, Any]) -> str | None:
    """Name of the prompt template in the summary of a training; None if it is not stated."""
    config = about.get("config")
    name = config.get("template") if isinstance(config, dict) else None
    return name if isinstance(name, str) else None


def save_offsets(
    folder: Path, v: Vectors, base: str, fingerprint: Mapping[str, Any] | None = None, **about: Any
) -> None:
    """Writes trained offsets.

    Args:
      folder: output folder, created if absent.
      v: vectors by leaf path, float32.
      base: name of the base model.
      fingerprint: fingerprint of the base weights, from `base_fingerprint`.
      **about: JSON-serializable summary of the training.
    """
    data = save({path: np.ascontiguousarray(x, np.float32) for path, x in to_host(v).items()})
    description = {
        "format": _FORMAT,
        "format_version": _VERSION,
        "base": base,
        "sha256": hashlib.sha256(data).hexdigest(),
        "about": about,
        "base_fingerprint": fingerprint,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _TENSORS, data)
    write_atomically(folder / OFFSETS, json.dumps(description, indent=1, allow_nan=False) + "\n")


def is_offsets(folder: Path) -> bool:
    """Whether a folder contains trained offsets."""
    return (folder / OFFSETS).is_file()


def read_offsets(folder: Path, transfer: bool = False) -> SavedOffsets:
    """Reads trained offsets without their base model; for `transfer` see `open_adapter`.

    Raises:
      AdapterError: a file is absent, damaged, altered or of another kind.
    """
    path = folder / OFFSETS
    text = read_at_most(path, MAX_JSON_BYTES, absent="", larger=f"{MAX_JSON_BYTES} bytes; is it a description?")
    try:
        description = parse_json(text)
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        raise AdapterError(f"{path} does not describe offsets: expected the format {_FORMAT!r}")
    if description.get("format_version") != _VERSION:
        found = f"{description.get('format_version')!r:.50}"
        raise AdapterError(f"{path} has format version {found}; this library reads {_VERSION}")
    base, fingerprint, about = (description.get(name) for name in ("base", "base_fingerprint", "about"))
    for name, value, kind in (("base", base, str), ("base_fingerprint", fingerprint, dict), ("about", about, dict)):
        if not (value is None or isinstance(value, kind)):
            raise AdapterError(f"{path}: {name} is {value!r:.60}, expected {kind.__name__} or null; copy it again")
    if fingerprint is not None:
        try:
            check_fingerprint(fingerprint)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise AdapterError(f"{path} is malformed ({type(error).__name__}: {error}); copy it again") from error
    v = _read_vectors(folder / _TENSORS, description.get("sha256"))
    return SavedOffsets(folder, v, base, fingerprint, transfer, about or {})


def _read_vectors(path: Path, sha256: Any) -> Vectors:
    data = read_at_most(path, _MAX_BYTES, absent=f"; offsets are this file and {OFFSETS}", larger="any set of offsets")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise AdapterError(f"{path} was altered: its SHA-256 is not the one in {OFFSETS}; copy both again")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged ({error}); copy it again") from error
    if not tensors:
        raise AdapterError(f"{path} contains no vectors; train the adapter again")
    for name, x in tensors.items():
        if x.dtype != np.float32 or x.ndim not in (1, 2) or not x.size:
            raise AdapterError(f"{path}: {name:.100} is {x.shape} {x.dtype}, expected a float32 vector")
        if not np.isfinite(x).all():
            raise AdapterError(f"{path}: {name:.100} holds numbers that are not finite; train the adapter again")
    return {name: jnp.asarray(x) for name, x in tensors.items()}
