"""How well scores tell members from others, with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import beta, norm, rankdata

from fedmerge.errors import ConfigError
from fedmerge.privacy._seen import Flags, Vector

LEVEL = 0.95
"""Of every interval."""

EXPECTED = 10
"""A rate of false alarms is measured only where so many are expected among the non-members: its own relative error is
then about a third."""


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval.

    Attributes:
        value: hits / of.
        low: Lower end.
        high: Upper end.
        hits: How often.
        of: Of how many.
    """

    value: float
    low: float
    high: float
    hits: int
    of: int


def clopper_pearson(hits: int, of: int, level: float = LEVEL) -> Rate:
    """The exact interval of a share: the chances p under which at least, and at most, so many hits are not too rare.

    Clopper and Pearson, "The use of confidence or fiducial limits illustrated in the case of the binomial", Biometrika
    26(4), 1934.

    Raises:
        ConfigError: More hits than trials, no trial, or a level outside (0, 1).

    Example:
        >>> from fedmerge.privacy import clopper_pearson
        >>> found = clopper_pearson(0, 100)
        >>> found.value, found.low, round(found.high, 4)
        (0.0, 0.0, 0.0362)
    """
    if not 0 <= hits <= of or of < 1:
        raise ConfigError(f"{hits} hits of {of}; expected 0 to as many as there were trials, and at least one trial")
    if not 0 < level < 1:
        raise ConfigError(f"level is {level:g}; expected the chance that the interval holds, within (0, 1)")
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, hits, of - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, of - hits)) if hits < of else 1.0
    return Rate(hits / of, low, high, hits, of)


@dataclass(frozen=True, eq=False)
class Rates:
    """What an attack achieves.

    Attributes:
        auc: Chance that a member scores above a non-member, ties counting half; with DeLong's interval. Its ``of`` is
            the number of pairs.
        balanced_accuracy: Mean of the shares of members and of non-members told rightly, at the best threshold. It is
            chosen on the same scores, so it is above .5 by chance where scores are few.
        tpr: Rate of false alarms -> share of members found at it, at the lowest threshold that does not exceed it.
        members: How many members.
        outsiders: How many non-members.
        roc: Rates of false alarms and of members found, at every threshold, from (0, 0) to (1, 1).
    """

    auc: Rate
    balanced_accuracy: float
    tpr: dict[float, Rate]
    members: int
    outsiders: int
    roc: tuple[Vector, Vector]

    def enough(self, fpr: float) -> bool:
        """Whether there are non-members enough for a rate of false alarms: ten at least are expected."""
        return self.outsiders * fpr >= EXPECTED - 1e-9


FPRS = (0.01, 0.001)
"""The rates of false alarms that are asked for."""


def rates(scores: npt.ArrayLike, members: npt.ArrayLike, *, fprs: Sequence[float] = FPRS) -> Rates:
    """Measure how well ``scores`` tell members from others.

    Args:
        scores: Float ``(N,)``, the higher the likelier a member; infinite ones are beyond all others.
        members: Bool ``(N,)``.
        fprs: Rates of false alarms at which members are counted.

    Raises:
        ConfigError: A score that is no number, a rate outside [0, 1], or there are no members or no others.

    Example:
        >>> from fedmerge.privacy import rates
        >>> found = rates([3, 2, 1, 0], [True, True, False, False])
        >>> found.auc.value, found.balanced_accuracy, found.tpr[0.01].value, found.enough(0.01)
        (1.0, 1.0, 1.0, False)
    """
    given, inside = np.asarray(scores, np.float64), np.asarray(members, bool)
    if given.shape != inside.shape or given.ndim != 1 or np.isnan(given).any():
        raise ConfigError(f"scores are {given.shape} and members {inside.shape}; expected (N,) each, and no NaN")
    if inside.all() or not inside.any():
        raise ConfigError(f"{inside.sum()} of {len(inside)} images are members; an attack needs members and others")
    if wrong := [fpr for fpr in fprs if not 0 <= fpr <= 1]:
        raise ConfigError(f"fprs has {wrong[0]:g}; expected rates of false alarms, from 0 to 1")
    from sklearn.metrics import roc_curve  # slow to import

    # Ranks have the order of scores and are finite; a threshold within a straight piece of the curve counts as well.
    false, true, _ = roc_curve(inside, rankdata(given), drop_intermediate=False)
    count, others = int(inside.sum()), int((~inside).sum())
    return Rates(
        auc=_auc(given, inside),
        balanced_accuracy=float(np.max(1 + true - false) / 2),
        tpr={fpr: clopper_pearson(round(float(true[false <= fpr].max()) * count), count) for fpr in fprs},
        members=count,
        outsiders=others,
        roc=(false, true),
    )


def _auc(scores: Vector, members: Flags) -> Rate:
    """The area under the ROC, with the interval of its logit.

    DeLong, DeLong, Clarke-Pearson, "Comparing the Areas under Two or More Correlated Receiver Operating Characteristic
    Curves", Biometrics 44(3), 1988: the variance over members of the share of non-members below them, and the reverse.
    """
    above, below = scores[members], scores[~members]
    m, n = len(above), len(below)
    ranks = rankdata(np.concatenate([above, below]))
    of_members = (ranks[:m] - rankdata(above)) / n
    of_others = 1 - (ranks[m:] - rankdata(below)) / m
    value = float(of_members.mean())
    variance = (of_members.var(ddof=1) / m if m > 1 else 0.25) + (of_others.var(ddof=1) / n if n > 1 else 0.25)
    if 0 < value < 1 and variance > 0:
        odds, half = math.log(value / (1 - value)), _Z * math.sqrt(variance) / (value * (1 - value))
        low, high = (1 / (1 + math.exp(-min(max(end, -700), 700))) for end in (odds - half, odds + half))
    else:  # every pair in one order, or all alike: as a share of so many independent pairs as the smaller side has
        exact = clopper_pearson(round(value * min(m, n)), min(m, n))
        low, high = exact.low, exact.high
    return Rate(value, low, high, round(value * m * n), m * n)


_Z = float(norm.ppf((1 + LEVEL) / 2))
