"""A lower bound on epsilon by experiment: what one training that claims differential privacy gives away of canaries."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import binom

from fedmerge.errors import ConfigError

SHARES = (1.0, 0.3, 0.1)
"""Of the canaries, how many are guessed at: all, for weak scores, or only the most certain ones."""


@dataclass(frozen=True)
class OneRun:
    """What an audit by one training found.

    Attributes:
        epsilon: Lower bound; the training was no more private than that, at the level of confidence. 0 says nothing.
        correct: Right guesses, of those that gave the bound.
        guesses: How many these were.
        canaries: Of how many canaries.
    """

    epsilon: float
    correct: int
    guesses: int
    canaries: int


def audited_epsilon(correct: int, guesses: int, canaries: int, *, delta: float, confidence: float = 0.95) -> float:
    r"""The largest epsilon at which so many right guesses would still be too good to be true.

    Each of m = ``canaries`` examples was put into the training set with probability 1/2, by a coin of its own, and
    whoever sees the outcome says of r = ``guesses`` of them, at choice, whether they were in; v = ``correct`` are
    right. If the training is :math:`(\epsilon, \delta)`-differentially private, then with W binomial of r trials and
    chance :math:`e^\epsilon / (1 + e^\epsilon)`,

    .. math:: \Pr[\text{at least } v \text{ right}]
              \le \Pr[W \ge v] + 2 m \delta \max_{1 \le i \le v} \frac{\Pr[v > W \ge v - i]}{i},

    and every epsilon at which the right side is below 1 - ``confidence`` is refuted. The bound holds whatever the
    examples are and however they are guessed, but for guesses that were chosen after a look at the answers.

    Steinke, Nasr, Jagielski, "Privacy Auditing with One (1) Training Run", NeurIPS 2023, arXiv:2305.08846, theorem
    5.2. Neighbours are data sets with one example more or less, as in DP-SGD. A number of guesses says no more than so
    many randomised responses could: about log(guesses / 3) at 95 % if all are right.

    Args:
        correct: Right guesses.
        guesses: Guesses made; the others were abstained from.
        canaries: Examples that were put in or left out.
        delta: Of the claim that is tested.
        confidence: Probability with which the bound holds.

    Returns:
        At least 0, which nothing refutes.

    Raises:
        ConfigError: Numbers that cannot be.

    Example:
        >>> from fedmerge.privacy import audited_epsilon
        >>> round(audited_epsilon(100, 100, 1000, delta=0.0), 2), audited_epsilon(50, 100, 1000, delta=1e-5)
        (3.49, 0.0)
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ConfigError(
            f"{correct} right of {guesses} guesses at {canaries} canaries; expected no more right ones than guesses, "
            "and no more guesses than canaries"
        )
    if not 0 <= delta < 1 or not 0 < confidence < 1:
        raise ConfigError(
            f"delta is {delta:g} and confidence {confidence:g}; expected at least 0 and below 1, and within (0, 1)"
        )

    def excess(epsilon: float) -> float:
        """By how much the chance of so many right guesses is above what is too good to be true."""
        chance, below = float(expit(epsilon)), np.arange(1, correct + 1)
        tail = float(binom.sf(correct - 1, guesses, chance))
        beside = np.cumsum(binom.pmf(correct - below, guesses, chance)) / below if delta else np.zeros(1)
        return tail + 2 * canaries * delta * float(beside.max(initial=0)) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    high = 1.0
    while excess(high) < 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def one_run(
    scores: npt.ArrayLike,
    kept: npt.ArrayLike,
    *,
    delta: float,
    confidence: float = 0.95,
    shares: Sequence[float] = SHARES,
) -> OneRun:
    """Guess at canaries by their scores, and say what that proves.

    Of the canaries, the highest scores are guessed to have been in, and as many of the lowest to have been out. Several
    numbers of guesses are tried, each at a level so much stricter that all bounds hold together; the best counts.
    Equal scores are put in an order drawn by lot: that in which they were given may know the coins.

    Args:
        scores: Float ``(m,)``, the higher the likelier that the canary was in: a loss negated, a confidence
            (:func:`fedmerge.privacy.confidence`), or that less what networks say that never saw it.
        kept: Bool ``(m,)``: whether it was in. Each must have been decided by a fair coin of its own, and the scores
            must not know the coins but through the training.
        delta: Of the claim that is tested.
        confidence: Probability with which the bound holds.
        shares: Of the canaries that are guessed at, chosen before anything was seen.

    Raises:
        ConfigError: Scores that are no numbers, do not fit, or shares outside (0, 1].

    Example:
        >>> import numpy as np
        >>> from fedmerge.privacy import one_run
        >>> rng = np.random.default_rng(0)
        >>> kept = rng.random(1000) < 0.5
        >>> found = one_run(kept + rng.normal(0, 1, 1000), kept, delta=1e-5)  # a Gaussian of epsilon 4.4
        >>> 1 < found.epsilon < 4.4
        True
    """
    given, inside = np.asarray(scores, np.float64), np.asarray(kept, bool)
    if given.ndim != 1 or given.shape != inside.shape or np.isnan(given).any() or not len(given):
        raise ConfigError(f"scores are {given.shape} and kept {inside.shape}; expected (m,) each, and no NaN")
    if not shares or not all(0 < share <= 1 for share in shares):
        raise ConfigError(f"shares are {list(shares)}; expected at least one number, all above 0 and at most 1")
    lots = np.random.default_rng(0).permutation(len(given))
    order, level = np.lexsort((lots, given)), 1 - (1 - confidence) / len(shares)
    found = []
    for share in shares:
        half = int(share * len(given)) // 2
        correct = int((~inside[order[:half]]).sum() + inside[order[len(given) - half :]].sum())
        bound = audited_epsilon(correct, 2 * half, len(given), delta=delta, confidence=level)
        found.append(OneRun(bound, correct, 2 * half, len(given)))
    return max(found, key=lambda one: one.epsilon)
