"""Paired tests against brute force, and how often they see a difference where there is none."""

import itertools

import numpy as np
import pytest
import scipy.stats

from tinylora_jax.metrics import compare_means, compare_right_or_wrong


def signs_at_least_as_far(differences):
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product([1, -1], repeat=len(differences))]
    return np.mean([each >= abs(sum(differences)) - 1e-12 for each in sums])


@pytest.mark.parametrize(
    ("better", "worse", "same"), [(0, 0, 5), (1, 0, 3), (6, 1, 2), (3, 3, 1), (2, 9, 0), (0, 10, 10)]
)
def test_mcnemar_is_the_binomial_test_and_the_permutation_test(better, worse, same):
    first = [0.0] * better + [1.0] * worse + [1.0] * same
    second = [1.0] * better + [0.0] * worse + [1.0] * same
    found = compare_right_or_wrong(first, second)
    assert found.p == pytest.approx(signs_at_least_as_far([1] * better + [-1] * worse) if better + worse else 1.0)
    if better + worse:
        assert found.p == pytest.approx(scipy.stats.binomtest(better, better + worse).pvalue)
    assert found.value == pytest.approx(np.mean(second) - np.mean(first))
    assert (found.better, found.worse) == (better, worse)
    assert -1 <= found.low <= found.value <= found.high <= 1 and found.low < found.high


def test_the_interval_of_a_difference_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    kinds, chances = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)], [0.5, 0.2, 0.1, 0.2]
    held = 0
    for _ in range(1000):
        drawn = [kinds[i] for i in rng.choice(4, 100, p=chances)]
        found = compare_right_or_wrong(*zip(*drawn, strict=True))
        held += found.low <= 0.1 <= found.high
    assert 930 < held < 975


def test_permutation_counts_all_signs_of_few_questions():
    rng = np.random.default_rng(2)
    for _ in range(5):
        first, second = rng.random(9), rng.random(9)
        found = compare_means(first.tolist(), second.tolist())
        assert found.p == pytest.approx(signs_at_least_as_far(second - first))
        assert found.value == pytest.approx(np.mean(second - first))


def test_permutation_of_many_questions_agrees_with_the_t_test_and_so_does_the_interval():
    rng = np.random.default_rng(3)
    first = rng.random(400)
    second = first + rng.normal(0.03, 0.3, 400)
    found = compare_means(first.tolist(), second.tolist())
    test = scipy.stats.ttest_rel(second, first)
    interval = test.confidence_interval()
    assert found.p == pytest.approx(test.pvalue, abs=0.015)
    assert (found.low, found.high) == (pytest.approx(interval.low, abs=0.003), pytest.approx(interval.high, abs=0.003))
    again = [compare_means(first.tolist(), second.tolist(), seed=seed) for seed in (0, 1)]
    assert found == again[0] != again[1]


def test_no_difference_is_found_as_often_as_the_level_says():
    rng = np.random.default_rng(4)
    pairs = [rng.binomial(4, 0.4, (2, 12)) / 4 for _ in range(200)]
    assert np.mean([compare_means(*pair.tolist()).p <= 0.05 for pair in pairs]) <= 0.09


def test_equal_runs_and_runs_that_differ_alike():
    same = compare_means([0.5, 0.25, 0.0], [0.5, 0.25, 0.0])
    assert (same.value, same.low, same.high, same.p) == (0, None, None, 1)
    shifted = compare_means([0.0, 0.0, 0.0], [0.5, 0.5, 0.5])
    assert (shifted.value, shifted.low, shifted.high, shifted.p) == (0.5, None, None, 0.25)


@pytest.mark.parametrize("count", [2, 500])
def test_one_question_that_differs_proves_nothing(count):
    found = compare_means([0.5] * count, [1.0] + [0.5] * (count - 1))
    assert found.p == 1.0 and found.value == pytest.approx(0.5 / count) and (found.better, found.worse) == (1, 0)
    assert found.low <= found.value <= found.high


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="same questions, got 2 and 1"):
        compare_right_or_wrong([1.0, 0.0], [1.0])
    with pytest.raises(ValueError, match="same questions"):
        compare_means([], [])
    with pytest.raises(ValueError, match="at least 2"):
        compare_means([1.0], [0.0])
    with pytest.raises(ValueError, match="0 and 1; use compare_means"):
        compare_right_or_wrong([0.5], [1.0])
