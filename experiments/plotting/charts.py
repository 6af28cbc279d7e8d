"""Plots of results: reward landscapes, curves over steps, accuracy against parameters."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.plotting.curves import mean_and_error
from experiments.plotting.picture import smoothing
from tinylora_jax.files import write_atomically

if TYPE_CHECKING:  # matplotlib takes a second to import, and only drawing needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#1f5fa8", "#d9730d", "#5a9e4b", "#7a7a7a")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":")
_GAP = 0.012  # distance between the accuracies after training, as a share of the steps
_ASIDE = 1.12  # factor between two series on the logarithmic axis


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure, (axes,) = _panels(width, height, 1)
    return figure, axes


def _panels(width: float, height: float, count: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure with several axes beside each other, with the same vertical range."""
    from matplotlib.figure import Figure  # without pyplot, which would keep global state

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, panels


def _write(figure: Figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(path, picture.getvalue(), durable=False)


def draw_landscape(result: Mapping[str, Any], path: Path) -> None:
    """Draws the result of `experiments.landscape`: a line with its standard error, or a map.

    Args:
      result: result of `experiments.landscape`.
      path: path of the PNG file.
    """
    rows = result["points"]
    t = np.array([row["t"] for row in rows])
    strict, lenient, error = (np.array([row[name] for row in rows]) for name in ("strict", "lenient", "se"))
    about = f"{result['params']} numbers, {result['questions']} questions × {result['samples']} samples"
    if result["axes"] == 1:
        figure, axes = _figure(6.4, 4.0)
        axes.plot(t[:, 0], strict, color=_COLORS[0], marker="o", markersize=3, label="strict")
        axes.fill_between(t[:, 0], strict - error, strict + error, color=_COLORS[0], alpha=0.2, linewidth=0)
        axes.plot(t[:, 0], lenient, color=_COLORS[1], linewidth=1, label="lenient")
        for place, name in ((0.0, "untrained"), (1.0, "trained")):
            axes.axvline(place, color="0.7", linewidth=0.8)
            axes.annotate(name, (place, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom", fontsize=8)
        axes.set_ylabel("mean reward")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=9)
    else:
        figure, axes = _figure(5.6, 4.6)
        side = round(len(rows) ** 0.5)
        ticks = t[::side, 0]
        image = axes.pcolormesh(ticks, ticks, strict.reshape(side, side).T, cmap="viridis", shading="nearest")
        figure.colorbar(image, ax=axes, label="mean reward (strict)")
        axes.plot(0, 0, "wo", markersize=6)
        axes.plot(1, 0, "w*", markersize=10)
        axes.set_ylabel("times the second direction")
    axes.set_xlabel("times the trained vector")
    axes.set_title(f"{result['model']}\n{about}", fontsize=9, pad=16 if result["axes"] == 1 else 6)
    _write(figure, path)


def draw_curves(result: Mapping[str, Any]) -> Figure:
    """Draws means over seeds with bands of one standard error, and for rewards the accuracies before and after.

    More than 40 steps are smoothed, for each run separately, so that the band still shows the spread over seeds.

    Args:
      result: result of `experiments.plotting.curves.mean_curves`.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib import colormaps

    curves, reward, before = result["curves"], result["metric"] == "reward", result["untrained"]
    figure, axes = _figure(7.6, 4.2 + 0.17 * len(curves))
    many = list(colormaps["turbo"](np.linspace(0.05, 0.95, len(curves))))
    colors = many if len(curves) > len(_COLORS) else _COLORS
    end = max(len(curve["mean"]) for curve in curves)
    width = smoothing(end)
    for place, (curve, color) in enumerate(zip(curves, colors, strict=False)):
        window = np.full(min(width, len(curve["mean"])), 1 / min(width, len(curve["mean"])))
        smooth = lambda y, window=window: np.convolve(y, window, "valid")
        mean, error = mean_and_error(np.array([smooth(row) for row in curve["values"]]))
        x = smooth(np.arange(len(curve["mean"])) + 1)
        look = {"color": color, "linewidth": 1.6, "linestyle": _LINES[place % len(_LINES)]}
        axes.plot(x, mean, marker="o" if width == 1 else None, markersize=3.5, label=_legend(curve), **look)
        if error is not None:
            axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        if reward and curve["trained"]:
            after, spread = mean_and_error(np.array(curve["trained"])[:, None])
            aside = end * (1 + _GAP * (place + 1))  # beside each other, where one would hide the other
            axes.errorbar(aside, after, spread, fmt="D", color=color, markersize=6, capsize=3)
    if reward and before is not None:
        axes.plot(0, before, "D", color="0.35", markersize=6, clip_on=False, label="untrained: ◆, greedy")
    name = "lines: reward of sampled training answers; ◆: accuracy of greedy held-out answers"
    name = name if reward else "loss on the worked solutions"
    about = [f"means of {width} steps"] if width > 1 else []
    about += ["band: 1 standard error of the seeds"] if any(curve["se"] for curve in curves) else []
    axes.set_title("\n".join(filter(None, [result["model"], name, ", ".join(about)])), fontsize=10, loc="left")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step")
    axes.set_ylabel("strict, mean" if reward else "nats per token, mean")
    ended = reward and any(curve["trained"] for curve in curves)
    axes.set_xlim(0, end * (1 + _GAP * (len(curves) + 1)) if ended else end + 0.5)
    if reward and _are_shares(curves):
        axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.3g} %")
    axes.set_xticks([tick for tick in axes.get_xticks() if tick <= end])
    axes.grid(axis="y", color="0.92")
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    return figure


def _are_shares(curves: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all rewards are in [0, 1], so that they can be shown in percent."""
    seen = [x for curve in curves for x in (*curve["mean"], *curve["trained"])]
    return 0 <= min(seen) and max(seen) <= 1


def _legend(curve: Mapping[str, Any]) -> str:
    """The legend of a curve: its label, and the accuracy after training."""
    count, trained = len(curve["runs"]), curve["trained"]
    words = [curve["label"]] if curve["label"] else []
    words += [f"mean of {count} seeds" if count > 1 else "one seed"]
    if max(curve["steps"]) > len(curve["mean"]):
        words += [f"to step {len(curve['mean'])}, the last of all"]
    if trained:
        mean, error = mean_and_error(np.array(trained)[:, None])
        spread = "" if error is None else f" ± {error[0]:.2g}"
        words += [f"◆ {mean[0]:.3g}{spread} greedy"]
    return ", ".join(words)


def draw_accuracy(
    series: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any], path: Path, title: str = ""
) -> None:
    """Draws accuracy against the number of trained numbers, on a logarithmic axis.

    A series has its colour and line, and a method its marker, so that the picture can be read without colours. Only
    points of one method are connected. Sampled answers have axes of their own, next to those of greedy answers.

    Args:
      series: points by name of the series (such as `RL`), with `params`; `accuracy`, `low` and `high` in [0, 1]; and
        optionally the `method`, and the same three values of sampled answers under `sampled`.
      base: `accuracy`, `low` and `high` of the untrained model, and optionally `sampled`.
      path: path of the PNG file.
      title: title of the picture, such as the model and the number of questions.
    """
    modes = ["greedy", *(["sampled"] if "sampled" in base else [])]
    figure, panels = _panels(7.6 if len(modes) == 1 else 11.0, 4.8, len(modes))
    methods = list(dict.fromkeys(point.get("method", "") for points in series.values() for point in points))
    markers = dict(zip(methods, _MARKERS, strict=False))
    for axes, mode in zip(panels, modes, strict=True):
        of = lambda each, mode=mode: each if mode == "greedy" else {**each, **each["sampled"]}
        shown = {name: [of(p) for p in points if mode == "greedy" or mode in p] for name, points in series.items()}
        _draw_series(axes, shown, of(base), markers)
        axes.set_ylabel(f"accuracy, strict, {mode} answers")
    about = "points: mean over seeds; bars: 95 % interval of a run"
    figure.suptitle("\n".join(filter(None, [title, about])), fontsize=10)
    for method in filter(None, methods):
        axes.plot([], [], color="0.3", marker=markers.get(method, "o"), markersize=7, linestyle="", label=method)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=9, frameon=False, ncols=4)
    _write(figure, path)


def _draw_series(
    axes: Axes,
    series: Mapping[str, Sequence[Mapping[str, Any]]],
    base: Mapping[str, Any],
    markers: Mapping[str, str],
) -> None:
    """Draws the points of one kind of answers, and the untrained model as a band."""
    axes.axhspan(base["low"], base["high"], color="0.88", linewidth=0, label="untrained, 95 % interval")
    axes.axhline(base["accuracy"], color="0.35", linewidth=1, linestyle=":", label="untrained")
    for place, ((name, points), color) in enumerate(zip(series.items(), _COLORS, strict=False)):
        look = {"color": color, "linestyle": _LINES[place % len(_LINES)], "capsize": 2, "linewidth": 1.4}
        look |= {"markersize": 7, "markerfacecolor": color if place == 0 else "white"}
        for method, marker in markers.items():
            own = sorted((p for p in points if p.get("method", "") == method), key=lambda point: point["params"])
            if own:
                x, y = [np.array([p[key] for p in own], float) for key in ("params", "accuracy")]
                spread = np.array([[p["accuracy"] - p["low"], p["high"] - p["accuracy"]] for p in own]).T
                moved = x * _ASIDE**place  # error bars of two series at one place would hide each other
                axes.errorbar(moved, y, yerr=spread, marker=marker, **look)
        axes.plot([], [], color=color, linestyle=look["linestyle"], linewidth=1.4, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, place: short_number(value))
    axes.set_xlabel("trained numbers")
    axes.yaxis.set_major_formatter(lambda value, place: f"{100 * value:.3g} %")
    axes.yaxis.set_tick_params(labelleft=True)
    axes.grid(axis="y", color="0.92")


def short_number(value: float) -> str:
    """Formats a number of parameters briefly.

    >>> short_number(13), short_number(43008), short_number(630167424), short_number(1e9)
    ('13', '43k', '630.2M', '1B')
    """
    for unit, name, digits in ((1e9, "B", 1), (1e6, "M", 1), (1e3, "k", 0)):
        if value >= unit:
            return f"{value / unit:.{digits}f}".removesuffix(".0") + name
    return f"{value:g}"
