"""Curves over the steps of runs: the mean of runs that differ only by seed, and its band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.plotting.picture import Run
from tinylora_jax.io import flat

_SEEDS = ("seed", "adapter.seed", "lora.seed")  # of the data's order and the noise, of P, of A
_ABSENT = "absent"


class CurveError(ValueError):
    """Runs that make no curves together."""


def mean_and_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """The mean of runs and its standard error, step by step.

    Args:
      values: float64 `[runs, steps]`.

    Returns:
      Both `[steps]`; no error of one run alone.
    """
    count = len(values)
    return values.mean(axis=0), values.std(axis=0, ddof=1) / count**0.5 if count > 1 else None


def mean_curves(runs: Sequence[tuple[str, Run]]) -> dict[str, Any]:
    """A curve for every config, whatever its seeds; as long as the shortest of its runs.

    Args:
      runs: with their names; one or more.

    Returns:
      JSON: `model` (None of several); `metric`, which is `reward` or, of SFT, `loss`; `untrained`, the strict accuracy
      before training (None if no run has it yet), and `curves`: of each a `label` that says what its config has of
      its own, its `runs` and the `steps` that each has done, `values` (a row a run), their `mean` and standard error
      `se` (None of one run alone), and the strict accuracies `trained` of the runs that have one.

    Raises:
      CurveError: some are of GRPO and some of SFT, or two have the same config and seeds.
    """
    metrics = {"reward" if "reward" in run.steps else "loss" for _, run in runs}
    if len(metrics) > 1:
        raise CurveError("some runs are of GRPO and some of SFT; draw rewards and losses in two pictures")
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
    """What every config has of its own, as a sweep names its members."""
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
