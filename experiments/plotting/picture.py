"""The plot of a run: five panels over its steps, chosen by its logged metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # matplotlib takes a second to import, and only drawing needs it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FEW = 40  # with more steps, single values are drawn faintly below smoothed ones
BLUE, ORANGE, GREEN = "#1f5fa8", "#d9730d", "#9ccc82"  # dark, medium and light, to be told apart without colours
GRAY, GRID = "#7a7a7a", "#ebebeb"
_PHASES = {"rollout_s": ("rollout", BLUE), "update_s": ("update", ORANGE), "grading_s": ("grading", GREEN)}
_PANEL = (4.4, 2.9)  # inches; as wide as a phone, so that text keeps its size there


@dataclass(frozen=True)
class Run:
    """The data of a run to draw.

    Attributes:
      title: title of the plot.
      config: run configuration; empty if the file is missing.
      steps: metrics that all steps have, by name, `[steps]` each.
      vectors: v after each step, `[steps, numbers]`; None if it was too long to be logged.
      before: accuracies of the untrained model; None if not available yet.
      after: accuracies of the trained model; None if not available yet.
      numbers: number of trained numbers; None if it is not known.
      between: step, strict and lenient accuracy of each evaluation during training.
      notes: whether the accuracies before and after are also written into the picture.
    """

    title: str
    config: Mapping[str, Any]
    steps: dict[str, np.ndarray]
    vectors: np.ndarray | None
    before: dict[str, float] | None
    after: dict[str, float] | None
    numbers: int | None = None
    between: tuple[tuple[int, float, float], ...] = ()
    notes: bool = True

    @property
    def count(self) -> int:
        """Number of finished steps."""
        return len(self.steps["v_norm"])


def draw(run: Run) -> Figure:
    """Draws a run, without using matplotlib's global state.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.6))
    # Fixed positions: matplotlib's automatic layout would draw everything twice to measure it.
    above = figure.add_gridspec(1, 2, left=0.07, right=0.93, top=0.9, bottom=0.57, width_ratios=(2.3, 1), wspace=0.17)
    beneath = figure.add_gridspec(1, 3, left=0.07, right=0.985, top=0.43, bottom=0.08, wspace=0.55)
    places = (above[0], above[1], beneath[0], beneath[1], beneath[2])
    for place, panels in zip(places, _PANELS, strict=True):
        axes = figure.add_subplot(place)
        axes.set_title(_panel(axes, run, panels), fontsize=10, loc="left")
    figure.suptitle(run.title)
    return figure


def draw_panels(run: Run) -> list[tuple[str, Figure]]:
    """Draws each panel of a run as a narrow picture of its own, and returns it with its title.

    Raises:
      ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    found = []
    for panels in _PANELS:
        figure = Figure(figsize=_PANEL, layout="constrained")
        found.append((_panel(figure.add_subplot(), replace(run, notes=False), panels), figure))
    return found


def _panel(axes: Axes, run: Run, panels: Mapping[str, Callable[[Axes, Run], None]]) -> str:
    """Draws the first of the panels whose metric is logged, and returns its title."""
    axes.set_xlim(0, run.count + 0.5)  # to the end of the last step's bar
    next(panel for name, panel in panels.items() if name in run.steps)(axes, run)
    title = axes.get_title()
    axes.set_title("")
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    return title


def smoothing(count: int) -> int:
    """Number of steps that are averaged: a tenth of many steps, else one."""
    return count // 10 if count > _FEW else 1


def _line(axes: Axes, values: np.ndarray, color: str, label: str, errors: np.ndarray | None = None) -> None:
    """Draws a metric over the steps, with its standard error if there is one."""
    count = len(values)
    x, width = np.arange(1, count + 1), smoothing(count)
    if width > 1:
        axes.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
        mean = lambda y: np.convolve(y, np.full(width, 1 / width), "valid")
        x, values = mean(x), mean(values)
        errors = None if errors is None else np.sqrt(mean(errors**2) / width)
        label = f"{label}, mean of {width} steps"
    axes.plot(x, values, color=color, linewidth=1.6, marker="o" if width == 1 else None, markersize=3.5, label=label)
    if errors is not None:
        axes.fill_between(x, values - errors, values + errors, color=color, alpha=0.2, linewidth=0)


def _percent(value: float, place: int | None = None) -> str:
    return f"{100 * value:.3g} %"


def _notes(axes: Axes, run: Run, shares: bool, mark: str = "") -> None:
    """Writes the accuracies before and after in the two upper corners, if the run asks for it."""
    if not run.notes:
        return
    text = _percent if shares else lambda x: f"{x:.3g}"
    for name, accuracy, x, side in (("untrained", run.before, 0.01, "left"), ("trained", run.after, 0.99, "right")):
        if accuracy is not None:
            found = f"{text(accuracy['strict'])} strict, {text(accuracy['lenient'])} lenient"
            note = f"{name}, held-out questions, greedy{mark}:\n{found}"
            axes.annotate(note, (x, 1.0), xycoords="axes fraction", ha=side, va="top", fontsize=9)


def _reward(axes: Axes, run: Run) -> None:
    axes.set_title("reward of the sampled answers" + (" (band: 1 standard error)" if "reward_se" in run.steps else ""))
    shares = 0 <= min(run.steps["reward"]) and max(run.steps["reward"]) <= 1
    _line(axes, run.steps["reward_lenient"], ORANGE, "lenient")
    _line(axes, run.steps["reward"], BLUE, "strict", run.steps.get("reward_se"))
    for accuracy, x in ((run.before, 0), (run.after, run.count + 0.5)):
        if accuracy is not None:
            axes.plot(x, accuracy["strict"], "D", color=BLUE, markersize=7, clip_on=False)
            axes.plot(x, accuracy["lenient"], "D", color=ORANGE, markersize=7, fillstyle="none", clip_on=False)
    for step, strict, lenient in run.between:
        axes.plot(step, strict, "D", color=BLUE, markersize=5)
        axes.plot(step, lenient, "D", color=ORANGE, markersize=5, fillstyle="none")
    _notes(axes, run, shares, " (◆)")
    seen = [*run.steps["reward"], *run.steps["reward_lenient"]]
    seen += [*(run.steps["reward"] + run.steps["reward_se"])] if "reward_se" in run.steps else []
    seen += [x for accuracy in (run.before, run.after) if accuracy for x in accuracy.values()]
    seen += [x for _, *pair in run.between for x in pair]
    low, high = min(0.0, *seen), max(seen)
    axes.set_ylim(low, (high + 0.3 * (high - low)) or 1.0)  # room for the two notes
    axes.set_ylabel("mean reward")
    if shares:
        axes.yaxis.set_major_formatter(_percent)
    axes.legend(loc="lower right", fontsize=9, frameon=False, ncols=2)


def _loss(axes: Axes, run: Run) -> None:
    axes.set_title("loss on the worked solutions")
    loss, ends = run.steps["loss"], [x for each in (run.before, run.after) if each for x in each.values()]
    _line(axes, loss, BLUE, "loss")
    _notes(axes, run, all(0 <= x <= 1 for x in ends))
    axes.set_ylabel("nats per token, mean")
    span = max(loss) - min(loss) or 0.1 * abs(max(loss)) or 1.0
    axes.set_ylim(min(loss) - 0.1 * span, max(loss) + 0.4 * span)  # room for the two notes


def _above_zero(axes: Axes, values: np.ndarray, label: str, color: str = BLUE, least: float = 0.0) -> None:
    """Draws a nonnegative metric, with an axis in the same colour."""
    _line(axes, values, color, label)
    axes.set_ylabel(label, color=color)
    axes.set_ylim(0, max(1.15 * max(values), least) or 1.0)


def _right(axes: Axes, values: np.ndarray, label: str, least: float = 0.0) -> Axes:
    """Draws a second metric, with its axis on the right."""
    right = axes.twinx()
    _above_zero(right, values, label, ORANGE, least)
    right.spines["top"].set_visible(False)
    return right


def _length(axes: Axes, run: Run) -> None:
    axes.set_title("length and truncation")
    _above_zero(axes, run.steps["length"], "tokens of an answer, mean")
    _right(axes, run.steps["truncated"], "answers cut off", 0.1).yaxis.set_major_formatter(_percent)


def _gradient(axes: Axes, run: Run) -> None:
    axes.set_title("gradient and entropy")
    _above_zero(axes, run.steps["grad_norm"], "norm of the gradient")
    _right(axes, run.steps["entropy"], "entropy, nats per token")


def _solutions(axes: Axes, run: Run) -> None:
    axes.set_title("length of the worked solutions")
    _above_zero(axes, run.steps["length"], "tokens of a solution, mean")


def _vector(axes: Axes, run: Run) -> None:
    if run.config.get("method") in ("lora", "full"):  # v starts as random matrices, or as the weights
        axes.set_title("the norm of all that is trained")
        _line(axes, run.steps["v_norm"], "black", "|v|")
        return
    from_zero = lambda values: np.concatenate([np.zeros_like(values[:1]), values])
    norms = axes
    axes.set_title("the trained vector v")
    if run.vectors is not None:
        axes.set_title(f"the trained vector v: its {run.vectors.shape[1]} numbers, and |v|")
        axes.plot(from_zero(run.vectors), color=BLUE, linewidth=0.9, alpha=0.7)
        axes.axhline(0, color=GRAY, linewidth=0.8)
        axes.set_ylabel("a number of v", color=BLUE)
        norms = axes.twinx()  # |v| grows with the count of numbers, and would flatten their lines
        norms.spines["top"].set_visible(False)
        norms.set_ylim(0, 1.15 * max(run.steps["v_norm"]) or 1.0)
    norms.plot(from_zero(run.steps["v_norm"]), color="black", linewidth=1.8, linestyle="--", label="|v|")
    norms.set_ylabel("|v|")


def _mismatch(axes: Axes, run: Run) -> None:
    axes.set_title("a token's probability: rollout against update")
    _line(axes, run.steps["delta_prob"], BLUE, "difference")
    axes.set_ylabel("mean absolute difference")
    axes.set_ylim(0, 1.15 * max(run.steps["delta_prob"]) or 1e-3)
    axes.yaxis.set_major_formatter(lambda value, place: f"{value:.2g}")  # a common factor would meet the title
    if not any(run.steps["delta_prob"]):
        axes.annotate("0 in every step", (0.5, 0.5), xycoords="axes fraction", ha="center", color=GRAY)


def _pairs(axes: Axes, run: Run) -> None:
    axes.set_title("pairs of points with different rewards")
    _line(axes, run.steps["pairs_that_differ"], BLUE, "share")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(_percent)


def _seconds(axes: Axes, run: Run) -> None:
    axes.set_title("seconds of a step")
    axes.set_ylabel("s")
    below = np.zeros(run.count)
    for name, (label, color) in _PHASES.items():
        if name in run.steps:
            top, edges = below + run.steps[name], np.arange(run.count + 1) + 0.5
            axes.stairs(top, edges, baseline=below, fill=True, color=color, label=label, linewidth=0)
            below = top
    usual = 1.35 * np.percentile(below, 90)
    axes.set_ylim(0, usual)
    if max(below) > usual:  # a step included compilation, or the machine was busy
        slowest = int(np.argmax(below))
        axes.set_title(f"seconds of a step (step {slowest + 1}: {max(below):.3g} s)")
    narrow = {"ncols": 3, "columnspacing": 0.8, "handlelength": 1.2, "handletextpad": 0.4}
    axes.legend(loc="upper right", fontsize=9, framealpha=1, edgecolor="none", **narrow)


_PANELS: tuple[dict[str, Callable[[Axes, Run], None]], ...] = (
    {"reward": _reward, "loss": _loss},
    {"truncated": _length, "grad_norm": _gradient},
    {"v_norm": _vector},
    {"delta_prob": _mismatch, "pairs_that_differ": _pairs, "length": _solutions},
    {"update_s": _seconds},
)
"""The candidates for each panel, by metric; the first one whose metric is logged is drawn."""
