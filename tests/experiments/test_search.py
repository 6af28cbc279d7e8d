"""Runs with the natural gradient and with an evolution strategy: trained, drawn, resumed to the same bits."""

import json

import numpy as np
import pytest

from experiments import grpo, sft
from experiments.common.specs import ConfigError, parse
from experiments.common.starting import idle_fields
from experiments.plot import plot
from experiments.sweep import run as sweep_run

OPTIONS = {
    "natural": {"optimizer": {"method": "natural", "kl_radius": 1e-2}},
    "es": {"search": "es", "samples": 1, "evolution": {"population": 4, "sigma": 0.3}},
}


@pytest.fixture(scope="module", params=list(OPTIONS))
def run_of(request, make_config, stop, tmp_path_factory):
    """The name of the option, the config of a run with it, and its workdir."""
    config = make_config()
    config.update(OPTIONS[request.param])
    config.max_steps = 4
    workdir = tmp_path_factory.mktemp("search") / "run"
    grpo.run(config, workdir, stop)
    return request.param, config, workdir


def test_v_moves_and_the_run_is_drawn(run_of, tmp_path, blank_panels):
    name, config, workdir = run_of
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    moved = np.diff([[0.0] * 8, *(row["v"] for row in rows)], axis=0)
    assert np.linalg.norm(moved, axis=1).max() > 1e-3
    if name == "natural":
        # The matrix of this batch is not the average that the step was made for, but must not be of another size.
        assert all(0 <= row["step_kl"] < 10 * config.optimizer.kl_radius for row in rows)
        assert any(row["step_kl"] > 0.1 * config.optimizer.kl_radius for row in rows)
    else:
        assert all(0 <= row["pairs_that_differ"] <= 1 for row in rows) and "loss" not in rows[0]
    assert blank_panels(plot(workdir, tmp_path / "run.png").read_bytes()) == []


def test_an_interrupted_run_continues_to_the_same_bits(run_of, interrupted, stop, traces):
    _, config, workdir = run_of
    parts = interrupted(config)
    grpo.run(config, parts, stop)
    assert traces(parts) == traces(workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"search": "random"}, "config.search='random': expected 'gradient' or 'es'"),
        ({**OPTIONS["es"], "samples": 0}, "config.samples=0: expected at least 1"),
        ({**OPTIONS["es"], "method": "lora"}, r"config.method='lora': expected .*'lora_xs'.* with config.search='es'"),
        ({**OPTIONS["es"], **OPTIONS["natural"]}, "config.optimizer.method: expected 'adam' with config.search='es'"),
        ({"search": "es", "evolution": {"population": 6}}, "3 pairs must share the config.batch_size=4 prompts"),
        ({"evolution": {"sigma": 0.0}}, "config.evolution: Evolution: sigma must be finite and > 0, got 0.0"),
        (
            {**OPTIONS["natural"], "method": "full"},
            "method='full': expected .* config.optimizer.method='natural'",
        ),
        ({"optimizer": {"method": "newton"}}, "config.optimizer: Optimizer: method 'newton'"),
    ],
)
def test_values_that_do_not_fit_are_refused(config, change, message):
    config.update(change)
    with pytest.raises(ConfigError, match=message):
        parse(config)


def test_more_numbers_than_the_natural_gradient_takes_are_refused_before_anything_runs(config, stop, tmp_path):
    config.update(OPTIONS["natural"])
    config.adapter.n_tie, config.adapter.u = 1, 400
    with pytest.raises(ValueError, match="expected at most 4,096, got 5,600"):
        grpo.run(config, tmp_path / "run", stop, dry_run=True)


def test_a_step_of_an_evolution_strategy_is_one_update_of_the_schedule(config, stop, tmp_path):
    config.update(OPTIONS["es"])
    config.max_steps, config.optimizer.schedule = 3, "linear"
    for updates in (1, 4):
        config.grpo.updates_per_rollout = updates
        grpo.run(config, tmp_path / str(updates), stop)
    first, second = (json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])["v"] for n in "14")
    assert first == second


def test_changed_fields_that_nothing_reads_are_named(config):
    config.optimizer.kl_radius, config.evolution.sigma, config.grpo.kl_coef = 1e-3, 0.1, 0.1
    config.lora.freeze_a = True
    assert set(idle_fields(config)) == {"lora.freeze_a", "optimizer.kl_radius", "evolution.sigma"}
    config.search, config.method = "es", "lora_xs"
    of_losses, of_tinylora = {"grpo.kl_coef", "grpo.remat", "grpo.stream_tokens"}, {"adapter.n_tie", "adapter.u"}
    assert set(idle_fields(config)) == {*of_losses, *of_tinylora, "lora.freeze_a", "optimizer.kl_radius"}
    config.search, config.method, config.optimizer.method = "gradient", "lora", "natural"
    assert set(idle_fields(config)) == {*of_tinylora, "optimizer.learning_rate", "evolution.sigma"}


def test_other_commands_refuse_an_evolution_strategy(config, stop, tmp_path):
    config.update({"search": "es", "evolution": {"population": 4}})
    with pytest.raises(ConfigError, match="config.search='es': SFT has no rewards"):
        sft.run(config, tmp_path / "sft", stop)
    with pytest.raises(ConfigError, match="config.search='es': a sweep trains by gradients"):
        sweep_run(config, ["seed=0,1"], tmp_path / "sweep", stop)
    config.search = "gradient"
    with pytest.raises(ConfigError, match="optimizer.method: members may differ only in"):
        sweep_run(config, ["optimizer.method=adam,natural"], tmp_path / "sweep", stop)
