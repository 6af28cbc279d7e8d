"""A whole run on a tiny model: what it leaves, and that it trains the policy that it samples from."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo
from experiments.common import runs
from experiments.common.answering import answer
from experiments.common.specs import parse
from experiments.common.task import load_task, make_prompts
from tinylora_jax import rl
from tinylora_jax.data import load_questions, padded_width
from tinylora_jax.io._checkpoint import Checkpoints
from tinylora_jax.io.adapter._file import read_adapter

METRICS = {
    *("step", "loss", "grad_norm", "v_norm", "kl", "entropy", "clip_low", "clip_high", "delta_prob", "importance"),
    *("reward", "reward_lenient", "reward_se", "groups_without_signal", "length", "truncated"),
    *("v", "rollout_s", "grading_s", "update_s", "tokens_per_s", "slot_efficiency"),
}


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def task(make_config):
    config = make_config()
    return load_task(config, parse(config))


def test_summary(finished):
    summary = finished.summary
    assert summary == json.loads((finished.workdir / "summary.json").read_text())
    expected = {"model": "tiny", "params": 8, "bytes_bf16": 16, "steps": 5}
    assert {name: summary[name] for name in expected} == expected
    for name in ("eval_before", "eval_after"):
        assert summary[name]["questions"] == 6
        assert 0 <= summary[name]["strict"] <= 1 and 0 <= summary[name]["lenient"] <= 1
    assert summary["wall_s"] > 0 and summary["generated_tokens_per_s"] > 0


def test_metrics_are_complete_and_finite(finished):
    found = rows(finished.workdir)
    assert [row["step"] for row in found] == list(range(5))
    for row in found:
        assert set(row) == METRICS
        vector = row.pop("v")
        assert len(vector) == 8 and all(map(math.isfinite, vector))
        assert math.dist(vector, [0] * 8) == pytest.approx(row["v_norm"], rel=1e-6)
        assert all(math.isfinite(value) for value in row.values()), row
    assert any(row["groups_without_signal"] < 1 for row in found)
    assert 0 < np.mean([row["reward"] for row in found]) < 1, "the run needs a signal"


def test_files(finished):
    workdir = finished.workdir
    assert [path.name for path in sorted((workdir / "samples").iterdir())] == [f"{i:06d}.txt" for i in range(5)]
    page = (workdir / "samples" / "000000.txt").read_text()
    assert page.count("=== question") == 2 and page.count("--- strict") == 4
    (events,) = (workdir / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()
    assert (workdir / "adapter" / "vector.bin").stat().st_size == 4 * finished.summary["params"]  # float32
    assert not list(workdir.rglob("*.tmp"))


def test_the_vector_moved_and_its_norm_is_the_logged_one(finished):
    _, v, _ = read_adapter(finished.workdir / "adapter")
    assert np.all(np.asarray(v) != 0)
    np.testing.assert_allclose(np.linalg.norm(v), rows(finished.workdir)[-1]["v_norm"], rtol=1e-6)


def test_bfloat16_vector_takes_two_bytes_a_number(config, stop, tmp_path):
    config.save_dtype, config.max_steps, config.eval_data.limit = "bfloat16", 1, 1
    summary = grpo.run(config, tmp_path / "run", stop)
    size = (tmp_path / "run" / "adapter" / "vector.bin").stat().st_size
    assert size == summary["bytes_bf16"] == 2 * summary["params"] == 16


def test_a_finished_run_is_not_trained_again(finished, config, stop, monkeypatch):
    monkeypatch.setattr(runs, "launch", lambda *_: pytest.fail("the model was loaded"))
    assert grpo.run(config, finished.workdir, stop) == finished.summary


def test_the_same_run_twice_gives_the_same_bits(finished, config, stop, tmp_path, traces):
    grpo.run(config, tmp_path / "again", stop)
    assert traces(tmp_path / "again") == traces(finished.workdir)


def test_another_seed_gives_other_bits(finished, config, stop, tmp_path, traces):
    config.seed = 1
    grpo.run(config, tmp_path / "other", stop)
    assert traces(tmp_path / "other")["v"] != traces(finished.workdir)["v"]


@pytest.fixture
def compilations():
    """Counts the programs that XLA compiles from now on."""
    count = [0]

    def listen(event, duration, **_):
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def test_kl_and_several_updates_and_nothing_compiles_after_the_first_step(
    config, stop, tmp_path, monkeypatch, compilations
):
    config.grpo.kl_coef, config.grpo.updates_per_rollout = 0.1, 2
    config.optimizer.learning_rate = 0.5  # far enough to leave the clipping range
    at_save, save = [], Checkpoints.save

    def counting(self, *args):
        save(self, *args)
        at_save.append(compilations[0])

    aside, untrained = [], runs.evaluate_untrained

    def evaluating(*args):
        before = compilations[0]
        found = untrained(*args)
        aside.append(compilations[0] - before)
        return found

    monkeypatch.setattr(Checkpoints, "save", counting)
    monkeypatch.setattr(runs, "evaluate_untrained", evaluating)
    jax.clear_caches()
    grpo.run(config, tmp_path / "run", stop)
    assert at_save[0] > 0, "the counter counts"
    # After the first step comes the evaluation of the untrained model, with its fingerprint.
    assert at_save == [at_save[0], *[at_save[0] + aside[0]] * 4]
    found = rows(tmp_path / "run")
    assert all(row["kl"] > 0 for row in found)
    assert any(row["clip_low"] + row["clip_high"] > 0 for row in found)
    assert all(row["delta_prob"] < 1e-5 for row in found), "old logprobs are those of the rollout"


def test_a_single_update_never_clips(finished):
    for row in rows(finished.workdir):
        assert row["kl"] == row["clip_low"] == row["clip_high"] == 0


@pytest.mark.parametrize("loss_type", ["dapo", pytest.param("dr_grpo", marks=pytest.mark.slow)])
def test_other_losses_run(config, stop, tmp_path, loss_type):
    config.grpo.loss_type, config.grpo.stream_tokens, config.max_steps = loss_type, 4096, 2
    config.optimizer.schedule = "linear"
    assert grpo.run(config, tmp_path / "run", stop)["steps"] == 2


def test_noise_differs_between_steps(config, stop, tmp_path, monkeypatch):
    config.train_data.limit, config.epochs = 4, 5  # every step asks the same four questions
    config.optimizer.learning_rate = 1e-30  # of the same model
    drawn = []

    def recording(*args, **kwargs):
        answers = answer(*args, **kwargs)
        order = np.argsort(answers.arrays.ids)
        drawn.append(answers.completions.tokens.reshape(4, 2, -1)[order])
        return answers

    monkeypatch.setattr(grpo, "answer", recording)
    grpo.run(config, tmp_path / "run", stop)
    assert len(drawn) == 5
    for i in range(5):
        for other in drawn[:i]:
            assert np.mean(np.any(drawn[i] != other, axis=-1)) > 0.5
        assert np.any(drawn[i][:, 0] != drawn[i][:, 1]), "two samples of a question differ"


def test_the_vector_reaches_the_rollout(config, task):
    # A stack whose rollout engine misses an adapter update trains on stale samples without noticing (verl#7495).
    prompts = make_prompts(config, load_questions(parse(config).train_data), task)[:4]
    key, width = rl.step_key(0, "train", 0), padded_width(prompts)
    zero = jnp.zeros((4, 2))
    v = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2)), jnp.float32)
    base, again, moved = (answer(task, x, prompts, key, task.sampling, 2, width).completions for x in (zero, zero, v))
    np.testing.assert_array_equal(base.tokens, again.tokens)
    assert np.any(base.tokens != moved.tokens)
    same = base.tokens[:, 0] == moved.tokens[:, 0]
    assert same.any() and np.all(base.logprobs[same, 0] != moved.logprobs[same, 0])


def test_each_rollout_uses_the_vector_of_the_update_before(config, stop, tmp_path, monkeypatch, task):
    used, states = [], []
    step = grpo.Trainer.step

    def recording(task, v, *args, **kwargs):
        used.append(np.asarray(v))
        return answer(task, v, *args, **kwargs)

    def stepping(self, task, state, *args):
        result = step(self, task, state, *args)
        states.append(np.asarray(result[0].v))
        return result

    monkeypatch.setattr(grpo, "answer", recording)
    monkeypatch.setattr(grpo.Trainer, "step", stepping)
    config.optimizer.learning_rate = 0.3
    grpo.run(config, tmp_path / "run", stop)
    np.testing.assert_array_equal(used, [np.zeros((4, 2)), *states[:-1]])
    assert all(row["delta_prob"] < 1e-5 and abs(row["importance"] - 1) < 1e-4 for row in rows(tmp_path / "run"))


def test_batches_cover_an_epoch_without_repeats(config, stop, tmp_path, monkeypatch):
    config.max_steps, config.epochs, config.train_data.limit = 0, 2, 9  # two batches of four an epoch, one is left
    asked = []
    monkeypatch.setattr(
        grpo, "answer", lambda task, v, prompts, *args: (asked.append(prompts), answer(task, v, prompts, *args))[1]
    )
    assert grpo.run(config, tmp_path / "run", stop)["steps"] == 4
    epochs = [[prompt.id for batch in asked[i : i + 2] for prompt in batch] for i in (0, 2)]
    assert all(len(set(ids)) == 8 for ids in epochs) and epochs[0] != epochs[1]
