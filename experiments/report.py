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
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from experiments.common.changes import change
from experiments.common.cli import fail, reporting_errors
from experiments.common.closing import ask_both, block, member_rows, next_lines, page_command, place_lines
from experiments.common.combining import (
    PRECISION,
    ReportError,
    best,
    checked_report,
    naming,
    points_of,
    read_lines,
    read_result,
    read_runs,
    report,
)
from experiments.common.opening import parse_flags
from experiments.common.places import run_of
from experiments.common.wording import counted, cut, p_digits, paragraph, points, size, table_with_sections
from experiments.configs import base
from experiments.plot import figures_of
from experiments.plotting.charts import draw_accuracy, short_number
from experiments.plotting.page import Content, page
from tinylora_jax.files import write_atomically
from tinylora_jax.io import flat

FLAGS = flags.FLAGS
_LARGE = 10**7  # smallest number of parameters that is shortened
_WIDEST = 27  # longest name of a run in the table


def _name(row: dict[str, Any], with_steps: bool) -> str:
    """Describes a run: its method, non-default values of u, tying and precision, options, and on request its steps."""
    words = [row["method"], *([f"r={row['rank']}"] if row["rank"] else [])]
    words += [re.sub(r"^\.\*/|/kernel$", "", row["targets"])] if row.get("targets") else []
    words += [f"u={row['u']}"] if row["u"] not in (None, 1) else []
    words += [row["tying"]] if row["tying"] not in (None, "tiled") else []
    precision = row.get("precision", PRECISION)  # absent in reports of older versions
    words += [precision] if precision != PRECISION else []
    words += [row["options"]] if row.get("options") else []
    return " ".join([*words, *([f"{row['steps']} steps"] if with_steps else [])])


def _about(result: dict[str, Any]) -> str:
    """The model and the number of questions of a report, as far as it states them."""
    count = result.get("questions")
    words = [str(result.get("model", "")), counted(count, "question") if isinstance(count, int) else ""]
    return ", ".join(filter(None, words))


def runs_table(result: dict[str, Any]) -> str:
    """Formats the runs in 80 columns, one per line below their series; a star marks those in the plot."""
    lines = [_about(result), *_mode_table(result, "greedy")]
    if "sampled" in result["untrained"] and all("sampled" in row for row in result["runs"]):
        lines += ["", "sampled answers:", *_mode_table(result, "sampled")]
    base = result["untrained"]
    interval = f"{100 * base['low']:.1f} to {100 * base['high']:.1f}"
    notes = f"""gain: points over the untrained model (greedy: {interval}, 95 %), by a paired test on the same
        questions. A star marks what the picture shows: of every size, the setting that was trained best."""
    return "\n".join([*lines, paragraph(notes)])


def _mode_table(result: dict[str, Any], mode: str) -> list[str]:
    """The table of greedy or of sampled answers."""
    of = lambda each: each if mode == "greedy" else each["sampled"]
    drawn = {id(row) for sizes in best(result["runs"]).values() for rows in sizes for row in rows}
    measure = "reward" if result["runs"][0]["training"] >= 0 else "-loss"
    lengths = {row.get("steps") for row in result["runs"]}
    rows = [["", "numbers", "rate", "seed", measure, "strict", "gain", "p"]]
    rows.append([" untrained", "0", "", "", "", f"{100 * of(result['untrained'])['accuracy']:.1f}", "", ""])
    sections: dict[int, str] = {}
    for row in result["runs"]:
        if row["series"] not in sections.values():
            sections[len(rows)] = row["series"]
        name = ("*" if id(row) in drawn else " ") + cut(_name(row, len(lengths) > 1 and None not in lengths), _WIDEST)
        rate = f"{row['learning_rate']:.3g}"
        count = f"{row['params']:,}" if row["params"] < _LARGE else short_number(row["params"])
        cells, own = [count, rate, str(row["seed"]), f"{row['training']:.3f}"], of(row)
        rows.append([name, *cells, f"{100 * own['accuracy']:.1f}", points(own["difference"]), p_digits(own["p"])])
    return table_with_sections(rows, sections, indent="")


def page_of(workdir: Path) -> Content:
    """Collects what the page of a finished run or sweep shows.

    Raises:
      ReportError: the folder contains no finished run.
      PlotError: a file is damaged.
    """
    summary, config = read_result(workdir / "summary.json"), read_result(workdir / "config.json")
    members, folder, table_rows = summary.get("members"), workdir, ()
    if members is not None:
        trained = [row for row in members if not row["dropped"]]
        if not trained:
            raise ReportError(f"{workdir} has no trained member: all of them were dropped")
        folder, table_rows = workdir / "members" / trained[0]["member"], member_rows(summary, workdir)
    with naming(folder / "answers_after.jsonl"):
        found = change(read_lines(workdir / "answers_before.jsonl"), read_lines(folder / "answers_after.jsonl"))
    numbers = summary["params"] if members is None else trained[0]["params"]
    about = [counted(summary["steps"], "step")]
    about += [f"{summary['wall_s'] / 60:.1f} minutes"] if "wall_s" in summary else []
    about += [f"{counted(len(members), 'member')}; the figures are those of {folder.name}"] if members else []
    fields = flat(config)
    usual = flat(base.get_config().to_dict())
    changed = {name: value for name, value in fields.items() if name in usual and usual[name] != value}
    title = f"{summary['model']}: {counted(numbers, 'trained number')}"
    return Content(title, ", ".join(about), found, figures_of(workdir), table_rows, fields, changed)


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
    print(block(text, place_lines(places), next_lines(_next_commands(output))))


def _next_commands(output: Path) -> list[tuple[str, Sequence[object]]]:
    """What comes after a table: the page of its first run, or for a picture that was drawn again nothing."""
    again = ["python", "-m", "experiments.report", f"--redraw={output}", f"--output={output.with_name('again.json')}"]
    if not FLAGS.runs:
        return []
    workdir = _series_and_folder(FLAGS.runs[0])[1]
    return [("see the answers of a run as a page", page_command(workdir)), ("draw the picture again", again)]


def _series_and_folder(text: str) -> tuple[str, Path]:
    """Splits `SERIES:WORKDIR`.

    Raises:
      ReportError: a part is missing.
    """
    name, _, path = text.partition(":")
    if not (name and path):
        raise ReportError(f"--runs={text}: expected SERIES:WORKDIR, such as RL:/tmp/sweep")
    return name, run_of(path)


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
    fixed = content.change.fixed if content.change else ()
    commands = ask_both(adapter, fixed) if (adapter := workdir / "adapter").is_dir() else []
    print(block(place_lines({"page": target, "size": size(target.stat().st_size)}), next_lines(commands)))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
