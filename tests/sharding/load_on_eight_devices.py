"""Loads a file of random weights whole, and each of eight CPU devices its shards; prints what was read as JSON.

python tests/sharding/load_on_eight_devices.py FILE MODEL DATA FSDP TENSOR

MODEL is a family, with a storage after a colon if the weights are quantized, and `:file` if they are so in the file.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial, reduce  # noqa: E402
from operator import getitem  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from compressed_files import compress  # noqa: E402
from conftest import FAMILIES, _randomized  # noqa: E402

from tinylora_jax.io.hf._compressed import Stored, open_compressed  # noqa: E402
from tinylora_jax.io.hf._safetensors import open_safetensors, write_safetensors  # noqa: E402
from tinylora_jax.io.hf._weights import build_tree, name_tensors, parameter_names  # noqa: E402
from tinylora_jax.models.sharding import MeshSpec, param_shardings  # noqa: E402


def opened(path, config, scheme, stored):
    """Opens the weights, which were written in float32; `stored` quantizes the file."""
    if not stored:
        return open_safetensors(path)
    (path.parent / "plain").mkdir()
    path.rename(path.parent / "plain" / "model.safetensors")
    (path.parent / "plain" / "config.json").write_text("{}")
    compress(path.parent / "plain", path.parent / "quantized", int(scheme.removeprefix("int")))
    return open_compressed(path.parent / "quantized", config, Stored(int(scheme.removeprefix("int")), True))


def run(path, config, mesh, scheme, stored):
    write_safetensors(path, name_tensors(config, _randomized(config, seed=3)), "float32")
    read = {}  # elements, by name: of every part that was read
    with opened(path, config, scheme, stored) as tensors:

        def watched(name):
            def part(index):
                values = tensors[name].read_part(index)
                read.setdefault(name, []).append(values.size)
                return values

            def integers(outputs):
                values, scale = tensors[name].integers(outputs)
                read.setdefault(name, []).append(values.size)
                return values, scale

            if tensors[name].integers is not None:
                return replace(tensors[name], read=None, integers=integers)
            return replace(tensors[name], read=None, read_part=part)

        whole = build_tree(config, tensors, jnp.bfloat16, None, scheme)
        places = partial(param_shardings, mesh)
        split = build_tree(config, {n: watched(n) for n in tensors}, jnp.bfloat16, places, scheme)
    found = {}
    for name, (place, _) in parameter_names(config).items():
        expected, leaf = (reduce(getitem, place, tree) for tree in (whole, split))
        found[name] = {
            "equal": bool(jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(leaf), jax.device_get(expected)))),
            "read": max(read[name]),
            "read in all": sum(read[name]),
            "shard": max(shard.data.size for shard in jax.tree.leaves(leaf)[0].addressable_shards),
            "whole": leaf.size,
        }
    return found


if __name__ == "__main__":
    path, family, *sizes = sys.argv[1:]
    family, scheme, stored = (family.split(":") + ["", ""])[:3]
    mesh = MeshSpec(*map(int, sizes)).make(jax.devices())
    print(json.dumps(run(Path(path), FAMILIES[family], mesh, scheme or "none", stored)))
