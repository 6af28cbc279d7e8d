"""Damage of every kind: to bytes, to JSON, and to what stands at a path."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

ODD = (
    *(None, True, False, -1, 0, 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 0.5, 1e308, -0.0, float("nan"), float("inf")),
    *(
        "",
        "x",
        "0",
        "../x",
        "/dev/zero",
        "\x00",
        "\ud800",
        "é",
        "x" * 2000,
        [],
        {},
        [None],
        {"": None},
        [[]],
        {"a": {}},
    ),
)
_HUGE = "\x07huge\x07"  # stands for an integer that Python would not write
_INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x00" * 8,
    b"\x00\x00\x00\x80",
    b"{",
    b"[",
)


def damaged_bytes(random: Random, data: bytes) -> bytes:
    """Bytes with one to three changes of any kind."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        data = _changed(random, bytearray(data))
    return data


def _changed(random: Random, data: bytearray) -> bytes:
    at, other = (random.randrange(len(data) + 1) for _ in range(2))
    low, high = min(at, other), min(max(at, other), min(at, other) + 4096)
    match random.randrange(10):
        case 0 | 1 if data:
            data[min(at, len(data) - 1)] ^= 1 << random.randrange(8)
        case 2 if data:
            data[min(at, len(data) - 1)] = random.randrange(256)
        case 3:
            data[at:at] = random.randbytes(random.choice((1, 2, 4, 8, 32, 64)))
        case 4:
            del data[low:high]
        case 5:
            del data[at:]
        case 6:
            data[at:at] = data[low:high] * random.choice((1, 1, 2, 100))
        case 7:
            piece = random.choice(_INTERESTING)
            data[at : at + len(piece)] = piece
        case 8:
            data += random.randbytes(random.choice((1, 31, 32, 4096)))
        case _:
            data[at:at] = random.choice(_INTERESTING) * random.choice((1, 1, 1000))
    return bytes(data)


def damaged_json(random: Random, text: bytes) -> bytes:
    """A JSON text with one to three of its values exchanged, removed, doubled or renamed."""
    try:
        holder = [json.loads(text)]
    except (ValueError, RecursionError):
        return damaged_bytes(random, text)
    for _ in range(random.choice((1, 1, 2, 3))):
        _change_value(random, holder)
    found = json.dumps(holder[0]).encode()
    if random.random() < 0.02:
        depth = random.choice((100, 900, 100_000))
        found = b"[" * depth + b"]" * depth
    return found.replace(json.dumps(_HUGE).encode(), b"1" + b"0" * random.choice((30, 400, 5000)))


def _change_value(random: Random, holder: list[Any]) -> None:
    node, key = holder, 0
    while isinstance(node[key], dict | list) and node[key] and random.random() < 0.8:
        node = node[key]
        key = random.choice(list(node)) if isinstance(node, dict) else random.randrange(len(node))
    match random.randrange(6):
        case 0 if node is not holder:
            del node[key]
        case 1 if isinstance(node, dict):
            node[f"{key}x"[random.randrange(2) :]] = node[key]
        case 2 if isinstance(node, list) and node is not holder:
            node += node[: 1 + key] * random.choice((1, 50))
        case 3:
            node[key] = _HUGE
        case 4 if isinstance(node[key], str) and node[key]:
            node[key] = damaged_bytes(random, node[key].encode("utf-8", "replace")).decode("utf-8", "replace")
        case _:
            node[key] = json.loads(json.dumps(random.choice(ODD)))


def damaged_lines(random: Random, data: bytes) -> bytes:
    """JSON lines of which one is damaged as JSON, left out, doubled, or followed by blank ones."""
    lines = data.split(b"\n")
    at = random.randrange(len(lines))
    match random.randrange(5):
        case 0:
            del lines[at]
        case 1:
            lines.insert(at, lines[at])
        case 2:
            lines.insert(at, b"\n" * random.choice((1, 1000)))
        case _:
            lines[at] = damaged_json(random, lines[at])
    return b"\n".join(lines)


def damage(random: Random, path: Path) -> str:
    """Damages a file in place, and says how."""
    if random.random() < 0.04:
        return _exchange(random, path)
    data, how = path.read_bytes(), "bytes"
    if path.suffix in (".json", "", ".jsonl") and random.random() < 0.7 and data.lstrip()[:1] in (b"{", b"["):
        how = "lines" if path.suffix == ".jsonl" else "json"
        data = (damaged_lines if how == "lines" else damaged_json)(random, data)
    elif path.suffix == ".gz" and random.random() < 0.5:
        how, data = "lines", gzip.compress(damaged_lines(random, gzip.decompress(data)), 1)
    else:
        data = damaged_bytes(random, data)
    path.write_bytes(data)
    return how


def _exchange(random: Random, path: Path) -> str:
    path.unlink()
    match random.randrange(6):
        case 0:
            return "removed"
        case 1:
            path.mkdir()
            return "a folder"
        case 2:
            os.mkfifo(path)
            return "a pipe"
        case 3:
            path.symlink_to("/dev/zero")
            return "endless"
        case 4:
            path.symlink_to(path.with_name("gone"))
            return "a link to nothing"
    path.write_bytes(b"")
    return "empty"


def copied(source: Path, target: Path) -> Path:
    """A fresh copy of a folder."""
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))
