"""Plots a finished or running run as a PNG, or the mean over seeds of several runs.

    python -m experiments.plot --workdir=/tmp/tinylora-demo
    python -m experiments.plot --workdir=/tmp/seed0 --workdir=/tmp/seed1 --output=/tmp/curves.png
    python -m experiments.plot --workdir=/tmp/sweep

For GRPO it shows the reward with one standard error and the accuracies before and after; length and truncation; |v|
and its components; the difference between probabilities in rollout and update; and the seconds of each phase. For SFT
it shows loss, gradient and entropy, |v| and its components, solution length and seconds. `experiments.grpo` and
`experiments.sft` draw this plot at the end, and `experiments.sweep` draws its curves.

For several runs, or the members of a sweep, runs that differ only in their seeds form one curve: their mean reward (or
loss, for SFT) over the steps, with a band of one standard error. The data are written next to the PNG as JSON, from
which --redraw draws it again.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports below, which take seconds
    from experiments.common import opening

    opening.define_path("workdir", "Folder or URL of a run or a sweep; may be repeated.", several=True, url=True)
    opening.define_path("redraw", "Draw the curves of this JSON file again.")
    opening.define_path("output", "Write the plot to this .png file. Default: run.png or curves.png in the workdir.")
    opening.begin(__doc__)

import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import app, flags

from experiments.common.cli import fail, reporting_errors
from experiments.common.closing import block, next_lines, page_command, place_lines
from experiments.common.opening import parse_flags
from experiments.common.places import run_of
from experiments.common.progress import tell
from experiments.common.wording import nearest_path
from experiments.plotting.charts import draw_curves
from experiments.plotting.curves import mean_curves
from experiments.plotting.picture import Run, draw, draw_panels
from tinylora_jax.extras import lacking
from tinylora_jax.files import is_number, parse_json, read_at_most, read_json, write_atomically

FLAGS = flags.FLAGS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "run.png"  # file name of the plot, in the workdir
_MAX_JSON_BYTES = 2**28  # a line of metrics takes about a kilobyte
CURVES = "curves.png"  # file name of a sweep's curves, in its workdir
_GRPO = ("reward", "reward_lenient", "length", "truncated", "v_norm", "delta_prob", "rollout_s", "update_s")
_EVOLUTION = (*(name for name in _GRPO if name != "delta_prob"), "pairs_that_differ")
_SFT = ("loss", "grad_norm", "entropy", "length", "v_norm", "update_s")
_EVALUATED = ("eval_strict", "eval_lenient")  # in the steps after which `config.evaluate_every` evaluates
_OPTIONAL = ("reward_se", "grading_s")  # absent in runs of older versions


class PlotError(ValueError):
    """A folder contains no run that can be plotted."""


def read_run(workdir: Path) -> Run:
    """Reads the log of a run so far.

    Raises:
      PlotError: there is no run, no step is finished, or a file is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not workdir.is_dir():
        hint = nearest_path(workdir)
        raise PlotError(f"{workdir} is not a folder; expected the --workdir of a run{hint}")
    if not (workdir / "config.json").exists() and not path.exists():
        raise PlotError(f"{workdir} contains no run: it has neither config.json nor metrics.jsonl")
    rows = _rows(path) if path.exists() else []
    if not rows:
        raise PlotError(f"{workdir} contains a run without a finished step; plot it after the first step")
    config, before, summary = (_json(workdir / name) for name in ("config.json", "eval_before.json", "summary.json"))
    is_evaluated = lambda row: all(name in row for name in _EVALUATED)
    shared = set.intersection(*(set(row) for row in rows))
    vectors = np.array([row["v"] for row in rows]) if "v" in shared else None
    what = [str(summary.get("model") or config.get("model") or workdir.name)]
    numbers = summary.get("params") or (None if vectors is None else vectors.shape[1])
    what += [f"{_number(workdir / 'summary.json', numbers):,.0f} trained numbers"] if numbers else []
    what += [f"{len(rows)} step{'s' if len(rows) > 1 else ''}" + ("" if summary else " so far")]
    what += [f"{_number(path, summary['wall_s']) / 60:.1f} minutes"] if "wall_s" in summary else []
    return Run(
        ", ".join(what),
        config,
        {name: np.array([row[name] for row in rows]) for name in shared - {"v"}},
        vectors,
        _accuracies(workdir / "eval_before.json", before or summary.get("eval_before")),  # a sweep's members share it
        _accuracies(workdir / "summary.json", summary.get("eval_after")),
        None if numbers is None else int(_number(workdir / "summary.json", numbers)),
        tuple((index, *(row[name] for name in _EVALUATED)) for index, row in enumerate(rows, 1) if is_evaluated(row)),
    )


def _json(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        return {}
    try:
        found = read_json(path, _MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise PlotError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise PlotError(f"{path} is damaged: expected an object, found {type(found).__name__}")
    return found


def _accuracies(path: Path, found: Any) -> dict[str, float] | None:
    if not found:
        return None
    if not isinstance(found, dict) or not {"strict", "lenient"} <= found.keys():
        raise PlotError(f"{path} is damaged: it lacks the accuracies `strict` and `lenient`")
    return {name: _number(path, found[name]) for name in ("strict", "lenient")}


def _number(where: object, value: Any) -> float:
    if not is_number(value) or not abs(value) < 1e300:
        raise PlotError(f"{where} is damaged: expected a finite number, found {str(value)[:40]!r}")
    return float(value)


def _rows(path: Path) -> list[dict[str, Any]]:
    """Reads the steps of metrics.jsonl; an incomplete last line, which a run may be writing, is skipped."""
    try:
        *lines, torn = read_at_most(path, _MAX_JSON_BYTES).split(b"\n")
    except (OSError, ValueError) as error:
        raise PlotError(f"{path} cannot be read: {error}") from error
    del torn
    rows: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        where = f"{path} line {index + 1}"
        try:
            row = parse_json(line)
        except ValueError as error:
            raise PlotError(f"{where} is damaged: {error}") from error
        if not isinstance(row, dict) or row.get("step") != index:
            raise PlotError(f"{where} is damaged: expected step {index}, found {str(row)[:40]!r}")
        needed = _needed((rows or [row])[0])
        if missing := [name for name in needed if name not in row]:
            raise PlotError(f"{where} lacks {', '.join(missing)}: it is not from experiments.grpo or experiments.sft")
        known = {name: _number(f"{where}, {name}", row[name]) for name in (*needed, *_OPTIONAL) if name in row}
        numbers = known | {name: float(x) for name, x in row.items() if name != "step" and is_number(x)}
        if "v" in row:
            size = next((len(other["v"]) for other in rows if "v" in other), None)
            if not isinstance(row["v"], list) or not row["v"] or size not in (None, len(row["v"])):
                raise PlotError(f"{where} is damaged: v is not a list of {size or 'some'} numbers")
            numbers["v"] = [_number(f"{where}, v", x) for x in row["v"]]
        rows.append(numbers)
    return rows


def _needed(first: dict[str, Any]) -> tuple[str, ...]:
    """The metrics of every step of a run, of the kind that its first step shows."""
    if "pairs_that_differ" in first:
        return _EVOLUTION
    return _GRPO if "reward" in first else _SFT


def plot(workdir: Path, output: Path | None = None) -> Path:
    """Plots the log of a run so far, or the curves of a sweep (see `plot_curves`).

    Args:
      workdir: folder of the run or sweep.
      output: path of the PNG; None for `run.png` in the workdir, or `curves.png` for a sweep.

    Returns:
      The path of the PNG.

    Raises:
      PlotError, CurveError: there is nothing to plot, or a file is damaged.
      ImportError: matplotlib is not installed.
    """
    if _members(workdir):
        return plot_curves([workdir], output or workdir / CURVES)
    path = output or workdir / NAME
    _save(draw(read_run(workdir)), path)
    return path


def figures_of(workdir: Path) -> list[tuple[str, Figure]]:
    """Draws the panels of a run, or the curves of a sweep, with their titles, for a page.

    Raises:
      PlotError, CurveError: there is nothing to plot, or a file is damaged.
      ImportError: matplotlib is not installed.
    """
    if members := _members(workdir):
        return [("mean over seeds", draw_curves(_curves_of(members)))]
    return draw_panels(read_run(workdir))


def _curves_of(folders: Sequence[Path]) -> dict[str, Any]:
    return mean_curves([(str(folder), read_run(folder)) for folder in folders])


def _save(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_atomically(path, picture.getvalue(), durable=False)  # a viewer sees the old file until then


def plot_curves(workdirs: Sequence[Path], output: Path) -> Path:
    """Plots means over seeds of the logs of several runs so far.

    Args:
      workdirs: folders of runs, or of sweeps, which represent all their members.
      output: path of the PNG; a JSON file with the data is written next to it.

    Returns:
      The path of the PNG.

    Raises:
      CurveError: the runs cannot be combined.
      PlotError: there is nothing to plot, or a file is damaged.
      ImportError: matplotlib is not installed.
    """
    folders = [member for workdir in workdirs for member in (_members(workdir) or [workdir])]
    result = _curves_of(folders)
    _save(draw_curves(result), output)
    write_atomically(output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    return output


def _members(workdir: Path) -> list[Path]:
    """The members of a sweep that have finished a step; empty for a run."""
    logs = sorted((workdir / "members").glob("*/metrics.jsonl"))
    return [log.parent for log in logs if log.stat().st_size]


def try_plot(workdir: Path) -> Path | None:
    """Plots a run at its end; returns its path, or reports the failure: a failed plot must not fail the run."""
    try:
        return plot(workdir)
    except Exception as error:  # from matplotlib, its fonts or the disk
        tell(f"no plot ({type(error).__name__}: {error}); retry: python -m experiments.plot --workdir={workdir}")
        return None


def _drawn(workdirs: Sequence[Path], output: Path | None) -> Path:
    """Draws the plot that the flags request."""
    if output is None or len(workdirs) == 1:
        return plot(workdirs[0], output)
    if workdirs:
        return plot_curves(workdirs, output)
    _save(draw_curves(checked_curves(Path(FLAGS.redraw))), output)
    return output


def checked_curves(path: Path) -> dict[str, Any]:
    """Reads and checks curves that this command wrote, to draw them again.

    Raises:
      PlotError: the file is damaged or of another kind; the message names the field.
    """
    result = _json(path)
    if not {"curves", "metric", "untrained", "model"} <= result.keys():
        raise PlotError(f"{path} contains no curves; expected a JSON file written by this command")
    curves, before, model = result["curves"], result["untrained"], result["model"]
    numbers = lambda x: isinstance(x, list) and all(is_number(each) and abs(each) < 1e15 for each in x)
    wrong = [] if result["metric"] in ("reward", "loss") else ["metric"]
    wrong += [] if before is None or numbers([before]) else ["untrained"]
    wrong += [] if model is None or isinstance(model, str) else ["model"]
    wrong += [] if isinstance(curves, list) and curves else ["curves"]
    for index, curve in enumerate([] if wrong else curves):
        ok = isinstance(curve, dict) and isinstance(curve.get("label"), str) and isinstance(curve.get("runs"), list)
        ok = ok and all(numbers(curve.get(name)) for name in ("mean", "steps", "trained")) and curve["steps"]
        ok = ok and isinstance(curve.get("values"), list) and all(map(numbers, curve["values"]))
        ok = ok and len(curve["values"]) == len(curve["runs"]) == len(curve["steps"])
        ok = ok and 1 <= len(curve["mean"]) <= min(map(len, curve["values"])) == max(map(len, curve["values"]))
        ok = ok and (curve.get("se", 0) is None or numbers(curve.get("se")))
        wrong += [] if ok else [f"curves[{index}]"]
    if wrong:
        raise PlotError(f"{path} is damaged: {', '.join(wrong[:3])} is not as this command wrote it")
    return result


def main(argv: Sequence[str]) -> None:
    """Runs the command line."""
    del argv
    if bool(FLAGS.workdir) == bool(FLAGS.redraw):
        fail("set --workdir (it may be repeated) or --redraw")
    if not all(FLAGS.workdir or [True]):
        fail("--workdir is empty; name the folder of a run")
    output = None if FLAGS.output is None else Path(FLAGS.output)
    if output is not None and (output.suffix != ".png" or output.is_dir()):
        fail(f"--output={FLAGS.output}: expected a file name that ends in .png")
    if output is None and (FLAGS.redraw or len(FLAGS.workdir) > 1):
        fail("--output is missing; it is required for several runs and for --redraw")
    with reporting_errors():
        try:
            workdirs = [run_of(name) for name in FLAGS.workdir or []]
            drawn = _drawn(workdirs, output)
        except ImportError as error:
            fail(f"{lacking('matplotlib')} ({error})")
    # Programs get the path alone.
    print(ending(drawn, workdirs) if sys.stdout.isatty() else drawn)


def ending(picture: Path, workdirs: Sequence[Path]) -> str:
    """The ending of the command: where the picture is, and what comes next."""
    again = ["python", "-m", "experiments.plot", *(f"--workdir={workdir}" for workdir in workdirs)]
    again += [f"--output={picture}"] if len(workdirs) > 1 else []
    commands: list[tuple[str, Sequence[object]]] = []
    if not all((workdir / "summary.json").exists() for workdir in workdirs):
        commands = [("draw it again after more steps", again)]
    elif len(workdirs) == 1 and (workdirs[0] / "answers_before.jsonl").exists():  # a sweep's member has none
        commands = [("write a page with the answers", page_command(workdirs[0]))]
    elif len(workdirs) > 1:
        runs = [f"--runs=RL:{workdir}" for workdir in workdirs]
        table = ["python", "-m", "experiments.report", *runs, f"--output={picture.with_name('report.json')}"]
        commands = [("compare them in a table", table)]
    return block(place_lines({"picture": picture}), next_lines(commands))


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
