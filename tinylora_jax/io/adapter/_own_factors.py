"""Reads and writes factors.safetensors: factors that neither the base model nor the seed determines."""

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
_MAX_HEADER = 1000  # largest header size of a safetensors file, in bytes per tensor
_SAME_P = 1e-5  # P that differs from the seed's only by the rounding of another file format is not stored


def pack_factors(factors: Factors) -> tuple[dict[str, Any] | None, bytes]:
    """Packs U, S and V that the weights do not determine, and P that no seed reproduces.

    Returns:
      The field `factors` of the description, and the bytes of the file; None and no bytes if all factors can be
      recomputed.
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
    """Replaces factors with those stored in the file.

    Args:
      folder: folder of the adapter.
      kept: field `factors` of the description.
      factors: factors of the base model for the adapter's spec.
      params: weights of the base model; None raises an error.

    Raises:
      AdapterError: the file is absent, damaged or altered, does not contain the described tensors, or contains triplets
        that do not belong to the weights.
    """
    if params is None:
        raise AdapterError(f"{folder} has its own factors, whose check needs the base model; pass params")
    tensors = _read(folder / FACTORS, kept, factors)
    triplets = {name: SVD(*(tensors[f"{name}.{k}"] for k in SVD._fields)) for name in kept["modules"]}
    try:
        factors = exchange(params, factors, triplets) if triplets else factors
    except ValueError as error:
        raise AdapterError(f"{folder / FACTORS} does not fit the base model: {error}") from error
    return with_projections(factors, {name: tensors[f"{name}.P"] for name in kept.get("projections", ())})


def _shapes(path: Path, kept: Mapping[str, Any], factors: Factors) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors that a file must contain."""
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
        absent=", but adapter.json says that it is part of the adapter; copy it too",
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
