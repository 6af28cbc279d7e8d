"""Loads a file of random weights whole, and each of eight CPU devices its shards; prints what was read as JSON.

python tests/sharding/load_on_eight_devices.py FILE MODEL DATA FSDP TENSOR
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import json  # noqa: E402
import sys  # noqa: E402
from dataclasses import replace  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from conftest import FAMILIES, _randomized  # noqa: E402

from tinylora_jax.io.safetensors_file import open_safetensors, write_safetensors  # noqa: E402
from tinylora_jax.io.weights import build_tree, name_tensors, parameter_names  # noqa: E402
from tinylora_jax.models.sharding import MeshSpec, param_shardings  # noqa: E402


def run(path, config, mesh):
    write_safetensors(path, name_tensors(config, _randomized(config, seed=3)), "float32")
    most = {}  # elements read at once, by name
    with open_safetensors(path) as tensors:

        def watched(name):
            def part(index):
                values = tensors[name].read_part(index)
                most[name] = max(most.get(name, 0), values.size)
                return values

            return replace(tensors[name], read=None, read_part=part)

        whole = build_tree(config, tensors, jnp.bfloat16)
        split = build_tree(config, {n: watched(n) for n in tensors}, jnp.bfloat16, partial(param_shardings, mesh))
    names = {
        jax.tree_util.keystr(tuple(map(jax.tree_util.DictKey, p))): n for n, (p, _) in parameter_names(config).items()
    }
    pairs = zip(jax.tree_util.tree_leaves_with_path(split), jax.tree.leaves(whole), strict=True)
    found = {}
    for (path, leaf), expected in pairs:
        name = names[jax.tree_util.keystr(path)]
        shard = max(shard.data.size for shard in leaf.addressable_shards)
        equal = bool(np.array_equal(np.asarray(leaf), np.asarray(expected)))
        found[name] = {"equal": equal, "read": most[name], "shard": shard, "whole": leaf.size}
    return found


if __name__ == "__main__":
    path, family, *sizes = sys.argv[1:]
    print(json.dumps(run(Path(path), FAMILIES[family], MeshSpec(*map(int, sizes)).make(jax.devices()))))
