"""Curves over the steps of runs: the mean of runs that differ only in their seeds, and its band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.plotting.picture import Run
from tinylora_jax.io import flat

_SEEDS = ("seed", "adapter.seed", "lora.seed")  # seeds of data order and noise, of P, and of A
_ABSENT = "absent"


class CurveError(ValueError):
    """Runs that cannot be combined into curves."""


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Computes the mean of runs and its standard error for each step.

    Args:
      values: values of the runs, float64 `[runs, steps]`.

    Returns:
      Mean and standard error, each `[steps]`; the error is None for a single run.
    """
    count = len(values)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / count**0.5 if count > 1 else None


def mean_curves(runs: Sequence[tuple[str, Run]]) -> dict[str, Any]:
    """Computes a curve for every config, over all its seeds, up to the length of the shortest run.

    Args:
      runs: runs with their names, at least one.

    Returns:
      A JSON-serializable dict with `model` (None for several); `metric`, which is `reward`, or `loss` for SFT;
      `untrained`, the strict accuracy before training (None if no run has it yet); and `curves`. Each curve has a
      `label` that states how its config differs, its `runs` and their finished `steps`, `values` (a row per run), their
      `mean` and standard error `se` (None for a single run), and the available strict accuracies `trained`.

    Raises:
      CurveError: the runs mix GRPO and SFT, or two have the same config and seeds.
    """
    metrics = {"reward" if "reward" in run.steps else "loss" for _, run in runs}
    if len(metrics) > 1:
        raise CurveError("the runs mix GRPO and SFT; draw rewards and losses in separate plots")
    (metric,) = metrics
    groups: dict[tuple[tuple[str, str], ...], dict[tuple[str, ...], tuple[str, Run]]] = {}
    for name, run in runs:
        fields = {field: repr(value) for field, value in flat(run.config).items()}
        seeds = tuple(fields.pop(field, _ABSENT) for field in _SEEDS)
        others = groups.setdefault(tuple(sorted(fields.items())), {})
        if seeds in others:
            raise CurveError(f"{others[seeds][0]} and {name} have the same config and seeds; expected other seeds")
        others[seeds] = name, run
    before = [run.before["strict"] for _, run in runs if run.before]
    labels = _labels([dict(config) for config in groups])
    curves = [
        _curve(label, metric, dict(members.values())) for label, members in zip(labels, groups.values(), strict=True)
    ]
    models = {run.config.get("model") for _, run in runs}
    return {
        "model": models.pop() if len(models) == 1 else None,
        "metric": metric,
        "untrained": float(np.mean(before)) if before else None,
        "curves": curves,
    }


def _labels(configs: list[dict[str, str]]) -> list[str]:
    """The differences of each config from the others, as in the names of a sweep's members."""
    names = sorted(set().union(*configs))
    value = lambda config, name: config.get(name, _ABSENT)
    own = [name for name in names if len({value(config, name) for config in configs}) > 1]
    return [",".join(f"{name.split('.')[-1]}={value(config, name)}" for name in own) for config in configs]


def _curve(label: str, metric: str, runs: dict[str, Run]) -> dict[str, Any]:
    count = min(run.count for run in runs.values())
    values = np.array([run.steps[metric][:count] for run in runs.values()])
    mean, error = mean_and_error(values)
    return {
        "label": label,
        "runs": list(runs),
        "steps": [run.count for run in runs.values()],
        "values": values.tolist(),
        "mean": mean.tolist(),
        "se": None if error is None else error.tolist(),
        "trained": [run.after["strict"] for run in runs.values() if run.after],
    }
