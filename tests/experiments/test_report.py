"""Many runs as one table: who is drawn, what is compared, what does not belong together."""

import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from experiments import report
from experiments.common.combining import ReportError, best, points_of, read_runs
from experiments.report import runs_table

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
CONFIG = {
    "method": "tinylora",
    "lora": {"rank": 8},
    "adapter": {"rank": 2, "tying": "tiled", "u": 1, "n_tie": 13},
    "optimizer": {"learning_rate": 1e-3},
    "seed": 0,
}
SCORES = {"strict": 0.5, "lenient": 0.5, "mean_tokens": 3.0, "truncated": 0.0}
BEFORE = [True] * 4 + [False] * 6


def write_answers(path, right):
    rows = [{"mode": "greedy", "id": i, "strict": float(x)} for i, x in enumerate(right)]
    rows.append({"mode": "sampled", "id": 0, "strict": 0.0})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, params, rewards, right, before=BEFORE, model="tiny", **config):
    folder.mkdir(parents=True)
    summary = {"model": model, "params": params, "steps": len(rewards), "eval_before": SCORES, "eval_after": SCORES}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rewards))
    write_answers(folder / "answers_after.jsonl", right)
    if before is not None:
        write_answers(folder / "answers_before.jsonl", before)
    return folder


def reward(*values):
    return [{"step": i, "reward": value} for i, value in enumerate(values)]


@pytest.fixture
def runs(tmp_path):
    sweep = tmp_path / "sweep"
    members = {"a": (13, reward(0, 0, 0, 0.3), 5e-3), "b": (13, reward(0, 0, 0, 0.4), 1e-3)}
    for name, (params, steps, rate) in members.items():
        folder = sweep / "members" / name
        write_run(folder, params, steps, [True] * 8 + [False] * 2, None, optimizer={"learning_rate": rate})
    rows = [{"member": name, "dropped": None} for name in members] + [{"member": "c", "dropped": "step 3"}]
    (sweep / "summary.json").write_text(json.dumps({"members": rows}))
    write_answers(sweep / "answers_before.jsonl", BEFORE)
    loss = [{"step": i, "loss": x} for i, x in enumerate((3.0, 2.0))]
    sft = write_run(tmp_path / "sft", 500, loss, [False] * 10, method="full")
    return read_runs("RL", sweep) + read_runs("SFT", sft)


def test_every_run_stands_beside_the_untrained_model(runs):
    result = report.report(runs)
    assert result["untrained"]["accuracy"] == 0.4 and result["questions"] == 10
    rl, _, sft = result["runs"]
    assert (rl["params"], rl["accuracy"], rl["difference"], rl["method"]) == (13, 0.8, 0.4, "TinyLoRA")
    assert rl["p"] == 0.125, "four questions better, none worse: 2 · 2⁻⁴"
    assert (sft["series"], sft["method"], sft["rank"], sft["training"]) == ("SFT", "all weights", None, -2.0)
    assert rl["low"] < 0.8 < rl["high"]


def test_training_alone_chooses_the_learning_rate(runs):
    result = report.report(runs)
    chosen = best(result["runs"])
    assert [row["learning_rate"] for rows in chosen["RL"] for row in rows] == [1e-3]
    lines = runs_table(result).splitlines()
    assert sum(line.startswith("*") for line in lines) == 2 and max(map(len, lines)) <= 80
    assert [line for line in lines if line in ("RL", "SFT")] == ["RL", "SFT"]
    assert any("over the untrained model" in line for line in lines), "it is said which baseline a gain is against"


def test_runs_of_one_size_are_told_apart(tmp_path):
    adapter = CONFIG["adapter"]
    kinds = {
        " TinyLoRA r=2": {},
        " TinyLoRA r=2 u=2": {"adapter": adapter | {"u": 2, "n_tie": 26}},
        "*TinyLoRA r=2 u=2 structured": {"adapter": adapter | {"u": 2, "tying": "structured"}},
        " TinyLoRA r=2 bfloat16": {"optimizer": {"learning_rate": 1e-3, "precision": "bfloat16"}},
        " LoRA-XS r=2": {"method": "lora_xs", "adapter": adapter | {"u": 2, "tying": "structured"}},
        " all weights bfloat16": {"method": "full", "optimizer": {"learning_rate": 1e-3, "precision": "bfloat16"}},
    }
    found = []
    for place, (name, config) in enumerate(kinds.items()):
        folder = tmp_path / str(place)
        found += read_runs("RL", write_run(folder, 13, reward(0.9 if name[0] == "*" else 0.1), BEFORE, **config))
    result = report.report(found)
    assert [row["precision"] for row in result["runs"]] == ["float32"] * 3 + ["bfloat16", "float32", "bfloat16"]
    assert [row["n_tie"] for row in result["runs"]] == [13, 26, 13, 13, None, None]
    _, first, base, series, *lines = runs_table(result).splitlines()
    lines = lines[: len(kinds)]
    assert series == "RL" and [line.partition("   ")[0] for line in lines] == list(kinds)
    ends = {line.index("13 ") for line in lines} | {base.index("0 ") - 1} | {first.index("numbers") + 5}
    assert len(ends) == 1, "columns stand under each other"


def test_runs_that_learn_in_another_way_are_no_seeds_of_one_setting(tmp_path):
    kinds = {
        "*TinyLoRA r=2 es population=4": {"search": "es", "evolution": {"population": 4}},
        " TinyLoRA r=2 cispo refill=3": {"refill": 3, "grpo": {"loss_type": "cispo", "stream_tokens": 64}},
        " TinyLoRA r=2 natural": {"optimizer": {"learning_rate": 1e-3, "method": "natural"}},
        " TinyLoRA r=2": {"logger": "none", "grpo": {"remat": "on"}, "seed": 1},
    }
    found = []
    for place, (name, config) in enumerate(kinds.items()):
        folder = tmp_path / str(place)
        found += read_runs("RL", write_run(folder, 13, reward(0.9 if name[0] == "*" else 0.1), BEFORE, **config))
    result = report.report(found)
    assert [len(rows) for rows in best(result["runs"])["RL"]] == [1]
    names = [line.partition("   ")[0].partition(" 13 ")[0].rstrip() for line in runs_table(result).splitlines()[4:8]]
    assert names == ["*TinyLoRA r=2 es population…", *list(kinds)[1:]]
    alone = report.report(found[:1] + read_runs("RL", found[0]["folder"]))
    assert "options" not in alone["runs"][0], "what all runs share is not repeated in their names"
    assert len(best(alone["runs"])["RL"][0]) == 2


def test_sampled_answers_stand_beside_greedy_ones(tmp_path):
    scores = SCORES | {"sampled": {"samples": 2, "strict": 0.5}}
    folder = write_run(tmp_path / "run", 13, reward(0.5), BEFORE)
    summary = json.loads((folder / "summary.json").read_text()) | {"eval_before": scores, "eval_after": scores}
    (folder / "summary.json").write_text(json.dumps(summary))
    for name, right in (("before", (0, 0)), ("after", (1, 0))):
        rows = [{"mode": "greedy", "id": i, "strict": float(x)} for i, x in enumerate(BEFORE)]
        rows += [{"mode": "sampled", "id": i, "strict": float(x)} for i in range(10) for x in right]
        (folder / f"answers_{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = report.report(read_runs("RL", folder))
    (row,) = result["runs"]
    assert row["difference"] == 0 and result["untrained"]["sampled"]["accuracy"] == 0
    assert row["sampled"] | {"low": 0, "high": 0} == {
        **{"accuracy": 0.5, "low": 0, "high": 0, "difference": 0.5, "difference_low": 0.5, "difference_high": 0.5},
        "p": 0.00195,
    }, "all ten questions improve by one of two samples: 2 · 2⁻¹⁰"
    assert points_of(result["runs"])["RL"][0]["sampled"]["accuracy"] == 0.5
    table = runs_table(result)
    assert "sampled answers:" in table and max(map(len, table.splitlines())) <= 80
    longer = [row, row | {"steps": 348, "learning_rate": 1e-2}]
    assert len(best(longer)["RL"]) == 1 and "r=2 348 steps" in runs_table(result | {"runs": longer})
    elsewhere = [row, row | {"targets": ".*/q_proj/kernel", "training": 0.9}]
    assert best(elsewhere)["RL"] == [elsewhere[1:]], "adapters of other modules are no seeds of one setting"
    assert "*TinyLoRA r=2 q_proj " in runs_table(result | {"runs": elsewhere})


def test_a_report_of_an_older_version_is_drawn(tmp_path, monkeypatch, capsys):
    values = {"runs": [], "redraw": str(RESULTS / "gsm8k_0_5b_methods_h100.json")}
    older = json.loads((RESULTS / "gsm8k_0_5b_methods_h100.json").read_text())
    for row in older["runs"]:
        del row["precision"]
    values["redraw"] = str(tmp_path / "older.json")
    (tmp_path / "older.json").write_text(json.dumps(older))
    monkeypatch.setattr(
        report, "FLAGS", type("Flags", (), values | {"output": str(tmp_path / "again.json"), "html": None})
    )
    report.main([])
    assert json.loads((tmp_path / "again.json").read_text()) == older
    lines = capsys.readouterr().out.splitlines()
    assert sum(line[1:].startswith(("TinyLoRA", "LoRA", "all weights")) for line in lines) == len(older["runs"])
    pixels = matplotlib.image.imread(tmp_path / "again.png")[..., :3]
    assert np.mean(pixels.min(axis=-1) < 0.85) > 0.005


def test_the_command_writes_json_and_picture(runs, tmp_path, monkeypatch):
    values = {"runs": [f"RL:{tmp_path / 'sweep'}", f"SFT:{tmp_path / 'sft'}"], "redraw": None, "html": None}
    for name, output in (("first", tmp_path / "one.json"), ("again", tmp_path / "two.json")):
        values["output"] = str(output)
        monkeypatch.setattr(report, "FLAGS", type("Flags", (), values))
        report.main([])
        values |= {"runs": [], "redraw": str(tmp_path / "one.json")}
        pixels = matplotlib.image.imread(output.with_suffix(".png"))[..., :3]
        assert np.mean(pixels.min(axis=-1) < 0.85) > 0.005, name
    assert (tmp_path / "one.json").read_text() == (tmp_path / "two.json").read_text()


def test_what_does_not_belong_together(runs, tmp_path):
    other = read_runs("RL", write_run(tmp_path / "other", 1, reward(0.1), BEFORE, model="another"))
    with pytest.raises(ReportError, match="2 models"):
        report.report(runs + other)
    fewer = read_runs("RL", write_run(tmp_path / "fewer", 1, reward(0.1), BEFORE[:5], BEFORE[:5]))
    with pytest.raises(ReportError, match="2 sets of questions"):
        report.report(runs + fewer)
    mixed = read_runs("RL", write_run(tmp_path / "mixed", 1, reward(0.1), BEFORE[:5]))
    with pytest.raises(ReportError, match="different questions before and after training"):
        report.report(mixed)


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ReportError, match="summary.json is missing"):
        read_runs("RL", tmp_path)
    folder = write_run(tmp_path / "run", 1, reward(0.1), BEFORE)
    (folder / "answers_after.jsonl").write_text("{")
    with pytest.raises(ReportError, match="answers_after.jsonl is damaged"):
        read_runs("RL", folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", '{"steps": 2}', "run is damaged: .*'model'"),
        ("config.json", "{}", "run is damaged: .*'method'"),
        ("metrics.jsonl", "", r"metrics.jsonl is damaged \(the reward"),
        ("metrics.jsonl", '{"step": 0, "reward": NaN}', r"metrics.jsonl is damaged \(the reward"),
        ("metrics.jsonl", '{"step": 0, "reward": "high"}', "metrics.jsonl is damaged"),
        ("metrics.jsonl", "hello", "metrics.jsonl is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message):
    folder = write_run(tmp_path / "run", 1, reward(0.1), BEFORE)
    (folder / name).write_text(content)
    with pytest.raises(ReportError, match=message):
        report.report(read_runs("RL", folder))


@pytest.mark.parametrize("name", ["speed_h100.json", "gsm8k_0_5b_curves_h100.json"])
def test_another_json_is_not_redrawn(tmp_path, monkeypatch, capsys, name):
    values = {"runs": [], "redraw": str(RESULTS / name), "output": str(tmp_path / "out.json"), "html": None}
    monkeypatch.setattr(report, "FLAGS", type("Flags", (), values))
    with pytest.raises(SystemExit):
        report.main([])
    assert "is not a report" in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_of_a_size_the_best_setting_is_drawn_and_not_the_best_seed():
    row = lambda rate, seed, training, accuracy: {
        **{"series": "RL", "method": "TinyLoRA", "rank": 2, "params": 13, "tying": "tiled", "u": 1, "n_tie": 13},
        **{"learning_rate": rate, "seed": seed, "training": training, "accuracy": accuracy},
        **{"low": accuracy - 0.1, "high": accuracy + 0.1},
    }
    lucky = [row(1e-2, 0, 0.9, 0.8), row(1e-2, 1, 0.1, 0.2)]
    steady = [row(1e-3, 0, 0.6, 0.3), row(1e-3, 1, 0.6, 0.5)]
    assert best(lucky + steady) == {"RL": [steady]}
    (drawn,) = points_of(lucky + steady)["RL"]
    assert drawn.pop("method") == "TinyLoRA"
    assert drawn == pytest.approx({"params": 13, "accuracy": 0.4, "low": 0.3, "high": 0.5})
