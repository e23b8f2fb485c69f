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


def test_the_page_says_levels_differences_and_what_is_missing() -> None:
    text = pays.STUDY.ours(rows())
    assert "| cnn | two classes | independent | 6 | best client | +3.5 |" in text
    assert "56.5 / 60.0 / 61.0 |" in text  # best client / merged / public labels, with everything
    assert "cnn, n = 6, two classes, independent (2)" in text.split("**Missing**")[1]
    assert "hlb, n = 6, iid, pretrained (3)" in text
    answer = pays.STUDY.answer(rows())
    assert "+3.5 to +3.5 points from the best client (above 0 in 1 of 1" in answer
    assert "in 1 of 1\nsettings, and -0.5 points" in answer
