"""Reads and writes trained adapters: a vector of 26 bytes and a human-readable description.

`vector.bin` contains only the vector. `adapter.json` contains the spec, the adapted weights and their tie groups, and
fingerprints that make loading fail if the base model or its factors differ from those in training. If a weight does not
determine its factors, or another generator produced P, `factors.safetensors` contains them. ADAPTER_FORMAT.md describes
all three files.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float

from tinylora_jax.adapters import Factors, TinyLoRA, factorize, scheme_of
from tinylora_jax.adapters.targets import natural
from tinylora_jax.files import open_regular, parse_json, write_atomically
from tinylora_jax.io.adapter._description import (
    DTYPES,
    MAX_JSON_BYTES,
    AdapterError,
    describe_spec,
    parse_description,
    parse_text,
    read_text,
    readable,
    structure_sha256,
    tables_sha256,
    version_of,
    whole_sha256,
)
from tinylora_jax.io.adapter._fingerprint import base_fingerprint, differences, probes
from tinylora_jax.io.adapter._own_factors import FACTORS, pack_factors, unpack_factors

_VECTOR, _DESCRIPTION = "vector.bin", "adapter.json"
_TABLES = b'\n "leaves":'
# Tolerance relative to a module's size. After a flipped sign, about one probe in six differs by less, but almost never
# all six.
_PROBE_TOLERANCE = 0.1


def save_adapter(
    folder: Path,
    factors: Factors,
    v: Float[Array, "groups u"],
    base: str,
    dtype: str = "bfloat16",
    fingerprint: Mapping[str, Any] | None = None,
    **about: Any,
) -> None:
    """Writes `vector.bin`, `adapter.json` and, for factors that cannot be recomputed, `factors.safetensors`.

    Args:
      folder: output folder, created if absent.
      factors: factors with which v was trained.
      v: trained vector, float32 `[groups, u]`.
      base: name of the base model.
      dtype: dtype of the file, `bfloat16` (two bytes per number) or `float32`.
      fingerprint: `base_fingerprint` of the base model; without it, loading compares only the factors.
      **about: JSON-serializable values, stored under "about" for information.

    Raises:
      AdapterError: the description would exceed the size limit of readers.
    """
    data = np.asarray(v, np.float32).astype(DTYPES[dtype]).tobytes()
    kept, packed = pack_factors(factors)
    description = {
        "format": "tinylora",
        "format_version": version_of(kept),
        "base": base,
        "dtype": dtype,
        "shape": list(v.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
        "spec": describe_spec(factors.spec),
        "factors": kept,
        "about": about,
        "structure_sha256": "",
        "description_sha256": "",
        "leaves": _describe_leaves(factors),
        "base_fingerprint": fingerprint,
    }
    description = parse_json(readable(description))  # as a reader will see it: lists instead of tuples, and string keys
    description["structure_sha256"] = structure_sha256(description)
    description["description_sha256"] = whole_sha256(description, tables_sha256(description))
    text = readable(description).encode()
    if len(text) > MAX_JSON_BYTES:
        raise AdapterError(f"the description has {len(text)} bytes, the limit is {MAX_JSON_BYTES}; shorten `about`")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _VECTOR, data)
    if kept is None:
        (folder / FACTORS).unlink(missing_ok=True)
    else:
        write_atomically(folder / FACTORS, packed)
    write_atomically(folder / _DESCRIPTION, text)


def _describe_leaves(factors: Factors) -> list[dict[str, Any]]:
    """Describes each leaf, ordered so that `select` finds the modules in the same order by their plain paths."""
    values = probes(factors)
    order = {target: rank for rank, target in enumerate(factors.spec.targets)}
    return [
        {
            "path": path,
            "layout": leaf.target.layout,
            "groups": list(leaf.groups),
            "probes": [[float(f"{x:.7g}") for x in row] for row in values[path]],
        }
        for path, leaf in sorted(factors.leaves.items(), key=lambda pair: (order[pair[1].target], natural(pair[0])))
    ]


def load_adapter(folder: Path, params: Any, method: str = "auto") -> tuple[Factors, Float[Array, "groups u"]]:
    """Reads an adapter for its base model; `apply` and `merge` take the result.

    Args:
      folder: folder with `vector.bin` and `adapter.json`.
      params: weights of the base model.
      method: SVD method, see `truncated_svd`; all methods give the same update.

    Returns:
      The factors, and the vector as float32 `[groups, u]`.

    Raises:
      AdapterError: a file is absent, malformed, truncated or altered, or belongs to another base model.
    """
    spec, v, description = read_adapter(folder)
    return factors_of(folder, spec, v, description, params, method), v


def factors_of(
    folder: Path,
    spec: TinyLoRA,
    v: Float[Array, "groups u"],
    description: Mapping[str, Any],
    params: Any,
    method: str = "auto",
) -> Factors:
    """Computes the factors for the results of `read_adapter`, as in `load_adapter`.

    Raises:
      AdapterError: the adapter belongs to another base model, which is detected before factorization if the weights
        show it, or its description names leaves that the model does not have.
    """
    check_base(description, params)
    try:
        factors = factorize(params, spec, method)
    except ValueError as error:
        raise AdapterError(f"{folder / _DESCRIPTION} does not fit this model: {error}") from error
    return _with_own_factors(folder, spec, v, description, factors, params)


def read_adapter(folder: Path) -> tuple[TinyLoRA, Float[Array, "groups u"], dict[str, Any]]:
    """Reads an adapter without its base model.

    Args:
      folder: folder with `vector.bin` and `adapter.json`.

    Returns:
      The spec, the vector as float32 `[groups, u]`, and the description; `check_fit` checks whether they fit a model.
      The spec's targets are the adapted leaves themselves: patterns from a file are never matched.

    Raises:
      AdapterError: a file is absent, malformed, truncated or altered.
    """
    path = folder / _DESCRIPTION
    description = parse_text(path, read_text(path))
    try:
        spec, dtype, shape = parse_description(description)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"[:300]
        raise AdapterError(f"{path} is malformed ({problem}); export the adapter again") from error
    if description.get("structure_sha256", (saved := structure_sha256(description))) != saved:  # absent in older files
        raise AdapterError(f"{path} was altered: its spec, shape or leaves are not as they were saved; copy it again")
    v = jnp.asarray(_read_vector(folder, dtype, shape, description["sha256"]))
    _check_whole(path, description, tables_sha256(description))
    return spec, v, description


def _check_whole(path: Path, head: Mapping[str, Any], tables: str) -> None:
    """Raises an error if any field of a description was altered; older files have no such checksum."""
    if head.get("description_sha256", (saved := whole_sha256(head, tables))) != saved:
        raise AdapterError(f"{path} was altered: one of its fields is not as it was saved; copy it again")


def _read_vector(folder: Path, dtype: np.dtype, shape: tuple[int, int], sha256: str) -> Float[np.ndarray, "groups u"]:
    path = folder / _VECTOR
    expected = dtype.itemsize * math.prod(shape)
    try:
        with open_regular(path) as file:
            found = os.fstat(file.fileno()).st_size
            data = file.read() if found == expected else b""
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterError(f"{path} is missing; an adapter is {_VECTOR} and {_DESCRIPTION} in one folder") from error
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    if found != expected:
        raise AdapterError(f"{path} has {found} bytes, expected {expected} for {shape} {dtype}; copy it again")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise AdapterError(f"{path} was altered: its SHA-256 is not the one in {_DESCRIPTION}; copy it again")
    v = np.frombuffer(data, dtype).astype(np.float32).reshape(shape)
    if not np.isfinite(v).all():
        raise AdapterError(f"{path} holds numbers that are not finite; train the adapter again")
    return v


def check_fit(
    folder: Path,
    spec: TinyLoRA,
    v: Float[Array, "groups u"],
    description: Mapping[str, Any],
    factors: Factors,
    params: Any = None,
) -> Factors:
    """Raises an error if an adapter from `read_adapter` does not belong to this base model.

    Args:
      folder: folder of the adapter.
      spec: spec from `read_adapter`.
      v: vector from `read_adapter`, float32 `[groups, u]`.
      description: description from `read_adapter`.
      factors: factors of the base model for that spec.
      params: weights of the base model. If None, its other weights are not compared, and an adapter with its own
        factors is rejected.

    Returns:
      The factors to use with v: the given ones, except for modules whose factors the adapter stores.

    Raises:
      AdapterError: the base model or its factors differ, or the vector does not have their shape.
    """
    if params is not None:
        check_base(description, params)
    return _with_own_factors(folder, spec, v, description, factors, params)


def _with_own_factors(
    folder: Path,
    spec: TinyLoRA,
    v: Float[Array, "groups u"],
    description: Mapping[str, Any],
    factors: Factors,
    params: Any,
) -> Factors:
    if description["factors"] is not None:
        factors = unpack_factors(folder, description["factors"], factors, params)
    check_factors(description, factors)
    if v.shape != (factors.num_groups, factors.spec.u):
        raise AdapterError(f"{folder}: the vector's shape {v.shape} does not fit its spec {spec}")
    return factors


def check_base(description: Mapping[str, Any], params: Any) -> None:
    """Raises an error for another base model than in training; warns about one with different rounding.

    Raises:
      AdapterError: weights differ; the message names some of them.
    """
    stored = description["base_fingerprint"]
    if stored is None:
        return
    _check_scheme(description["base"], stored.get("quantize", "none"), scheme_of(params))
    found = base_fingerprint(params)
    other, rounded = differences(stored, found)
    if other:
        raise AdapterError(
            f"the adapter was trained on {description['base']!r}, but this base model differs in {len(other)} of"
            f" {len(found['weights'])} weights ({', '.join(other[:3])}, …); load it with its own base model"
        )
    if rounded:
        logging.warning(
            "the base model differs slightly from the one in training: %d weights are rounded differently (%s, …). The"
            " adapter was trained on %s weights, these are %s; load them in the former dtype for the same update",
            *(len(rounded), rounded[0], stored["dtype"], found["dtype"]),
        )


def _check_scheme(base: str, trained: str, found: str) -> None:
    """Raises an error for weights that are quantized in another way than in training."""
    if trained == found:
        return
    said = lambda scheme: "without quantization" if scheme == "none" else f"in {scheme}"
    if found == "none":
        advice = (
            "or ask for the transfer to 16 bit: --transfer of experiments.evaluate, --quantize=none of generate and"
            " export, or `transfer=True` of `open_adapter`"
        )
    else:
        advice = "or export it with --to=merged and quantize the merged model"
    raise AdapterError(
        f"the adapter was trained on {base!r} {said(trained)}, but this base model was loaded {said(found)}; load it"
        f" with quantize={trained!r} (--config.quantize={trained} in a command), {advice}"
    )


def check_factors(description: Mapping[str, Any], factors: Factors) -> None:
    """Raises an error if factors or tie groups differ from those in an adapter's training.

    Raises:
      AdapterError: modules differ; the message names some of them.
    """
    stored, found = {leaf["path"]: leaf for leaf in description["leaves"]}, probes(factors)
    if set(stored) != set(found):
        differ = sorted(set(stored) ^ set(found))
        raise AdapterError(f"the adapter has other modules than this model; they differ in {', '.join(differ[:3])}, …")
    ties = [path for path, leaf in factors.leaves.items() if list(leaf.groups) != stored[path]["groups"]]
    if ties:
        raise AdapterError(f"the adapter's spec and its own table tie modules differently ({', '.join(ties[:3])}, …)")
    wrong = []
    for path, rows in found.items():
        ours, theirs = np.asarray(rows), np.asarray(stored[path]["probes"], np.float64)
        if not np.all(np.abs(ours - theirs) <= _PROBE_TOLERANCE * ours[:, -1:] + 1e-6):
            wrong.append(path)
    if wrong:
        raise AdapterError(
            f"the adapter was trained on {description['base']!r}, whose factors differ from this model's in"
            f" {len(wrong)} of {len(found)} weights ({', '.join(wrong[:3])}, …); load it with its own base model"
            " and an unmodified adapter.json, because another spec has other factors"
        )


class AdapterReader:
    """Reads many adapters of one base model, which share its factors.

    Most of an `adapter.json` consists of its tables of leaves and weights, which have the same bytes for adapters with
    the same training setup. So tables that passed before are neither parsed nor compared again.

    Args:
      params: weights of the base model.
      factors: factors of the base model for the adapters' spec.

    Attributes:
      factors: factors to use with the vectors: the given ones, except for modules whose factors the adapters store.
    """

    _SHARED = ("spec", "shape", "dtype", "factors")  # fields that must be equal, besides the tables
    _MOST_TABLES = 16  # number of tables kept, of about 50 KB each

    def __init__(self, params: Any, factors: Factors):
        self.factors, self._params = factors, params
        self._first: tuple[Path, Any] | None = None  # the first adapter, and its field for its own factors
        self._fitting: dict[bytes, dict[str, Any]] = {}
        self._digests: dict[bytes, str] = {}

    def read(self, folder: Path) -> Float[np.ndarray, "groups u"]:
        """Reads the vector of an adapter, float32 `[groups, u]`; stacked vectors give each row its own adapter.

        Raises:
          AdapterError: the adapter is damaged, or its base model or factors differ from those of earlier adapters.
        """
        path = folder / _DESCRIPTION
        text = read_text(path)
        # For a thousand adapters, parsing their tables would take most of the time. So tables are compared as bytes,
        # and only the few fields before them are parsed, with an added closing brace.
        head, key, tables = text.partition(_TABLES)
        known = self._fitting.get(tables) if key else None
        if known:
            try:
                short = parse_text(path, head + b' "end": 0}')
            except AdapterError:  # the tables are not at the end of the file
                short = {}
            if known == {name: short.get(name) for name in self._SHARED}:
                _check_whole(path, short, self._digests[tables])
                return _read_vector(folder, DTYPES[short["dtype"]], tuple(short["shape"]), short.get("sha256", ""))
        spec, v, description = read_adapter(folder)
        shared = {name: description[name] for name in self._SHARED}
        self._check_alike(folder, spec, shared)
        try:
            self.factors = check_fit(folder, spec, v, description, self.factors, self._params)
        except AdapterError as error:
            raise AdapterError(f"{folder}: {error}") from error
        self._first = self._first or (folder, shared["factors"])
        if key:
            self._fitting[tables], self._digests[tables] = shared, tables_sha256(description)
            if len(self._fitting) > self._MOST_TABLES:
                oldest = next(iter(self._fitting))
                del self._fitting[oldest], self._digests[oldest]
        return np.asarray(v)

    def _check_alike(self, folder: Path, spec: TinyLoRA, shared: Mapping[str, Any]) -> None:
        """Raises an error if an adapter cannot share the factors of earlier adapters."""
        if shared["spec"] != describe_spec(self.factors.spec):
            raise AdapterError(f"{folder} was trained with {spec}, but the factors belong to {self.factors.spec}")
        if self._first and self._first[1] != shared["factors"]:
            raise AdapterError(
                f"{folder} and {self._first[0]} have different stored factors; use one reader for each, and"
                " tinylora_jax.adapters.combine to put them in one batch"
            )
