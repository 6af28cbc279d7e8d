"""A whole run over eight devices is the run of one device."""

import json

import numpy as np
import pytest

from experiments.common.specs import ConfigError, parse
from tinylora_jax.io.adapter._file import read_adapter


@pytest.mark.slow
def test_a_run_on_a_mesh_is_the_run_of_one_device(processes, finished, tmp_path, traces, monkeypatch):
    monkeypatch.setitem(processes.env, "XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    mesh = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")
    flags = (f"--workdir={tmp_path / 'run'}", "--config.grpo.remat=on", *mesh)
    result = processes.run("grpo", *flags)
    assert result.code == 0, result.err
    expected, got = traces(finished.workdir), traces(tmp_path / "run")
    assert got["pages"] == expected["pages"]
    assert got["summary"] == expected["summary"]
    _, v, _ = read_adapter(tmp_path / "run" / "adapter")
    _, alone, _ = read_adapter(finished.workdir / "adapter")
    np.testing.assert_allclose(v, alone, atol=1e-5)

    evaluated = processes.run("evaluate", f"--adapter={tmp_path / 'run' / 'adapter'}", *mesh)
    assert evaluated.code == 0, evaluated.err
    result = json.loads(evaluated.out)
    assert {name: result[name] for name in expected["summary"]["eval_after"]} == expected["summary"]["eval_after"]


def test_a_mesh_that_does_not_fit_is_one_message(processes, tmp_path):
    result = processes.run("grpo", f"--workdir={tmp_path / 'run'}", "--config.mesh.tensor=3")
    assert result.code == 1
    assert result.err.strip().startswith(
        "error: mesh data=auto, fsdp=1, tensor=3 does not fit the number of devices, 1"
    )


def test_a_size_that_is_none_is_among_the_configs_problems(make_config):
    config = make_config()
    config.mesh.fsdp = 0
    with pytest.raises(ConfigError, match="config.mesh: MeshSpec: fsdp must be an integer >= 1, got 0"):
        parse(config)
