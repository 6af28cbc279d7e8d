"""Computes the scores of an evaluation from its rows, and formats them as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.common.wording import WIDTH, counted, cut, percent, table_with_sections
from tinylora_jax.metrics import estimate, majority, pass_at_k
from tinylora_jax.rewards import normalize

Row = dict[str, Any]
GRADES = ("strict", "lenient")


def summary(rows: Sequence[Row], samples: int = 1) -> dict[str, Any]:
    """Computes strict and lenient scores with 95 % intervals.

    Args:
      rows: rows ordered by question, with `samples` rows per question.
      samples: number of samples per question.
    """
    groups = [rows[start : start + samples] for start in range(0, len(rows), samples)]
    mean = lambda name: [math.fsum(row[name] for row in group) / samples for group in groups]
    return {
        **_scores({name: mean(name) for name in GRADES}, samples),
        "mean_tokens": _rounded(sum(row["tokens"] for row in rows) / len(rows)),
        "truncated": _rounded(sum(not row["stopped"] for row in rows) / len(rows)),
    }


def sampled_summary(rows: Sequence[Row], samples: int) -> dict[str, Any]:
    """`summary` with `majority` (maj@k of all samples) and `pass` (pass@k by k, only for grades of 0 and 1)."""
    groups = [rows[start : start + samples] for start in range(0, len(rows), samples)]
    voted = {name: [majority(_votes(group), [row[name] for row in group]) for group in groups] for name in GRADES}
    result = {**summary(rows, samples), "majority": _scores(voted)}
    if all(row[name] in (0, 1) for row in rows for name in GRADES):
        right = {name: [sum(int(row[name]) for row in group) for group in groups] for name in GRADES}
        result["pass"] = {
            str(k): _scores({name: [pass_at_k(samples, c, k) for c in right[name]] for name in GRADES}, samples)
            for k in sorted({*(2**power for power in range(samples.bit_length())), samples})
        }
    return result


def accuracy_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Formats the results of several sets as tables of 80 columns, in percent."""
    lines = [["", "strict", "[95 %]", "lenient", "[95 %]", "tokens", "cut off"]]
    sections: dict[int, str] = {}
    for name, result in results.items():
        sections[len(lines)] = f"{cut(name, WIDTH - 20)}: {counted(result['questions'], 'question')}"
        lines.append(["greedy", *_cells(result), *_lengths(result)])
        sampled = result.get("sampled")
        if sampled:
            count, largest = sampled["samples"], sampled.get("pass", {}).get(str(sampled["samples"]))
            lines.append([f"avg@{count}", *_cells(sampled), *_lengths(sampled)])
            if count > 1:
                lines.append([f"maj@{count}", *_cells(sampled["majority"]), "", ""])
                lines += [[f"pass@{count}", *_cells(largest), "", ""]] if largest else []
    return "\n".join(table_with_sections(lines, sections))


def scores(result: Mapping[str, Any]) -> str:
    """Formats the accuracies of a result in a line."""
    show = [f"{name} {percent(result[name])}" for name in GRADES]
    return f"{', '.join(show)} of {result['questions']:,} questions, greedy"


def _unsigned(value: float) -> str:
    """Formats a share in percent with one decimal, without the sign."""
    return f"{100 * value:.1f}"


def _scores(of: Mapping[str, Sequence[float]], samples: int = 1) -> dict[str, Any]:
    found = {name: estimate(scores, samples) for name, scores in of.items()}
    intervals = {
        f"{name}_interval": None if each.low is None or each.high is None else [_rounded(each.low), _rounded(each.high)]
        for name, each in found.items()
    }
    return {**{name: _rounded(each.value) for name, each in found.items()}, **intervals}


def _votes(group: Sequence[Row]) -> list[str | None]:
    return [None if row["found"] is None else normalize(row["found"]) for row in group]


def _rounded(value: float) -> float:
    return round(value, 6)


def _cells(scores: Mapping[str, Any]) -> list[str]:
    cells = []
    for name in GRADES:
        interval = scores[f"{name}_interval"]
        cells += [_unsigned(scores[name]), f"[{', '.join(map(_unsigned, interval))}]" if interval else ""]
    return cells


def _lengths(scores: Mapping[str, Any]) -> list[str]:
    return [f"{scores['mean_tokens']:.0f}", _unsigned(scores["truncated"])]
