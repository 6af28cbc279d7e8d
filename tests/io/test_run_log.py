"""A run's folder: one config, one line a step, whatever interrupts it."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys

import pytest

from experiments.configs import base
from tinylora_jax.io._run_log import RunLog, WorkdirError, write_atomically

OLDER_GRPO = (
    "loss_type normalize_std clip_low clip_high kl_coef tis_cap updates_per_rollout stream_tokens remat"
    " skip_without_signal"
)
OLDER_OPTIMIZER = "learning_rate schedule warmup_updates weight_decay b1 b2 max_grad_norm precision"
CONFIG = {"model": "m", "seed": 0, "grpo": {"kl_coef": 0.1, "deep": {"x": None}}, "list": (1, 2)}


@pytest.fixture
def log(tmp_path):
    made = RunLog(tmp_path / "a" / "b", CONFIG)
    yield made
    made.close()


def steps(log):
    return [json.loads(line)["step"] for line in (log.workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_metric_that_is_not_defined_is_null(log):
    """JSON has no NaN, and readers refuse a line that holds one."""
    log.start(0)
    log.metrics(0, {"loss": 1.0, "length_if_right": float("nan"), "ratio": float("inf"), "v": [0.5, 1.0]})
    (line,) = (log.workdir / "metrics.jsonl").read_text().splitlines()
    refused = lambda constant: pytest.fail(f"{constant} is no JSON")
    expected = {"step": 0, "loss": 1.0, "length_if_right": None, "ratio": None, "v": [0.5, 1.0]}
    assert json.loads(line, parse_constant=refused) == expected


def test_two_processes_do_not_share_a_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tinylora_jax.io._run_log import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), {'seed': 0}); print('mine', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(WorkdirError, match="another process is using .*wait until it ends, or choose another"):
            RunLog(tmp_path, {"seed": 0})
        other.kill()
    RunLog(tmp_path, {"seed": 0}).close()


def test_write_replaces_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, "new, but")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_atomically(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_the_same_config_is_taken_again(log):
    RunLog(log.workdir, json.loads(json.dumps(CONFIG)))
    assert json.loads((log.workdir / "config.json").read_text()) == json.loads(json.dumps(CONFIG))


def test_another_config_is_refused_by_field(log):
    other = {"model": "m", "seed": 1, "grpo": {"kl_coef": 0.1, "deep": {"x": 5}}, "list": [1, 2], "new": True}
    with pytest.raises(WorkdirError) as caught:
        RunLog(log.workdir, other)
    assert str(caught.value).splitlines()[1:-1] == [
        "  config.grpo.deep.x: None there, 5 now",
        "  config.new: '(absent)' there, True now",
        "  config.seed: 0 there, 1 now",
    ]


def test_a_field_that_became_none_is_another_config(tmp_path):
    RunLog(tmp_path, {"a": 1, "b": None})
    with pytest.raises(WorkdirError, match="config.b"):
        RunLog(tmp_path, {"a": 1})


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"'])
def test_a_damaged_config(log, text):
    (log.workdir / "config.json").write_text(text)
    with pytest.raises(WorkdirError, match="config.json"):
        RunLog(log.workdir, CONFIG)


def test_numbers_of_a_config_survive(tmp_path):
    RunLog(tmp_path, {"a": 1.5, "b": 1e-300, "c": 10**20})
    RunLog(tmp_path, {"a": 1.5, "b": 1e-300, "c": 10**20})


def test_an_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(WorkdirError, match=f"cannot write to workdir {workdir}.*choose another --workdir"):
            RunLog(workdir, CONFIG)


def test_metrics_are_appended_and_forgotten_from_a_step_on(log):
    log.start(0)
    for step in range(5):
        log.metrics(step, {"loss": 1 / (step + 1), "kl": 0.0})
    log.close()
    again = RunLog(log.workdir, CONFIG)
    again.start(3)
    assert steps(again) == [0, 1, 2]
    again.metrics(3, {"loss": 9.0, "kl": 0.0})
    assert steps(again) == [0, 1, 2, 3]
    again.close()
    line = (log.workdir / "metrics.jsonl").read_text().splitlines()[2]
    assert json.loads(line) == {"step": 2, "loss": 1 / 3, "kl": 0.0}


def test_the_numbers_of_a_vector_have_names_of_their_own(log):
    log.start(0)
    log.metrics(0, {"v": [0.25, -0.5]})
    log.close()
    assert json.loads((log.workdir / "metrics.jsonl").read_text()) == {"step": 0, "v": [0.25, -0.5]}
    (events,) = (log.workdir / "tensorboard").iterdir()
    assert all(name in events.read_bytes() for name in (b"v/0", b"v/1"))


@pytest.mark.parametrize(
    "tail", [b'{"step": 2, "lo', b'{"step": 2', b"{", b"\n", b"\x00" * 64, b"\xff\xfe\xfa", b"[1]\n", b"7\n", b"{}\n"]
)
def test_a_torn_tail_is_dropped(log, tail):
    log.start(0)
    for step in range(2):
        log.metrics(step, {"loss": 0.5})
    with (log.workdir / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    log.close()
    again = RunLog(log.workdir, CONFIG)
    again.start(2)
    assert steps(again) == [0, 1]
    again.close()


def test_samples_and_results(log):
    log.samples(3, "=== ünïcode\u2028 page")
    assert (log.workdir / "samples" / "000003.txt").read_text(encoding="utf-8") == "=== ünïcode\u2028 page"
    assert log.read_json("summary.json") is None
    log.write_json("summary.json", {"a": {"b": 0.1}})
    assert log.read_json("summary.json") == {"a": {"b": 0.1}}
    (log.workdir / "summary.json").write_text('{"a"')
    with pytest.raises(WorkdirError, match="summary.json is damaged"):
        log.read_json("summary.json")


def test_pages_hold_any_text_in_any_locale(log):
    # A completion may hold any character, and a container's locale may be plain ASCII.
    code = (
        "import sys; from pathlib import Path; from tinylora_jax.io._run_log import RunLog;"
        "log = RunLog(Path(sys.argv[1]), {'a': chr(0xE9)}); log.samples(0, chr(0x1F600));"
        "log.write_json('x.json', {'a': chr(0xE9)}); RunLog(Path(sys.argv[1]), {'a': chr(0xE9)})"
    )
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.getcwd()}
    command = [sys.executable, "-c", code, str(log.workdir / "other")]
    result = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (log.workdir / "other" / "samples" / "000000.txt").read_bytes() == "\U0001f600".encode()


def test_a_damaged_line_does_not_take_the_later_ones_with_it(log, caplog):
    rows = [json.dumps({"step": step}) for step in range(5)]
    path = log.workdir / "metrics.jsonl"
    path.write_text("\n".join([rows[0], '{"step": 1,', "[" * 5000, rows[2], rows[3], rows[4][:6]]))
    log.start(4)
    assert steps(log) == [0, 2, 3]
    told = [record.getMessage() for record in caplog.records]
    assert [re.search(r"metrics.jsonl, line (\d) is damaged", line)[1] for line in told] == ["2", "3"]


def test_links_are_not_followed(log, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    log.start(0)
    (log.workdir / "samples").mkdir()
    for name in ("summary.json", "summary.json.tmp", "samples/000001.txt", "samples/000001.txt.tmp"):
        (log.workdir / name).symlink_to(victim)
    log.write_json("summary.json", {"a": 1})
    log.samples(1, "page")
    (log.workdir / "metrics.jsonl").unlink()
    (log.workdir / "metrics.jsonl").symlink_to(victim)
    with pytest.raises(WorkdirError, match="metrics.jsonl is a link"):
        log.metrics(1, {"reward": 1.0})
    assert victim.read_text() == "mine" and log.read_json("summary.json") == {"a": 1}


@pytest.mark.parametrize("again", [False, True])
def test_a_workdir_that_was_deleted_or_replaced_is_an_error(log, again):
    shutil.rmtree(log.workdir)
    if again:
        RunLog(log.workdir, CONFIG).close()
    with pytest.raises(WorkdirError, match="was deleted or replaced during the run"):
        log.write_json("summary.json", {})


def test_what_is_written_survives_a_power_cut(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(stat.S_ISDIR(os.fstat(fd).st_mode)), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("renamed"), replace(*names)))
    write_atomically(tmp_path / "x", "text")
    assert calls == [False, "renamed", True], "the bytes, then the name, then the folder that holds it"


def test_a_run_from_before_a_field_existed_goes_on_with_the_value_it_had(tmp_path):
    RunLog(tmp_path, {"seed": 0}).close()
    with pytest.raises(WorkdirError, match=r"config.quantize: 'none' there, 'int8' now"):
        RunLog(tmp_path, {"seed": 0, "quantize": "int8"})
    with pytest.raises(WorkdirError, match=r"config.quantize_cache: 'none' there, 'int8' now"):
        RunLog(tmp_path, {"seed": 0, "quantize": "none", "quantize_cache": "int8"})
    RunLog(tmp_path, {"seed": 0, "quantize": "none", "quantize_cache": "none"}).close()


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    """Its config lacks every field that was added since; a new field of the configs belongs to that list too."""
    now = base.get_config().to_dict()
    older = json.loads(json.dumps(now))
    for name in "quantize quantize_cache refill min_draw search teacher teacher_adapter evolution".split():
        del older[name]
    del older["lora"]["freeze_a"]
    older["optimizer"] = {name: now["optimizer"][name] for name in OLDER_OPTIMIZER.split()}
    older["grpo"] = {name: now["grpo"][name] for name in OLDER_GRPO.split()}
    RunLog(tmp_path, older).close()
    with pytest.raises(WorkdirError, match=r"config.optimizer.method: 'adam' there, 'natural' now"):
        RunLog(tmp_path, now | {"optimizer": now["optimizer"] | {"method": "natural"}})
    RunLog(tmp_path, now).close()


def test_a_run_may_go_on_with_another_mesh_and_other_slots(tmp_path):
    """They say how it lies on its devices; earlier versions also had other defaults for them."""
    config = {"seed": 0, "slots": 0, "mesh": {"data": 0, "tensor": 1}}
    RunLog(tmp_path, config).close()
    RunLog(tmp_path, config | {"slots": 8, "mesh": {"data": 0, "tensor": 0}}).close()
    RunLog(tmp_path, config | {"evaluate_every": 5}).close()  # a field that older runs lack, and which changes nothing
    with pytest.raises(WorkdirError, match="config.seed: 0 there, 1 now"):
        RunLog(tmp_path, config | {"seed": 1})
