"""A trained adapter on disk: 26 bytes of vector, and a readable file that says what they mean.

`vector.bin` holds the vector alone. `adapter.json` holds the spec, the adapted weights and their tie groups, and
numbers by which a load is refused when the base model or its factors are not those that the vector was trained with.
Where a weight does not determine its factors, `factors.safetensors` holds them. ADAPTER_FORMAT.md describes all three.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from absl import logging
from jaxtyping import Array, Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tinylora_jax.adapters import Factors, Target, TinyLoRA, exchange, factorize
from tinylora_jax.adapters.projections import standard_normals
from tinylora_jax.adapters.svd import SVD
from tinylora_jax.adapters.targets import natural
from tinylora_jax.adapters.tinylora import LeafFactors
from tinylora_jax.io.fingerprint import NUM_SIGNED, base_fingerprint, differences

FORMAT_VERSION = 2
_VECTOR, _DESCRIPTION, _FACTORS = "vector.bin", "adapter.json", "factors.safetensors"
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}
_SPEC = ("rank", "u", "n_tie", "tying", "seed")
_MAX_JSON_BYTES = 2**22  # as Python objects it takes some thirty times as much
_MAX_HEADER = 1000  # of a safetensors file, for each of its tensors
_MAX_LEAVES = 10_000
_MAX_NAME = 1000
_NUM_PROBES = 6
# Of a module's size. After a flipped sign, one probe in six differs by less, hardly ever all six.
_PROBE_TOLERANCE = 0.1


class AdapterError(ValueError):
    """An adapter cannot be written or read, or does not belong to this base model."""


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
    folder: Path,
    factors: Factors,
    v: Float[Array, "groups u"],
    base: str,
    dtype: str = "bfloat16",
    fingerprint: Mapping[str, Any] | None = None,
    **about: Any,
) -> None:
    """Writes `vector.bin`, `adapter.json` and, if some factors are undetermined, `factors.safetensors`.

    Args:
      folder: created if absent.
      factors: that v was trained with.
      v: the vector.
      base: name of the base model.
      dtype: `bfloat16` (two bytes a number) or `float32`.
      fingerprint: `base_fingerprint` of the base model; without it a load compares the factors alone.
      **about: anything JSON can hold, kept for readers under "about".

    Raises:
      AdapterError: the description would be larger than a reader accepts.
    """
    data = np.asarray(v, np.float32).astype(_DTYPES[dtype]).tobytes()
    kept = _pack_factors(factors) if factors.undetermined else None
    description = {
        "format": "tinylora",
        "format_version": FORMAT_VERSION,
        "base": base,
        "dtype": dtype,
        "shape": list(v.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
        "spec": {name: getattr(factors.spec, name) for name in _SPEC},
        "factors": kept and {"modules": list(factors.undetermined), "sha256": hashlib.sha256(kept).hexdigest()},
        "about": about,
        "leaves": _describe_leaves(factors),
        "base_fingerprint": fingerprint,
    }
    text = _readable(description).encode()
    if len(text) > _MAX_JSON_BYTES:
        raise AdapterError(
            f"the description has {len(text)} bytes, at most {_MAX_JSON_BYTES} are read; shorten `about`"
        )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _VECTOR).write_bytes(data)
    if kept is None:
        (folder / _FACTORS).unlink(missing_ok=True)
    else:
        (folder / _FACTORS).write_bytes(kept)
    (folder / _DESCRIPTION).write_bytes(text)


def _describe_leaves(factors: Factors) -> list[dict[str, Any]]:
    """One row a leaf, in the order that makes `select` find the modules in the same order by their bare paths."""
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


def _readable(description: Mapping[str, Any]) -> str:
    """JSON with a line for every field, leaf and weight, but none for every number."""
    dump = lambda x: json.dumps(x, ensure_ascii=False, allow_nan=False)
    lines = []
    for name, value in description.items():
        if name == "leaves":
            text = "[\n  " + ",\n  ".join(map(dump, value)) + "\n ]"
        elif name == "base_fingerprint" and value is not None:
            rows = ",\n   ".join(f"{dump(path)}: {dump(row)}" for path, row in value["weights"].items())
            text = f'{{"dtype": {dump(value["dtype"])}, "weights": {{\n   {rows}\n }}}}'
        else:
            text = dump(value)
        lines.append(f" {dump(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _modules(factors: Factors) -> Iterator[tuple[str, LeafFactors, int]]:
    """Every module's name, and where its factors are: a leaf's and which layer of it."""
    for path, leaf in factors.leaves.items():
        for layer in range(len(leaf.groups)):
            yield (f"{path}[{layer}]" if leaf.target.axes("layer") else path), leaf, layer


def _pack_factors(factors: Factors) -> bytes:
    places = {name: (leaf, layer) for name, leaf, layer in _modules(factors)}
    tensors = {}
    for name in factors.undetermined:
        leaf, layer = places[name]
        tensors |= {f"{name}.{k}": np.ascontiguousarray(getattr(leaf, k)[layer], np.float32) for k in SVD._fields}
    return save(tensors)


def load_adapter(folder: Path, params: Any, method: str = "auto") -> tuple[Factors, Float[Array, "groups u"]]:
    """Reads an adapter for its base model: what `apply` and `merge` take.

    Args:
      folder: holds `vector.bin` and `adapter.json`.
      params: the base model's tree.
      method: of the decomposition, see `truncated_svd`; any gives the same update.

    Returns:
      The factors and the vector as float32.

    Raises:
      AdapterError: a file is absent, malformed, truncated or altered, or belongs to another base model.
      ValueError: the base model cannot be factorized.
    """
    spec, v, description = read_adapter(folder)
    check_base(description, params)
    factors = factorize(params, spec, method)
    return _with_own_factors(folder, spec, v, description, factors, params), v


def read_adapter(folder: Path) -> tuple[TinyLoRA, Float[Array, "groups u"], dict[str, Any]]:
    """Reads an adapter without its base model.

    Args:
      folder: holds `vector.bin` and `adapter.json`.

    Returns:
      The spec, the vector as float32, and the description; `check_fit` tells whether they fit a model. The spec's
      targets are the adapted leaves themselves: no pattern of a file is ever matched.

    Raises:
      AdapterError: a file is absent, malformed, truncated or altered.
    """
    path = folder / _DESCRIPTION
    description = _read_description(path)
    try:
        spec, dtype, shape = _parse(description)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        problem = f"{type(error).__name__}: {error}"[:300]
        raise AdapterError(f"{path} is malformed ({problem}); export the adapter again") from error
    path = folder / _VECTOR
    if not path.is_file():
        raise AdapterError(f"{path} is missing; an adapter is {_VECTOR} and {_DESCRIPTION} in one folder")
    expected, found = dtype.itemsize * math.prod(shape), path.stat().st_size
    if found != expected:
        raise AdapterError(f"{path} has {found} bytes, expected {expected} for {shape} {dtype}; copy it again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != description["sha256"]:
        raise AdapterError(f"{path} was altered: its SHA-256 is not the one in {_DESCRIPTION}; copy it again")
    v = np.frombuffer(data, dtype).astype(np.float32).reshape(shape)
    if not np.isfinite(v).all():
        raise AdapterError(f"{path} holds numbers that are not finite; train the adapter again")
    return spec, jnp.asarray(v), description


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError(f"{path} is missing; an adapter is a folder with {_VECTOR} and {_DESCRIPTION}")
    with path.open("rb") as file:
        text = file.read(_MAX_JSON_BYTES + 1)
    if len(text) > _MAX_JSON_BYTES:
        raise AdapterError(f"{path} is larger than {_MAX_JSON_BYTES} bytes; is it an adapter's description?")
    try:
        description = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(description, dict) or description.get("format") != "tinylora":
        raise AdapterError(f"{path} does not describe a TinyLoRA adapter")
    found = description.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise AdapterError(f"{path} has format version {str(found)[:50]}; this library reads {FORMAT_VERSION}")
    return description


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"the name {name[:100]!r} occurs twice in one object")
        result[name] = value
    return result


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _parse(description: Mapping[str, Any]) -> tuple[TinyLoRA, np.dtype, tuple[int, int]]:
    """Checks every field that is used; what it raises says which one is wrong."""
    _require(_is_name(description["base"]), "base", f"a text of 1 to {_MAX_NAME} characters")
    _require(isinstance(description["dtype"], str) and description["dtype"] in _DTYPES, "dtype", " or ".join(_DTYPES))
    _require(isinstance(description["sha256"], str), "sha256", "a text")
    fields, leaves = description["spec"], description["leaves"]
    _require(isinstance(fields, dict) and set(fields) == set(_SPEC), "spec", f"an object of {', '.join(_SPEC)}")
    _require(type(fields["seed"]) is int, "seed", "an integer")
    _require(isinstance(leaves, list) and 1 <= len(leaves) <= _MAX_LEAVES, "leaves", f"1 to {_MAX_LEAVES} objects")
    for leaf in leaves:
        _require(isinstance(leaf, dict) and _is_name(leaf.get("path")), "leaves", "objects with the path of a leaf")
        groups, rows, where = leaf["groups"], leaf["probes"], leaf["path"]
        _require(_is_list(groups, int) and groups and min(groups) >= 0, f"groups of {where}", "integers >= 0")
        ok = isinstance(rows, list) and len(rows) == len(groups) and all(_is_numbers(r, _NUM_PROBES + 1) for r in rows)
        _require(ok, f"probes of {where}", f"{_NUM_PROBES + 1} finite numbers for each of its {len(groups)} layers")
    _require(len({leaf["path"] for leaf in leaves}) == len(leaves), "leaves", "no path twice")
    spec = TinyLoRA(**fields, targets=tuple(Target(re.escape(leaf["path"]), leaf["layout"]) for leaf in leaves))
    shape = description["shape"]
    expected = [1 + max(group for leaf in leaves for group in leaf["groups"]), spec.u]
    _require(_is_list(shape, int) and shape == expected, "shape", f"[groups, u] = {expected}")
    kept, base = description["factors"], description["base_fingerprint"]
    if kept is not None:
        names = kept["modules"]
        _require(_is_list(names, str) and 1 <= len(set(names)) == len(names), "factors", "modules, none twice")
        _require(isinstance(kept["sha256"], str), "factors", "a SHA-256")
    if base is not None:
        _require(isinstance(base["dtype"], str) and isinstance(base["weights"], dict), "base_fingerprint", "an object")
        bad = [path for path, row in base["weights"].items() if not _is_numbers(row, NUM_SIGNED + 1)]
        _require(not bad, f"base_fingerprint of {', '.join(bad[:1])}", f"{NUM_SIGNED + 1} finite numbers")
    return spec, _DTYPES[description["dtype"]], tuple(shape)


def _require(ok: Any, field: str, expected: str) -> None:
    if not ok:
        raise ValueError(f"{field}: expected {expected}")


def _is_name(x: Any) -> bool:
    return isinstance(x, str) and 1 <= len(x) <= _MAX_NAME


def _is_list(x: Any, of: type) -> bool:
    return isinstance(x, list) and all(type(item) is of for item in x)


def _is_numbers(x: Any, count: int) -> bool:
    return (
        isinstance(x, list) and len(x) == count and all(type(n) in (int, float) and math.isfinite(float(n)) for n in x)
    )


def check_fit(
    folder: Path,
    spec: TinyLoRA,
    v: Float[Array, "groups u"],
    description: Mapping[str, Any],
    factors: Factors,
    params: Any = None,
) -> Factors:
    """Refuses what `read_adapter` read from a folder if it does not belong to this base model.

    Args:
      folder: the adapter's.
      spec: that was read.
      v: that was read.
      description: that was read.
      factors: of the base model by that spec.
      params: the base model. Without it, its other weights are not compared, and an adapter that holds factors of its
        own is refused.

    Returns:
      The factors to use with v: those given, with the adapter's own where the weights do not determine them.

    Raises:
      AdapterError: the base model is another one, or its factors are, or the vector has not their shape.
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
        if params is None:
            raise AdapterError(f"{folder} holds factors of its own, which only its base model can check; pass params")
        try:
            factors = exchange(params, factors, _read_factors(folder, description["factors"], factors))
        except AdapterError:
            raise
        except ValueError as error:
            raise AdapterError(f"{folder / _FACTORS} does not fit the base model: {error}") from error
    check_factors(description, factors)
    if v.shape != (factors.num_groups, factors.spec.u):
        raise AdapterError(f"{folder}: vector of shape {v.shape} does not fit its own spec {spec}")
    return factors


def _read_factors(folder: Path, kept: Mapping[str, Any], factors: Factors) -> dict[str, SVD]:
    places = {name: (leaf, layer) for name, leaf, layer in _modules(factors)}
    strange = [name for name in kept["modules"] if name not in places]
    if strange:
        raise AdapterError(f"{folder / _DESCRIPTION}: factors of {strange[0][:100]!r}, which is not adapted")
    shapes = {f"{name}.{k}": getattr(places[name][0], k).shape[1:] for name in kept["modules"] for k in SVD._fields}
    path = folder / _FACTORS
    most = sum(4 * math.prod(shape) + len(name) + _MAX_HEADER for name, shape in shapes.items())
    if not path.is_file():
        raise AdapterError(f"{path} is missing, but {_DESCRIPTION} says that it belongs to the adapter; copy it too")
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise AdapterError(f"{path} is larger than the factors of {len(kept['modules'])} modules; copy it again")
    if hashlib.sha256(data).hexdigest() != kept["sha256"]:
        raise AdapterError(f"{path} was altered: its SHA-256 is not the one in {_DESCRIPTION}; copy it again")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged ({error}); copy it again") from error
    wrong = {n for n in shapes if n not in tensors or tensors[n].shape != shapes[n] or tensors[n].dtype != np.float32}
    if wrong or len(tensors) != len(shapes):
        raise AdapterError(f"{path} does not hold U, S and V of the modules that {_DESCRIPTION} names; copy it again")
    return {name: SVD(*(tensors[f"{name}.{k}"] for k in SVD._fields)) for name in kept["modules"]}


def check_base(description: Mapping[str, Any], params: Any) -> None:
    """Refuses a base model other than the one that an adapter was trained on; warns of one that is rounded otherwise.

    Raises:
      AdapterError: names weights that differ.
    """
    stored = description["base_fingerprint"]
    if stored is None:
        return
    found = base_fingerprint(params)
    other, rounded = differences(stored, found)
    if other:
        raise AdapterError(
            f"the adapter was trained on {description['base']!r}, from which this base model differs in {len(other)} of"
            f" {len(found['weights'])} weights ({', '.join(other[:3])}, …); load it with its own base model"
        )
    if rounded:
        logging.warning(
            "the base model is not quite what the adapter was trained on: %d weights are rounded otherwise (%s, …). It"
            " was trained on weights in %s, these are in %s; load them so for the same update",
            *(len(rounded), rounded[0], stored["dtype"], found["dtype"]),
        )


def check_factors(description: Mapping[str, Any], factors: Factors) -> None:
    """Refuses factors or tie groups other than those that an adapter was trained with.

    Raises:
      AdapterError: names the modules that differ.
    """
    stored, found = {leaf["path"]: leaf for leaf in description["leaves"]}, probes(factors)
    if set(stored) != set(found):
        differ = sorted(set(stored) ^ set(found))
        raise AdapterError(f"the adapter's modules are not this model's; they differ in {', '.join(differ[:3])}, …")
    ties = [path for path, leaf in factors.leaves.items() if list(leaf.groups) != stored[path]["groups"]]
    if ties:
        raise AdapterError(
            f"the adapter's spec ties its modules otherwise than its own table ({', '.join(ties[:3])}, …)"
        )
    wrong = []
    for path, rows in found.items():
        ours, theirs = np.asarray(rows), np.asarray(stored[path]["probes"], np.float64)
        if not np.all(np.abs(ours - theirs) <= _PROBE_TOLERANCE * ours[:, -1:] + 1e-6):
            wrong.append(path)
    if wrong:
        raise AdapterError(
            f"the adapter was trained on {description['base']!r}, whose factors differ from this model's in"
            f" {len(wrong)} of {len(found)} weights ({', '.join(wrong[:3])}, …); load it with its own base model"
        )
