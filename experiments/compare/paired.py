"""Paired comparison of two methods over seeds: how large the difference is, how sure that is, and how lucky."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95

WILCOXON_FROM = 6
"""Fewest differences, zeros aside, for a Wilcoxon test: with n of them its smallest p is 2 / 2^n, above 0.05 at 5."""


@dataclass(frozen=True)
class Paired:
    """What ``n`` paired differences say. NaN stands for what so few or such differences do not say.

    Attributes:
        n: Number of pairs.
        mean: Mean difference.
        sd: Sample standard deviation of the differences (``n - 1``); from two pairs.
        low: Lower end of the confidence interval of the mean.
        high: Its upper end.
        t: Two-sided p-value of the paired t-test.
        wilcoxon: Two-sided p-value of the Wilcoxon signed-rank test; from :data:`WILCOXON_FROM` pairs.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    t: float
    wilcoxon: float


def paired(differences: Sequence[float]) -> Paired:
    r"""Estimate and test the mean of ``differences`` :math:`d_1, ..., d_n` (Student, Biometrika 6, 1908).

    With mean :math:`\bar d` and sample deviation :math:`s`, the interval of confidence :data:`CONFIDENCE` is

    .. math:: \bar d \pm t_{0.975, n-1}\, s / \sqrt{n}

    and the t-test rejects :math:`E[d] = 0` at 5 % exactly when 0 is outside. Both assume that the differences
    scatter normally, which a handful of seeds cannot show; the Wilcoxon test assumes only their symmetry. Without
    any spread (all differences equal) neither says anything, so interval and p-values are NaN then.
    """
    return _paired(tuple(map(float, differences)))


@lru_cache(maxsize=2**14)  # tables, verdicts and pictures of one report ask for the same
def _paired(differences: tuple[float, ...]) -> Paired:
    d = np.asarray(differences, dtype=float)
    n = len(d)
    nothing = math.nan
    if n == 0 or not np.isfinite(d).all():
        return Paired(n, nothing, nothing, nothing, nothing, nothing, nothing)
    mean = float(d.mean())
    if n < 2:
        return Paired(n, mean, nothing, nothing, nothing, nothing, nothing)
    sd = float(d.std(ddof=1))
    if np.ptp(d) < 1e-12:
        return Paired(n, mean, sd, nothing, nothing, nothing, nothing)
    exact = d.round(12)  # differences that round-off alone tells apart share their rank, and none is that of a zero
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * sd / math.sqrt(n)
    return Paired(
        n=n,
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        t=float(stats.ttest_1samp(d, 0.0).pvalue),
        wilcoxon=float(stats.wilcoxon(exact).pvalue) if np.count_nonzero(exact) >= WILCOXON_FROM else nothing,
    )


def holm(p_values: Sequence[float]) -> npt.NDArray[np.float64]:
    r"""Correct p-values for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Sorted, :math:`p_{(1)} \le ... \le p_{(m)}`, they become

    .. math:: \tilde p_{(i)} = \min(1, \max_{j \le i}\, (m - j + 1)\, p_{(j)})

    so that calling all with :math:`\tilde p \le \alpha` different is wrong even once with probability at most
    :math:`\alpha`, however the tests depend on each other. NaN (nothing was tested) stays and is not counted.
    """
    p = np.asarray(p_values, dtype=float)
    corrected = np.full(p.shape, math.nan)
    tested = np.flatnonzero(~np.isnan(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps)) if len(order) else steps
    return corrected
