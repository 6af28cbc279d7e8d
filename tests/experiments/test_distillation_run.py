"""Runs that learn from a teacher: another model, or the same one with an adapter."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from experiments import grpo, sft
from experiments.common.fitting import rollout_bytes
from experiments.common.specs import ConfigError, parse
from experiments.sweep import run as sweep_run
from tinylora_jax.io import open_pretrained
from tinylora_jax.models import MeshSpec


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def taught(make_config, other_model_folder, stop, tmp_path_factory):
    """The config of a run whose teacher is another model, and its workdir."""
    config = make_config()
    config.teacher, config.max_steps = str(other_model_folder), 4
    workdir = tmp_path_factory.mktemp("taught") / "run"
    grpo.run(config, workdir, stop)
    return config, workdir


def test_an_interrupted_run_continues_to_the_same_bits(taught, interrupted, stop, traces):
    config, workdir = taught
    parts = interrupted(config)
    grpo.run(config, parts, stop)
    assert traces(parts) == traces(workdir)
    assert all(loss > 0.01 for loss in losses(workdir)), "the divergence from another model is positive"


def test_of_itself_there_is_nothing_to_learn_and_of_its_adapter_there_is(config, finished, stop, tmp_path):
    config.teacher, config.max_steps = config.model, 1
    grpo.run(config, tmp_path / "itself", stop)
    row = json.loads((tmp_path / "itself" / "metrics.jsonl").read_text())
    assert abs(row["loss"]) < 1e-4 and row["grad_norm"] < 1e-3
    config.teacher_adapter = str(finished.workdir / "adapter")
    grpo.run(config, tmp_path / "adapted", stop)
    adapted = json.loads((tmp_path / "adapted" / "metrics.jsonl").read_text())
    assert adapted["grad_norm"] > 10 * row["grad_norm"] and adapted["reward"] == row["reward"]


def test_one_answer_per_question_is_enough(config, other_model_folder, stop, tmp_path):
    config.teacher, config.max_steps, config.samples = str(other_model_folder), 1, 1
    grpo.run(config, tmp_path / "run", stop)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["loss"] > 0.01 and row["grad_norm"] > 1e-3


def test_the_teacher_is_counted_and_its_adapter_is_opened_before_anything_runs(config, stop, tmp_path):
    mesh = MeshSpec(1, 1, 1).make(jax.devices()[:1])
    model = open_pretrained(config.model, jnp.dtype(config.dtype)).abstract
    size = lambda: rollout_bytes(model.config, config, mesh, 8, joined=False)
    alone = size()
    config.teacher = config.model
    assert size() - alone == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model.params))
    config.teacher_adapter = str(tmp_path / "nowhere")
    with pytest.raises((ValueError, OSError), match="nowhere"):
        grpo.run(config, tmp_path / "run", stop, dry_run=True)


def test_a_teacher_with_another_tokenizer_is_refused(config, model_folder, stop, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(model_folder, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[5:7]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config.teacher = str(folder)
    with pytest.raises(ConfigError, match="has another tokenizer than .* the same family"):
        grpo.run(config, tmp_path / "run", stop)


def test_what_does_not_fit_is_refused(config, stop, tmp_path):
    config.teacher_adapter = "somewhere"
    with pytest.raises(ConfigError, match="config.teacher_adapter needs config.teacher"):
        parse(config)
    config.teacher, config.search = config.model, "es"
    with pytest.raises(ConfigError, match="config.teacher=.*: expected none with config.search='es'"):
        parse(config)
    config.search = "gradient"
    with pytest.raises(ConfigError, match="config.teacher=.*: SFT learns from solutions"):
        sft.run(config, tmp_path / "sft", stop)
    with pytest.raises(ConfigError, match="config.teacher=.*: a sweep trains with rewards"):
        sweep_run(config, ["seed=0,1"], tmp_path / "sweep", stop)
