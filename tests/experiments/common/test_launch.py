"""The start of a run: what compiles while weights are read is what runs, and what fails there is told at once."""

import re
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import grpo, sft, sweep
from experiments.common import launch as launching
from experiments.common.compilation import compile_together
from experiments.common.launch import launch
from experiments.common.specs import parse
from experiments.common.task import load_task

STEPS = {"jit(_generate)", "jit(_accumulate)", "jit(_apply)"}  # the programs of a step and of evaluation
FACTORS = {"jit(subspace_svd)", "jit(oriented_stack)"}  # the exact method is not compiled on a CPU


@pytest.fixture
def compiled(monkeypatch):
    """Names of programs, compiled before the weights are there and after."""
    found = SimpleNamespace(early=[], late=[], now=None)
    found.now = found.early

    def listen(event, duration, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.now.append(fun_name)

    def together(*args):
        compile_together(*args)
        found.now = found.late

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    monkeypatch.setattr(launching, "compile_together", together)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize(
    "method", ["tinylora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "full"))]
)
def test_what_runs_was_compiled_from_shapes(config, stop, tmp_path, compiled, method):
    config.method, config.eval_samples, config.svd = method, 3, "subspace"
    grpo.run(config, tmp_path / "run", stop)
    wanted = STEPS | (FACTORS if method == "tinylora" else set())
    assert wanted <= set(compiled.early) and compiled.early.count("jit(_generate)") == 3
    assert compiled.late and not (STEPS | FACTORS) & set(compiled.late)


@pytest.mark.slow
def test_so_it_is_for_sft_and_for_a_population(config, stop, tmp_path, compiled):
    config.max_new_tokens, config.max_steps, config.svd = 24, 2, "subspace"
    sft.run(config, tmp_path / "sft", stop)
    assert STEPS | FACTORS <= set(compiled.early) and not (STEPS | FACTORS) & set(compiled.late)
    jax.clear_caches()
    compiled.early, compiled.late = [], []
    compiled.now = compiled.early
    sweep.run(config, ["seed=0,1"], tmp_path / "sweep", stop)
    assert STEPS | FACTORS <= set(compiled.early)
    assert (STEPS | FACTORS) & set(compiled.late) == {"jit(_apply)"}, "the small one that every member has of its own"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "steps"),
    [
        ({"optimizer": {"method": "natural"}}, {"jit(_generate)", "jit(_accumulate_by_prompt)", "jit(_apply)"}),
        ({"search": "es", "evolution": {"population": 4}}, {"jit(_generate)", "jit(_apply)"}),
    ],
)
def test_so_it_is_for_other_steps_of_v(config, stop, tmp_path, compiled, change, steps):
    config.update({**change, "max_steps": 2, "svd": "subspace"})
    grpo.run(config, tmp_path / "run", stop)
    assert steps <= set(compiled.early) and not steps & set(compiled.late)


@pytest.mark.slow
def test_so_it_is_on_a_mesh(processes, tmp_path, monkeypatch):
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_LOG_COMPILES": "1"}
    monkeypatch.setattr(processes, "env", processes.env | settings)
    how = ("--config.mesh.tensor=2", "--config.max_steps=2", "--config.svd=subspace")
    result = processes.run("grpo", f"--workdir={tmp_path / 'run'}", *how)
    assert result.code == 0, result.err
    early, late = result.err.split("factorizing its weights")
    names = lambda text: set(re.findall(r"Finished XLA compilation of (jit\(\w+\))", text))
    assert names(early) >= STEPS | FACTORS and not (STEPS | {"jit(oriented_stack)"}) & names(late)


def test_modules_that_are_not_determined_change_no_program(config, model_folder, stop, tmp_path, compiled):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.eye(32, dtype=np.float32)
    save_file(tensors, folder / "model.safetensors")
    config.model, config.max_steps = str(folder), 1
    task = load_task(config, parse(config))
    assert (
        task.ill_conditioned == task.policy_to_save().factors.ill_conditioned == ("layers/1/self_attn/q_proj/kernel",)
    )
    assert task.policy.factors.ill_conditioned == ()
    grpo.run(config, tmp_path / "run", stop)
    assert not STEPS & set(compiled.late)
    assert "layers/1/self_attn/q_proj/kernel" in (tmp_path / "run" / "adapter" / "adapter.json").read_text()


def test_only_the_final_evaluation_is_left(config, finished, stop, tmp_path, monkeypatch, traces):
    grpo.run(config, tmp_path / "run", stop)
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(grpo.Trainer, "lower", lambda *_: pytest.fail("nothing is left to train"))
    grpo.run(config, tmp_path / "run", stop)
    assert traces(tmp_path / "run") == traces(finished.workdir)


def test_a_weight_that_cannot_be_read_ends_the_wait_for_compilers(config, monkeypatch):
    going = threading.Event()
    slow = SimpleNamespace(compile=lambda: going.wait(60))

    def broken(*_):
        raise ValueError("model.norm.weight: damaged")

    monkeypatch.setattr("tinylora_jax.io.hf._weights._leaf", broken)
    with (
        pytest.raises(ValueError, match=rf"{config.model}: model.norm.weight: damaged"),
        launch(config, parse(config)) as start,
    ):
        start.finish([slow])
    assert not going.is_set(), "the compiler was not waited for"
    going.set()


def test_a_program_that_does_not_compile_is_told():
    def fail():
        raise ValueError("no such program")

    with pytest.raises(ValueError, match="no such program"):
        compile_together([SimpleNamespace(compile=lambda: None), SimpleNamespace(compile=fail)])
