"""A trained adapter on disk: 26 bytes of vector, and a readable file that says what they mean.

`vector.bin` holds the vector alone, row by row, little-endian bfloat16 or float32. `adapter.json` holds the
spec, the base model's name and a few probes per module, by which a load is refused when the base weights or
their factors are not those that the vector was trained with.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors, Target, TinyLoRA
from tinylora_jax.adapters.projections import standard_normals

FORMAT_VERSION = 1
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}
_MAX_JSON_BYTES = 2**24
_NUM_PROBES = 6
# Of a module's size. After a flipped sign, one probe in six differs by less, hardly ever all six.
_PROBE_TOLERANCE = 0.1


class AdapterError(ValueError):
    """An adapter cannot be read, or does not belong to this base model."""


@lru_cache(maxsize=64)
def _directions(side: str, size: int) -> np.ndarray:
    directions = standard_normals(f"probe:{side}", _NUM_PROBES * size).reshape(_NUM_PROBES, size)
    return directions / np.linalg.norm(directions, axis=1, keepdims=True)


def probes(factors: Factors) -> dict[str, list[list[float]]]:
    """A few numbers per module that any change of its factors changes.

    The first ones are hᵤᵀ ΔW hᵥ · √(in · out) for fixed unit directions hᵤ, hᵥ and v = 1, of the order of the
    last, ‖ΔW‖.

    Args:
      factors: of a model.

    Returns:
      By leaf path, one row per layer.
    """
    result = {}
    for path, leaf in factors.leaves.items():
        U, S, V, P = (np.asarray(x, np.float64) for x in (leaf.U, leaf.S, leaf.V, leaf.P))
        middle = S[:, :, None] * P.sum(axis=1)
        size = np.linalg.norm(middle, axis=(1, 2))  # U and V are orthonormal
        left = np.einsum("lor,ko->lkr", U, _directions("out", U.shape[1]))
        right = np.einsum("lir,ki->lkr", V, _directions("in", V.shape[1]))
        values = np.einsum("lkr,lrs,lks->lk", left, middle, right) * np.sqrt(U.shape[1] * V.shape[1])
        result[path] = np.concatenate([values, size[:, None]], axis=1).tolist()
    return result


def save_adapter(
    folder: Path, factors: Factors, v: Float[Array, "groups u"], base: str, dtype: str = "bfloat16", **about: Any
) -> None:
    """Writes `vector.bin` and `adapter.json`.

    Args:
      folder: created if absent.
      factors: that v was trained with.
      v: the vector.
      base: name of the base model.
      dtype: `bfloat16` (two bytes a number) or `float32`.
      **about: anything JSON can hold, kept for readers under "about".
    """
    data = np.asarray(v, np.float32).astype(_DTYPES[dtype]).tobytes()
    spec = dataclasses.asdict(factors.spec)
    description = {
        "format": "tinylora",
        "format_version": FORMAT_VERSION,
        "base": base,
        "dtype": dtype,
        "shape": list(v.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
        "spec": spec,
        "about": about,
        "probes": probes(factors),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vector.bin").write_bytes(data)
    (folder / "adapter.json").write_text(json.dumps(description, indent=1) + "\n")


def read_adapter(folder: Path) -> tuple[TinyLoRA, Float[Array, "groups u"], dict[str, Any]]:
    """Reads an adapter without its base model.

    Args:
      folder: holds `vector.bin` and `adapter.json`.

    Returns:
      The spec, the vector as float32, and the description; `check_factors` tells whether they fit a model.

    Raises:
      AdapterError: a file is absent, malformed, truncated or altered.
    """
    spec, v, description = _read(folder, _read_bytes(folder / "adapter.json"))
    return spec, jnp.asarray(v), description


def _read(folder: Path, text: bytes) -> tuple[TinyLoRA, Float[np.ndarray, "groups u"], dict[str, Any]]:
    description = _description(folder / "adapter.json", text)
    try:
        fields = dict(description["spec"])
        fields["targets"] = tuple(Target(**target) for target in fields["targets"])
        if type(fields["seed"]) is not int:
            raise TypeError(f"seed {fields['seed']!r} is not an integer")
        spec = TinyLoRA(**fields)
        dtype, shape, digest = _DTYPES[description["dtype"]], tuple(description["shape"]), description["sha256"]
        if len(shape) != 2 or any(type(size) is not int or size < 1 for size in shape) or shape[1] != spec.u:
            raise ValueError(f"shape {shape} is not [groups, u={spec.u}]")
        if not isinstance(description["probes"], dict):
            raise TypeError("probes are not an object")
    except (AttributeError, KeyError, TypeError, ValueError, re.error) as error:
        problem = f"{type(error).__name__}: {error}"
        raise AdapterError(f"{folder / 'adapter.json'} is malformed ({problem}); export the adapter again") from error
    path = folder / "vector.bin"
    if not path.is_file():
        raise AdapterError(f"{path} is missing; an adapter is vector.bin and adapter.json in one folder")
    expected, found = dtype.itemsize * math.prod(shape), path.stat().st_size
    if found != expected:
        raise AdapterError(f"{path} has {found} bytes, expected {expected} for {shape} {dtype}; copy it again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != digest:
        raise AdapterError(f"{path} was altered: its SHA-256 is not the one in adapter.json; copy it again")
    v = np.frombuffer(data, dtype).astype(np.float32).reshape(shape)
    if not np.isfinite(v).all():
        raise AdapterError(f"{path} holds numbers that are not finite; train the adapter again")
    return spec, v, description


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise AdapterError(f"{path} is missing; an adapter is a folder with vector.bin and adapter.json")
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise AdapterError(f"{path} is larger than {_MAX_JSON_BYTES} bytes; is it an adapter's description?")
    return path.read_bytes()


def _description(path: Path, text: bytes) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(description, dict) or description.get("format") != "tinylora":
        raise AdapterError(f"{path} does not describe a TinyLoRA adapter")
    if description.get("format_version") != FORMAT_VERSION:
        found = description.get("format_version")
        raise AdapterError(f"{path} has format version {found!r}; this library reads {FORMAT_VERSION}")
    return description


class AdapterReader:
    """Reads many adapters of one base model, whose factors are probed once.

    The probes are nearly all of an `adapter.json`, and those of adapters trained alike are the same bytes: when they
    are the last ones that fitted, they are not parsed again.
    """

    def __init__(self, factors: Factors):
        self._spec = factors.spec
        self._shape = (factors.num_groups, factors.spec.u)
        self._probes = probes(factors)
        self._fitting: bytes | None = None

    def read(self, folder: Path) -> Float[np.ndarray, "groups u"]:
        """The vector of an adapter, float32; stacked, `[rows, groups, u]`, they give each row its own.

        Raises:
          AdapterError: the adapter is damaged, or belongs to other factors than these.
        """
        text = _read_bytes(folder / "adapter.json")
        head, key, tail = text.rpartition(b'"probes":')
        known = tail == self._fitting
        # In any other place than the end of the outermost object this would not be JSON.
        spec, v, description = _read(folder, head + key + b"{}}" if known else text)
        if spec != self._spec:
            raise AdapterError(f"{folder} was trained with {spec}, the factors are those of {self._spec}")
        if v.shape != self._shape:
            raise AdapterError(f"{folder}: vector of shape {v.shape} does not fit its own spec {spec}")
        if not known:
            try:
                _check_probes(description, self._probes)
            except AdapterError as error:
                raise AdapterError(f"{folder}: {error}") from error
            self._fitting = tail if key else None
        return v


def check_fit(
    folder: Path, spec: TinyLoRA, v: Float[Array, "groups u"], description: dict[str, Any], factors: Factors
) -> None:
    """Refuses what `read_adapter` read from a folder if it does not belong to these factors.

    Raises:
      AdapterError: the factors are others, or the vector has not their shape.
    """
    check_factors(description, factors)
    if v.shape != (factors.num_groups, factors.spec.u):
        raise AdapterError(f"{folder}: vector of shape {v.shape} does not fit its own spec {spec}")


def check_factors(description: dict[str, Any], factors: Factors) -> None:
    """Refuses factors other than those that an adapter was trained with.

    Raises:
      AdapterError: names the modules that differ.
    """
    _check_probes(description, probes(factors))


def _check_probes(description: dict[str, Any], found: dict[str, list[list[float]]]) -> None:
    stored = description["probes"]
    if set(stored) != set(found):
        differ = sorted(set(stored) ^ set(found))
        raise AdapterError(f"the adapter's modules are not this model's; they differ in {', '.join(differ[:3])}, …")
    wrong = []
    for path, rows in found.items():
        try:
            ours = np.asarray(rows)
            theirs = np.asarray(stored[path], np.float64).reshape(ours.shape)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the adapter's probe of {path} is malformed: {error}") from error
        if not np.all(np.abs(ours - theirs) <= _PROBE_TOLERANCE * ours[:, -1:] + 1e-6):
            wrong.append(path)
    if wrong:
        raise AdapterError(
            f"the adapter was trained on {description.get('base')!r}, whose factors differ from this model's in"
            f" {len(wrong)} of {len(found)} weights ({', '.join(wrong[:3])}, …); load it with its own base model"
        )
