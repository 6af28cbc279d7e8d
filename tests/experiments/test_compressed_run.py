"""A run on a model whose file is quantized already: its storage is used without a word in the config."""

import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from compressed_files import compress  # noqa: E402

from experiments import evaluate, export, generate, grpo  # noqa: E402
from experiments.common import meshes  # noqa: E402
from experiments.common.architectures import described  # noqa: E402
from tinylora_jax.adapters import exact, leaves_by_path, scheme_of  # noqa: E402
from tinylora_jax.io import load_pretrained, open_adapter  # noqa: E402


def write(root, bits, model_folder, make_config):
    compress(model_folder, root / "model", bits)
    config = make_config()
    config.model, config.max_steps = str(root / "model"), 2
    return config


@pytest.fixture
def config(model_folder, make_config, tmp_path):
    return write(tmp_path, 8, model_folder, make_config)


@pytest.fixture(scope="module", params=[8, 4])
def trained(request, make_config, model_folder, stop, tmp_path_factory):
    root = tmp_path_factory.mktemp("compressed")
    config = write(root, request.param, model_folder, make_config)
    return config, root / "run", grpo.run(config, root / "run", stop), f"int{request.param}"


def test_the_base_model_is_evaluated(config):
    result, rows = evaluate.run(config, None)
    assert result["questions"] == 6 and len(rows) == 12


@pytest.mark.slow
def test_the_adapter_records_the_storage_and_scores_the_same(trained):
    config, workdir, summary, scheme = trained
    assert config.quantize == "none" and open_adapter(workdir / "adapter").quantize == scheme
    result, _ = evaluate.run(config, workdir / "adapter")
    assert all(result[name] == summary["eval_after"][name] for name in ("strict", "lenient", "mean_tokens"))
    config = config.copy_and_resolve_references()
    config.quantize = scheme  # to ask for what the file has is the same
    assert evaluate.run(config, workdir / "adapter")[0]["strict"] == result["strict"]
    assert scheme_of(generate.load(config.model, [str(workdir / "adapter")], jnp.float32).base.params) == scheme


def test_a_dry_run_plans_with_the_storage_of_the_file(config, stop, tmp_path, monkeypatch):
    planned, fit = [], meshes.fit
    monkeypatch.setattr(meshes, "fit", lambda *given: planned.append(given[1].quantize) or fit(*given))
    grpo.run(config, tmp_path / "run", stop, dry_run=True)
    assert config.quantize == "none" and planned == ["int8"]
    assert described(config.model, "none")[1] == "int8"


@pytest.mark.slow
def test_a_merged_export_is_a_plain_model(trained, tmp_path, capsys):
    config, workdir, _, scheme = trained
    export.export(workdir / "adapter", "merged", tmp_path / "merged", config.model)
    assert f"restored from {scheme}\n" in capsys.readouterr().err
    merged = load_pretrained(str(tmp_path / "merged"), jnp.float32)
    assert scheme_of(merged.params) == "none" and "quantization_config" not in merged.hf_config
    base = leaves_by_path(load_pretrained(config.model, jnp.float32).params)
    moved = {
        path: float(jnp.abs(leaf - exact(base[path])).max()) for path, leaf in leaves_by_path(merged.params).items()
    }
    assert 1e-4 < max(moved.values()) < 1
    assert all(change == 0 for path, change in moved.items() if not path.endswith("proj/kernel"))


def test_weights_that_are_trained_are_refused(config, stop, tmp_path):
    config.method = "full"
    with pytest.raises(ValueError, match="full fine-tuning trains the weights, but they are quantized in int8"):
        grpo.run(config, tmp_path / "run", stop)
