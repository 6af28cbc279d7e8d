"""Scores against brute force: every subset, every drawing, and how often intervals hold the truth."""

import itertools
import math

import numpy as np
import pytest

from tinylora_jax.metrics import estimate, majority, pass_at_k


@pytest.mark.parametrize("samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(samples):
    for right in range(samples + 1):
        outcomes = [1] * right + [0] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(max, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_unbiased():
    chance, samples, k = 0.3, 6, 3
    mean = sum(
        math.comb(samples, c) * chance**c * (1 - chance) ** (samples - c) * pass_at_k(samples, c, k)
        for c in range(samples + 1)
    )
    assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_pass_at_k_takes_large_counts_and_refuses_what_makes_no_sense():
    assert pass_at_k(4096, 1, 64) == pytest.approx(64 / 4096)
    for arguments in ((4, 1, 0), (4, 1, 5), (4, 5, 1), (4, -1, 1)):
        with pytest.raises(ValueError, match="pass@k needs"):
            pass_at_k(*arguments)


def drawn(answers, grades):
    """The expected grade: a most frequent answer is drawn, then a sample that gave it."""
    given = [answer for answer in answers if answer is not None]
    if not given:
        return np.mean(grades)
    most = max(given.count(answer) for answer in set(given))
    winners = [answer for answer in set(given) if given.count(answer) == most]
    return np.mean([np.mean([g for a, g in zip(answers, grades, strict=True) if a == winner]) for winner in winners])


def test_majority_against_every_small_case():
    for answers in itertools.product(["a", "b", "c", None], repeat=4):
        for grades in itertools.product([0.0, 1.0], repeat=4):
            assert majority(answers, grades) == pytest.approx(drawn(answers, grades), abs=1e-12)
    with pytest.raises(ValueError, match="one grade per answer"):
        majority(["a"], [1.0, 0.0])
    with pytest.raises(ValueError, match="one grade per answer"):
        majority([], [])


@pytest.mark.parametrize(("right", "count", "low", "high"), [(0, 10, 0, 0.277533), (5, 10, 0.236593, 0.763407)])
def test_wilson_s_interval_of_right_and_wrong_answers(right, count, low, high):
    found = estimate([1.0] * right + [0.0] * (count - right))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))


@pytest.mark.parametrize("right", range(0, 21))
def test_wilson_s_interval_holds_the_rates_that_a_z_test_would_not_refuse(right):
    """Its ends solve |p - rate| = z √(rate (1 - rate) / n)."""
    found = estimate([1.0] * right + [0.0] * (20 - right))
    for rate in np.linspace(0, 1, 2001)[1:-1]:
        accepted = abs(right / 20 - rate) <= 1.959964 * math.sqrt(rate * (1 - rate) / 20)
        if min(abs(rate - found.low), abs(rate - found.high)) > 1e-6:
            assert accepted == (found.low < rate < found.high)


@pytest.mark.parametrize(
    ("questions", "samples", "spread"), [(200, 4, 0.5), (200, 1, 0.5), (50, 16, 2.0), (40, 8, 30.0)]
)
def test_intervals_of_samples_hold_the_truth_as_often_as_they_say(questions, samples, spread):
    """Questions of different difficulty (a beta distribution), so that samples of one are alike."""
    rng = np.random.default_rng(0)
    truth, held, trials = 0.3, 0, 1000
    for _ in range(trials):
        chances = rng.beta(truth * spread, (1 - truth) * spread, questions)
        found = estimate((rng.binomial(samples, chances) / samples).tolist(), samples)
        held += found.low <= truth <= found.high
    assert 0.93 < held / trials < 0.975


def test_intervals_have_a_width_where_nothing_varies():
    assert (
        estimate([0.0] * 30, samples=8).high
        == pytest.approx(estimate([0.0] * 30).high)
        == pytest.approx(0.1135, abs=1e-4)
    )
    assert estimate([0.5] * 30, samples=2) == estimate([0.0, 1.0] * 30)
    only = estimate([1.0])
    assert only.high == 1.0 and 0.2 < only.low < 0.21


def test_scores_beyond_one_have_a_mean_alone():
    found = estimate([2.0, -1.0])
    assert (found.value, found.low, found.high) == (0.5, None, None)
    for arguments in (([],), ([1.0], 0), ([1.0], 1, 1.0)):
        with pytest.raises(ValueError, match="an estimate needs"):
            estimate(*arguments)
