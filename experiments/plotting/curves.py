"""Curves over the steps of runs: the mean of runs that differ only in their seeds, and its band."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.plotting.picture import Run
from tinylora_jax.io import flat

_SEEDS = ("seed", "adapter.seed", "lora.seed")  # seeds of data order and noise, of P, and of A
_ABSENT = "absent"
_SIZES = ("method", "adapter.n_tie", "adapter.u", "adapter.rank", "adapter.tying", "lora.rank", "lora.alpha")
_WORDS = {
    "optimizer.learning_rate": "rate {}",
    "optimizer.precision": "v in {}",
    "grpo.kl_coef": "KL {}",
    "max_steps": "{} steps",
    "model": "{}",
    "method": "{}",
    "adapter.tying": "{} ties",
    "adapter.rank": "r = {}",
    "lora.rank": "r = {}",
    "adapter.u": "u = {}",
}
"""How a legend words the fields of a config; others are written as `field=value`."""


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
    groups: dict[tuple[tuple[str, Any], ...], dict[tuple[str, ...], tuple[str, Run]]] = {}
    for name, run in runs:
        # As text, because a field may hold a list; a number of the same value is the same setting.
        fields = {field: str(value) for field, value in flat(run.config).items()}
        seeds = tuple(fields.pop(field, _ABSENT) for field in _SEEDS)
        others = groups.setdefault(tuple(sorted(fields.items())), {})
        if seeds in others:
            raise CurveError(f"{others[seeds][0]} and {name} have the same config and seeds; expected other seeds")
        others[seeds] = name, run
    before = [run.before["strict"] for _, run in runs if run.before]
    numbers = [next(iter(members.values()))[1].numbers for members in groups.values()]
    labels = _labels([dict(config) for config in groups], numbers)
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


def _labels(configs: list[dict[str, str]], numbers: list[int | None]) -> list[str]:
    """Describes how each config differs from the others, such as `13 numbers, rate 0.003`.

    Args:
      configs: fields of each config, as text.
      numbers: number of trained numbers of each config; None if it is not known.
    """
    names = sorted(set().union(*configs))
    value = lambda config, name: config.get(name, _ABSENT)
    own = [name for name in names if len({value(config, name) for config in configs}) > 1]
    by_size = [name for name in own if name in _SIZES]
    # The number of trained numbers says what a size means, unless two configs have the same number.
    counts = bool(by_size) and None not in numbers
    settings = [tuple(value(config, name) for name in by_size) for config in configs]
    sizes = set(zip(numbers, settings, strict=True))
    if counts and len(sizes) == len({size[0] for size in sizes}):
        own = [name for name in own if name not in by_size]
    labels = []
    for config, count in zip(configs, numbers, strict=True):
        words = [f"{count:,} number{'' if count == 1 else 's'}"] if counts else []
        words += [_WORDS.get(name, name.split(".")[-1] + "={}").format(value(config, name)) for name in own]
        labels.append(", ".join(words))
    return labels


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
