"""The description of an adapter, adapter.json, which is human-readable and untrusted until parsed."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tinylora_jax.adapters import SCHEMES, Target, TinyLoRA
from tinylora_jax.files import open_regular, parse_json
from tinylora_jax.io.adapter._fingerprint import NUM_PROBES, NUM_SIGNED

FORMAT_VERSION = 3
_WITHOUT_PROJECTIONS = 2  # version 3 adds projections; a file without them has version 2
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}
_SPEC_FIELDS = ("rank", "u", "n_tie", "tying", "seed")  # the leaves serve as targets
MAX_JSON_BYTES = 2**22  # as Python objects it takes about thirty times as much
_MAX_LEAVES = 10_000
_MAX_NAME = 1000


class AdapterError(ValueError):
    """An adapter cannot be written or read, or does not belong to this base model."""


def readable(description: Mapping[str, Any]) -> str:
    """Formats JSON with one line per field, leaf and weight, but not per number."""
    dump = lambda x: json.dumps(x, ensure_ascii=False, allow_nan=False)
    lines = []
    for name, value in description.items():
        if name == "leaves":
            text = "[\n  " + ",\n  ".join(map(dump, value)) + "\n ]"
        elif name == "base_fingerprint" and value is not None:
            rows = ",\n   ".join(f"{dump(path)}: {dump(row)}" for path, row in value["weights"].items())
            head = "".join(f"{dump(key)}: {dump(x)}, " for key, x in value.items() if key != "weights")
            text = f'{{{head}"weights": {{\n   {rows}\n }}}}'
        else:
            text = dump(value)
        lines.append(f" {dump(name)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def version_of(kept: Mapping[str, Any] | None) -> int:
    """The lowest format version that supports an adapter's own factors, for compatibility with older readers."""
    return FORMAT_VERSION if "projections" in (kept or {}) else _WITHOUT_PROJECTIONS


def read_at_most(path: Path, most: int, absent: str, larger: str) -> bytes:
    """Reads a file of at most `most` bytes.

    Args:
      path: path of the file.
      most: largest accepted size, in bytes.
      absent: text after "… is missing" in the error message.
      larger: text after "… is larger than" in the error message.

    Raises:
      AdapterError: the file is absent, too large or not a regular file.
    """
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise AdapterError(f"{path} is missing{absent}") from error
    except OSError as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    if len(data) > most:
        raise AdapterError(f"{path} is larger than {larger}")
    return data


def read_text(path: Path) -> bytes:
    """Reads an adapter.json.

    Raises:
      AdapterError: the file is absent or too large.
    """
    return read_at_most(
        path,
        MAX_JSON_BYTES,
        absent="; an adapter is a folder with vector.bin and adapter.json",
        larger=f"{MAX_JSON_BYTES} bytes; is it an adapter's description?",
    )


def parse_text(path: Path, text: bytes) -> dict[str, Any]:
    """Parses an adapter.json and checks its format and version.

    Raises:
      AdapterError: the text is not strict JSON, or has another format.
    """
    try:
        description = parse_json(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except ValueError as error:
        raise AdapterError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(description, dict) or description.get("format") != "tinylora":
        raise AdapterError(f"{path} does not describe a TinyLoRA adapter")
    found = description.get("format_version")
    if type(found) is not int or found not in (_WITHOUT_PROJECTIONS, FORMAT_VERSION):
        known = f"{_WITHOUT_PROJECTIONS} and {FORMAT_VERSION}"
        raise AdapterError(f"{path} has format version {repr(found)[:50]}; this library reads {known}")
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


def structure_sha256(description: Mapping[str, Any]) -> str:
    """SHA-256 of the fields that state which weights are adapted, and how; detects a removed row."""
    return _sha256([description[name] for name in ("spec", "shape", "leaves")])


def tables_sha256(description: Mapping[str, Any]) -> str:
    """SHA-256 of the two tables: the leaves and the base model's weights."""
    return _sha256([description["leaves"], description["base_fingerprint"]])


def whole_sha256(head: Mapping[str, Any], tables: str) -> str:
    """SHA-256 of a description: of all fields except its tables, and of `tables_sha256`."""
    outside = ("leaves", "base_fingerprint", "description_sha256", "end")
    return _sha256([{name: value for name, value in head.items() if name not in outside}, tables])


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe_spec(spec: TinyLoRA) -> dict[str, Any]:
    """Builds the field `spec` of the description."""
    fields = {name: getattr(spec, name) for name in _SPEC_FIELDS}
    return fields if spec.projection == "random" else fields | {"projection": spec.projection}


def parse_description(description: Mapping[str, Any]) -> tuple[TinyLoRA, np.dtype, tuple[int, int]]:
    """Checks and parses every field that is used.

    Returns:
      The spec, whose targets are the adapted leaves themselves, and the dtype and shape of the vector.

    Raises:
      AttributeError, KeyError, OverflowError, TypeError or ValueError: a field is wrong; the message says which.
    """
    _require(_is_name(description["base"]), "base", f"a string of 1 to {_MAX_NAME} characters")
    _require(isinstance(description["dtype"], str) and description["dtype"] in DTYPES, "dtype", " or ".join(DTYPES))
    _require(isinstance(description["sha256"], str), "sha256", "a text")
    fields, leaves = description["spec"], description["leaves"]
    _require(
        isinstance(fields, dict) and set(fields) - {"projection"} == set(_SPEC_FIELDS),
        "spec",
        f"an object with {', '.join(_SPEC_FIELDS)} and optionally projection",
    )
    _require(type(fields["seed"]) is int, "seed", "an integer")
    _require(isinstance(leaves, list) and 1 <= len(leaves) <= _MAX_LEAVES, "leaves", f"1 to {_MAX_LEAVES} objects")
    for leaf in leaves:
        _require(isinstance(leaf, dict) and _is_name(leaf.get("path")), "leaves", "objects with the path of a leaf")
        groups, rows, where = leaf["groups"], leaf["probes"], leaf["path"]
        _require(_is_list(groups, int) and groups and min(groups) >= 0, f"groups of {where}", "integers >= 0")
        ok = isinstance(rows, list) and len(rows) == len(groups) and all(_is_numbers(r, NUM_PROBES + 1) for r in rows)
        _require(ok, f"probes of {where}", f"{NUM_PROBES + 1} finite numbers for each of its {len(groups)} layers")
    _require(len({leaf["path"] for leaf in leaves}) == len(leaves), "leaves", "distinct paths")
    spec = TinyLoRA(**fields, targets=tuple(Target(re.escape(leaf["path"]), leaf["layout"]) for leaf in leaves))
    shape = description["shape"]
    expected = [1 + max(group for leaf in leaves for group in leaf["groups"]), spec.u]
    _require(_is_list(shape, int) and shape == expected, "shape", f"[groups, u] = {expected}")
    kept, base = description["factors"], description["base_fingerprint"]
    _require(
        (kept is None or isinstance(kept, dict)) and version_of(kept) == description["format_version"],
        *("factors", f"null or an object, with projections only in version {FORMAT_VERSION}"),
    )
    if kept is not None:
        for names, least in ((kept["modules"], "projections" not in kept), (kept.get("projections", ["-"]), 1)):
            _require(_is_list(names, str) and least <= len(set(names)) == len(names), "factors", "distinct modules")
        _require(isinstance(kept["sha256"], str), "factors", "a SHA-256")
    if base is not None:
        check_fingerprint(base)
    return spec, DTYPES[description["dtype"]], tuple(shape)


def check_fingerprint(base: Mapping[str, Any]) -> None:
    """Checks the fingerprint of a base model from a file.

    Raises:
      AttributeError, KeyError, OverflowError, TypeError or ValueError: a field is wrong; the message says which.
    """
    _require(isinstance(base["dtype"], str) and isinstance(base["weights"], dict), "base_fingerprint", "an object")
    _require(base.get("quantize", "none") in list(SCHEMES), "base_fingerprint.quantize", " or ".join(SCHEMES))
    bad = [path for path, row in base["weights"].items() if not _is_numbers(row, NUM_SIGNED + 1)]
    _require(not bad, f"base_fingerprint of {', '.join(bad[:1])}", f"{NUM_SIGNED + 1} finite numbers")


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
