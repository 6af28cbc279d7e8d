"""Draws a run, finished or still going, to one PNG.

    python -m experiments.plot --workdir=/tmp/tinylora-demo

Reward with one standard error, and the accuracies before and after; length and truncation; |v| and its numbers; how
far the probabilities of rollout and update differ; seconds of each phase. `experiments.grpo` draws it at its end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from experiments.cli import fail, parse_flags, reporting_errors, tell
from experiments.picture import Run, draw

NAME = "run.png"  # of the picture, in the workdir
_NEEDED = ("reward", "reward_lenient", "length", "truncated", "v_norm", "delta_prob", "rollout_s", "update_s")
_OPTIONAL = ("reward_se", "grading_s")  # not in runs of older versions


class PlotError(ValueError):
    """A folder holds no run that can be drawn."""


def read_run(workdir: Path) -> Run:
    """Reads what a run has logged so far.

    Raises:
      PlotError: there is no run, no step is done, or a file is damaged.
    """
    path = workdir / "metrics.jsonl"
    if not workdir.is_dir():
        raise PlotError(f"{workdir} is no folder; expected the --workdir of a run of experiments.grpo")
    if not (workdir / "config.json").exists() and not path.exists():
        raise PlotError(f"{workdir} holds no run: it has neither config.json nor metrics.jsonl")
    rows = _rows(path) if path.exists() else []
    if not rows:
        raise PlotError(f"{workdir} holds a run that has not finished a step; draw it when the first one is done")
    config, before, summary = (_json(workdir / name) for name in ("config.json", "eval_before.json", "summary.json"))
    shared = set.intersection(*(set(row) for row in rows))
    vectors = np.array([row["v"] for row in rows]) if "v" in shared else None
    names = (*_NEEDED, *(name for name in _OPTIONAL if name in shared))
    what = [str(summary.get("model") or config.get("model") or workdir.name)]
    numbers = summary.get("params") or (None if vectors is None else vectors.shape[1])
    what += [f"{numbers} trained numbers"] if numbers else []
    what += [f"{len(rows)} steps" + ("" if summary else " so far")]
    what += [f"{_number(path, summary['wall_s']) / 60:.1f} minutes"] if "wall_s" in summary else []
    return Run(
        ", ".join(what),
        {name: np.array([row[name] for row in rows]) for name in names},
        vectors,
        _accuracies(workdir / "eval_before.json", before),
        _accuracies(workdir / "summary.json", summary.get("eval_after")),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PlotError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise PlotError(f"{path} is damaged: expected an object, found {type(found).__name__}")
    return found


def _accuracies(path: Path, found: Any) -> dict[str, float] | None:
    if not found:
        return None
    if not isinstance(found, dict) or not {"strict", "lenient"} <= found.keys():
        raise PlotError(f"{path} is damaged: it has no accuracy `strict` and `lenient`")
    return {name: _number(path, found[name]) for name in ("strict", "lenient")}


def _number(where: object, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise PlotError(f"{where} is damaged: expected a finite number, found {str(value)[:40]!r}")
    return float(value)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The steps of metrics.jsonl; of a last line without its end, which a run may be writing, nothing is kept."""
    *lines, torn = path.read_bytes().split(b"\n")
    del torn
    rows: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        where = f"{path} line {index + 1}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PlotError(f"{where} is damaged: {error}") from error
        if not isinstance(row, dict) or row.get("step") != index:
            raise PlotError(f"{where} is damaged: expected step {index}, found {str(row)[:40]!r}")
        if missing := [name for name in _NEEDED if name not in row]:
            raise PlotError(f"{where} has no {', '.join(missing)}: it is not of experiments.grpo")
        numbers = {name: _number(f"{where}, {name}", row[name]) for name in (*_NEEDED, *_OPTIONAL) if name in row}
        if "v" in row:
            size = next((len(other["v"]) for other in rows if "v" in other), None)
            if not isinstance(row["v"], list) or not row["v"] or size not in (None, len(row["v"])):
                raise PlotError(f"{where} is damaged: v is not a list of {size or 'some'} numbers")
            numbers["v"] = [_number(f"{where}, v", x) for x in row["v"]]
        rows.append(numbers)
    return rows


def plot(workdir: Path, output: Path | None = None) -> Path:
    """Draws what a run has logged so far.

    Args:
      workdir: of the run.
      output: the PNG to write; None is `run.png` in the workdir.

    Returns:
      The path of the PNG.

    Raises:
      PlotError: there is nothing to draw, or it is damaged.
      ImportError: matplotlib is not installed.
    """
    path = output or workdir / NAME
    figure = draw(read_run(workdir))
    temporary = path.with_name(path.name + ".tmp")  # who looks while it is written sees the old one
    figure.savefig(temporary, format="png", dpi=100)
    os.replace(temporary, path)
    return path


def try_plot(workdir: Path) -> None:
    """Draws a run and says where; if that fails, says why. What a run ends with: a picture must not cost its result."""
    try:
        tell(f"drawn: {plot(workdir)}")
    except Exception as error:  # matplotlib, its fonts, the disk
        tell(f"not drawn ({type(error).__name__}: {error}); python -m experiments.plot --workdir={workdir} tries again")


def main(argv: Sequence[str]) -> None:
    """Command line."""
    del argv
    if not FLAGS.workdir:
        fail("--workdir is empty; name the folder of a run")
    output = None if FLAGS.output is None else Path(FLAGS.output)
    if output is not None and (output.suffix != ".png" or output.is_dir()):
        fail(f"--output={FLAGS.output}: expected a file name that ends in .png")
    with reporting_errors():
        try:
            print(plot(Path(FLAGS.workdir), output))
        except ImportError as error:
            fail(f"{error}; pip install matplotlib")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "Folder of a run.")
    flags.DEFINE_string("output", None, "Write this .png instead of run.png in the workdir.")
    flags.mark_flag_as_required("workdir")
    app.run(main, flags_parser=parse_flags)
