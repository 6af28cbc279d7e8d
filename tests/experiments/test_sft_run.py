"""SFT: the same run as GRPO's, learning from worked solutions."""

import json

import numpy as np
import pytest

from experiments import grpo, sft
from experiments.common.preemption import Stopped
from experiments.evaluate import run as evaluate_run
from experiments.plot import read_run
from experiments.plotting.picture import draw
from tinylora_jax.data import DataError, Prompt, encode_solutions, solution_text
from tinylora_jax.io._run_log import WorkdirError
from tinylora_jax.rewards import BUILT_IN, load_reward


@pytest.fixture
def sft_config(config):
    config.max_new_tokens = 24
    config.reward = "hash"
    return config


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_its_solutions(sft_config, stop, tmp_path):
    summary = sft.run(sft_config, tmp_path / "run", stop)
    rows = rows_of(tmp_path / "run")
    assert len(rows) == 5 and rows[-1]["loss"] < rows[0]["loss"] and np.abs(rows[-1]["v"]).max() > 1e-2
    assert summary["params"] == 8 and "generated_tokens_per_s" not in summary
    page = (tmp_path / "run" / "samples" / "000000.txt").read_text()
    assert "#### " in page and "<|im_end|>" in page
    result, _ = evaluate_run(sft_config, tmp_path / "run" / "adapter")
    assert {name: result[name] for name in ("strict", "lenient")} == {
        name: summary["eval_after"][name] for name in ("strict", "lenient")
    }


def test_an_interrupted_run_continues_to_the_same_bits(sft_config, stop, tmp_path):
    whole = sft.run(sft_config, tmp_path / "whole", stop)
    with pytest.raises(Stopped):
        sft.run(sft_config, tmp_path / "parts", type(stop)(4))
    assert sft.run(sft_config, tmp_path / "parts", stop)["eval_after"] == whole["eval_after"]
    assert [row["v"] for row in rows_of(tmp_path / "parts")] == [row["v"] for row in rows_of(tmp_path / "whole")]


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [(sft, grpo), (grpo, sft)])
def test_a_workdir_of_sft_is_not_continued_by_grpo(sft_config, stop, tmp_path, first, second):
    with pytest.raises(Stopped):
        first.run(sft_config, tmp_path / "run", type(stop)(4))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(WorkdirError, match="experiment: '(sft|grpo)' there, '(sft|grpo)' now"):
        second.run(sft_config, tmp_path / "run", stop)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "method", ["tinylora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("lora", "full"))]
)
def test_a_run_is_drawn_at_its_end(sft_config, command_line, tmp_path, blank_panels, method):
    sft_config.method, sft_config.max_steps, sft_config.optimizer.learning_rate = method, 2, 1e-3
    result = command_line(sft_config, tmp_path / "run", sft)
    assert result.code == 0 and f"{tmp_path / 'run' / 'run.png'}\n" in result.err, result.err
    assert not blank_panels((tmp_path / "run" / "run.png").read_bytes())
    run, summary, rows = read_run(tmp_path / "run"), json.loads(result.out), rows_of(tmp_path / "run")
    assert run.title.startswith("tiny, ") and f"{summary['params']:,} trained numbers, 2 steps" in run.title
    for accuracies, name in ((run.before, "eval_before"), (run.after, "eval_after")):
        assert accuracies == {grade: summary[name][grade] for grade in ("strict", "lenient")}
    lines = [line.get_ydata() for axes in draw(run).axes for line in axes.lines]
    start = [0.0] if method == "tinylora" else []
    for name in ("loss", "grad_norm", "entropy", "length", "v_norm"):
        expected = (start if name == "v_norm" else []) + [row[name] for row in rows]
        assert any(np.array_equal(y, expected) for y in lines), name


@pytest.mark.parametrize(
    "solution, answer, reward, expected",
    [
        ("a <<1+1=2>>2 b", "2", "hash", "a 2 b\n#### 2"),
        ("a = 2\n#### 2", "2", "hash", "a = 2\n#### 2"),
        ("so \\boxed{2}.", "2", "boxed", "so \\boxed{2}."),
        ("so 2.", "2", "boxed", "so 2.\n\\boxed{2}"),
        (" so 2. ", "2", "my_rewards:f", "so 2."),
    ],
)
def test_a_solution_in_the_format_of_the_reward(solution, answer, reward, expected):
    assert solution_text(solution, answer, reward) == expected


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_is_learned_is_what_the_reward_pays(name):
    assert load_reward(name)(solution_text("1 + 1 = 2", "2", name), "2", "").strict == 1


class Letters:
    """One token a character."""

    chat_template = None

    def apply_chat_template(self, conversation, *args, **kwargs):
        raise AssertionError("a solution is no conversation")

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) for c in text]


def test_solutions_end_with_the_stop_token():
    prompts = [Prompt(3, (1,), "q", "2", "ab")]
    assert encode_solutions(prompts, Letters(), "plain", 7, 3) == ((97, 98, 7),)
    with pytest.raises(DataError, match=r"1 of 1 questions \(ids 3\) are longer than max_new_tokens=2 \(longest: 3"):
        encode_solutions(prompts, Letters(), "plain", 7, 2)
    with pytest.raises(DataError, match=r"1 of 1 questions \(ids 3\) have no worked solution"):
        encode_solutions([Prompt(3, (1,), "q", "2")], Letters(), "plain", 7, 3)
