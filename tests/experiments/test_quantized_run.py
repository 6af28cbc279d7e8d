"""A run on a quantized base: training, resuming, evaluating, exporting, and moving the adapter to the 16-bit base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import evaluate, export, generate, grpo
from experiments.common.preemption import Stopped
from tinylora_jax.adapters import exact, leaves_by_path, scheme_of
from tinylora_jax.io import load_pretrained, open_adapter, open_trained
from tinylora_jax.io.adapter import AdapterError


def configured(config, scheme, method="tinylora"):
    config.quantize, config.method, config.max_steps = scheme, method, 2
    return config


@pytest.fixture(scope="module", params=["int8", pytest.param("int4", marks=pytest.mark.slow)])
def trained(request, make_config, stop, tmp_path_factory):
    config = configured(make_config(), request.param)
    workdir = tmp_path_factory.mktemp(request.param) / "run"
    return config, workdir, grpo.run(config, workdir, stop)


def weights_of(config, scheme):
    return load_pretrained(config.model, "float32", quantize=scheme)


def test_the_saved_adapter_scores_the_same(trained):
    config, workdir, summary = trained
    result, _ = evaluate.run(config, workdir / "adapter")
    assert all(result[name] == summary["eval_after"][name] for name in ("strict", "lenient", "mean_tokens"))
    assert open_adapter(workdir / "adapter").quantize == config.quantize == result["quantize"]


def test_an_interrupted_run_continues_to_the_same_bits(trained, stop, tmp_path):
    config, workdir, _ = trained
    with pytest.raises(Stopped):
        grpo.run(config, tmp_path / "run", type(stop)(4))
    grpo.run(config, tmp_path / "run", stop)
    np.testing.assert_array_equal(*(open_adapter(path / "adapter").v for path in (tmp_path / "run", workdir)))


def test_another_storage_is_refused_unless_asked_for(trained):
    config, workdir, _ = trained
    folder, scheme = workdir / "adapter", config.quantize
    plain, quantized = (weights_of(config, each).params for each in ("none", scheme))
    with pytest.raises(
        AdapterError, match=f"in {scheme}, but .* without quantization; .* quantize='{scheme}' .*, or ask"
    ):
        open_adapter(folder).factors(plain, "auto")
    other = "int4" if scheme == "int8" else "int8"
    with pytest.raises(AdapterError, match="--to=merged"):
        open_adapter(folder, transfer=True).factors(weights_of(config, other).params, "auto")
    ours, theirs = open_adapter(folder).factors(quantized, "auto"), open_adapter(folder, True).factors(plain, "auto")
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_the_next_commands_of_a_transfer_ask_for_it_too(trained):
    config, workdir, _ = trained
    config = config.copy_and_resolve_references()
    config.quantize = "none"
    result, _ = evaluate.run(config, workdir / "adapter", showcase=1, transfer=True)
    assert result["quantize"] == "none"
    shown = lambda result, transfer: evaluate.ending(result, workdir / "adapter", None, transfer)
    plain = {name: value for name, value in result.items() if name != "showcase"}
    for transfer in (False, True):
        assert ("--transfer" in shown(plain, transfer)) == ("--quantize=none" in shown(result, transfer)) == transfer


@pytest.mark.slow
def test_a_lora_is_refused_and_moved_too(config, stop, tmp_path):
    config = configured(config, "int8", "lora")
    grpo.run(config, tmp_path / "run", stop)
    plain, folder = weights_of(config, "none").params, tmp_path / "run" / "adapter"
    with pytest.raises(AdapterError, match="in int8, but"):
        open_trained(folder).policy(plain, "auto")
    assert open_trained(folder, transfer=True).policy(plain, "auto").params is plain


def test_merged_exports(trained, tmp_path, model_folder):
    config, workdir, _ = trained
    moved = {}
    for quantize in (None, "none"):
        folder = tmp_path / str(quantize)
        export.export(workdir / "adapter", "merged", folder, str(model_folder), quantize=quantize)
        base = leaves_by_path(weights_of(config, quantize or config.quantize).params)
        merged = leaves_by_path(load_pretrained(str(folder), jnp.float32).params)
        moved[quantize] = {path: merged[path] - exact(base[path]) for path in base}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *moved.values())
    assert max(float(jnp.abs(x).max()) for x in moved[None].values()) > 1e-4
    with pytest.raises(ValueError, match="keeps the base of training"):
        export.export(workdir / "adapter", "tinylora", tmp_path / "own", str(model_folder), quantize="none")


def test_a_peft_folder_says_that_it_does_not_record_the_storage(trained, tmp_path, model_folder, capsys):
    config, workdir, _ = trained
    export.export(workdir / "adapter", "peft-lora", tmp_path / "lora", str(model_folder))
    said = capsys.readouterr().err
    assert f"trained on {config.quantize}; peft-lora does not record it" in said


def test_generation_loads_the_base_of_training(trained, model_folder):
    config, workdir, _ = trained
    for quantize, expected in ((None, config.quantize), ("none", "none")):
        folder = str(workdir / "adapter")
        answering = generate.load(str(model_folder), [folder, "base"], jnp.float32, quantize=quantize)
        assert scheme_of(answering.base.params) == expected
