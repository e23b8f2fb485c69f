"""Ranks of methods over seeds and problems: who is usually ahead, whatever the size of the lead.

After Demšar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 7, 2006, Sec. 3.2.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from experiments.compare.stages import outcome
from experiments.records.keys import METHOD_KEYS, differing_keys, problem, spelt
from experiments.records.runs import Run

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of methods over blocks; a block is one problem with one seed, 1 is the best.

    Attributes:
        methods: Names, best mean rank first.
        ranks: Their mean ranks; equal results share the mean of their places.
        blocks: Number of blocks.
        left_out: Number of blocks in which a method had no result, which do not count.
        p: p-value of Friedman's test that all methods rank alike; NaN below 3 methods or 2 blocks.
        critical: Nemenyi's critical difference at 5 %: mean ranks nearer than this are not told apart.
            NaN below 2 blocks.
    """

    methods: tuple[str, ...]
    ranks: tuple[float, ...]
    blocks: int
    left_out: int
    p: float
    critical: float


def rank(scores: pd.DataFrame, *, left_out: int = 0) -> Ranking | None:
    r"""Rank the columns (methods) of ``scores`` in each row (block), the highest first; None with nothing to rank.

    With k methods and N blocks the critical difference is

    .. math:: q_{0.05, k} \sqrt{k (k + 1) / (6 N)}, \quad q = \text{studentized range} / \sqrt 2

    (Nemenyi's test, Demšar, Sec. 3.2.2).
    """
    blocks, methods = scores.shape
    if methods < 2 or blocks < 1:
        return None
    values = scores.to_numpy(dtype=float)
    # Rounded, so that results that differ by round-off alone share their place.
    ranks = stats.rankdata(-values.round(12), axis=1)
    means = ranks.mean(axis=0)
    order = np.argsort(means, kind="stable")
    told_apart = blocks > 1
    q = float(stats.studentized_range.ppf(CONFIDENCE, methods, np.inf)) / math.sqrt(2)
    differ = told_apart and methods > 2 and bool((np.ptp(ranks, axis=1) > 0).any())
    return Ranking(
        methods=tuple(str(scores.columns[i]) for i in order),
        ranks=tuple(float(means[i]) for i in order),
        blocks=blocks,
        left_out=left_out,
        p=float(stats.friedmanchisquare(*values.round(12).T).pvalue) if differ else math.nan,
        critical=q * math.sqrt(methods * (methods + 1) / (6 * blocks)) if told_apart else math.nan,
    )


def mean_ranks(runs: Sequence[Run]) -> Ranking | None:
    """Rank the outcomes of the finished ``runs``: methods are told apart by the keys of ``METHOD_KEYS`` that differ.

    A method without results in most blocks (an excluded combination) is not ranked; a block in which one of the
    others has none is left out, and counted in ``left_out``.
    """
    finished = [run for run in runs if run.finished]
    keys = [key for key in differing_keys(finished) if key in METHOD_KEYS] if finished else []
    scores: dict[str, dict[str, float]] = {}
    for run in finished:
        result = outcome(run)
        if result is not None and math.isfinite(result.accuracy):
            block = repr(sorted(problem(run.config).items()))
            scores.setdefault(spelt(run.config, keys), {})[block] = result.accuracy
    table = pd.DataFrame(scores)
    if table.empty:
        return None
    table = table.loc[:, table.notna().mean() > 0.5]
    complete = table.dropna()
    return rank(complete, left_out=len(table) - len(complete))
