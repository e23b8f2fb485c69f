"""Whose risk rises: single images in one stage beside another, and members laid to their owners."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control, norm

from experiments.audit.federations import labels_of
from experiments.audit.leakage import Leakage
from fedmerge.privacy import Seen, Vector, by_class, source


@dataclass(frozen=True)
class Change:
    r"""How the risk of single images is in a stage, beside a network of one owner.

    The risk of an image is :math:`(\mu_{in} - \mu_{out}) / \sigma`: how many deviations its confidence lies higher in
    the networks trained on it.

    Attributes:
        effect: Its mean over images; NaN where a stage has no two networks of a kind.
        rises: Share of images with a higher risk than in a single owner's network, by chance too.
        rises_surely: Share of those whose rise is beyond chance: Benjamini and Hochberg, 5 % false discoveries.
        falls_surely: Likewise of a fall.
    """

    effect: float = float("nan")
    rises: float = float("nan")
    rises_surely: float = float("nan")
    falls_surely: float = float("nan")


def change(single: Seen, stage: Seen) -> Change:
    """Compare the risk of each image in the networks of ``stage`` with that in those of one owner."""
    (alone, error_alone), (there, error) = risk(single), risk(stage)
    z = (there - alone) / np.sqrt(error**2 + error_alone**2)
    known = np.isfinite(z)
    if not known.any():
        return Change()
    up, down = (false_discovery_control(norm.sf(side * z[known])) < 0.05 for side in (1, -1))
    return Change(float(there[known].mean()), float((z[known] > 0).mean()), float(up.mean()), float(down.mean()))


def risk(seen: Seen) -> tuple[Vector, Vector]:
    """The risk of each image and its standard error, with one deviation for all images."""
    inside, outside = seen.members.sum(0), (~seen.members).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [
            np.where(chosen, seen.confidence, 0).sum(0) / chosen.sum(0) for chosen in (seen.members, ~seen.members)
        ]
        left = seen.confidence - np.where(seen.members, *means)
        sigma = np.sqrt(np.nansum(left**2) / max(1, np.maximum(inside - 1, 0).sum() + np.maximum(outside - 1, 0).sum()))
        found = (means[0] - means[1]) / sigma
        return found, np.sqrt(1 / inside + 1 / outside)


@dataclass(frozen=True)
class Whose:
    """Known members laid to their owner: by each client's own network, by the class alone, and by guessing."""

    source: float = float("nan")
    source_by_class: float = float("nan")
    source_chance: float = float("nan")


def whose(study: Leakage, single: Sequence[Seen]) -> Whose:
    """Of all federations together."""
    owners, networks, classes = [], [], []
    labels = labels_of(study.arena.world.split)
    for k, seen in enumerate(single):
        known = seen.members.any(0)
        owners.append(seen.members[:, known].argmax(0))
        networks.append(source(seen.confidence[:, known]))
        counts = [np.bincount(labels[held], minlength=labels.max() + 1) for held in study.arena.dealt(k)]
        classes.append(by_class(labels[study.arena.audited][known], counts))
    true = np.concatenate(owners)
    own, by_label = (float((np.concatenate(guess) == true).mean()) for guess in (networks, classes))
    return Whose(own, by_label, float(np.bincount(true).max() / len(true)))
