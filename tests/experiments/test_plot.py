"""The picture of a run shows its numbers, and what is no run is refused in one sentence."""

import json
import re
import shutil

import numpy as np
import pytest

from experiments import grpo, plot
from experiments.picture import draw
from experiments.plot import PlotError, read_run

BEFORE, AFTER = {"strict": 0.28125, "lenient": 0.289062}, {"strict": 0.378906, "lenient": 0.382812}


def write_run(workdir, steps=10, numbers=13, finished=True, **constant):
    """A run's folder as `experiments.grpo` leaves it, with numbers from a generator."""
    rng = np.random.default_rng(steps)
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps({"model": "some/model"}))
    v, lines = np.zeros(numbers), []
    for step in range(steps):
        v = v + 0.02 * rng.standard_normal(numbers)
        reward = 0.3 + 0.01 * step + 0.05 * rng.standard_normal()
        row = {
            **{"step": step, "reward": reward, "reward_lenient": reward + 0.02, "reward_se": 0.03, "loss": -0.1},
            **{"length": 15 + rng.standard_normal(), "truncated": 0.1 * rng.uniform(), "v_norm": np.linalg.norm(v)},
            **{"v": v.tolist(), "delta_prob": 0.002 * rng.uniform()},
            **{"rollout_s": 1 + rng.uniform() + 50 * (step == 0), "grading_s": 0.1, "update_s": 2.0},
        }
        lines.append(json.dumps(row | constant) + "\n")
    (workdir / "metrics.jsonl").write_text("".join(lines))
    (workdir / "eval_before.json").write_text(json.dumps(BEFORE))
    if finished:
        summary = {"model": "some/model", "params": numbers, "eval_after": AFTER, "wall_s": 546.0}
        (workdir / "summary.json").write_text(json.dumps(summary))
    return workdir


def rewrite(workdir, change):
    """Changes the rows of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    rows = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [figure.get_suptitle()]


def test_every_panel_has_the_runs_numbers(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    figure = draw(run)
    drawn = [line.get_ydata() for axes in figure.axes for line in axes.lines]
    has = lambda values: any(len(y) == len(values) and np.allclose(y, values) for y in drawn)
    for name in ("reward", "reward_lenient", "length", "truncated", "delta_prob"):
        assert has([row[name] for row in rows]), name
    for number in range(13):
        assert has([0.0] + [row["v"][number] for row in rows])
    assert has([0.0] + [row["v_norm"] for row in rows])
    stairs = [patch.get_data() for axes in figure.axes for patch in axes.patches]
    heights = [np.asarray(data.values) - data.baseline for data in stairs]
    for name in ("rollout_s", "update_s", "grading_s"):
        assert any(np.allclose(height, [row[name] for row in rows]) for height in heights), name
    text = " ".join(words(figure))
    for word in (
        "28.1 % strict",
        "28.9 % lenient",
        "37.9 % strict",
        "38.3 % lenient",
        "some/model, 13 trained numbers",
    ):
        assert word in text


@pytest.mark.parametrize(
    "name, options, change",
    [
        ("finished", {}, None),
        ("one step", {"steps": 1}, None),
        ("still going", {"finished": False}, None),
        ("many steps", {"steps": 120}, None),
        ("nothing ever right", {"reward": 0.0, "reward_lenient": 0.0, "truncated": 0.0, "delta_prob": 0.0}, None),
        ("rewards below 0", {"reward": -3.0, "reward_lenient": 4.0}, None),
        ("a long vector", {}, lambda row: {k: x for k, x in row.items() if k != "v"}),
        ("an older version", {}, lambda row: {k: x for k, x in row.items() if k not in ("reward_se", "grading_s")}),
        ("continued by a newer version", {}, lambda row: {k: x for k, x in row.items() if k != "v" or row["step"] > 4}),
    ],
)
def test_no_panel_is_blank(tmp_path, blank_panels, name, options, change):
    workdir = write_run(tmp_path / "run", **options)
    if change:
        rewrite(workdir, change)
    path = plot.plot(workdir)
    assert path == workdir / "run.png" and not list(workdir.glob("*.tmp"))
    assert not blank_panels(path.read_bytes())


def test_a_blank_panel_is_told_from_a_drawn_one(tmp_path, blank_panels):
    figure = draw(read_run(write_run(tmp_path / "run")))
    for axes in figure.axes[-2:]:  # mismatch and seconds
        for artist in (*axes.lines, *axes.patches, *axes.collections, *axes.texts, axes.get_legend()):
            if artist is not None:
                artist.remove()
    figure.savefig(tmp_path / "blank.png", dpi=100)
    assert blank_panels((tmp_path / "blank.png").read_bytes()) == [3, 4]


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    workdir = write_run(tmp_path / "run", finished=False)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "rew')
    run = read_run(workdir)
    assert run.count == 10 and run.title.endswith("10 steps so far") and run.after is None


def replace_line(workdir, number, text):
    path = workdir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[number - 1] = text
    path.write_bytes(b"".join(lines))


DAMAGE = {
    "absent": (shutil.rmtree, "is no folder; expected the --workdir"),
    "a file": (lambda w: (shutil.rmtree(w), w.write_text("")), "is no folder"),
    "empty": (lambda w: (shutil.rmtree(w), w.mkdir()), "holds no run: it has neither"),
    "just begun": (lambda w: (w / "metrics.jsonl").unlink(), "has not finished a step; draw it when"),
    "first line torn": (lambda w: (w / "metrics.jsonl").write_text('{"step"'), "has not finished a step"),
    "no JSON": (lambda w: replace_line(w, 3, b"{{\n"), r"metrics\.jsonl line 3 is damaged"),
    "binary": (lambda w: replace_line(w, 3, b"\xff\x00\n"), "line 3 is damaged"),
    "nested": (lambda w: replace_line(w, 3, b"[" * 100_000 + b"\n"), "line 3 is damaged"),
    "a list": (lambda w: replace_line(w, 3, b"[1]\n"), "line 3 is damaged: expected step 2, found"),
    "a step is missing": (lambda w: replace_line(w, 3, b""), "line 3 is damaged: expected step 2, found"),
    "another log": (lambda w: replace_line(w, 1, b'{"step": 0, "loss": 1}\n'), "line 1 has no reward, .*not of"),
    "a word": (lambda w: rewrite(w, lambda r: r | {"length": "x"}), "line 1, length is damaged: .* number, found 'x'"),
    "not finite": (lambda w: rewrite(w, lambda r: r | {"reward": np.nan}), "line 1, reward is damaged"),
    "v changes its size": (
        lambda w: rewrite(w, lambda r: r | {"v": [0.0] * (3 + r["step"] // 5)}),
        "line 6 is damaged: v is not a list of 3 numbers",
    ),
    "config": (lambda w: (w / "config.json").write_text("{"), r"config\.json is damaged"),
    "summary": (lambda w: (w / "summary.json").write_text("[]"), "summary.json is damaged: expected an object"),
    "accuracy": (lambda w: (w / "eval_before.json").write_text('{"strict": 1}'), "no accuracy `strict` and `lenient`"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_no_run_is_refused(tmp_path, name):
    workdir = write_run(tmp_path / "run")
    damage, message = DAMAGE[name]
    damage(workdir)
    with pytest.raises(PlotError, match=message) as caught:
        plot.plot(workdir)
    assert str(workdir) in str(caught.value) and not list(tmp_path.rglob("*.png"))


def test_the_command(tmp_path, processes, blank_panels):
    workdir = write_run(tmp_path / "run")
    result = processes.run("plot", f"--workdir={workdir}", f"--output={tmp_path / 'my.png'}", config=False)
    assert (result.code, result.out) == (0, f"{tmp_path / 'my.png'}\n"), result.err
    assert not blank_panels((tmp_path / "my.png").read_bytes())


@pytest.mark.parametrize(
    "workdir, output, message",
    [
        ("", None, "--workdir is empty"),
        ("run", "x.jpg", "expected a file name that ends in .png"),
        ("run", "no/such/x.png", "No such file"),
        ("other", None, "is no folder"),
    ],
)
def test_flags_that_cannot_be(tmp_path, monkeypatch, capsys, workdir, output, message):
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "FLAGS", type("Flags", (), {"workdir": workdir, "output": output}), raising=False)
    with pytest.raises(SystemExit) as caught:
        plot.main([])
    err = capsys.readouterr().err
    assert caught.value.code == 1 and err.startswith("error: ") and re.search(message, err)
    assert len(err.splitlines()) == 1


def test_a_run_is_drawn_at_its_end(finished, config, command_line, blank_panels):
    result = command_line(config, finished.workdir)
    assert result.code == 0 and f"drawn: {finished.workdir / 'run.png'}" in result.err
    assert not blank_panels((finished.workdir / "run.png").read_bytes())
    assert json.loads(result.out) == finished.summary


def test_a_run_that_cannot_be_drawn_keeps_its_result(finished, config, command_line, monkeypatch):
    def broken(run):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(plot, "draw", broken)
    result = command_line(config, finished.workdir)
    assert result.code == 0 and json.loads(result.out) == finished.summary
    assert "not drawn (RuntimeError: no fonts here)" in result.err


def test_of_several_processes_the_first_draws(finished, config, command_line, monkeypatch):
    monkeypatch.setattr(grpo, "is_first", lambda: False)
    monkeypatch.setattr(grpo, "try_plot", lambda _: pytest.fail("drawn"))
    assert command_line(config, finished.workdir).out == ""
