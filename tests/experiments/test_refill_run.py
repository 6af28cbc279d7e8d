"""Runs with refilled batches and remembered pass rates: exact resume, the same batches for any number of slots."""

import json

import jax
import numpy as np
import pytest

from experiments import grpo, sft, sweep
from experiments.common.runs import data_of
from experiments.common.specs import ConfigError, parse
from tinylora_jax.data import Prompt, PromptQueue
from tinylora_jax.io._checkpoint import Checkpoints

BOTH = {"refill": 3, "min_draw": 0.1, "max_steps": 8}


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both(make_config, stop, tmp_path_factory, traces):
    """A finished run with both options: the workdir and its traces, and how many programs every step compiled."""
    compiled, at_save, save = [0], [], Checkpoints.save
    listen = lambda event, duration, **_: compiled.append("backend_compile" in event)
    jax.monitoring.register_event_duration_secs_listener(listen)
    config, workdir = make_config(), tmp_path_factory.mktemp("runs") / "both"
    config.update(BOTH)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", lambda *args: (at_save.append(sum(compiled)), save(*args))[1])
        grpo.run(config, workdir, stop)
    jax.monitoring.unregister_event_duration_listener(listen)
    return workdir, traces(workdir), at_save


def test_nothing_compiles_after_the_untrained_model_is_evaluated(both):
    _, _, at_save = both
    assert at_save[0] > 0 and len(set(at_save[1:])) == 1


def test_batches_have_a_signal_and_the_reward_is_that_of_all_groups(both):
    workdir, _, _ = both
    found = rows(workdir)
    assert len(found) == 8
    assert all(row["batch_without_signal"] == 0 or row["questions"] == 12 for row in found)
    assert sum(row["batch_without_signal"] == 0 for row in found) > 4
    assert any(row["groups_without_signal"] > 0 and row["reward"] != row["batch_reward"] for row in found)
    assert all(4 <= row["questions"] <= row["questions_started"] <= 12 for row in found)
    assert all(row["generated_tokens"] >= 2 * row["questions"] * row["length"] * 0.999 for row in found)


@pytest.mark.parametrize("checks", [6, pytest.param(9, marks=pytest.mark.slow)])
def test_an_interrupted_run_continues_to_the_same_bits(both, config, interrupted, stop, traces, checks):
    config.update(BOTH)
    workdir = interrupted(config, checks)
    assert 0 < len(rows(workdir)) < 8
    grpo.run(config, workdir, stop)
    assert traces(workdir) == both[1]


@pytest.mark.slow
def test_slots_change_no_batch(both, config, stop, tmp_path, traces):
    config.update(BOTH | {"slots": 3, "max_steps": 4})
    grpo.run(config, tmp_path / "slots", stop)
    found = traces(tmp_path / "slots")
    assert found["pages"] == {name: both[1]["pages"][name] for name in found["pages"]}
    for got, expected in zip(found["rows"], both[1]["rows"], strict=False):
        np.testing.assert_allclose(got["v"], expected["v"], atol=1e-5)
        assert (got["questions"], got["reward"]) == (expected["questions"], expected["reward"])


def test_pass_rates_are_remembered_without_refill_too(config, stop, tmp_path):
    config.update({"min_draw": 0.1, "max_steps": 6})
    grpo.run(config, tmp_path / "pools", stop)
    record = json.loads(next((tmp_path / "pools" / "checkpoints").glob("6/record/*")).read_text())["record"]
    queue = PromptQueue([Prompt(i, (1,), "", "") for i in range(16)], 4, 0, 2, 0.1)
    queue.set_state(record["data"])
    assert queue._counts[1].sum() == 6 * 4 * 2
    assert record["data"]["position"] > 6 * 4, "some must have been skipped"
    expected = sum(2 * 4 * row["reward"] for row in rows(tmp_path / "pools"))
    assert queue._counts[0].sum() == pytest.approx(expected)


def test_off_is_the_plain_pipeline(config):
    prompts = [Prompt(i, (1,), "", "") for i in range(16)]
    assert not isinstance(data_of(config, prompts), PromptQueue)
    config.refill = 1
    assert isinstance(data_of(config, prompts), PromptQueue)


@pytest.mark.parametrize("command", [sft, sweep])
def test_only_grpo_draws_by_rewards(config, stop, tmp_path, command):
    config.update({"refill": 2, "min_draw": 0.5})
    arguments = (["seed=0,1"], tmp_path / "run", stop) if command is sweep else (tmp_path / "run", stop)
    with pytest.raises(ConfigError, match="config.refill=2 and config.min_draw=0.5: only experiments.grpo"):
        command.run(config, *arguments)


def test_fields_are_checked(config):
    config.update({"refill": -1, "min_draw": 0.0})
    with pytest.raises(
        ConfigError, match=r"config.refill=-1: expected at least 0\n.*config.min_draw=0.0: expected from"
    ):
        parse(config)
