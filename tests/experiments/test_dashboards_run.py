"""A run's dashboards from its config: each step once after a resume, and the same run without one."""

import pytest

from experiments import grpo, sweep
from experiments.common.specs import ConfigError, parse
from tinylora_jax.io import _dashboards


class Recorder:
    runs: dict = {}

    def __init__(self, run_id, name, workdir, config):
        self.run = self.runs.setdefault(run_id, {"config": config, "steps": [], "pictures": 0})

    def step(self, step, values, page):
        self.run["steps"].append((step, values["reward"], bool(page)))

    def picture(self, path, step):
        self.run["pictures"] += 1

    def close(self):
        pass


@pytest.fixture
def recorder(monkeypatch):
    made = type("Fresh", (Recorder,), {"runs": {}})
    monkeypatch.setitem(_dashboards.LOGGERS, "wandb", made)
    monkeypatch.setattr(_dashboards.importlib.util, "find_spec", lambda name: object())
    return made


def test_a_run_that_was_interrupted_is_one_run_on_its_dashboard(
    recorder, config, interrupted, command_line, finished, traces
):
    config.logger = "wandb,tensorboard"
    workdir = interrupted(config, checks=9)
    result = command_line(config, workdir)
    assert result.code == 0, result.err
    (run,) = recorder.runs.values()
    assert [step for step, _, _ in run["steps"]] == list(range(5)) and all(page for _, _, page in run["steps"])
    assert run["pictures"] == 1 and run["config"]["optimizer"]["learning_rate"] == 0.05
    ours, theirs = traces(workdir), traces(finished.workdir)
    assert ours == theirs, "the numbers are those of a run without dashboards"
    assert [reward for _, reward, _ in run["steps"]] == [row["reward"] for row in ours["rows"]]


@pytest.mark.parametrize(
    "logger, said", [("wndb", "config.logger: 'wndb' is unknown.*did you mean wandb"), ("", "no logger")]
)
def test_a_wrong_logger_is_a_problem_of_the_config(config, logger, said):
    config.logger = logger
    with pytest.raises(ConfigError, match=said):
        parse(config)


def test_a_sweep_has_no_other_dashboards(recorder, config, stop, tmp_path):
    config.logger = "wandb"
    with pytest.raises(ConfigError, match="a sweep has no wandb; set it to tensorboard or none"):
        sweep.run(config, ["seed=0,1"], tmp_path / "sweep", stop)


def test_a_run_without_loggers_has_its_lines_alone(config, stop, tmp_path):
    config.logger, config.max_steps = "none", 1
    grpo.run(config, tmp_path / "run", stop)
    assert not (tmp_path / "run" / "tensorboard").exists() and (tmp_path / "run" / "metrics.jsonl").exists()
