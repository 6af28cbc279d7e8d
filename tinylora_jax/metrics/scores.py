"""Scores of one evaluation: means over questions with their intervals, pass@k and maj@k."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its interval.

    Attributes:
      value: mean score.
      low: lower bound of the interval; None if a score lies outside 0 … 1.
      high: upper bound of the interval.
    """

    value: float
    low: float | None
    high: float | None


def estimate(scores: Sequence[float], samples: int = 1, level: float = 0.95) -> Estimate:
    r"""Estimates the mean score over all such questions, with an interval.

    Questions are independent, but samples of one question are not, so the unit is a question's score. Wilson's interval

    ```
    (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n)
    ```

    is used with n = p(1-p) / Var(p), the number of independent yes-or-no answers whose mean would vary as much as p,
    where Var(p) = Σ (sᵢ-p)² / N². So it stays within 0 … 1 and has a positive width even at p = 0 and 1. If all scores
    are 0 or 1, n = N and it is Wilson's original interval (1927).

    Args:
      scores: score of each question: its grade, or the mean grade of its samples; at least one question.
      samples: number of samples per question; n is at most N·samples.
      level: coverage probability of the interval.

    Returns:
      The mean and its interval; no interval if a score lies outside 0 … 1.

    Raises:
      ValueError: there are no scores, or the sample count or level is out of range.

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
    independent = max(independent, count)  # rounding may put it slightly below
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    center = (mean + z2 / (2 * independent)) / (1 + z2 / independent)
    half = math.sqrt(z2 * (spread / independent + z2 / (4 * independent**2))) / (1 + z2 / independent)
    return Estimate(mean, min(mean, max(0.0, center - half)), max(mean, min(1.0, center + half)))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimates pass@k: the probability that one of k samples is right (Chen et al. 2021, arXiv 2107.03374).

    ```
    1 - C(n-c, k) / C(n, k)
    ```

    is the unbiased estimate: the share of all sets of k samples that contain a right one.

    Args:
      samples: n, the number of samples.
      right: c, the number of right samples.
      k: number of samples per attempt, from 1 to n.

    Raises:
      ValueError: k or c is out of range.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 1, 4)
    (0.25, 0.5, 1.0)
    """
    if not (1 <= k <= samples and 0 <= right <= samples):
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= c <= n, got k={k}, n={samples}, c={right}")
    all_sets = math.comb(samples, k)
    return (all_sets - math.comb(samples - right, k)) / all_sets


def majority(answers: Sequence[Hashable | None], grades: Sequence[float]) -> float:
    """Computes the grade of the most frequent answer among a question's samples (maj@k).

    Samples without an answer (None) do not vote. Ties, and samples with the same answer but different grades (for
    example inside and outside the required format), are resolved at random; the result is the expected grade.

    Args:
      answers: answer of each sample, in a form in which equal answers compare equal.
      grades: grade of each sample.

    Returns:
      The grade; the mean grade of all samples if none has an answer.

    Raises:
      ValueError: there are no samples, or the counts differ.

    >>> majority(["7", "8", "7", None], [1.0, 0.0, 1.0, 0.0])
    1.0
    >>> majority(["7", "8"], [1.0, 0.0])
    0.5
    """
    if not answers or len(answers) != len(grades):
        raise ValueError(f"maj@k needs one grade per answer, got {len(answers)} answers and {len(grades)} grades")
    votes: dict[Hashable, list[float]] = defaultdict(list)
    for answer, grade in zip(answers, grades, strict=True):
        if answer is not None:
            votes[answer].append(grade)
    if not votes:
        return math.fsum(grades) / len(grades)
    most = max(map(len, votes.values()))
    first = [math.fsum(given) / most for given in votes.values() if len(given) == most]
    return math.fsum(first) / len(first)
