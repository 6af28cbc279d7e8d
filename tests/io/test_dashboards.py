"""A run on dashboards: each step once, under one id, whatever is interrupted and whatever fails."""

import json
import sys
import time

import pytest

from tinylora_jax.io import _dashboards, log_picture, parse_loggers
from tinylora_jax.io._run_log import RunLog

CONFIG = {"model": "m", "seed": 0, "grpo": {"kl_coef": 0.1}}


class Recorder:
    """A dashboard that keeps what it was given, by id, as a service would."""

    runs: dict = {}
    fails: set = set()

    def __init__(self, run_id, name, workdir, config):
        if "init" in self.fails:
            raise RuntimeError("no network\nsecond line")
        self.run = self.runs.setdefault(
            run_id, {"name": name, "config": config, "steps": [], "pictures": [], "opened": 0}
        )
        self.run["opened"] += 1

    def step(self, step, values, page):
        if step in self.fails:
            raise ConnectionError("gone")
        self.run["steps"].append((step, dict(values), page))

    def picture(self, path, step):
        self.run["pictures"].append((step, path.read_bytes()))

    def close(self):
        if "close" in self.fails:
            raise OSError("cannot flush")
        self.run["closed"] = True


@pytest.fixture
def recorder(monkeypatch):
    made = type("Fresh", (Recorder,), {"runs": {}, "fails": set()})
    monkeypatch.setitem(_dashboards.LOGGERS, "recorder", made)
    monkeypatch.setitem(_dashboards.LOGGERS, "another", type("Another", (made,), {"runs": {}, "fails": set()}))
    return made


def run(workdir, first, end, loggers=("recorder",), config=CONFIG):
    """Logs steps as a run does that begins or continues at `first`, and is killed before it closes anything."""
    log = RunLog(workdir, config, loggers=loggers)
    log.start(first)
    for step in range(first, end):
        log.samples(step, f"page {step}")
        log.metrics(step, {"loss": 1 / (step + 1), "v": [0.5, step], "undefined": float("nan")})
    return log


def only(recorder):
    ((run_id, found),) = recorder.runs.items()
    return found


def test_a_dashboard_gets_the_config_and_each_step_with_its_page(recorder, tmp_path):
    run(tmp_path / "mine", 0, 3).close()
    found = only(recorder)
    assert found["name"] == "mine" and found["config"] == CONFIG and found["closed"]
    assert found["steps"] == [(i, {"loss": 1 / (i + 1), "v/0": 0.5, "v/1": i}, f"page {i}") for i in range(3)]
    assert not (tmp_path / "mine" / "tensorboard").exists(), "only what was asked for"


def test_a_run_that_continues_keeps_its_id_and_repeats_no_step(recorder, tmp_path):
    run(tmp_path, 0, 6)  # its last checkpoint was of step 4
    run(tmp_path, 4, 8).close()
    found = only(recorder)
    assert [step for step, _, _ in found["steps"]] == list(range(8)) and found["opened"] == 2
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == list(range(8))


def test_a_dashboard_that_is_new_to_a_run_gets_its_earlier_steps(recorder, tmp_path):
    run(tmp_path, 0, 6, ("recorder",))
    run(tmp_path, 4, 8, ("recorder", "another")).close()
    another = _dashboards.LOGGERS["another"].runs
    assert list(another) == list(recorder.runs), "one id for all"
    assert [step for step, _, _ in only(_dashboards.LOGGERS["another"])["steps"]] == list(range(8))
    assert [step for step, _, _ in only(recorder)["steps"]] == list(range(8))


def test_a_dashboard_of_another_machine_gets_the_earlier_steps_under_the_same_id(recorder, tmp_path):
    run(tmp_path, 0, 4)
    (run_id,) = recorder.runs
    recorder.runs.clear()
    recorder.is_new = True
    run(tmp_path, 4, 6).close()
    assert list(recorder.runs) == [run_id]
    assert [step for step, _, _ in only(recorder)["steps"]] == list(range(6))


def test_another_dashboard_is_not_another_run(recorder, tmp_path):
    run(tmp_path, 0, 2, config=CONFIG | {"logger": "tensorboard"}).close()
    run(tmp_path, 2, 4, config=CONFIG | {"logger": "none"}).close()


def test_a_workdir_that_was_deleted_begins_under_another_id(recorder, tmp_path):
    for name in ("a", "b"):
        run(tmp_path / name, 0, 2).close()
    assert len(recorder.runs) == 2


@pytest.mark.parametrize("damage", ["{", '{"id": "../x", "names": []}', '{"id": 3, "names": 4}', "[]"])
def test_a_damaged_id_begins_anew(recorder, tmp_path, damage):
    run(tmp_path, 0, 2).close()
    (tmp_path / "dashboards.json").write_text(damage)
    run(tmp_path, 2, 4).close()
    assert [[step for step, _, _ in found["steps"]] for found in recorder.runs.values()] == [[0, 1], [0, 1, 2, 3]]


@pytest.mark.parametrize("moment", ["init", 0, 2, "close"])
def test_a_dashboard_that_fails_costs_one_warning(recorder, tmp_path, moment, caplog):
    recorder.fails.add(moment)
    run(tmp_path, 0, 5, ("recorder", "another", "tensorboard")).close()
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "the dashboard recorder failed and is left out" in warning and "the run goes on" in warning
    assert "\n" not in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    assert len(only(_dashboards.LOGGERS["another"])["steps"]) == 5 and list((tmp_path / "tensorboard").iterdir())


def test_an_interrupt_is_no_failure_of_a_dashboard(recorder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(recorder, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 0, 1)


def test_the_picture_joins_the_run(recorder, tmp_path):
    run(tmp_path, 0, 3).close()
    picture = tmp_path / "run.png"
    picture.write_bytes(b"png")
    log_picture(tmp_path, ("recorder", "tensorboard"), CONFIG, picture, 3)
    found = only(recorder)
    assert found["pictures"] == [(3, b"png")] and len(found["steps"]) == 3


def test_by_default_a_run_has_tensorboard_and_no_id(tmp_path):
    log = RunLog(tmp_path, CONFIG)
    log.start(0)
    log.metrics(0, {"loss": 1.0})
    log.close()
    assert (tmp_path / "tensorboard").is_dir() and not (tmp_path / "dashboards.json").exists()


def test_none_leaves_the_lines_alone(tmp_path):
    run(tmp_path, 0, 2, parse_loggers("none")).close()
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "lock", "metrics.jsonl", "samples"}


@pytest.mark.parametrize(
    "text, said",
    [
        ("wandbb", "'wandbb' is unknown; expected wandb, trackio, tensorboard, none.*did you mean wandb"),
        ("tensorboard,tensorbord", "did you mean tensorboard"),
        ("tensorboard, tensorboard", "names a logger twice; write each name once"),
        ("wandb,wandb", "names a logger twice"),
        ("none,none", "names none and others; write none alone"),
        ("none,tensorboard", "names none and others; write none alone, or only tensorboard"),
        ("", "names no logger; expected wandb"),
        (",", "names no logger"),
    ],
)
def test_wrong_names(text, said):
    with pytest.raises(ValueError, match=said):
        parse_loggers(text)


def test_none_and_others_are_refused_whether_or_not_the_others_are_installed(monkeypatch):
    monkeypatch.setattr(_dashboards.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError) as caught:
        parse_loggers("none,wandb")
    assert str(caught.value) == "'none,wandb' names none and others; write none alone, or only wandb"


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_library_is_named_with_its_command(name, monkeypatch):
    monkeypatch.setattr(_dashboards.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=rf"{name} is not installed; run: pip install -e '.\[{name}\]'"):
        parse_loggers(f"tensorboard,{name}")
    assert parse_loggers("tensorboard") == ("tensorboard",)


def test_libraries_are_imported_only_when_asked_for(tmp_path):
    run(tmp_path, 0, 1, ("tensorboard",)).close()
    assert not {"wandb", "trackio"} & set(sys.modules) or "trackio" in sys.modules  # by a test below


@pytest.fixture
def two_parts(tmp_path, monkeypatch):
    """A run of six steps, two of them logged twice, with a picture: name of the dashboard to workdir and id."""

    def go(name):
        workdir = tmp_path / "run"
        run(workdir, 0, 4, (name,)).close()  # wandb allows an id only once in a process
        run(workdir, 2, 6, (name,)).close()
        import matplotlib.image
        import numpy as np

        picture = workdir / "run.png"
        matplotlib.image.imsave(picture, np.zeros((4, 4)))
        time.sleep(1.1 if name == "wandb" else 0)  # its folders are named by the second
        log_picture(workdir, (name,), CONFIG, picture, 6)
        return workdir, json.loads((workdir / "dashboards.json").read_text())["id"]

    return go


@pytest.mark.filterwarnings("ignore")
def test_trackio_has_each_step_once(two_parts, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="the library is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    _, run_id = two_parts("trackio")
    (name,) = SQLiteStorage.get_runs("tinylora_jax")
    assert name == f"run-{run_id}"
    rows = SQLiteStorage.get_logs("tinylora_jax", name)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(6))
    assert [row["loss"] for row in steps] == [1 / (i + 1) for i in range(6)]
    assert "page 3" in json.dumps(steps[3]) and any("picture" in row for row in rows)
    assert (tmp_path / "trackio").is_dir()
    for each, is_new in ((run_id, False), ("0" * 16, True)):
        opened = _dashboards.LOGGERS["trackio"](each, "run", tmp_path, CONFIG)
        opened.close()
        assert opened.is_new == is_new
    assert capsys.readouterr().out == "", "standard output holds only results"


def leveldb_log(data, block=32768, offset=7):
    """The records in a log of LevelDB, the format of wandb's files, whose first block lacks their own head."""
    place, parts = 0, []
    while place + 7 <= len(data):
        left = block - (place + offset) % block
        if left < 7:
            place += left
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_each_step_once_offline(two_parts, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the library is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    workdir, run_id = two_parts("wandb")
    rows = []
    for path in sorted(workdir.glob(f"wandb/offline-run-*-{run_id}/*.wandb")):
        for data in leveldb_log(path.read_bytes()[7:]):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                assert record.run.run_id == run_id and "kl_coef" in str(record.run.config)
            if record.HasField("history"):
                rows.append({"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item})
    steps = [(row["_step"], row["loss"]) for row in rows if "loss" in row]
    assert steps == [(i, 1 / (i + 1)) for i in range(6)]
    assert all("samples/path" in row for row in rows[:6])
    assert [row["_step"] for row in rows if "picture/path" in row] == [6]
