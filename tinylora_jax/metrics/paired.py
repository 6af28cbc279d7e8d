"""Tests of the difference between two evaluations on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """The difference between two evaluations: the second minus the first.

    Attributes:
      value: mean of the second minus mean of the first.
      low: lower bound of the 95 % interval; None if all questions have the same difference, which gives no interval.
      high: upper bound of the 95 % interval.
      p: two-sided p-value: the probability of a difference at least this large between equally good models.
      test: name of the test.
      better: number of questions on which the second is better.
      worse: number of questions on which the second is worse.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    test: str
    better: int
    worse: int


def compare_paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """The paired test that fits the scores: McNemar's if all are 0 or 1, else the permutation test.

    Args:
      first: score of each question in the first evaluation.
      second: scores of the second evaluation, in the same order.

    Raises:
      ValueError: the counts differ, or there are too few questions for the test.
    """
    test = compare_right_or_wrong if {*first, *second} <= {0, 1} else compare_means
    return test(first, second)


def compare_right_or_wrong(first: Sequence[float], second: Sequence[float]) -> Difference:
    """McNemar's exact test, for one answer per question.

    Of the b + c questions that exactly one of the two has right, each is equally likely to be either's if both are
    equally good. So p is the binomial probability of a split at least as uneven as b : c. The interval is that of
    Bonett and Price (2012): with 1 added to b and to c, and 2 to n, (b - c)/n ± z √((b + c)/n - ((b - c)/n)²) / √n.

    Args:
      first: score of each question in the first evaluation, 0 or 1.
      second: scores of the second evaluation, in the same order.

    Raises:
      ValueError: a score is not 0 or 1, or the counts differ.

    >>> compare_right_or_wrong([0.0] * 6 + [1.0], [1.0] * 7).p
    0.03125
    """
    _require_pairs(first, second)
    if not {*first, *second} <= {0, 1}:
        raise ValueError("McNemar's test needs grades of 0 and 1; use compare_means")
    better = sum(b > a for a, b in zip(first, second, strict=True))
    worse = sum(b < a for a, b in zip(first, second, strict=True))
    split, total = min(better, worse), better + worse
    p = min(1.0, 2 * sum(math.comb(total, i) for i in range(split + 1)) / 2**total)
    count = len(first) + 2
    shifted, discordant = (better - worse) / count, (total + 2) / count
    half = NormalDist().inv_cdf(0.975) * math.sqrt((discordant - shifted**2) / count)
    value = (better - worse) / len(first)
    return Difference(
        value, max(-1.0, shifted - half), min(1.0, shifted + half), p, "McNemar, exact", int(better), int(worse)
    )


def compare_means(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Difference:
    """A permutation test for scores per question, such as means over samples.

    If both are equally good, the sign of each question's difference is random. So p is the share of sign patterns
    whose mean is at least as far from 0: of all patterns if there are at most 9,999, else of 9,999 random ones and
    the observed one. The interval is the percentile bootstrap over questions.

    Args:
      first: score of each question in the first evaluation.
      second: scores of the second evaluation, in the same order.
      seed: seed of the random permutations.

    Raises:
      ValueError: the counts differ, or there are fewer than 2 questions.
    """
    from scipy.stats import bootstrap, permutation_test

    _require_pairs(first, second)
    if len(first) < 2:
        raise ValueError("a permutation test needs at least 2 questions")
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    value, changed = float(differences.mean()), differences[differences != 0]  # zeros have no sign
    low, high, p = None, None, 1.0
    drawn = {"n_resamples": RESAMPLES, "batch": 256, "vectorized": True}
    if changed.size > 1:  # for one question both signs are equally far from 0, and SciPy rejects it
        total = lambda x, axis: np.sum(x, axis=axis)
        p = float(permutation_test((changed,), total, permutation_type="samples", rng=seed, **drawn).pvalue)
    if np.ptp(differences):
        interval = bootstrap((differences,), np.mean, method="percentile", rng=seed, **drawn).confidence_interval
        low, high = float(interval.low), float(interval.high)
    better, worse = int(np.sum(differences > 0)), int(np.sum(differences < 0))
    return Difference(value, low, high, min(1.0, p), "permutation", better, worse)


def _require_pairs(first: Sequence[float], second: Sequence[float]) -> None:
    if not len(first) or len(first) != len(second):
        raise ValueError(f"a paired test needs the same questions, got {len(first)} and {len(second)} scores")
