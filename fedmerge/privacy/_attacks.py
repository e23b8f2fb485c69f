"""Was this image in the training set? Membership inference by loss, LiRA and RMIA.

All read one number an image and network (:func:`fedmerge.privacy.confidence`), so what they find does not depend on the
order of a network's units. An attack gives each image a score, the higher the likelier a member; what a score is worth
is measured by :func:`fedmerge.privacy.rates`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.special import expit
from scipy.stats import norm

from fedmerge.errors import ConfigError
from fedmerge.privacy._seen import Flags, Seen, Vector
from fedmerge.registry import Entry, Registry


@dataclass(frozen=True)
class Attack(Entry):
    """An attack: ``make(confidence, population, shadows) -> scores``.

    ``confidence`` is float ``(N,)`` and ``population`` ``(Z,)``, of the network under attack; ``shadows`` are networks
    that the attacker trained. The scores are float64 ``(N,)``.
    """

    make: Callable[[Vector, Vector, Seen], Vector]

    called = ("confidence population shadows", "")


def loss_threshold(confidence: Vector, population: Vector, shadows: Seen) -> Vector:
    """Members have a smaller loss: one threshold for all images, and no shadow.

    Yeom, Giacomelli, Fredrikson, Jha, "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting", CSF
    2018, arXiv:1709.01604, adversary 1, with any threshold in place of the mean training loss.
    """
    return np.asarray(confidence, np.float64)


def lira(confidence: Vector, population: Vector, shadows: Seen, *, online: bool = True, enough: int = 32) -> Vector:
    r"""The likelihood ratio of two Gaussians an image: of shadows that were trained on it, and of those that were not.

    .. math:: \Lambda(x) = \log \frac{N(\phi; \mu_{in}(x), \sigma^2_{in}(x))}{N(\phi; \mu_{out}(x), \sigma^2_{out}(x))}

    Offline there are no shadows that were trained on the image, and the score is how far it lies above the others,
    :math:`(\phi - \mu_{out}) / \sigma_{out}`, which puts images in the order of the one-sided test of the paper.

    Carlini, Chien, Nasr, Song, Terzis, Tramèr, "Membership Inference Attacks From First Principles", IEEE S&P 2022,
    arXiv:2112.03570, algorithm 1 and section VI-A. Where one side has fewer than ``enough`` shadows, its variance is
    that of all images about their own means (the paper pools the values, which counts the spread between images too).
    An image that no shadow saw, or that all saw, is given the other side's mean, moved by the mean difference of the
    two over all images.

    Args:
        confidence: ``(N,)``, of the network under attack.
        population: Not read.
        shadows: The attacker's networks.
        online: Whether there are shadows that were trained on the images.
        enough: So many shadows of a kind give an image a variance of its own.

    Raises:
        ConfigError: Fewer than two shadows of a kind for every image.
    """
    outside = _moments(shadows.confidence, shadows.outside, enough, "were not trained on it")
    if not online:
        mean, deviation = _completed(outside[0]), outside[1]
        scores: Vector = (confidence - mean) / deviation
        return scores
    inside = _moments(shadows.confidence, shadows.members, enough, "were trained on it")
    if np.isnan(inside[0] - outside[0]).all():
        raise ConfigError(
            "no image is in some shadows and out of others, so nothing tells what training on an image changes; take "
            "lira-offline, or draw the shadows' images anew"
        )
    shift = np.nanmean(inside[0] - outside[0])
    mean_in = _completed(np.where(np.isnan(inside[0]), outside[0] + shift, inside[0]))
    mean_out = _completed(np.where(np.isnan(outside[0]), inside[0] - shift, outside[0]))
    ratio: Vector = norm.logpdf(confidence, mean_in, inside[1]) - norm.logpdf(confidence, mean_out, outside[1])
    return ratio


def _moments(values: Vector, chosen: Flags, enough: int, which: str) -> tuple[Vector, Vector]:
    """Mean (NaN where nothing is chosen) and deviation of the chosen values of each column."""
    counts = chosen.sum(0)
    if not (counts > 1).any():
        raise ConfigError(
            f"no image has two of the {len(values)} shadows that {which}; LiRA needs a variance: train more shadows, "
            "or take rmia-1"
        )
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(chosen, values, 0.0).sum(0) / counts
        squares = np.where(chosen, (values - mean) ** 2, 0.0).sum(0)
        own = squares / (counts - 1)
    pooled = squares[counts > 0].sum() / (counts[counts > 0] - 1).sum()
    variance = np.where(counts >= enough, own, pooled)
    return mean, np.sqrt(np.maximum(variance, _LEAST))


_LEAST = 1e-12
"""Of a variance: networks that agree to the last digit, as copies do."""


def _completed(mean: Vector) -> Vector:
    return np.where(np.isnan(mean), np.nanmean(mean), mean)


def rmia(
    confidence: Vector,
    population: Vector,
    shadows: Seen,
    *,
    references: int = 0,
    gamma: float = 2.0,
    a: float = 0.3,
) -> Vector:
    r"""The share of other images against which this one stands out, each held against what it is without the network.

    .. math:: \mathrm{score}(x)
              = \Pr_z\left[\frac{p(x \mid \theta)}{p(x)} \ge \gamma \frac{p(z \mid \theta)}{p(z)}\right]

    over images z of the population. p(x | theta) is the probability of x's class, p(x) its mean over networks trained
    on x and networks not trained on it, half each. Offline, with ``references`` networks that were not trained on x,
    whose mean is q, it is :math:`\tfrac12 ((1 + a) q + 1 - a)`; z, which nobody trained on, is always treated so.

    Zarifzadeh, Liu, Shokri, "Low-Cost High-Power Membership Inference Attacks", ICML 2024, arXiv:2312.03262; the
    offline p(x) is that of its appendix. Probabilities are those of the softmax. Of images that beat equally many
    others, the one with the larger ratio is put first: to the share is added less than half of what one other counts.

    Args:
        confidence: ``(N,)``, of the network under attack.
        population: ``(Z,)``, likewise.
        shadows: The attacker's networks.
        references: How many of those not trained on an image are used, the first of them; 0 for the online attack,
            with all shadows.
        gamma: How much an image must stand out.
        a: Of the offline attack: 1 where training on an image does not change its probability, 0 where it makes it 1.

    Raises:
        ConfigError: No image has a shadow that was not trained on it.
    """
    chances, out = _chance(shadows.confidence), shadows.outside
    if references:
        out = out & (out.cumsum(0) <= references)
    counts = out.sum(0)
    if not counts.any():
        raise ConfigError(f"each image is in all {len(shadows)} shadows; RMIA needs one without it: train more shadows")
    mean_out = _mean(chances, out)
    mean_in = np.full_like(mean_out, np.nan) if references else _mean(chances, shadows.members)
    # Of an image in all shadows only that is known; of one in none and out of none, or offline, the others' mean.
    mean_out = _completed(mean_out if references else np.where(np.isnan(mean_out), mean_in, mean_out))
    mean_in = np.where(np.isnan(mean_in), mean_out * a + 1 - a, mean_in)
    ratio = _chance(confidence) / ((mean_in + mean_out) / 2)
    first = slice(references or None)
    of_others = _chance(population) / (((1 + a) * _chance(shadows.population[first]).mean(0) + 1 - a) / 2)
    below = np.searchsorted(np.sort(of_others), ratio / gamma, side="right") / max(1, len(of_others))
    scores: Vector = below + ratio / (1 + ratio) / (2 * max(1, len(of_others)))
    return scores


def _chance(confidence: Vector) -> Vector:
    """The probability of the class; of a network that is utterly wrong not quite 0, so that ratios have a value."""
    found: Vector = expit(np.maximum(confidence, -300.0))
    return found


def _mean(values: Vector, chosen: Flags) -> Vector:
    """Mean of the chosen values of each column, NaN where nothing is chosen."""
    with np.errstate(invalid="ignore"):
        mean: Vector = np.where(chosen, values, 0.0).sum(0) / chosen.sum(0)
    return mean


ATTACKS: Registry[Attack] = Registry("attack", Attack, "attacks")
"""The membership attacks."""

ATTACKS.add(
    Attack("loss", loss_threshold, "one threshold on the loss, without shadows (Yeom et al. 2018)", title="Loss"),
    Attack("lira", lira, "likelihood ratio of an image's own Gaussians (Carlini et al. 2022)", title="LiRA"),
    Attack(
        "lira-offline",
        partial(lira, online=False),
        "LiRA without shadows that were trained on the image",
        title="LiRA, offline",
    ),
    Attack("rmia", rmia, "an image against other images, all shadows (Zarifzadeh et al. 2024)", title="RMIA"),
    *(
        Attack(
            f"rmia-{n}",
            partial(rmia, references=n),
            f"RMIA, offline, with {n} reference network{'s' if n > 1 else ''} an image",
            title=f"RMIA, {n} reference{'s' if n > 1 else ''}",
        )
        for n in (1, 2, 4)
    ),
)


def attacks() -> dict[str, str]:
    """Name -> one-line summary of every membership attack.

    Example:
        >>> from fedmerge.privacy import attacks
        >>> "lira" in attacks()
        True
    """
    return ATTACKS.summaries()
