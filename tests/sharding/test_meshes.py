"""Generation and one update give the same on any mesh of eight devices as on one device."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinylora_jax.models.sharding import MeshSpec

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]  # the tiny models' 2 kv heads do not divide 4 or 8


def run(family, modes, mesh):
    return start("on_eight_devices.py", family, ",".join(modes), *mesh)


def start(program, *arguments):
    command = [sys.executable, str(Path(__file__).with_name(program)), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def alone():
    """The results on one device, by family and modes."""
    found = {}

    def get(*key):
        if key not in found:
            found[key] = run(*key, (1, 1, 1))
        return found[key]

    return get


def check(alone, family, modes, mesh):
    expected, got = alone(family, modes), run(family, modes, mesh)
    for mode in modes:
        assert got[mode] == expected[mode], mode
    np.testing.assert_allclose(got["v"], expected["v"], atol=1e-5)
    np.testing.assert_allclose(got["grad_norm"], expected["grad_norm"], rtol=1e-4)
    assert expected["streams"] == 1 and got["streams"] > 1, "the streams must be split too"
    assert got["compiled"] == got["shapes"], "a second update must not compile again"
    assert len(set(expected["sampled"]["lengths"])) > 1 and expected["grad_norm"] > 1e-3


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 1, 8)], ids=str)
def test_a_mesh_changes_nothing(alone, mesh):
    check(alone, "qwen2", ("sampled",), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama", "smollm"])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh_changes_nothing(alone, family, mesh):
    check(alone, family, ("greedy", "sampled"), mesh)


@pytest.mark.parametrize("mesh", [(1, 2, 4), (2, 1, 4)], ids=str)
def test_of_a_file_each_device_gets_its_shards_and_no_more_is_read(mesh, tmp_path):
    found = start("load_on_eight_devices.py", str(tmp_path / "weights.safetensors"), "qwen2", *mesh)
    assert all(leaf["equal"] and leaf["read"] == leaf["shard"] for leaf in found.values()), found
    assert all(leaf["read in all"] == leaf["whole"] for leaf in found.values()), "what several hold is read once"
    gate = found["model.layers.0.mlp.gate_proj.weight"]
    assert gate["shard"] <= gate["whole"] // 4


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ((3, 1, 1), 8, "choose data = 8 / 1"),
        ((0, 1, 3), 8, "a divisor of 8"),
        ((2, 2, 4), 8, "does not fit 8 devices"),
    ],
)
def test_a_mesh_that_does_not_fit_says_what_does(sizes, devices, message):
    with pytest.raises(ValueError, match=message):
        MeshSpec(*sizes).resolve(devices)


@pytest.mark.parametrize(("sizes", "message"), [((-1, 1, 1), "data"), ((1, 0, 1), "fsdp"), ((1, 1, True), "tensor")])
def test_sizes_of_a_mesh_are_checked(sizes, message):
    with pytest.raises(ValueError, match=message):
        MeshSpec(*sizes)
