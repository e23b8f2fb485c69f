"""What the page of does-merging-pay makes of rows whose differences are known."""

import math

import pandas as pd
import pytest
from scipy import stats

from experiments.studies import pays
from experiments.studies.does_merging_pay import BEST, ENSEMBLE, MERGED, PUBLIC

LESS_BEST = {0: 0.02, 1: 0.05, 2: 0.035}


def rows() -> pd.DataFrame:
    """Three seeds: merged above the best client by as much as said, below public labels by a point each."""
    found = []
    for seed, gain in LESS_BEST.items():
        merged = 0.5 + 0.1 * seed
        where = {"model": "cnn", "partition": "two classes", "n": 6, "init": "independent", "seed": seed, "of": ""}
        empty = {"val": 0.1, "test": 0.2, "head_val": "", "head_test": "", "strength": ""}
        found += [{**where, "network": ENSEMBLE, "teacher": t, "unlabelled": False, **empty, "test": merged + 0.005}
                  for t in ("mean", "stacked", "by-class")]  # fmt: skip
        ends = {MERGED: merged, BEST: merged - gain, PUBLIC: merged + 0.01}
        for teacher, unlabelled in (("mean", False), ("stacked", True)):
            found += [
                {**where, "network": name, "teacher": teacher, "unlabelled": unlabelled, **empty, "head_test": end}
                for name, end in ends.items()
            ]
    return pd.DataFrame(found)


def test_the_family_is_the_whole_way_paired_by_seed_and_corrected_once() -> None:
    best, public = pays.family(pays._read(rows()))
    assert (best.other, best.difference.n, round(best.difference.mean, 6)) == (BEST, 3, 3.5)
    points = [100 * gain for gain in LESS_BEST.values()]
    half = stats.t.ppf(0.975, 2) * pd.Series(points).std() / math.sqrt(3)
    assert best.difference.low == pytest.approx(3.5 - half)
    assert best.p == pytest.approx(stats.ttest_1samp(points, 0).pvalue)  # the other has no spread, so nothing to test
    assert (public.other, round(public.difference.mean, 6), math.isnan(public.p)) == (PUBLIC, -1.0, True)


def test_the_page_says_levels_differences_and_how_much_is_missing() -> None:
    text = pays.STUDY.ours(rows())
    assert "| cnn | two classes | independent | 6 | best client | +3.5 |" in text
    assert "56.5 / 60.0 / 61.0 |" in text  # best client / merged / public labels, with everything
    assert "| merged | cnn | 6 | 40 | 3 | 37 |" in text  # four partitions, two starts, five seeds
    assert "| FedAvg | hlb | 6 | 12 | 0 | 12 |" in text
    answer = pays.STUDY.answer(rows())
    assert "the best client is\n+3.5 points (above 0 in 1 of 1 settings" in answer
    assert "\n-0.5 points, and within a point of it or above in 1 of 1 settings" in answer


def test_a_seed_that_lacks_one_of_the_three_networks_is_left_out() -> None:
    found = rows()
    found = found[~((found["network"] == PUBLIC) & (found["seed"] == 1))]
    best, public = pays.family(pays._read(found))
    assert (best.difference.n, public.difference.n, round(best.difference.mean, 6)) == (2, 2, 2.75)
