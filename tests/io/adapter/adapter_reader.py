"""An adapter's updates by NumPy alone, written from `ADAPTER_FORMAT.md`: the test of that page."""

import hashlib
import json
import math
import struct

import numpy as np


def read_vector(folder, description):
    data = (folder / "vector.bin").read_bytes()
    assert hashlib.sha256(data).hexdigest() == description["sha256"]
    if description["dtype"] == "bfloat16":
        flat = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        flat = np.frombuffer(data, "<f4")
    return flat.reshape(description["shape"]).astype(np.float64)


def normals(label, count):
    found = []
    for k in range(math.ceil(count / 4)):
        words = struct.unpack(">4Q", hashlib.sha256(f"{label}:{k}".encode()).digest())
        for a, b in (words[:2], words[2:]):
            radius = math.sqrt(-2 * math.log(((a >> 11) + 1) / 2**53))
            angle = 2 * math.pi * (b >> 11) / 2**53
            found += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(found[:count])


def read_tensors(path):
    """The safetensors format: a length, a JSON header, the numbers."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(body[slice(*x["data_offsets"])], "<f4").reshape(x["shape"]) for name, x in header.items()
    }


def oriented(kernel, layout):
    """`[layers, out, in]`."""
    words = layout.split()
    order = [i for word in ("layer", "out", "in") for i, w in enumerate(words) if w == word]
    sizes = [math.prod([kernel.shape[i] for i, w in enumerate(words) if w == word]) for word in ("layer", "out", "in")]
    return np.transpose(np.asarray(kernel, np.float64), order).reshape(sizes)


def triplets(W, rank):
    U, S, Vt = np.linalg.svd(W, full_matrices=False)
    U, S, V = U[:, :rank], S[:rank], Vt[:rank].T
    for column in range(rank):
        if U[np.abs(U[:, column]).argmax(), column] < 0:
            U[:, column], V[:, column] = -U[:, column], -V[:, column]
    return U, S, V


def updates(folder, weights):
    """ΔW `[out, in]` by module name, for the base model's kernels by path; and each module's group."""
    description = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    assert description["format"] == "tinylora" and description["format_version"] in (2, 3)
    spec, v = description["spec"], read_vector(folder, description)
    kept = {} if description["factors"] is None else read_tensors(folder / "factors.safetensors")
    rank, u, found, groups = spec["rank"], spec["u"], {}, {}
    for leaf in description["leaves"]:
        stacked = "layer" in leaf["layout"].split()
        for layer, W in enumerate(oriented(weights[leaf["path"]], leaf["layout"])):
            name = f"{leaf['path']}[{layer}]" if stacked else leaf["path"]
            U, S, V = (kept[f"{name}.{k}"] for k in "USV") if f"{name}.U" in kept else triplets(W, rank)
            label = f"{spec['seed']}:{name}"
            P = (normals(label, u * rank**2) / math.sqrt(rank)).astype(np.float32).reshape(u, rank, rank)
            P = np.eye(u).reshape(u, rank, rank) if spec.get("projection") == "standard" else P
            P = kept.get(f"{name}.P", P)
            groups[name] = leaf["groups"][layer]
            found[name] = U @ np.diag(S) @ sum(v[groups[name], i] * P[i] for i in range(u)) @ V.T
            probes(leaf["probes"][layer], U, S, V, P)
    assert groups == tie_groups(spec, description["leaves"])
    return found


def probes(stored, U, S, V, P):
    update, size = U @ np.diag(S) @ P.sum(axis=0) @ V.T, np.linalg.norm(np.diag(S) @ P.sum(axis=0))
    sides = [normals(f"probe:{side}", 6 * n).reshape(6, n) for side, n in zip(("out", "in"), update.shape, strict=True)]
    h, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in sides)
    values = [*(a @ update @ b * math.sqrt(update.size) for a, b in zip(h, k, strict=True)), size]
    assert np.all(np.abs(np.array(values) - stored) <= 0.01 * size + 1e-6)


def tie_groups(spec, leaves):
    modules = []
    for place, leaf in enumerate(leaves):
        parts = leaf["path"].split("/")
        numbers, kind = [int(p) for p in parts if p.isdigit()], tuple("*" if p.isdigit() else p for p in parts)
        for layer in range(len(leaf["groups"])):
            stacked = "layer" in leaf["layout"].split()
            name = f"{leaf['path']}[{layer}]" if stacked else leaf["path"]
            modules.append(((numbers + [layer] * stacked, place), name, kind))
    modules.sort()
    if spec["tying"] == "tiled":
        return {name: k // spec["n_tie"] for k, (_, name, _) in enumerate(modules)}
    found, first = {}, 0
    for kind in dict.fromkeys(kind for _, _, kind in modules):
        members = [name for _, name, other in modules if other == kind]
        found |= {name: first + j // spec["n_tie"] for j, name in enumerate(members)}
        first += math.ceil(len(members) / spec["n_tie"])
    return found
