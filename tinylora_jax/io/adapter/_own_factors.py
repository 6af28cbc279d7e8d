"""Reads and writes factors.safetensors: factors that neither base model nor seed determines."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tinylora_jax.adapters import Factors, exchange
from tinylora_jax.adapters.rebase import places_of, with_projections
from tinylora_jax.adapters.svd import SVD
from tinylora_jax.io.adapter._description import AdapterError, read_at_most
from tinylora_jax.multihost import to_host

FACTORS = "factors.safetensors"
_MAX_HEADER = 1000  # of a safetensors file, for each of its tensors
_SAME_P = 1e-5  # a seed's P are not stored because they came back from another form and were rounded there


def pack_factors(factors: Factors) -> tuple[dict[str, Any] | None, bytes]:
    """U, S and V of the modules whose weight does not determine them, and P of those where no seed gives it.

    Returns:
      The description's field `factors`, and the bytes of the file; None and nothing if all can be computed again.
    """
    places, drawn_otherwise, tensors = places_of(factors), [], {}
    host = {path: to_host(leaf) for path, leaf in factors.leaves.items()}
    for name in factors.ill_conditioned:
        path, layer = places[name]
        tensors |= {f"{name}.{k}": np.ascontiguousarray(getattr(host[path], k)[layer], np.float32) for k in SVD._fields}
    for name, (path, layer) in places.items():
        P = np.ascontiguousarray(host[path].P[layer], np.float32)
        if not np.allclose(P, factors.spec.P(name), rtol=_SAME_P, atol=_SAME_P):
            drawn_otherwise.append(name)
            tensors[f"{name}.P"] = P
    if not tensors:
        return None, b""
    data = save(tensors)
    kept = {"modules": list(factors.ill_conditioned), "sha256": hashlib.sha256(data).hexdigest()}
    return kept | ({"projections": drawn_otherwise} if drawn_otherwise else {}), data


def unpack_factors(folder: Path, kept: Mapping[str, Any], factors: Factors, params: Any) -> Factors:
    """The factors with those of the file.

    Args:
      folder: the adapter's.
      kept: the description's field `factors`.
      factors: factors of the base model for the adapter's spec.
      params: the base model; None is refused.

    Raises:
      AdapterError: the file is absent, damaged or altered, holds other tensors than described, or brings triplets
        that are not the weight's.
    """
    if params is None:
        raise AdapterError(f"{folder} holds factors of its own, which only its base model can check; pass params")
    tensors = _read(folder / FACTORS, kept, factors)
    triplets = {name: SVD(*(tensors[f"{name}.{k}"] for k in SVD._fields)) for name in kept["modules"]}
    try:
        factors = exchange(params, factors, triplets) if triplets else factors
    except ValueError as error:
        raise AdapterError(f"{folder / FACTORS} does not fit the base model: {error}") from error
    return with_projections(factors, {name: tensors[f"{name}.P"] for name in kept.get("projections", ())})


def _shapes(path: Path, kept: Mapping[str, Any], factors: Factors) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a file must hold."""
    places, shapes = places_of(factors), {}
    for names, fields in ((kept["modules"], SVD._fields), (kept.get("projections", ()), ("P",))):
        for name in names:
            if name not in places:
                raise AdapterError(f"{path.parent}/adapter.json: factors of {name[:100]!r}, which is not adapted")
            leaf = factors.leaves[places[name][0]]
            shapes |= {f"{name}.{k}": getattr(leaf, k).shape[1:] for k in fields}
    return shapes


def _read(path: Path, kept: Mapping[str, Any], factors: Factors) -> dict[str, np.ndarray]:
    shapes = _shapes(path, kept, factors)
    data = read_at_most(
        path,
        sum(4 * math.prod(shape) + len(name.encode()) + _MAX_HEADER for name, shape in shapes.items()),
        absent=", but adapter.json says that it belongs to the adapter; copy it too",
        larger=f"the {len(shapes)} tensors that adapter.json names; copy it again",
    )
    if hashlib.sha256(data).hexdigest() != kept["sha256"]:
        raise AdapterError(f"{path} was altered: its SHA-256 is not the one in adapter.json; copy it again")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged ({error}); copy it again") from error
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        found = "none" if tensor is None else f"{tensor.shape} {tensor.dtype}"
        if tensor is None or tensor.shape != shape or tensor.dtype != np.float32:
            raise AdapterError(f"{path}: {name[:100]} is {found}, expected {shape} float32; export the adapter again")
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name[:100]} holds numbers that are not finite; train the adapter again")
    if strange := sorted(set(tensors) - set(shapes)):
        raise AdapterError(f"{path} holds {strange[0][:100]!r}, which adapter.json does not name; copy both again")
    return tensors
