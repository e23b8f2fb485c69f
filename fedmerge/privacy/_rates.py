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
        effective: As many non-members of equal weight say as much as these: fewer, where some weigh more than others.
        roc: Rates of false alarms and of members found, at every threshold, from (0, 0) to (1, 1).
    """

    auc: Rate
    balanced_accuracy: float
    tpr: dict[float, Rate]
    members: int
    outsiders: int
    effective: float
    roc: tuple[Vector, Vector]

    def enough(self, fpr: float) -> bool:
        """Whether there are non-members enough for a rate of false alarms: ten at least are expected."""
        return self.effective * fpr >= EXPECTED - 1e-9


FPRS = (0.01, 0.001)
"""The rates of false alarms that are asked for."""


def rates(
    scores: npt.ArrayLike, members: npt.ArrayLike, *, kinds: npt.ArrayLike | None = None, fprs: Sequence[float] = FPRS
) -> Rates:
    """Measure how well ``scores`` tell members from others.

    Where members have other classes than the rest, as those of a client of a skewed federation do, a score that knows
    no more than the class tells many of them, and says nothing of any one image. With ``kinds`` it is worth nothing:
    non-members weigh so that each kind is as frequent among them as among the members.

    Args:
        scores: Float ``(N,)``, the higher the likelier a member; infinite ones are beyond all others.
        members: Bool ``(N,)``.
        kinds: Whole numbers ``(N,)``: images are held against others of their kind, for example of one class in one
            network. Members of kinds without a non-member are left out, as are non-members of kinds without a member.
            All weigh alike if None.
        fprs: Rates of false alarms at which members are counted.

    Raises:
        ConfigError: A score that is no number, a rate outside [0, 1], kinds that do not fit, or there are no members or
            no others, or none of one kind.

    Example:
        >>> from fedmerge.privacy import rates
        >>> found = rates([3, 2, 1, 0], [True, True, False, False])
        >>> found.auc.value, found.balanced_accuracy, found.tpr[0.01].value, found.enough(0.01)
        (1.0, 1.0, 1.0, False)
        >>> kinds = [7, 7, 7, 5, 5, 5]  # members are mostly of kind 7, which is all that these scores know
        >>> rates(kinds, [True, True, False, True, False, False], kinds=kinds).auc.value
        0.5
    """
    given, inside = np.asarray(scores, np.float64), np.asarray(members, bool)
    if given.shape != inside.shape or given.ndim != 1 or np.isnan(given).any():
        raise ConfigError(f"scores are {given.shape} and members {inside.shape}; expected (N,) each, and no NaN")
    if inside.all() or not inside.any():
        raise ConfigError(f"{inside.sum()} of {len(inside)} images are members; an attack needs members and others")
    if wrong := [fpr for fpr in fprs if not 0 <= fpr <= 1]:
        raise ConfigError(f"fprs has {wrong[0]:g}; expected rates of false alarms, from 0 to 1")
    weights = np.ones(len(given))
    if kinds is not None:
        if np.shape(kinds) != given.shape:
            raise ConfigError(f"kinds is {np.shape(kinds)}; expected {given.shape}, the kind of each image")
        weights = _weights(np.asarray(kinds), inside)
        given, inside, weights = (part[weights > 0] for part in (given, inside, weights))
        if not len(given):
            raise ConfigError(
                "no member has a non-member of its kind, so none can be held against one; ask for more images"
            )
    from sklearn.metrics import roc_curve  # slow to import

    # Ranks have the order of scores and are finite; a threshold within a straight piece of the curve counts as well.
    false, true, _ = roc_curve(inside, rankdata(given), sample_weight=weights, drop_intermediate=False)
    count, others, at = int(inside.sum()), int((~inside).sum()), false * (1 - 1e-12)
    return Rates(
        auc=_auc(given, inside, weights[~inside]),
        balanced_accuracy=float(np.max(1 + true - false) / 2),
        tpr={fpr: clopper_pearson(round(float(true[at <= fpr].max()) * count), count) for fpr in fprs},
        members=count,
        outsiders=others,
        effective=_effective(weights[~inside]),
        roc=(false, true),
    )


def _weights(kinds: npt.NDArray[np.generic], members: Flags) -> Vector:
    """1 for members, and for others as many as there are members of their kind for each; 0 without a counterpart."""
    _, which = np.unique(kinds, return_inverse=True)
    inside, outside = (np.bincount(which[some], minlength=which.max() + 1) for some in (members, ~members))
    of_others = inside / np.maximum(outside, 1)
    weights: Vector = np.where(members, outside[which] > 0, of_others[which])
    return weights


def _effective(weights: Vector) -> float:
    """Kish, "Survey Sampling", 1965: a mean with these weights varies as one of so many equal ones does."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _auc(scores: Vector, members: Flags, weights: Vector) -> Rate:
    """The area under the ROC, with the interval of its logit; ``weights`` of the non-members.

    DeLong, DeLong, Clarke-Pearson, "Comparing the Areas under Two or More Correlated Receiver Operating Characteristic
    Curves", Biometrics 44(3), 1988: the variance over members of the share of non-members below them, and the reverse.
    """
    above, below = scores[members], scores[~members]
    m, n = len(above), _effective(weights)
    order = np.argsort(below)
    sums = np.concatenate([[0.0], np.cumsum(weights[order])])
    ranks = [np.searchsorted(below[order], above, side) for side in ("left", "right")]
    of_members = (sums[ranks[0]] + sums[ranks[1]]) / (2 * sums[-1])
    in_order = np.sort(above)
    of_others = 1 - sum(np.searchsorted(in_order, below, side) for side in ("left", "right")) / (2 * m)
    value = float(of_members.mean())
    variance = of_members.var(ddof=1) / m if m > 1 else 0.25
    variance += float((weights**2 * (of_others - value) ** 2).sum()) / sums[-1] ** 2 / (1 - 1 / n) if n > 1 else 0.25
    if 0 < value < 1 and variance > 0:
        odds, half = math.log(value / (1 - value)), _Z * math.sqrt(variance) / (value * (1 - value))
        low, high = (1 / (1 + math.exp(-min(max(end, -700), 700))) for end in (odds - half, odds + half))
    else:  # every pair in one order, or all alike: as a share of so many independent pairs as the smaller side has
        least = min(m, int(n + 1e-9))
        exact = clopper_pearson(round(value * least), least)
        low, high = exact.low, exact.high
    return Rate(value, low, high, round(value * m * len(below)), m * len(below))


_Z = float(norm.ppf((1 + LEVEL) / 2))
