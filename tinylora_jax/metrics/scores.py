"""Scores of one evaluation: means over questions with their intervals, pass@k and maj@k."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Estimate:
    """A mean over questions.

    Attributes:
      value: the mean.
      low: lower end of its interval; None where grades are not within 0 … 1.
      high: upper end.
    """

    value: float
    low: float | None
    high: float | None


def estimate(scores: Sequence[float], samples: int = 1, level: float = 0.95) -> Estimate:
    r"""The mean of the questions' scores and the interval in which that of all such questions lies.

    Questions are independent, the samples of one are not: what varies is the score of a question. Wilson's interval

    ```
    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    ```

    is taken at the number n = p(1-p) / Var(p) of independent yes-or-no answers that would vary as much as the mean p
    does, with Var(p) = Σ (sᵢ-p)² / N². So it stays within 0 … 1, has a width at p = 0 and 1 too, and for scores that
    are all 0 or 1 it is Wilson's own (1927), with n = N.

    Args:
      scores: one score per question: the grade, or the mean of the samples' grades; at least one question.
      samples: number of samples per question; n is at most N·samples.
      level: how often the interval is to hold the true value.

    Returns:
      The mean and its interval; no interval if a score lies outside 0 … 1.

    Raises:
      ValueError: no scores, or a sample count or level that makes no sense.

    >>> found = estimate([1.0] * 8 + [0.0] * 2)
    >>> round(found.low, 3), found.value, round(found.high, 3)
    (0.49, 0.8, 0.943)
    """
    if not scores or samples < 1 or not 0 < level < 1:
        got = f"{len(scores)} scores, samples={samples}, level={level}"
        raise ValueError(f"an estimate needs scores, samples >= 1 and a level between 0 and 1, got {got}")
    count = len(scores)
    mean = math.fsum(scores) / count
    if not all(0 <= score <= 1 for score in scores):
        return Estimate(mean, None, None)
    mean = min(1.0, max(0.0, mean))
    variance = math.fsum((score - mean) ** 2 for score in scores) / count**2
    spread = mean * (1 - mean)
    independent = min(spread / variance, count * samples) if variance > 0 else count * (samples if spread else 1)
    independent = max(independent, count)  # rounding
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = (mean + z2 / (2 * independent)) / (1 + z2 / independent)
    half = math.sqrt(z2 * (spread / independent + z2 / (4 * independent**2))) / (1 + z2 / independent)
    return Estimate(mean, min(mean, max(0.0, center - half)), max(mean, min(1.0, center + half)))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The share of all sets of k of a question's samples that hold a right one (Chen et al. 2021, arXiv 2107.03374).

    ```
    1 - C(n-c, k) / C(n, k)
    ```

    is the unbiased estimate of the chance that one of k samples is right.

    Args:
      samples: n, how many there are.
      right: c, how many of them are right.
      k: from 1 to n.

    Raises:
      ValueError: no such k or c.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
    (0.25, 0.5, 1.0)
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got k={k}, n={samples}, c={right}")
    all_sets = math.comb(samples, k)
    return (all_sets - math.comb(samples - right, k)) / all_sets


def majority(answers: Sequence[Hashable | None], grades: Sequence[float]) -> float:
    """The grade of the most frequent answer of a question's samples.

    Samples without an answer (None) do not vote. A tie is resolved by chance and so are samples that give one answer
    but have different grades (as in and outside of the required format): the result is the expected grade.

    Args:
      answers: one answer per sample, equal for equal answers.
      grades: one grade per sample.

    Returns:
      The grade; that of all samples on average when none has an answer.

    Raises:
      ValueError: no samples, or unequal counts.

    >>> majority(["7", "8", "7", None], [1.0, 0.0, 1.0, 0.0])
    1.0
    >>> majority(["7", "8"], [1.0, 0.0])
    0.5
    """
    if not answers or len(answers) != len(grades):
        raise ValueError(f"a majority needs one grade an answer, got {len(answers)} answers and {len(grades)} grades")
    votes: dict[Hashable, list[float]] = defaultdict(list)
    for answer, grade in zip(answers, grades, strict=True):
        if answer is not None:
            votes[answer].append(grade)
    if not votes:
        return math.fsum(grades) / len(grades)
    most = max(map(len, votes.values()))
    first = [math.fsum(given) / most for given in votes.values() if len(given) == most]
    return math.fsum(first) / len(first)
