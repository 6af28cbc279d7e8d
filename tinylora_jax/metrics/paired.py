"""Tests of the difference of two evaluations on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

RESAMPLES = 9999


@dataclass(frozen=True)
class Difference:
    """How much better the second of two evaluations is.

    Attributes:
      value: mean of the second less that of the first.
      low: lower end of the interval of 95 %; None where all questions differ alike, which tells of no other.
      high: upper end.
      p: how often equally good ones would differ at least as much (two-sided).
      test: by which test.
      better: questions on which the second is better.
      worse: on which it is worse.
    """

    value: float
    low: float | None
    high: float | None
    p: float
    test: str
    better: int
    worse: int


def compare_right_or_wrong(first: Sequence[float], second: Sequence[float]) -> Difference:
    """McNemar's exact test for one answer a question.

    Of the b + c questions that one alone has right, each is as likely either's when both are equally good: p is the
    binomial probability of a split at least as uneven as b : c. The interval is Bonett and Price's (2012): with one
    question added to b and c each and two to n, (b - c)/n ± z √((b + c)/n - ((b - c)/n)²) / √n.

    Args:
      first: 0 or 1 for each question.
      second: scores of the other evaluation, in the same order.

    Raises:
      ValueError: other numbers, or unequal counts.

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
    """A permutation test for scores of questions, such as means of their samples.

    If both are equally good, the sign of each question's difference is a coin's: p is the share of signs with which
    the mean is at least as far from 0 (all of them if there are at most 9,999, else so many drawn, and the observed
    one). The interval is the percentile bootstrap's over questions.

    Args:
      first: the score of each question.
      second: scores of the other evaluation, in the same order.
      seed: seed of the random permutations.

    Raises:
      ValueError: unequal counts, or fewer than 2 questions.
    """
    from scipy.stats import bootstrap, permutation_test

    _require_pairs(first, second)
    if len(first) < 2:
        raise ValueError("a permutation test needs at least 2 questions")
    differences = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    value, changed = float(differences.mean()), differences[differences != 0]  # zeros have no sign
    low, high, p = None, None, 1.0
    drawn = {"n_resamples": RESAMPLES, "batch": 256, "vectorized": True}
    if changed.size > 1:  # of one, either sign is as far from 0, and SciPy takes no sample of one
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
