"""Whose risk rises by merging: single images in merged networks, beside networks of one owner."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, norm

from fedmerge.errors import ConfigError
from fedmerge.privacy._rates import Rate, clopper_pearson
from fedmerge.privacy._seen import Flags, Labels, Seen, Vector

_FALSE = 0.05
"""Of the images that are said to rise or fall beyond chance, so many are expected there by chance."""


def risk(seen: Seen, labels: Labels | None = None) -> tuple[Vector, Vector]:
    r"""How much each image's membership shows, and the standard error of that.

    .. math:: r_x = \frac{\mu_{in,x} - \mu_{out,x}}{\sigma}

    with the mean confidence in x of the networks that were trained on it, that of the others, and one deviation
    :math:`\sigma` for all images. It is the signal that the likelihood ratio of Carlini et al. 2022 has for x.

    Networks that were trained on x saw more images of its class than others did, above all where clients hold few
    classes, and are surer of all of them. With ``labels`` that is no risk of x: from each confidence is taken how much
    surer its network is of the other outsiders of the class than networks usually are that they are outsiders of.

    Args:
        seen: Networks that were made in one way, some with each image and some without.
        labels: Int64 ``(N,)``, the class of each image; all images are of one if None, and nothing is taken off.

    Returns:
        Two float64 ``(N,)``; the risk is NaN of an image that all or none of the networks were trained on.

    Raises:
        ConfigError: Labels that do not fit.

    Example:
        >>> import numpy as np
        >>> from fedmerge.privacy import Seen, risk
        >>> sure = np.array([[3.0], [5.0], [0.0], [2.0]])
        >>> members = np.array([[True], [True], [False], [False]])
        >>> found, error = risk(Seen(sure, members, np.zeros((4, 1))))
        >>> round(float(found[0]), 3), float(error[0])  # 4 - 1 in deviations of the square root of 2
        (2.121, 1.0)
    """
    sure = seen.confidence if labels is None else _beside_its_class(seen, labels)
    known = np.isfinite(sure)
    sides = seen.members & known, seen.outside & known
    inside, outside = (side.sum(0) for side in sides)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [np.where(side, sure, 0).sum(0) / side.sum(0) for side in sides]
        left = np.where(sides[0] | sides[1], sure - np.where(seen.members, *means), np.nan)
        variance = np.nansum(left**2) / max(1, np.maximum(inside - 1, 0).sum() + np.maximum(outside - 1, 0).sum())
        found = (means[0] - means[1]) / np.sqrt(max(variance, _LEAST))
        return found, np.sqrt(1 / inside + 1 / outside)


def _beside_its_class(seen: Seen, labels: Labels) -> Vector:
    """Each confidence less how much surer than usual the network is of the class's other outsiders; NaN without any."""
    if np.shape(labels) != seen.confidence.shape[1:]:
        raise ConfigError(
            f"labels is {np.shape(labels)}; expected the class of each of {seen.confidence.shape[1]} images"
        )
    sure, outside = seen.confidence.astype(np.float64), seen.outside
    found = np.empty_like(sure)
    with np.errstate(invalid="ignore", divide="ignore"):
        usual = np.where(outside, sure, 0).sum(0) / outside.sum(0)  # some images are harder, whatever the network
        above = np.where(outside, sure - usual, 0)
        for label in np.unique(labels):
            of = labels == label
            total, count = above[:, of].sum(1, keepdims=True), outside[:, of].sum(1, keepdims=True)
            found[:, of] = sure[:, of] - (total - above[:, of]) / (count - outside[:, of])
    return found


@dataclass(frozen=True, eq=False)
class RiskChange:
    """How the risk of images differs between two ways to make networks; see :func:`risk_change`.

    Attributes:
        before: Float ``(N,)``: the risk of each image in networks of one owner.
        after: Likewise in the networks made of several.
        z: The difference in its own standard errors.
    """

    before: Vector
    after: Vector
    z: Vector

    def rises(self) -> Rate:
        """The share of images whose risk is higher, by chance too: half of them where nothing changed."""
        return clopper_pearson(int((self.z > 0).sum()), len(self.z))

    def surely(self, *, falls: bool = False) -> Rate:
        """The share of images whose risk rises (or falls) beyond chance.

        They are chosen so that of all that are chosen, 5 % are expected to be there by chance: Benjamini and Hochberg,
        "Controlling the False Discovery Rate", Journal of the Royal Statistical Society B 57(1), 1995.
        """
        chances = norm.sf(-self.z if falls else self.z)
        return clopper_pearson(int((false_discovery_control(chances) < _FALSE).sum()), len(self.z))

    @staticmethod
    def stack(parts: "Sequence[RiskChange]") -> "RiskChange":
        """The images of all ``parts``, one after the other."""
        return RiskChange(
            np.concatenate([p.before for p in parts]),
            np.concatenate([p.after for p in parts]),
            np.concatenate([p.z for p in parts]),
        )


def risk_change(single: Seen, merged: Seen, images: Flags | None = None, *, labels: Labels | None = None) -> RiskChange:
    r"""The risk of each image in ``merged`` networks beside that in networks of a ``single`` owner.

    .. math:: z_x = \frac{r'_x - r_x}{\sqrt{s'^2_x + s_x^2}}

    with the risks and standard errors of :func:`risk`. An average over members hides that merging can lower the risk of
    most and raise that of some.

    Iwahana, Ito, Yamada, Shibahara, Yamashita, Miura ask this of networks merged in pairs by permutation (Computer
    Security Symposium 2024, IPSJ, in Japanese). We could read no more than its abstract, so the measure is ours: a
    known attack's signal, from shadows that were merged as the target was, with the number of images taken into
    account.

    Args:
        single: Networks of one owner each.
        merged: Networks made of several, on the same images.
        images: Bool ``(N,)``: which images count; all if None. Those without a risk in both are left out.
        labels: As of :func:`risk`.

    Raises:
        ConfigError: Other images in ``merged``, ``images`` or ``labels``, or none whose risk is known in both.

    Example:
        >>> import numpy as np
        >>> from fedmerge.privacy import Seen, risk_change
        >>> rng = np.random.default_rng(0)
        >>> members = rng.random((40, 200)) < 0.5
        >>> def networks(effect):
        ...     return Seen(rng.normal(size=(40, 200)) + effect * members, members, np.zeros((40, 1)))
        >>> found = risk_change(networks(3.0), networks(1.0))
        >>> found.rises().value, found.surely(falls=True).value > 0.9
        (0.0, True)
    """
    if single.confidence.shape[1] != merged.confidence.shape[1]:
        raise ConfigError(
            f"{single.confidence.shape[1]} and {merged.confidence.shape[1]} images; expected the same images in both"
        )
    if images is not None and np.shape(images) != single.confidence.shape[1:]:
        raise ConfigError(f"images is {np.shape(images)}; expected a flag for each of {single.confidence.shape[1]}")
    (before, error_before), (after, error) = risk(single, labels), risk(merged, labels)
    z = (after - before) / np.sqrt(error**2 + error_before**2)
    known = np.isfinite(z) if images is None else np.isfinite(z) & np.asarray(images, bool)
    if not known.any():
        raise ConfigError(
            "no image has networks with it and without it among both; its risk asks for more shadow federations"
        )
    return RiskChange(before[known], after[known], z[known])


_LEAST = 1e-12
"""Of a variance: networks that agree to the last digit, as copies do."""
