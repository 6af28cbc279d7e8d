"""The command `python -m experiments.compile`: its table, its JSON, its refusals; and, slowly, the real models."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="pip install 'jax[tpu]'")

from experiments import compile  # noqa: E402
from experiments.configs import base  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments" / "configs"
SMALL = (
    "--model_config=tiny",
    "--only=decode",
    "--only=optimizer",
    "--config.max_prompt_tokens=32",
    "--config.max_new_tokens=96",
    "--config.batch_size=8",
    "--config.svd=subspace",
)


def run(*flags, config="gsm8k_qwen2_5_7b", timeout=300):
    command = [sys.executable, "-m", "experiments.compile", f"--config={CONFIGS / config}.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=timeout)


@pytest.mark.slow
def test_the_table_and_the_json_tell_the_same(tmp_path):
    output = tmp_path / "result.json"
    result = run(*SMALL, "--topology=v5e:2x2", "--mesh=1,1,4", f"--json={output}")
    assert result.returncode == 0, result.stderr
    written = json.loads(output.read_text())
    (found,) = written["results"]
    assert (
        written["command"].startswith("python -m experiments.compile --config=")
        and "--mesh=1,1,4" in written["command"]
    )
    assert found["fits"] and found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 4} and found["devices"] == 4
    names = [program["program"] for program in found["programs"]]
    assert names == ["decode, one step", "optimizer"]
    for program in found["programs"]:
        assert program["bytes"]["total"] > 0 and program["compile_s"] >= 0
        assert program["program"][:40] in result.stdout
    assert found["decode"]["weight_bytes_gathered"] == 0
    assert found["decode"]["seconds"] > found["decode"]["floor_s"] > 0
    assert "everything fits: yes" in result.stdout


def test_an_unknown_topology_is_one_message():
    result = run("--topology=v5e:3x3")
    assert result.returncode == 1
    assert "error: topology 'v5e:3x3' does not exist; the nearest is v5e:2x4" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("mesh", "model", "message"),
    [
        ("1,1,3", None, "does not fit the number of devices, 8"),
        ("8", None, "--mesh=8: expected data,fsdp,tensor as three integers, such as 1,1,8"),
        (None, "gpt-5", "the architecture of 'gpt-5' is unknown: expected one of qwen2.5-0.5b"),
    ],
)
def test_what_cannot_be_compiled_says_why(mesh, model, message):
    with pytest.raises(ValueError, match=message):
        compile.run(base.get_config(), ["v5e:2x4"], mesh, model)


MODELS = [
    ("gsm8k_qwen2_5_7b", "v5e:2x4", "1,1,8", None),
    ("gsm8k_qwen2_5_7b", "v6e:2x4", "1,1,8", None),
    ("gsm8k_qwen2_5_7b", "v5p:2x2x1", "1,1,4", None),
    ("gsm8k_qwen2_5_7b", "tpu7x:2x2x1", "2,1,4", None),
    ("gsm8k_qwen2_5_7b", "v5e:16x16", "32,1,8", None),
    ("gsm8k_llama3_1_8b", "v6e:2x4", "1,1,8", None),
    ("gsm8k_qwen3_8b", "v6e:2x4", "1,1,8", None),
]


@pytest.mark.slow
@pytest.mark.parametrize(("config", "target", "mesh", "slots"), MODELS)
def test_a_real_model_fits_and_gathers_no_weights(config, target, mesh, slots, tmp_path):
    output = tmp_path / "result.json"
    more = [] if slots is None else [f"--config.slots={slots}"]
    flags = (f"--topology={target}", f"--mesh={mesh}", "--config.svd=subspace", f"--json={output}", *more)
    result = run(*flags, config=config, timeout=3600)
    assert result.returncode == 0, result.stderr
    (found,) = json.loads(output.read_text())["results"]
    assert found["fits"], result.stdout
    assert found["decode"]["weight_bytes_gathered"] == 0
    for update in found["updates"]:
        assert 0 <= update["all_reduce_bytes"] - update["gradient_bytes"] <= 64
