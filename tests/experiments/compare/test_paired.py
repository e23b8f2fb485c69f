"""Paired comparison: published examples, brute force, and SciPy's own paired test."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.compare.paired import holm, paired

SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
"""Hours of sleep gained by one drug over the other, ten patients: the data of Student (1908)."""


def test_students_own_example() -> None:
    found = paired(SLEEP)
    assert found.n == 10
    assert found.mean == pytest.approx(1.58)
    assert found.sd == pytest.approx(1.2300, abs=5e-5)
    # t = 4.0621 on 9 degrees of freedom; t(0.975, 9) = 2.262 in any table.
    assert found.t == pytest.approx(0.002833, abs=5e-7)
    half = 2.262157 * 1.229995 / math.sqrt(10)
    assert (found.low, found.high) == pytest.approx((1.58 - half, 1.58 + half), abs=1e-5)


def test_interval_and_test_are_those_of_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=5), rng.normal(size=5)
    found, oracle = paired(a - b), stats.ttest_rel(a, b)
    assert found.t == pytest.approx(oracle.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(oracle.confidence_interval(0.95)))


def test_wilcoxon_is_the_share_of_sign_patterns_at_least_as_uneven() -> None:
    differences = np.array([0.3, -0.1, 0.7, 0.5, 1.1, -0.2, 0.9])
    ranks = np.abs(differences).argsort().argsort() + 1
    observed = abs(int((np.sign(differences) * ranks).sum()))
    patterns = [abs(int(np.dot(signs, ranks))) for signs in itertools.product((-1, 1), repeat=7)]
    assert paired(differences).wilcoxon == pytest.approx(np.mean([p >= observed for p in patterns]))


def test_wilcoxon_waits_for_six_pairs() -> None:
    assert math.isnan(paired([1.0, 2.0, 3.0, 4.0, 5.0]).wilcoxon)
    assert paired([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).wilcoxon == pytest.approx(2 / 2**6)


def test_wilcoxon_ties_what_round_off_alone_tells_apart() -> None:
    a, b = np.array([91, 75, 61, 95, 96, 61, 83, 92]), np.array([90, 76, 93, 92, 64, 60, 63, 74])
    assert paired(a / 100 - b / 100).wilcoxon == pytest.approx(stats.wilcoxon(a - b).pvalue)


@pytest.mark.parametrize("differences", [[], [0.5], [0.5, 0.5, 0.5], [0.5, math.nan]])
def test_too_little_says_neither_interval_nor_p(differences: list[float]) -> None:
    found = paired(differences)
    assert found.n == len(differences)
    assert all(math.isnan(x) for x in (found.low, found.high, found.t, found.wilcoxon))


def test_holm_by_hand() -> None:
    # 4 x 0.005, 3 x 0.01, 2 x 0.03, and 1 x 0.04 is raised to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


def test_holm_passes_over_what_was_not_tested() -> None:
    found = holm([math.nan, 0.02, math.nan, 0.03])
    assert np.isnan(found).tolist() == [True, False, True, False]
    assert found[[1, 3]] == pytest.approx([0.04, 0.04])
    assert holm([]).shape == (0,)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_by_hand_rejects(p_values: list[float]) -> None:
    alpha, m = 0.05, len(p_values)
    rejected = set()
    for step, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        if p_values[i] * (m - step) > alpha:
            break
        rejected.add(i)
    corrected = holm(p_values)
    assert {i for i in range(m) if corrected[i] <= alpha} == rejected
    assert (corrected >= np.asarray(p_values)).all()
