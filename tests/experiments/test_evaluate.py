"""Evaluation: every question once, the same answer every time, and no adapter on a model that is not its own."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_rewards import even

from experiments import evaluate as cli
from experiments import grpo
from experiments.common import untrained
from experiments.common.answering import answer
from experiments.common.specs import parse
from experiments.common.task import load_task, make_prompts
from experiments.evaluate import evaluate
from tinylora_jax import rl
from tinylora_jax.adapters import TinyLoRA, factorize, init
from tinylora_jax.data import DataSpec, load_questions, solution_text
from tinylora_jax.io.adapter._file import AdapterError, read_adapter, save_adapter
from tinylora_jax.rollout import Sampling

NO_SUITE = {"suite": None, "suite_folder": None, "correct": None, "transfer": False}


@pytest.fixture(scope="module")
def task(make_config):
    config = make_config()
    return load_task(config, parse(config))


@pytest.fixture(scope="module")
def prompts(make_config, task):
    config = make_config()
    return make_prompts(config, load_questions(parse(config).eval_data), task)


@pytest.fixture
def adapter(finished, tmp_path):
    """A copy of the finished run's adapter, to damage."""
    return shutil.copytree(finished.workdir / "adapter", tmp_path / "adapter")


def v_like(task, seed=0):
    shape = init(task.policy.factors).shape
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def alone(task, v, prompt):
    """The greedy answer of one question, asked by itself."""
    greedy = Sampling(task.sampling.max_new_tokens, temperature=0.0, stop_tokens=task.sampling.stop_tokens)
    return answer(task, v, [prompt], rl.step_key(0, "eval", 0), greedy)


@pytest.mark.parametrize("batch_size", [1, 4, 5, 6, 100])
def test_every_question_counts_once_whatever_the_batch(task, prompts, batch_size):
    v = v_like(task)
    result, rows = evaluate(task, v, prompts, batch_size=batch_size)
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]
    expected = [alone(task, v, prompt).texts[0] for prompt in prompts]
    assert [row["completion"] for row in rows] == expected
    grades = [even(text, "", "") for text in expected]
    assert result["questions"] == len(prompts) == 6
    assert result["strict"] == pytest.approx(np.mean([grade.strict for grade in grades]), abs=1e-6)
    assert result["lenient"] == pytest.approx(np.mean([grade.lenient for grade in grades]), abs=1e-6)
    assert len(set(expected)) > 1, "the model answers different questions differently"


def test_greedy_ignores_the_seed_and_sampling_does_not(task, prompts):
    rows = [evaluate(task, v_like(task), prompts, batch_size=4, samples=3, seed=seed)[1] for seed in (0, 0, 1)]
    of = lambda i, mode: [row["completion"] for row in rows[i] if row["mode"] == mode]
    assert of(0, "greedy") == of(1, "greedy") == of(2, "greedy")
    assert of(0, "sampled") == of(1, "sampled") != of(2, "sampled")
    assert len(of(0, "sampled")) == 18


def test_samples_are_averaged_over_all_completions(task, prompts):
    result, rows = evaluate(task, v_like(task), prompts, batch_size=4, samples=3)
    sampled = [row for row in rows if row["mode"] == "sampled"]
    assert [(row["id"], row["sample"]) for row in sampled] == [(p.id, s) for p in prompts for s in range(3)]
    for name in ("strict", "lenient"):
        assert result["sampled"][name] == pytest.approx(np.mean([row[name] for row in sampled]), abs=1e-6)
    assert result["sampled"]["samples"] == 3 and result["sampled"]["temperature"] == 1.0


def test_the_saved_adapter_scores_as_the_summary_says(finished, config):
    result, _ = cli.run(config, finished.workdir / "adapter")
    after = finished.summary["eval_after"]
    assert {name: result[name] for name in after} == after


def test_without_an_adapter_it_is_the_base_model(finished, config):
    result, _ = cli.run(config, None)
    before = finished.summary["eval_before"]
    assert {name: result[name] for name in before} == before and result["adapter"] is None


def test_command_line_writes_json_and_every_answer(finished, config, monkeypatch, capsys, tmp_path, one_host):
    output = tmp_path / "new" / "result.json"
    files = {"adapter": str(finished.workdir / "adapter"), "output": str(output)}
    values = SimpleNamespace(config=config, **files, **NO_SUITE, **one_host)
    monkeypatch.setattr(cli, "FLAGS", values, raising=False)
    cli.main([])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads(output.read_text())
    assert result["model"] == "tiny" and result["adapter"] == values.adapter and result["questions"] == 6
    rows = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    assert [row["mode"] for row in rows] == ["greedy"] * 6 + ["sampled"] * 6  # the command samples at least once
    for found, part in ((result, rows[:6]), (result["sampled"], rows[6:])):
        assert np.mean([row["strict"] for row in part]) == pytest.approx(found["strict"], abs=1e-6)
    assert set(rows[0]) >= {"id", "question", "answer", "completion", "strict", "lenient", "tokens", "stopped"}


def test_correct_answers_are_solutions_to_learn_from(tmp_path):
    def row(question, completion, strict=1.0, mode="sampled", stopped=True):
        about = {"set": "sums", "id": question, "question": f"What is 1 + {question}?", "answer": str(1 + question)}
        return {**about, "mode": mode, "completion": completion, "strict": strict, "stopped": stopped}

    rows = [
        row(2, "1 + 2 is \\boxed{3}"),
        row(2, "1 + 2 is \\boxed{3}"),  # the same again
        row(2, "It is \\boxed{3}"),
        row(3, "It is \\boxed{3}", strict=0.0),
        row(4, "\\boxed{5}", mode="greedy"),
        row(5, "\\boxed{6} and on and on", stopped=False),
    ]
    found = cli.correct_answers(rows)
    assert [each["solution"] for each in found] == ["1 + 2 is \\boxed{3}", "It is \\boxed{3}"]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in found))
    questions = load_questions(DataSpec(str(path), solution_column="solution"))
    assert [(each.question, each.answer) for each in questions] == [("What is 1 + 2?", "3")] * 2
    assert [solution_text(q.solution, q.answer, "math") for q in questions] == [each["solution"] for each in found]


@pytest.mark.slow
def test_as_a_process(finished, processes, tmp_path):
    adapter = finished.workdir / "adapter"
    result = processes.run("evaluate", f"--adapter={adapter}", f"--output={tmp_path / 'r.json'}")
    assert result.code == 0, result.err
    after = finished.summary["eval_after"]
    found = json.loads(result.out.splitlines()[-1])
    assert {name: found[name] for name in after} == after
    assert (tmp_path / "r.jsonl").is_file()


def edited(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_adapter_of_another_base_is_refused(adapter, config, other_model_folder, capsys, monkeypatch, one_host):
    config.model = str(other_model_folder)
    with pytest.raises(AdapterError, match="trained on 'tiny', but this base model differs in 16 of 27 weights"):
        cli.run(config, adapter)
    values = SimpleNamespace(config=config, adapter=str(adapter), output=None, **NO_SUITE, **one_host)
    monkeypatch.setattr(cli, "FLAGS", values, raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 1
    out, err = capsys.readouterr()
    assert out == "" and "error: the adapter was trained on 'tiny'" in err and "Traceback" not in err


def test_an_adapter_whose_spec_was_altered_is_refused(adapter, config):
    spec = json.loads((adapter / "adapter.json").read_text())["spec"]
    for change in ({"rank": 1}, {"seed": 1}, {"n_tie": 2}, {"n_tie": 7}, {"u": 1}, {"u": 10**9}):
        edited(adapter, spec=spec | change)
        with pytest.raises(AdapterError):
            cli.run(config, adapter)
    edited(adapter, spec=spec | {"rank": 30})
    with pytest.raises(ValueError, match="adapter.json was altered"):
        cli.run(config, adapter)
    edited(adapter, spec=spec)
    cli.run(config, adapter)


def test_an_adapter_for_other_modules_is_refused(adapter, config):
    leaves = json.loads((adapter / "adapter.json").read_text())["leaves"]
    edited(adapter, leaves=leaves[:3])
    with pytest.raises(AdapterError):
        cli.run(config, adapter)
    edited(adapter, leaves=[leaves[0] | {"path": "no/such/.*"}, *leaves[1:]])
    with pytest.raises(ValueError, match="adapter.json was altered"):
        cli.run(config, adapter)


def test_a_truncated_or_altered_vector_is_refused(adapter, config):
    vector = adapter / "vector.bin"
    data = vector.read_bytes()
    vector.write_bytes(data[:-1])
    with pytest.raises(AdapterError, match=f"vector.bin has {len(data) - 1} bytes, expected {len(data)}"):
        cli.run(config, adapter)
    vector.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(AdapterError, match="was altered"):
        cli.run(config, adapter)
    vector.unlink()
    with pytest.raises(AdapterError, match="vector.bin is missing"):
        cli.run(config, adapter)


def test_the_adapter_s_own_spec_counts_not_the_config_s(task, config, prompts, tmp_path):
    spec = TinyLoRA(rank=3, u=1, n_tie=7, tying="structured", seed=5)
    factors = factorize(task.policy.params, spec)
    v = 0.5 * jnp.ones((factors.num_groups, 1))
    save_adapter(tmp_path / "adapter", factors, v, "tiny", "float32")
    assert dataclasses.replace(read_adapter(tmp_path / "adapter")[0], targets=spec.targets) == spec
    result, _ = cli.run(config, tmp_path / "adapter")
    assert result["questions"] == 6


@pytest.fixture(scope="module")
def graded(make_config, tmp_path_factory, stop):
    """The workdir of a short run with a built-in reward, whose answers can be used again."""
    config = make_config()
    config.reward, config.max_steps = "hash", 1
    workdir = tmp_path_factory.mktemp("graded") / "run"
    grpo.run(config, workdir, stop)
    return workdir


def hash_config(make_config, **changes):
    config = make_config()
    config.reward, config.max_steps = "hash", 1
    config.update_from_flattened_dict(changes)
    return config


def test_the_base_models_answers_are_used_again(graded, make_config, capsys):
    again = cli.run(hash_config(make_config), graded / "adapter", showcase=2)
    said = capsys.readouterr().err
    assert "evaluating the base model" not in said and f"are those of its run in {graded}" in said
    (graded / "answers_before.jsonl").rename(graded / "hidden")
    computed = cli.run(hash_config(make_config), graded / "adapter", showcase=2)
    (graded / "hidden").rename(graded / "answers_before.jsonl")
    assert "evaluating the base model" in capsys.readouterr().err
    assert again == computed


def test_answers_made_in_another_way_are_computed_again(graded, make_config, tmp_path, monkeypatch):
    task = load_task(hash_config(make_config), parse(hash_config(make_config)))
    prompts = make_prompts(hash_config(make_config), load_questions(parse(make_config()).eval_data), task)
    workdir = shutil.copytree(graded, tmp_path / "run")
    known = lambda prompts=prompts, task=task, **changes: untrained.known_answers(
        workdir / "adapter", hash_config(make_config, **changes), task, prompts
    )
    assert [row["id"] for row in known()] == [prompt.id for prompt in prompts]
    assert known(evaluate_every=3) is not None, "this changes no answer"
    for field, value in {"dtype": "bfloat16", "max_new_tokens": 5, "eval_batch_size": 6, "reward": "boxed"}.items():
        assert known(**{field: value}) is None, field
    assert known(prompts=prompts[:-1]) is None and known(prompts=prompts[::-1]) is None
    other = task.policy.map_frozen(lambda params: jax.tree.map(lambda x: 1.001 * x, params), lambda factors: factors)
    assert known(task=dataclasses.replace(task, policy=other)) is None, "other weights of the same name"
    monkeypatch.setattr(untrained, "__version__", "another")
    assert known() is None
    monkeypatch.undo()
    rows = (workdir / "answers_before.jsonl").read_text()
    for damaged in (rows[:-20], rows.replace('"strict": ', '"strict": "x", "s": '), "", rows.replace("greedy", "odd")):
        (workdir / "answers_before.jsonl").write_text(damaged)
        assert known() is None, damaged[:60]
    (workdir / "answers_before.jsonl").write_text(rows)
    result = json.loads((workdir / "eval_before.json").read_text())
    (workdir / "eval_before.json").write_text(json.dumps({k: x for k, x in result.items() if k != "made_by"}))
    assert known() is None, "a run of an older version does not say how"


def test_a_reward_of_ones_own_is_asked_again(finished, config, task, prompts):
    assert untrained.known_answers(finished.workdir / "adapter", config, task, prompts) is None
