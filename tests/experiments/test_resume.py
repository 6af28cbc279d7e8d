"""A run that is killed, stopped or damaged continues to the same bits."""

import json
import random
import shutil
import signal
import time

import pytest

from experiments import grpo
from experiments.common import runs

LONGER = {"max_steps": 24, "epochs": 10}  # long enough to be killed in the middle


@pytest.fixture(scope="module")
def undisturbed(make_config, tmp_path_factory, traces, stop):
    """The traces of the longer run."""
    config = make_config()
    config.update(LONGER)
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    grpo.run(config, workdir, stop)
    return traces(workdir)


def flags(workdir):
    return [f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in LONGER.items())]


def num_lines(workdir):
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_until_finished(processes, workdir, kills, seed):
    """Kills at random moments between the first new step and the end; returns how many kills hit."""
    rng, hits = random.Random(seed), 0
    for _ in range(kills):
        checkpoints = workdir / "checkpoints"
        before = max((int(p.name) for p in checkpoints.glob("[0-9]*") if p.name.isdigit()), default=0)
        more, pause = rng.randint(1, 6), rng.uniform(0, 0.05)
        process = processes.start("grpo", *flags(workdir))

        def ready(before=before, more=more, process=process):
            return num_lines(workdir) >= min(before + more, LONGER["max_steps"]) or process.poll() is not None

        while not ready():
            time.sleep(0.002)
        time.sleep(pause)
        process.kill()
        out, err = process.communicate(timeout=60)
        hits += process.returncode == -signal.SIGKILL
        assert process.returncode in (0, -signal.SIGKILL), (out, err)
    result = processes.run("grpo", *flags(workdir))
    assert result.code == 0, result.err
    assert json.loads(result.out.splitlines()[-1]) == json.loads((workdir / "summary.json").read_text())
    return hits


@pytest.mark.slow
def test_kill_9_at_random_moments(processes, tmp_path, traces, undisturbed):
    assert kill_until_finished(processes, tmp_path / "run", kills=2, seed=0) >= 1
    assert traces(tmp_path / "run") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_9_at_many_random_moments(processes, tmp_path, traces, undisturbed, seed):
    assert kill_until_finished(processes, tmp_path / "run", kills=8, seed=seed) >= 4
    assert traces(tmp_path / "run") == undisturbed


@pytest.mark.slow
def test_kill_9_before_training_and_during_the_final_evaluation(processes, tmp_path, traces, undisturbed):
    workdir = tmp_path / "run"
    for moment in (workdir / "config.json", workdir / "eval_before.json", workdir / "adapter" / "vector.bin"):
        process = processes.start("grpo", *flags(workdir))
        while not moment.exists() and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate(timeout=60)
    assert processes.run("grpo", *flags(workdir)).code == 0
    assert traces(workdir) == undisturbed


def test_sigterm_then_ctrl_c_then_the_end(processes, tmp_path, traces, undisturbed):
    workdir = tmp_path / "run"
    term = processes.signal_when(
        processes.start("grpo", *flags(workdir)), signal.SIGTERM, lambda: num_lines(workdir) >= 3
    )
    assert term.code == 0, term.err
    assert "stopped by SIGTERM; the same command continues the run in" in term.out
    assert not (workdir / "summary.json").exists()
    done = num_lines(workdir)
    interrupt = processes.signal_when(
        processes.start("grpo", *flags(workdir)), signal.SIGINT, lambda: num_lines(workdir) >= done + 3
    )
    assert interrupt.code == 130, interrupt.err
    assert f"stopped by SIGINT; the same command continues the run in {workdir}" in " ".join(interrupt.out.split())
    assert "Traceback" not in term.err + interrupt.err
    assert f"continuing after step {done} of 24" in interrupt.err
    last = processes.run("grpo", *flags(workdir))
    assert last.code == 0, last.err
    assert traces(workdir) == undisturbed


@pytest.mark.parametrize("tail", ['{"step": 2, "loss"', '{"step": 2, "loss": 0.5}\n', "\x00\x00\x00", "\n"])
def test_a_torn_last_line_of_metrics(interrupted, config, command_line, finished, traces, tail):
    workdir = interrupted(config)
    metrics = workdir / "metrics.jsonl"
    assert num_lines(workdir) == 2
    metrics.write_text(metrics.read_text() + tail)
    assert command_line(config, workdir).code == 0
    assert traces(workdir) == traces(finished.workdir)


def test_the_last_complete_line_without_its_newline(interrupted, config, command_line, finished, traces):
    workdir = interrupted(config)
    metrics = workdir / "metrics.jsonl"
    metrics.write_text(metrics.read_text().rstrip("\n"))
    assert command_line(config, workdir).code == 0
    assert traces(workdir) == traces(finished.workdir)


def test_another_config_is_refused(interrupted, config, make_config, command_line, finished, traces):
    workdir = interrupted(config)
    other = make_config()
    other.optimizer.learning_rate, other.seed = 0.25, 7
    result = command_line(other, workdir)
    assert result.code == 1
    assert result.err.startswith(f"error: workdir {workdir} belongs to a run with another config:\n")
    assert "config.optimizer.learning_rate: 0.05 there, 0.25 now" in result.err
    assert "config.seed: 0 there, 7 now" in result.err
    assert "config.samples" not in result.err
    assert command_line(config, workdir).code == 0, "the refusal changed nothing"
    assert traces(workdir) == traces(finished.workdir)


def newest(workdir):
    return max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def files_of(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves coroutines behind
def test_a_corrupt_checkpoint_is_named_and_can_be_deleted(interrupted, config, command_line, finished, traces):
    workdir = interrupted(config)
    folder = newest(workdir)
    assert folder.name == "2" and files_of(folder)
    for file in files_of(folder):
        size = (folder / file).stat().st_size
        with (folder / file).open("r+b") as stream:
            stream.truncate(size // 2)
    result = command_line(config, workdir)
    assert result.code == 1
    assert result.err.count("error: ") == 1 and "Traceback" not in result.err
    assert f"error: the checkpoint {folder} is damaged" in result.err and "Delete that folder" in result.err
    shutil.rmtree(folder)
    assert command_line(config, workdir).code == 0
    assert traces(workdir) == traces(finished.workdir)


def without_evaluations(found):
    """Traces without the evaluations during training, and these by step."""
    names = ("eval_strict", "eval_lenient")
    evaluated = {row["step"]: [row[name] for name in names] for row in found["rows"] if names[0] in row}
    rows = [{name: value for name, value in row.items() if name not in names} for row in found["rows"]]
    return found | {"rows": rows}, evaluated


def test_evaluations_during_training_change_nothing_and_survive_an_interruption(
    config, finished, stop, interrupted, tmp_path, traces
):
    config.evaluate_every = 2
    grpo.run(config, tmp_path / "run", stop)
    found = traces(tmp_path / "run")
    plain, evaluated = without_evaluations(found)
    assert plain == traces(finished.workdir) and sorted(evaluated) == [1, 3]
    workdir = interrupted(config, checks=9)  # in the evaluation after the second step
    grpo.run(config, workdir, stop)
    assert traces(workdir) == found


def test_the_first_step_comes_before_the_untrained_model_is_evaluated(config, stop, tmp_path, monkeypatch):
    order, step, judge = [], grpo.Trainer.step, runs.evaluate
    monkeypatch.setattr(grpo.Trainer, "step", lambda *args: (order.append("step"), step(*args))[1])
    monkeypatch.setattr(runs, "evaluate", lambda *args, **named: (order.append("evaluate"), judge(*args, **named))[1])
    grpo.run(config, tmp_path / "run", stop)
    assert order == ["step", "evaluate", *["step"] * 4, "evaluate"]


@pytest.mark.parametrize("checks", [2, 3])  # before the first and before the second batch of that evaluation
def test_a_run_stopped_before_the_untrained_model_is_evaluated(config, finished, interrupted, stop, traces, checks):
    workdir = interrupted(config, checks)
    assert num_lines(workdir) == 1 and not (workdir / "eval_before.json").exists()
    grpo.run(config, workdir, stop)
    assert traces(workdir) == traces(finished.workdir)
    for name in ("answers_before.jsonl", "answers_after.jsonl", "eval_before.json"):
        assert (workdir / name).read_bytes() == (finished.workdir / name).read_bytes()


def test_a_run_of_one_step_has_both_evaluations_after_a_kill_between_them(config, stop, interrupted, tmp_path, traces):
    config.max_steps = 1
    grpo.run(config, tmp_path / "run", stop)
    workdir = interrupted(config, checks=2)
    grpo.run(config, workdir, stop)
    assert traces(workdir) == traces(tmp_path / "run")
