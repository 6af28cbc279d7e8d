"""Reports accuracy against the number of trained parameters: many runs as a table, JSON and plot.

    python -m experiments.report --runs=RL:/tmp/sweep --runs=RL:/tmp/lora --runs=SFT:/tmp/sft --output=/tmp/report.json
    python -m experiments.report --runs=RL:/tmp/tinylora-demo --html=/tmp/demo.html
    python -m experiments.report --redraw=experiments/results/gsm8k_0_5b_methods_h100.json --output=/tmp/again.json

Each run is a workdir of experiments.grpo, sft or sweep; all must have the same base model and questions. For each
series and size, the plot shows the setting with the best training (mean reward or loss over the last quarter of the
steps and over seeds), as the mean of its seeds, so that test questions do not influence the choice. The table lists all
runs. It shows trained next to untrained accuracies, with a paired test of their difference. The plot is written next to
the JSON. --html writes a page of one run or sweep: curves, tests, answers before and after, and settings.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from absl import flags

    from experiments.common import opening

    flags.DEFINE_multi_string("runs", [], "SERIES:WORKDIR of a run or a sweep; may be repeated.")
    opening.define_path("html", "Write a page of one run or sweep to this .html file, to mail or to print.")
    opening.define_path("redraw", "Draw the plot of this JSON file again.")
    opening.define_path("output", "Write the report to this .json file, and the plot to a .png file next to it.")
    opening.begin(__doc__)

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.common.cli import fail, reporting_errors
from experiments.common.closing import block, change, member_rows, place_lines
from experiments.common.opening import parse_flags
from experiments.common.wording import counted, cut, p_digits, paragraph, points, size, table_with_sections
from experiments.configs import base
from experiments.plot import plot
from experiments.plotting.charts import draw_accuracy, short_number
from experiments.plotting.page import Content, page
from tinylora_jax.files import expand, is_number, open_regular, parse_json, read_json, write_atomically
from tinylora_jax.io import flat
from tinylora_jax.metrics import compare_right_or_wrong, estimate

FLAGS = flags.FLAGS
_LARGE = 10**7  # smallest number of parameters that is shortened
_WIDEST = 27  # longest name of a run in the table
_PRECISION = "float32"  # precision of v in runs of older versions
_MAX_JSON_BYTES = 2**26
_SETTING = ("method", "rank", "tying", "u", "n_tie", "precision", "learning_rate")  # all fields but the seed


class ReportError(ValueError):
    """A folder contains no finished run, or runs cannot be combined."""


def _read(path: Path) -> Any:
    try:
        return read_json(path, _MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReportError(f"{path} is missing; expected the --workdir of a finished run or sweep") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} is damaged ({error})") from error


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the name of a missing or damaged file to errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise ReportError(f"{path} is missing; the run is not finished") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is damaged ({error!r})") from error


def _lines(path: Path) -> list[Any]:
    with open_regular(path) as file:
        return [parse_json(line) for line in file if line.strip()]


def _greedy(path: Path) -> dict[int, bool]:
    """Whether each question was answered correctly by greedy decoding, under the strict grader."""
    with _naming(path):
        return {row["id"]: row["strict"] == 1 for row in _lines(path) if row["mode"] == "greedy"}


def _training(path: Path) -> float:
    """Mean reward over the last quarter of the steps, or the negative mean loss without rewards."""
    with _naming(path):
        rows = _lines(path)
        last = rows[-max(1, len(rows) // 4) :]
        values = [row["reward"] if "reward" in row else -row["loss"] for row in last]
        found = float(np.mean(values)) if values and all(map(is_number, values)) else np.nan
    if not np.isfinite(found):
        raise ReportError(f"{path} is damaged (the reward or loss of its last steps is not finite, or it is empty)")
    return found


def read_runs(series: str, workdir: Path) -> list[dict[str, Any]]:
    """Reads the results of a run or of the members of a sweep.

    Args:
      series: name of the series, such as RL.
      workdir: folder of the run or sweep.

    Returns:
      For each run its folder, config, answers before and after, and a measure of training success.

    Raises:
      ReportError: the folder contains no finished run.
    """
    try:
        return [
            _read_run(series, workdir, workdir if member is None else workdir / "members" / member["member"])
            for member in _read(workdir / "summary.json").get("members", [None])
            if member is None or not member["dropped"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{workdir} is damaged: a JSON file there lacks {error}") from error


def _read_run(series: str, workdir: Path, folder: Path) -> dict[str, Any]:
    own = _read(folder / "summary.json")
    return {
        "series": series,
        "folder": folder,
        "model": own["model"],
        "params": own["params"],
        "steps": own["steps"],
        "config": _read(folder / "config.json"),
        "training": _training(folder / "metrics.jsonl"),
        "before": _greedy(workdir / "answers_before.jsonl"),
        "after": _greedy(folder / "answers_after.jsonl"),
        "eval_before": own["eval_before"],
        "eval_after": own["eval_after"],
    }


def _row(run: dict[str, Any]) -> dict[str, Any]:
    config, ids = run["config"], sorted(run["before"])
    if set(run["after"]) != set(run["before"]):
        raise ReportError(f"a run with {run['params']} parameters has different questions before and after training")
    before, after = ([float(run[which][i]) for i in ids] for which in ("before", "after"))
    found, difference = estimate(after), compare_right_or_wrong(before, after)
    name = {"tinylora": "TinyLoRA", "lora_xs": "LoRA-XS", "lora": "LoRA", "full": "all weights"}[config["method"]]
    rank = {"lora": config["lora"]["rank"], "full": None}.get(config["method"], config["adapter"]["rank"])
    keep = ("strict", "lenient", "mean_tokens", "truncated", "sampled")
    return {
        "series": run["series"],
        "method": name,
        "rank": rank,
        "params": run["params"],
        "tying": config["adapter"]["tying"] if config["method"] == "tinylora" else None,
        "u": config["adapter"]["u"] if config["method"] == "tinylora" else None,
        "n_tie": config["adapter"]["n_tie"] if config["method"] == "tinylora" else None,
        "precision": config["optimizer"].get("precision", _PRECISION),
        "learning_rate": config["optimizer"]["learning_rate"],
        "seed": config["seed"],
        "steps": run["steps"],
        "training": round(run["training"], 6),
        "accuracy": round(found.value, 6),
        "low": round(found.low, 6),
        "high": round(found.high, 6),
        "difference": round(difference.value, 6),
        "p": float(f"{difference.p:.3g}"),
        "eval": {name: run["eval_after"][name] for name in keep if name in run["eval_after"]},
    }


def _checked_row(run: dict[str, Any]) -> dict[str, Any]:
    try:
        return _row(run)
    except (KeyError, TypeError) as error:
        raise ReportError(f"{run['folder']} is damaged: its config.json or summary.json lacks {error}") from error


def report(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combines all runs into one report.

    Args:
      runs: runs that `read_runs` returned.

    Raises:
      ReportError: the runs have different models or questions.
    """
    models, sets = {run["model"] for run in runs}, {tuple(sorted(run["before"])) for run in runs}
    if len(models) > 1 or len(sets) > 1:
        raise ReportError(f"the runs have {len(models)} models and {len(sets)} sets of questions; expected one of each")
    first = runs[0]
    base = estimate([float(x) for x in first["before"].values()])
    rows = sorted(map(_checked_row, runs), key=lambda row: (row["series"], row["params"], row["learning_rate"]))
    return {
        "model": first["model"],
        "questions": len(first["before"]),
        "untrained": {
            "accuracy": round(base.value, 6),
            "low": round(base.low, 6),
            "high": round(base.high, 6),
            "eval": first["eval_before"],
        },
        "runs": rows,
    }


def best(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The best-trained setting of every size, by series: the rows of its runs, which differ only in their seeds."""
    settings: dict[tuple[str, int], dict[tuple[Any, ...], list[dict[str, Any]]]] = {}
    for row in rows:
        setting = tuple({"precision": _PRECISION, **row}.get(name) for name in _SETTING)
        settings.setdefault((row["series"], row["params"]), {}).setdefault(setting, []).append(row)
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for (series, _), groups in settings.items():
        found.setdefault(series, []).append(max(groups.values(), key=lambda runs: _mean(runs, "training")))
    return found


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def points_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The points to draw: means over seeds of accuracies and of interval bounds."""
    drawn = ("params", "accuracy", "low", "high")
    point = lambda runs: {"method": runs[0]["method"], **{name: _mean(runs, name) for name in drawn}}
    return {series: [point(runs) for runs in sizes] for series, sizes in best(rows).items()}


def checked_report(path: Path) -> dict[str, Any]:
    """Reads and checks a report that this command wrote, to draw it again.

    Raises:
      ReportError: the file is damaged or of another kind; the message names the field.
    """
    result = _read(path)
    if not (isinstance(result, dict) and {"runs", "untrained"} <= result.keys()):
        raise ReportError(f"{path} is not a report; expected a JSON file written by this command")
    rows = result["runs"]
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ReportError(f"{path}: runs: expected a list of objects, one or more")
    shares = ("accuracy", "low", "high")
    _require(path, "untrained", result["untrained"], shares, 0, 1)
    for index, row in enumerate(rows):
        where = f"runs[{index}]"
        _require(path, where, row, shares, 0, 1)
        _require(path, where, row, ("params",), 1, 1e15)
        _require(path, where, row, ("training", "learning_rate", "seed", "difference", "p"), -1e15, 1e15)
        wrong = [name for name in ("series", "method") if not isinstance(row.get(name), str)]
        wrong += ["precision"] if not isinstance(row.get("precision", _PRECISION), str) else []
        wrong += [name for name in _SETTING if isinstance(row.get(name, ""), list | dict)]
        if wrong or "u" not in row or "tying" not in row or "rank" not in row or not isinstance(row["params"], int):
            raise ReportError(f"{path}: {where} is not a run: {', '.join(wrong) or 'a field'} is missing or invalid")
        if not isinstance(row["tying"], str | None):
            raise ReportError(f"{path}: {where}: tying: expected a string or null")
    return result


def _require(path: Path, where: str, row: Any, names: Sequence[str], low: float, high: float) -> None:
    for name in names:
        value = row.get(name) if isinstance(row, dict) else None
        if not (is_number(value) and low <= value <= high):
            raise ReportError(
                f"{path}: {where}: {name}: expected a number from {low:g} to {high:g}, found {value!r:.40}"
            )


def _name(row: dict[str, Any]) -> str:
    """Describes a run: its method, and non-default values of u, tying and precision."""
    words = [row["method"], *([f"r={row['rank']}"] if row["rank"] else [])]
    words += [f"u={row['u']}"] if row["u"] not in (None, 1) else []
    words += [row["tying"]] if row["tying"] not in (None, "tiled") else []
    precision = row.get("precision", _PRECISION)  # absent in reports of older versions
    return " ".join([*words, *([precision] if precision != _PRECISION else [])])


def _about(result: dict[str, Any]) -> str:
    """The model and the number of questions of a report, as far as it states them."""
    count = result.get("questions")
    words = [str(result.get("model", "")), counted(count, "question") if isinstance(count, int) else ""]
    return ", ".join(filter(None, words))


def runs_table(result: dict[str, Any]) -> str:
    """Formats the runs in 80 columns, one per line below their series; a star marks those in the plot."""
    drawn = {id(row) for sizes in best(result["runs"]).values() for rows in sizes for row in rows}
    base, measure = result["untrained"], "reward" if result["runs"][0]["training"] >= 0 else "-loss"
    rows = [["", "numbers", "rate", "seed", measure, "strict", "gain", "p"]]
    rows.append([" untrained", "0", "", "", "", f"{100 * base['accuracy']:.1f}", "", ""])
    sections: dict[int, str] = {}
    for row in result["runs"]:
        if row["series"] not in sections.values():
            sections[len(rows)] = row["series"]
        name = ("*" if id(row) in drawn else " ") + cut(_name(row), _WIDEST)
        rate = f"{row['learning_rate']:.3g}"
        count = f"{row['params']:,}" if row["params"] < _LARGE else short_number(row["params"])
        cells = [count, rate, str(row["seed"]), f"{row['training']:.3f}"]
        rows.append([name, *cells, f"{100 * row['accuracy']:.1f}", points(row["difference"]), p_digits(row["p"])])
    lines = [_about(result), *table_with_sections(rows, sections, indent="")]
    interval = f"{100 * base['low']:.1f} to {100 * base['high']:.1f}"
    notes = f"""gain: points over the untrained model ({interval}, 95 %), by a paired test of greedy answers to the
        same questions. A star marks what the picture shows: for every size the setting that was trained best."""
    return "\n".join([*lines, paragraph(notes)])


def page_of(workdir: Path) -> Content:
    """Collects what the page of a finished run or sweep shows.

    Raises:
      ReportError: the folder contains no finished run.
      PlotError: a file is damaged.
    """
    summary, config = _read(workdir / "summary.json"), _read(workdir / "config.json")
    members, folder, table_rows = summary.get("members"), workdir, ()
    if members is not None:
        trained = [row for row in members if not row["dropped"]]
        if not trained:
            raise ReportError(f"{workdir} has no trained member: all of them were dropped")
        folder, table_rows = workdir / "members" / trained[0]["member"], member_rows(summary, workdir)
    with _naming(folder / "answers_after.jsonl"):
        found = change(_lines(workdir / "answers_before.jsonl"), _lines(folder / "answers_after.jsonl"))
    numbers = summary["params"] if members is None else trained[0]["params"]
    about = [counted(summary["steps"], "step")]
    about += [f"{summary['wall_s'] / 60:.1f} minutes"] if "wall_s" in summary else []
    about += [f"{counted(len(members), 'member')}; the figures are those of {folder.name}"] if members else []
    fields = flat(config)
    usual = flat(base.get_config().to_dict())
    changed = {name: value for name, value in fields.items() if name in usual and usual[name] != value}
    title = f"{summary['model']}: {counted(numbers, 'trained number')}"
    return Content(title, ", ".join(about), found, plot(workdir), table_rows, fields, changed)


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    if FLAGS.html is not None:
        _write_page(FLAGS.html)
    if FLAGS.output is None:
        if FLAGS.html is None:
            fail("set --output for a table and a picture, or --html for a page")
        return
    output = Path(FLAGS.output)
    if output.suffix != ".json":
        fail(f"--output={FLAGS.output}: expected a file name that ends in .json")
    if bool(FLAGS.runs) == bool(FLAGS.redraw):
        fail("set --runs (it may be repeated) or --redraw")
    with reporting_errors():
        if FLAGS.redraw:
            result = checked_report(Path(FLAGS.redraw))
        else:
            result = report([run for text in FLAGS.runs for run in read_runs(*_series_and_folder(text))])
        drawn, text = points_of(result["runs"]), runs_table(result)
        title = _about(result)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(result, indent=1) + "\n")
        draw_accuracy(drawn, result["untrained"], output.with_suffix(".png"), title)
    places = {"result": output, "picture": output.with_suffix(".png")}
    print(block(text, place_lines(places)))


def _series_and_folder(text: str) -> tuple[str, Path]:
    """Splits `SERIES:WORKDIR`.

    Raises:
      ReportError: a part is missing.
    """
    name, _, path = text.partition(":")
    if not (name and path):
        raise ReportError(f"--runs={text}: expected SERIES:WORKDIR, such as RL:/tmp/sweep")
    return name, expand(path)


def _write_page(name: str) -> None:
    """Writes the page of --html."""
    target = Path(name)
    if target.suffix != ".html" or target.is_dir():
        fail(f"--html={name}: expected a file name that ends in .html")
    if len(FLAGS.runs) != 1:
        fail("--html shows one run or sweep; set --runs once, such as --runs=RL:/tmp/tinylora-demo")
    with reporting_errors():
        workdir = _series_and_folder(FLAGS.runs[0])[1]
        try:
            content = page_of(workdir)
        except (KeyError, TypeError, AttributeError) as error:
            raise ReportError(f"{workdir} is damaged: a JSON file there lacks {error}") from error
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, page(content))
    print(block(place_lines({"page": target, "size": size(target.stat().st_size)})))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
