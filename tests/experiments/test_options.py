"""Runs with other losses and several rewards: logged, resumed to the same bits, and evaluated by the first reward."""

import json

import numpy as np
import pytest

from experiments import grpo
from experiments.common.specs import ConfigError, parse
from experiments.evaluate import run as evaluate_run

SEVERAL = "tiny_rewards:even:1,tiny_rewards:shortest:0.5,format:0.25"
SEQUENCE = {"importance_sampling_level": "sequence", "tis_mode": "sequence_truncate", "updates_per_rollout": 2}
OPTIONS = {
    "gspo": {**SEQUENCE, "clip_low": 3e-4, "clip_high": 4e-4, "kl_coef": 0.1},
    "all": {
        **SEQUENCE,
        "loss_type": "cispo",
        "mask_truncated_completions": True,
        "multi_objective_aggregation": "normalize_then_sum",
    },
}


@pytest.fixture(scope="module", params=["all", pytest.param("gspo", marks=pytest.mark.slow)])
def run_of(request, make_config, stop, tmp_path_factory):
    """The config of a run with options, its workdir and its summary."""
    config = make_config()
    config.grpo.update(OPTIONS[request.param])
    config.reward, config.max_steps = SEVERAL, 4
    workdir = tmp_path_factory.mktemp("options") / "run"
    return config, workdir, grpo.run(config, workdir, stop)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_every_reward_is_logged_by_itself(run_of):
    _, workdir, _ = run_of
    weights = {"reward/tiny_rewards:even": 1, "reward/tiny_rewards:shortest": 0.5, "reward/format": 0.25}
    for row in rows(workdir):
        assert [name for name in row if name.startswith("reward/")] == list(weights)
        total = sum(weight * row[name] for name, weight in weights.items())
        assert row["reward"] == pytest.approx(total, abs=1e-6) and row["grad_norm"] >= 0
    assert any(row["reward/tiny_rewards:shortest"] not in (0, row["reward/tiny_rewards:even"]) for row in rows(workdir))
    assert np.linalg.norm(rows(workdir)[-1]["v"]) > 0
    page = (workdir / "samples" / "000000.txt").read_text()
    assert page.count(", tiny_rewards:shortest ") == page.count("--- strict") == 4


def test_the_first_reward_is_the_accuracy(run_of):
    config, workdir, summary = run_of
    alone = config.copy_and_resolve_references()
    alone.reward = "tiny_rewards:even"
    found, answers = evaluate_run(alone, workdir / "adapter")
    assert {row["strict"] for row in answers} <= {0.0, 1.0}
    assert all(found[name] == summary["eval_after"][name] for name in ("strict", "lenient", "mean_tokens"))
    assert evaluate_run(config, workdir / "adapter")[0] == found


def test_an_interrupted_run_continues_to_the_same_bits(run_of, interrupted, stop, traces):
    config, workdir, _ = run_of
    parts = interrupted(config)
    grpo.run(config, parts, stop)
    assert traces(parts) == traces(workdir)


def test_length_cannot_be_the_accuracy(config):
    config.reward = "length:0.05,hash"
    with pytest.raises(ConfigError, match="'length' only compares the answers of a group; name it after another one"):
        parse(config)
