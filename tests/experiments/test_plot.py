"""The picture of a run shows its numbers, and what is no run is refused in one sentence."""

import json
import re
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import PolyCollection

from experiments import plot
from experiments.common import runs
from experiments.plot import PlotError, read_run
from experiments.plotting.charts import draw_curves
from experiments.plotting.curves import CurveError
from experiments.plotting.picture import draw

PHASES = ("rollout_s", "update_s", "grading_s")
BEFORE, AFTER = {"strict": 0.28125, "lenient": 0.289062}, {"strict": 0.378906, "lenient": 0.382812}


def write_run(workdir, steps=10, numbers=13, finished=True, sft=False, config=(), **constant):
    """A run's folder as `experiments.grpo`, or `experiments.sft`, leaves it, with numbers from a generator."""
    config = {"model": "some/model", "method": "tinylora", "seed": 0} | dict(config)
    rng = np.random.default_rng([steps, config["seed"]])
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(config))
    v, lines = np.zeros(numbers), []
    for step in range(steps):
        v = v + 0.02 * rng.standard_normal(numbers)
        row = {"step": step, "loss": 0.6 - 0.01 * step + 0.02 * rng.standard_normal(), "grad_norm": rng.uniform()}
        row |= {"entropy": 0.5 + 0.1 * rng.uniform(), "length": 15 + rng.standard_normal(), "update_s": 2 + step / 10}
        row |= {"v": v.tolist(), "v_norm": np.linalg.norm(v)}
        if not sft:
            reward = 0.3 + 0.01 * step + 0.05 * rng.standard_normal()
            row |= {"reward": reward, "reward_lenient": reward + 0.02, "reward_se": 0.03}
            row |= {"truncated": 0.1 * rng.uniform(), "delta_prob": 0.002 * rng.uniform()}
            row |= {"rollout_s": 1 + rng.uniform() + 50 * (step == 0), "grading_s": 0.1}
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


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts] + [figure.get_suptitle()]


def has_line(figure, values):
    drawn = [line.get_ydata() for axes in figure.axes for line in axes.lines]
    return any(len(y) == len(values) and np.allclose(y, values) for y in drawn)


@pytest.mark.parametrize(
    "sft, lines, bars",
    [
        (False, ("reward", "reward_lenient", "length", "truncated", "delta_prob"), PHASES),
        (True, ("loss", "grad_norm", "entropy", "length"), PHASES[1:2]),
    ],
    ids=["grpo", "sft"],
)
def test_every_panel_has_the_runs_numbers(tmp_path, sft, lines, bars):
    run = read_run(write_run(tmp_path / "run", sft=sft))
    rows = rows_of(tmp_path / "run")
    figure = draw(run)
    has = lambda values: has_line(figure, values)
    for name in lines:
        assert has([row[name] for row in rows]), name
    for number in range(13):
        assert has([0.0] + [row["v"][number] for row in rows])
    assert has([0.0] + [row["v_norm"] for row in rows])
    stairs = [patch.get_data() for axes in figure.axes for patch in axes.patches]
    heights = [np.asarray(data.values) - data.baseline for data in stairs]
    assert len(heights) == len(bars)
    for name in bars:
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


@pytest.mark.parametrize("sft", [False, True], ids=["grpo", "sft"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 40])
def test_the_axis_of_steps_ends_with_the_last(tmp_path, steps, sft):
    for axes in draw(read_run(write_run(tmp_path / "run", steps=steps, sft=sft))).axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert all(tick == int(tick) for tick in ticks) and ticks[-1] == steps == int(high) and ticks[0] == 0


@pytest.mark.parametrize("method", ["lora", "full", "lora_xs"])
@pytest.mark.parametrize("sft", [False, True], ids=["grpo", "sft"])
def test_what_does_not_begin_at_zero_is_not_drawn_from_there(tmp_path, blank_panels, method, sft):
    workdir = write_run(tmp_path / "run", sft=sft, config={"method": method}, v_norm=512.25)
    rewrite(workdir, lambda row: {k: x for k, x in row.items() if k != "v"})
    figure, norms = draw(read_run(workdir)), [row["v_norm"] for row in rows_of(workdir)]
    assert has_line(figure, [0.0, *norms] if method == "lora_xs" else norms)
    assert not blank_panels(plot.plot(workdir).read_bytes())


@pytest.mark.parametrize("sft", [False, True], ids=["grpo", "sft"])
@pytest.mark.parametrize(
    "name, options, change",
    [
        ("finished", {}, None),
        ("one step", {"steps": 1}, None),
        ("still going", {"finished": False}, None),
        ("many steps", {"steps": 120}, None),
        ("nothing ever right", {"reward": 0.0, "reward_lenient": 0.0, "truncated": 0.0, "delta_prob": 0.0}, None),
        ("nothing to learn", {"loss": 0.0, "grad_norm": 0.0}, None),
        ("rewards below 0", {"reward": -3.0, "reward_lenient": 4.0}, None),
        ("a long vector", {}, lambda row: {k: x for k, x in row.items() if k != "v"}),
        ("an older version", {}, lambda row: {k: x for k, x in row.items() if k not in ("reward_se", "grading_s")}),
        ("continued by a newer version", {}, lambda row: {k: x for k, x in row.items() if k != "v" or row["step"] > 4}),
    ],
)
def test_no_panel_is_blank(tmp_path, blank_panels, name, options, change, sft):
    if sft and ("reward" in options or name == "an older version"):
        pytest.skip("of rewards")
    workdir = write_run(tmp_path / "run", sft=sft, **options)
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


def test_metrics_of_ones_own_are_read_where_all_steps_have_them(tmp_path):
    workdir = write_run(tmp_path / "run", my_share=0.25, my_mean=0.5)
    rewrite(workdir, lambda row: row | {"my_mean": None} if row["step"] == 3 else row)
    steps = read_run(workdir).steps
    np.testing.assert_array_equal(steps["my_share"], np.full(10, 0.25))
    assert "my_mean" not in steps and "step" not in steps


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
    "absent": (shutil.rmtree, "is not a folder; expected the --workdir"),
    "a file": (lambda w: (shutil.rmtree(w), w.write_text("")), "is not a folder"),
    "empty": (lambda w: (shutil.rmtree(w), w.mkdir()), "contains no run: it has neither"),
    "just begun": (lambda w: (w / "metrics.jsonl").unlink(), "without a finished step; plot it after"),
    "first line torn": (lambda w: (w / "metrics.jsonl").write_text('{"step"'), "without a finished step"),
    "no JSON": (lambda w: replace_line(w, 3, b"{{\n"), r"metrics\.jsonl line 3 is damaged"),
    "binary": (lambda w: replace_line(w, 3, b"\xff\x00\n"), "line 3 is damaged"),
    "nested": (lambda w: replace_line(w, 3, b"[" * 100_000 + b"\n"), "line 3 is damaged"),
    "a list": (lambda w: replace_line(w, 3, b"[1]\n"), "line 3 is damaged: expected step 2, found"),
    "a step is missing": (lambda w: replace_line(w, 3, b""), "line 3 is damaged: expected step 2, found"),
    "another log": (lambda w: replace_line(w, 1, b'{"step": 0, "loss": 1}\n'), "line 1 lacks grad_norm, .*not from"),
    "SFT after GRPO": (
        lambda w: rewrite(w, lambda r: {k: x for k, x in r.items() if k != "reward" or r["step"] < 3}),
        "line 4 lacks reward: it is not from experiments.grpo or experiments.sft",
    ),
    "a word": (lambda w: rewrite(w, lambda r: r | {"length": "x"}), "line 1, length is damaged: .* number, found 'x'"),
    "not finite": (lambda w: rewrite(w, lambda r: r | {"reward": np.nan}), "line 1, reward is damaged"),
    "v changes its size": (
        lambda w: rewrite(w, lambda r: r | {"v": [0.0] * (3 + r["step"] // 5)}),
        "line 6 is damaged: v is not a list of 3 numbers",
    ),
    "config": (lambda w: (w / "config.json").write_text("{"), r"config\.json is damaged"),
    "summary": (lambda w: (w / "summary.json").write_text("[]"), "summary.json is damaged: expected an object"),
    "accuracy": (
        lambda w: (w / "eval_before.json").write_text('{"strict": 1}'),
        "lacks the accuracies `strict` and",
    ),
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
        ([""], None, "--workdir is empty"),
        (["run", ""], "x.png", "--workdir is empty"),
        (["run"], "x.jpg", "expected a file name that ends in .png"),
        (["run"], "no/such/x.png", "No such file"),
        (["other"], None, "is not a folder"),
        (["run", "run2"], None, "--output is missing; it is required for several runs"),
        (["run", "run"], "x.png", "run and run have the same config and seeds"),
        (["run", "other"], "x.png", "other is not a folder"),
    ],
)
def test_flags_that_cannot_be(tmp_path, monkeypatch, capsys, workdir, output, message):
    write_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    values = {"workdir": workdir, "output": output, "redraw": None}
    monkeypatch.setattr(plot, "FLAGS", type("Flags", (), values), raising=False)
    with pytest.raises(SystemExit) as caught:
        plot.main([])
    err = capsys.readouterr().err
    assert caught.value.code == 1 and err.startswith("error: ") and re.search(message, err)
    assert len(err.splitlines()) == 1


def test_a_run_is_drawn_at_its_end(finished, config, command_line, blank_panels):
    result = command_line(config, finished.workdir)
    assert result.code == 0 and f"{finished.workdir / 'run.png'}\n" in result.err
    assert not blank_panels((finished.workdir / "run.png").read_bytes())
    assert json.loads(result.out) == finished.summary


def test_a_run_that_cannot_be_drawn_keeps_its_result(finished, config, command_line, monkeypatch):
    def broken(run):
        raise RuntimeError("no fonts here")

    monkeypatch.setattr(plot, "draw", broken)
    result = command_line(config, finished.workdir)
    assert result.code == 0 and json.loads(result.out) == finished.summary
    assert "no plot (RuntimeError: no fonts here)" in result.err


def test_of_several_processes_the_first_draws(finished, config, command_line, monkeypatch):
    monkeypatch.setattr(runs, "is_first", lambda: False)
    monkeypatch.setattr(runs, "try_plot", lambda _: pytest.fail("drawn"))
    assert command_line(config, finished.workdir).out == ""


@pytest.fixture
def sweep(tmp_path):
    """A sweep's folder: two rates, three seeds each; one member has done fewer steps, and one none at all."""
    folder = tmp_path / "sweep"
    for rate in (0.01, 0.05):
        for seed in (0, 1, 2):
            config = {"seed": seed, "optimizer": {"learning_rate": rate}}
            steps = 7 if (rate, seed) == (0.05, 1) else 10
            member = folder / "members" / f"learning_rate={rate},seed={seed}"
            write_run(member, steps=steps, config=config)
            (member / "eval_before.json").unlink()
            summary = json.loads((member / "summary.json").read_text())
            after = {"strict": 0.3 + 0.1 * seed, "lenient": 0.9}
            (member / "summary.json").write_text(json.dumps(summary | {"eval_before": BEFORE, "eval_after": after}))
    diverged = write_run(folder / "members" / "diverged", steps=1, config={"seed": 3})
    (diverged / "metrics.jsonl").write_text("")
    return folder


def test_a_sweeps_member_is_drawn_as_a_run(sweep, blank_panels):
    member = sweep / "members" / "learning_rate=0.01,seed=0"
    assert not blank_panels(plot.plot(member).read_bytes())
    assert "28.1 % strict" in " ".join(words(draw(read_run(member))))


def test_a_sweep_is_drawn_as_its_curves(sweep):
    assert plot.plot(sweep) == sweep / "curves.png"
    assert (sweep / "curves.png").exists() and not (sweep / "run.png").exists()


def test_curves_are_drawn_again_from_their_json(sweep, tmp_path, monkeypatch, capsys):
    plot.plot(sweep)
    values = {"workdir": None, "output": str(tmp_path / "again.png"), "redraw": str(sweep / "curves.json")}
    monkeypatch.setattr(plot, "FLAGS", type("Flags", (), values), raising=False)
    plot.main([])
    assert (tmp_path / "again.png").read_bytes() == (sweep / "curves.png").read_bytes()
    values["redraw"] = str(sweep / "members" / "diverged" / "config.json")
    monkeypatch.setattr(plot, "FLAGS", type("Flags", (), values), raising=False)
    with pytest.raises(SystemExit):
        plot.main([])
    assert "contains no curves" in capsys.readouterr().err


def test_runs_that_differ_by_their_seeds_make_one_curve(sweep):
    found = plot.plot_curves([sweep], sweep / "curves.png")
    result = json.loads(found.with_suffix(".json").read_text())
    about = {name: result[name] for name in ("model", "metric", "untrained")}
    assert about == {"model": "some/model", "metric": "reward", "untrained": BEFORE["strict"]}
    assert [curve["label"] for curve in result["curves"]] == ["rate 0.01", "rate 0.05"]
    for curve, steps in zip(result["curves"], (10, 7), strict=True):
        rewards = np.array([[row["reward"] for row in rows_of(Path(run))][:steps] for run in curve["runs"]])
        assert rewards.shape == (3, steps) and len({tuple(row) for row in rewards}) == 3
        np.testing.assert_allclose(curve["values"], rewards)
        np.testing.assert_allclose(curve["mean"], rewards.sum(axis=0) / 3)
        spread = np.sqrt(((rewards - rewards.mean(axis=0)) ** 2).sum(axis=0) / 2)
        np.testing.assert_allclose(curve["se"], spread / np.sqrt(3))
        np.testing.assert_allclose(curve["trained"], [0.3, 0.4, 0.5])
    assert result["curves"][1]["steps"] == [10, 7, 10]

    (axes,) = draw_curves(result).axes
    bands = [band.get_paths()[0].vertices for band in axes.collections if isinstance(band, PolyCollection)]
    for curve, band in zip(result["curves"], bands, strict=True):
        assert any(np.array_equal(line.get_ydata(), curve["mean"]) for line in axes.lines)
        mean, error = np.array(curve["mean"]), np.array(curve["se"])
        at_end = band[band[:, 0] == len(mean), 1]
        np.testing.assert_allclose([at_end.min(), at_end.max()], [mean[-1] - error[-1], mean[-1] + error[-1]])
    labels = [text.get_text() for legend in axes.figure.legends for text in legend.get_texts()]
    assert labels[0] == "rate 0.01, mean of 3 seeds, ◆ 0.4 ± 0.058 greedy"
    assert "to step 7, the last of all" in labels[1] and labels[2] == "untrained: ◆, greedy"
    assert "sampled" in axes.get_title(loc="left") and "greedy" in axes.get_title(loc="left")


@pytest.mark.parametrize("sft", [False, True], ids=["grpo", "sft"])
@pytest.mark.parametrize("count, steps", [(1, 3), (2, 1), (5, 120)])
def test_curves_of_any_length(tmp_path, sft, count, steps):
    folders = [
        write_run(tmp_path / f"run{seed}", steps=steps, sft=sft, config={"seed": seed}, finished=seed > 0)
        for seed in range(count)
    ]
    plot.plot_curves(folders, tmp_path / "curves.png")
    result = json.loads((tmp_path / "curves.json").read_text())
    (curve,) = result["curves"]
    assert result["metric"] == ("loss" if sft else "reward") and len(curve["mean"]) == steps
    assert (curve["se"] is None) == (count == 1) and curve["label"] == ""
    pixels = matplotlib.image.imread(tmp_path / "curves.png")[..., :3]
    assert np.mean(pixels.max(axis=-1) - pixels.min(axis=-1) > 0.3) > 1e-4, "something has colour"
    (axes,) = draw_curves(result).axes
    low, high = axes.get_xlim()
    assert low == 0 and steps < high < 1.1 * steps + 1
    assert all(tick == int(tick) and tick <= steps for tick in axes.get_xticks()), "steps are whole"


def test_legends_say_how_many_numbers_are_trained(tmp_path):
    sizes = {(17, 1): 13, (210, 1): 1, (210, 13): 13}
    folders = [
        write_run(
            tmp_path / f"{n_tie}-{u}",
            steps=3,
            numbers=numbers,
            config={"adapter": {"n_tie": n_tie, "u": u}, "optimizer": {"learning_rate": 0.01 * u}},
        )
        for (n_tie, u), numbers in sizes.items()
    ]
    labels = lambda names: [
        each["label"] for each in plot.mean_curves([(str(f), read_run(f)) for f in names])["curves"]
    ]
    assert labels(folders[:2]) == ["13 numbers", "1 number"]
    same = labels(folders)
    assert same == [
        "13 numbers, n_tie=17, u = 1, rate 0.01",
        "1 number, n_tie=210, u = 1, rate 0.01",
        "13 numbers, n_tie=210, u = 13, rate 0.13",
    ], "the number alone would not tell the first and the last apart"


def test_evaluations_during_training_are_in_the_picture(tmp_path):
    workdir = write_run(tmp_path / "run", steps=6)
    rows = rows_of(workdir)
    rows[2] |= {"eval_strict": 0.31, "eval_lenient": 0.36}
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(workdir)
    assert run.between == ((3, 0.31, 0.36),)
    points = [(*line.get_xdata(), *line.get_ydata()) for line in draw(run).axes[0].lines if len(line.get_xdata()) == 1]
    assert (3, 0.31) in points and (3, 0.36) in points


def test_smoothing_keeps_the_band_of_the_seeds(tmp_path):
    """Seeds that are apart by a constant have that band, however many steps are averaged."""
    for seed, reward in enumerate((0.2, 0.4)):
        write_run(tmp_path / f"run{seed}", steps=100, config={"seed": seed}, reward=reward)
    plot.plot_curves([tmp_path / "run0", tmp_path / "run1"], tmp_path / "curves.png")
    (axes,) = draw_curves(json.loads((tmp_path / "curves.json").read_text())).axes
    (band,) = [band.get_paths()[0].vertices for band in axes.collections if isinstance(band, PolyCollection)]
    np.testing.assert_allclose([band[:, 1].min(), band[:, 1].max()], [0.2, 0.4])


def test_rewards_and_losses_make_no_curve(tmp_path):
    folders = [write_run(tmp_path / f"run{sft}", sft=sft) for sft in (False, True)]
    with pytest.raises(CurveError, match="the runs mix GRPO and SFT"):
        plot.plot_curves(folders, tmp_path / "curves.png")
    assert not list(tmp_path.glob("curves.*"))


def test_the_command_draws_a_sweep(sweep, processes):
    result = processes.run("plot", f"--workdir={sweep}", config=False)
    assert (result.code, result.out) == (0, f"{sweep / 'curves.png'}\n"), result.err
    assert (sweep / "curves.json").exists() and not list(sweep.rglob("*.tmp"))


def test_the_ending_names_what_can_be_done_next(tmp_path, sweep):
    going, done = write_run(tmp_path / "going", finished=False), write_run(tmp_path / "done")
    assert f"--workdir={going}" in plot.ending(going / "run.png", [going])
    assert "python" not in plot.ending(done / "run.png", [done]), "a page needs the untrained answers"
    (done / "answers_before.jsonl").touch()
    assert "--html=" in plot.ending(done / "run.png", [done])
    both = plot.ending(tmp_path / "curves.png", [done, done])
    assert both.count("--runs=RL:") == 2 and f"--output={tmp_path / 'report.json'}" in both
    assert "python" not in plot.ending(tmp_path / "again.png", [])


def test_the_panels_of_a_page_are_those_of_the_picture(tmp_path, sweep):
    run = read_run(write_run(tmp_path / "run"))
    whole = [axes.get_title(loc="left") for axes in draw(run).axes if axes.get_title(loc="left")]
    assert [title for title, _ in plot.figures_of(tmp_path / "run")] == whole and len(whole) == 5
    ((_, figure),) = plot.figures_of(sweep)
    assert len(figure.axes) == 1


def test_the_norm_of_v_has_an_axis_of_its_own(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    norms = [0.0, *run.steps["v_norm"]]
    (its,) = [axes for axes in draw(run).axes if any(np.array_equal(line.get_ydata(), norms) for line in axes.lines)]
    assert its.get_ylabel() == "|v|" and len(its.lines) == 1
