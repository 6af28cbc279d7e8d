"""Finished runs as one report: accuracy before and after training, with paired tests."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from experiments.configs import base
from tinylora_jax.files import is_number, open_regular, parse_json, read_json
from tinylora_jax.io import flat
from tinylora_jax.metrics import Difference, compare_paired, estimate

PRECISION = "float32"  # precision of v in runs of older versions
_MAX_JSON_BYTES = 2**26
# All fields but the seed.
_SETTING = ("method", "rank", "targets", "tying", "u", "n_tie", "precision", "learning_rate", "steps", "options")
# Fields of a config that a row states already, or that change no result.
_STATED = re.compile(
    r"model|method|targets|adapter\..*|lora\.(rank|seed|freeze_a)|optimizer\.(learning_rate|precision)|(.*\.)?seed"
    r"|epochs|max_steps|eval.*|logger|samples_kept|checkpoint_every|slots|svd|mesh\..*|save_dtype"
    r"|grpo\.(stream_tokens|remat|skip_without_signal)"
)
_POINT = ("accuracy", "low", "high")
_SAMPLED = (*_POINT, "difference", "difference_low", "difference_high", "p")

_NAMES = ("search", "optimizer.method", "grpo.loss_type")  # fields whose values need no name beside them


class ReportError(ValueError):
    """A folder contains no finished run, or runs cannot be combined."""


def read_result(path: Path) -> Any:
    """Reads a JSON file of a run.

    Raises:
      ReportError: the file is missing or damaged.
    """
    try:
        return read_json(path, _MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ReportError(f"{path} is missing; expected the --workdir of a finished run or sweep") from error
    except (OSError, ValueError) as error:
        raise ReportError(f"{path} is damaged ({error})") from error


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the name of a missing or damaged file to errors."""
    try:
        yield
    except FileNotFoundError as error:
        raise ReportError(f"{path} is missing; the run is not finished") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{path} is damaged ({error!r})") from error


def read_lines(path: Path) -> list[Any]:
    """The values of a file with one JSON value per line."""
    with open_regular(path) as file:
        return [parse_json(line) for line in file if line.strip()]


def _accuracies(path: Path) -> dict[str, dict[int, float]]:
    """For each mode (`greedy`, `sampled`), the share of each question's answers that the strict grader accepts."""
    grades: dict[str, dict[int, list[float]]] = {"greedy": {}}
    with naming(path):
        for row in read_lines(path):
            grades.setdefault(row["mode"], {}).setdefault(row["id"], []).append(float(row["strict"] == 1))
    return {mode: {i: sum(x) / len(x) for i, x in found.items()} for mode, found in grades.items()}


def _training(path: Path) -> float:
    """Mean reward over the last quarter of the steps, or the negative mean loss without rewards."""
    with naming(path):
        rows = read_lines(path)
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
            for member in read_result(workdir / "summary.json").get("members", [None])
            if member is None or not member["dropped"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{workdir} is damaged: a JSON file there lacks {error}") from error


def _read_run(series: str, workdir: Path, folder: Path) -> dict[str, Any]:
    own = read_result(folder / "summary.json")
    return {
        "series": series,
        "folder": folder,
        "model": own["model"],
        "params": own["params"],
        "steps": own["steps"],
        "config": read_result(folder / "config.json"),
        "training": _training(folder / "metrics.jsonl"),
        "before": _accuracies(workdir / "answers_before.jsonl"),
        "after": _accuracies(folder / "answers_after.jsonl"),
        "eval_before": own["eval_before"],
        "eval_after": own["eval_after"],
    }


def _paired(run: Mapping[str, Any], mode: str) -> tuple[Difference, dict[str, float]] | None:
    """The change of a mode's answers, and the accuracy after training with its interval; None without such answers."""
    before, after = (run[which].get(mode, {}) for which in ("before", "after"))
    if not before or before.keys() != after.keys():
        return None
    ids, samples = sorted(before), run["eval_after"].get("sampled", {}).get("samples", 1) if mode == "sampled" else 1
    found = estimate([after[i] for i in ids], samples)
    return compare_paired([before[i] for i in ids], [after[i] for i in ids]), _rounded(found)


def _rounded(found: Any) -> dict[str, float]:
    return {"accuracy": round(found.value, 6), "low": round(found.low, 6), "high": round(found.high, 6)}


def _sampled(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The sampled answers of a run: accuracy, and difference from the untrained model."""
    found = _paired(run, "sampled") if len(run["before"].get("sampled", ())) > 1 else None
    if found is None:
        return None
    change, point = found
    ends = {f"difference_{name}": getattr(change, name) for name in ("low", "high")}
    ends = {name: round(change.value if value is None else value, 6) for name, value in ends.items()}
    return {**point, "difference": round(change.value, 6), **ends, "p": float(f"{change.p:.3g}")}


_METHODS = {
    "tinylora": "TinyLoRA",
    "lora_xs": "LoRA-XS",
    "lora": "LoRA",
    "full": "all weights",
    "steering": "steering vectors",
    "bias": "biases",
    "norm": "scales of norms",
}


def _is_frozen(config: Mapping[str, Any]) -> bool:
    """Whether a run trained LoRA with A frozen; older runs do not state it."""
    return config["method"] == "lora" and config["lora"].get("freeze_a", False)


def _options(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings in which runs differ besides those of `_STATED`, for each run, as one text: `es population=4`.

    Without them, runs of one size with different losses or optimizers would look like seeds of one setting.
    """
    usual = flat(base.get_config().to_dict())
    fields = [{**usual, **{k: v for k, v in flat(run["config"]).items() if k in usual}} for run in runs]
    differ = [name for name in usual if len({json.dumps(each[name]) for each in fields}) > 1]
    differ = [name for name in differ if not _STATED.fullmatch(name)]
    differ.sort(key=lambda name: name not in _NAMES)  # a table may cut the end
    words = lambda name, value: str(value) if name in _NAMES else f"{name.rpartition('.')[2]}={value}"
    return [" ".join(words(name, each[name]) for name in differ if each[name] != usual[name]) for each in fields]


def _row(run: dict[str, Any]) -> dict[str, Any]:
    config, paired = run["config"], _paired(run, "greedy")
    if paired is None:
        raise ReportError(f"a run with {run['params']} parameters has different questions before and after training")
    difference, point = paired
    name = _METHODS[config["method"]] + (", A frozen" if _is_frozen(config) else "")
    ranks = {method: config["adapter"]["rank"] for method in ("tinylora", "lora_xs")} | {"lora": config["lora"]["rank"]}
    keep = ("strict", "lenient", "mean_tokens", "truncated", "sampled")
    return {
        "series": run["series"],
        "method": name,
        "rank": ranks.get(config["method"]),
        "params": run["params"],
        **({"targets": config["targets"]} if config.get("targets") else {}),
        "tying": config["adapter"]["tying"] if config["method"] == "tinylora" else None,
        "u": config["adapter"]["u"] if config["method"] == "tinylora" else None,
        "n_tie": config["adapter"]["n_tie"] if config["method"] == "tinylora" else None,
        "precision": config["optimizer"].get("precision", PRECISION),
        "learning_rate": config["optimizer"]["learning_rate"],
        **({"options": run["options"]} if run.get("options") else {}),
        "seed": config["seed"],
        "steps": run["steps"],
        "training": round(run["training"], 6),
        **point,
        "difference": round(difference.value, 6),
        "p": float(f"{difference.p:.3g}"),
        **({"sampled": sampled} if (sampled := _sampled(run)) else {}),
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
    models, sets = {run["model"] for run in runs}, {tuple(sorted(run["before"]["greedy"])) for run in runs}
    if len(models) > 1 or len(sets) > 1:
        raise ReportError(f"the runs have {len(models)} models and {len(sets)} sets of questions; expected one of each")
    first = runs[0]
    untrained = estimate(list(first["before"]["greedy"].values()))
    told = [{**run, "options": options} for run, options in zip(runs, _options(runs), strict=True)]
    rows = sorted(map(_checked_row, told), key=lambda row: (row["series"], row["params"], row["learning_rate"]))
    return {
        "model": first["model"],
        "questions": len(first["before"]["greedy"]),
        "untrained": {**_rounded(untrained), **_untrained_sampled(first), "eval": first["eval_before"]},
        "runs": rows,
    }


def _untrained_sampled(run: Mapping[str, Any]) -> dict[str, Any]:
    """The sampled answers of the untrained model, if there are any."""
    grades, samples = run["before"].get("sampled", {}), run["eval_before"].get("sampled", {}).get("samples", 1)
    return {"sampled": _rounded(estimate(list(grades.values()), samples))} if len(grades) > 1 else {}


def best(rows: Sequence[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """The best-trained setting of every size, by series: the rows of its runs, which differ only in their seeds."""
    settings: dict[tuple[str, int], dict[tuple[Any, ...], list[dict[str, Any]]]] = {}
    for row in rows:
        setting = tuple({"precision": PRECISION, **row}.get(name) for name in _SETTING)
        settings.setdefault((row["series"], row["params"]), {}).setdefault(setting, []).append(row)
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for (series, _), groups in settings.items():
        found.setdefault(series, []).append(max(groups.values(), key=lambda runs: _mean(runs, "training")))
    return found


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def points_of(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The points to draw: means over seeds of accuracies and of interval bounds, for both kinds of answers."""
    mean = lambda runs: {name: _mean(runs, name) for name in _POINT}

    def point(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
        sampled = [row["sampled"] for row in runs if "sampled" in row]
        more = {"sampled": mean(sampled)} if len(sampled) == len(runs) else {}
        return {"method": runs[0]["method"], "params": _mean(runs, "params"), **mean(runs), **more}

    return {series: [point(runs) for runs in sizes] for series, sizes in best(rows).items()}


def checked_report(path: Path) -> dict[str, Any]:
    """Reads and checks a report that this command wrote, to draw it again.

    Raises:
      ReportError: the file is damaged or of another kind; the message names the field.
    """
    result = read_result(path)
    if not (isinstance(result, dict) and {"runs", "untrained"} <= result.keys()):
        raise ReportError(f"{path} is not a report; expected a JSON file written by this command")
    rows = result["runs"]
    if not (isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)):
        raise ReportError(f"{path}: runs: expected a list of objects, one or more")
    _require(path, "untrained", result["untrained"], _POINT, 0, 1)
    _require_sampled(path, "untrained", result["untrained"], _POINT)
    for index, row in enumerate(rows):
        where = f"runs[{index}]"
        _require(path, where, row, _POINT, 0, 1)
        _require_sampled(path, where, row, _SAMPLED)
        _require(path, where, row, ("params",), 1, 1e15)
        _require(path, where, row, ("training", "learning_rate", "seed", "difference", "p"), -1e15, 1e15)
        wrong = [name for name in ("series", "method") if not isinstance(row.get(name), str)]
        wrong += ["precision"] if not isinstance(row.get("precision", PRECISION), str) else []
        wrong += [name for name in _SETTING if isinstance(row.get(name, ""), list | dict)]
        if wrong or "u" not in row or "tying" not in row or "rank" not in row or not isinstance(row["params"], int):
            raise ReportError(f"{path}: {where} is not a run: {', '.join(wrong) or 'a field'} is missing or invalid")
        for name in ("tying", "targets"):
            if not isinstance(row.get(name), str | None):
                raise ReportError(f"{path}: {where}: {name}: expected a string or null")
    return result


def _require_sampled(path: Path, where: str, row: Mapping[str, Any], names: Sequence[str]) -> None:
    if "sampled" in row:
        _require(path, f"{where}: sampled", row["sampled"], names, -1, 1)
        _require(path, f"{where}: sampled", row["sampled"], _POINT, 0, 1)


def _require(path: Path, where: str, row: Any, names: Sequence[str], low: float, high: float) -> None:
    for name in names:
        value = row.get(name) if isinstance(row, dict) else None
        if not (is_number(value) and low <= value <= high):
            raise ReportError(
                f"{path}: {where}: {name}: expected a number from {low:g} to {high:g}, found {value!r:.40}"
            )
