"""Whose risk rises: single images in one stage beside another, and members laid to their owners."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.audit.federations import Arena, Indices, labels_of
from experiments.audit.leakage import Leakage
from fedmerge.errors import ConfigError
from fedmerge.privacy import Labels, Seen, by_class, risk_change, source


@dataclass(frozen=True)
class Change:
    """How the risk of single images (:func:`fedmerge.privacy.risk`) is in a stage, beside a network of one owner.

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


def change(single: Seen, stage: Seen, labels: Labels) -> Change:
    """Compare the risk of each image in the networks of ``stage`` with that in those of one owner."""
    try:
        found = risk_change(single, stage, labels=labels)
    except ConfigError:  # too few networks for the risk of any image
        return Change()
    up, down = (found.surely(falls=falls).value for falls in (False, True))
    return Change(float(found.after.mean()), found.rises().value, up, down)


@dataclass(frozen=True)
class Whose:
    """Known members laid to their owner: by each client's own network, by the class alone, and by guessing."""

    source: float = float("nan")
    source_by_class: float = float("nan")
    source_chance: float = float("nan")


def whose(study: Leakage, single: Sequence[Seen]) -> Whose:
    """Of all federations together."""
    found = [guesses(study.arena, seen, study.arena.dealt(k)) for k, seen in enumerate(single)]
    true, networks, classes = (np.concatenate(parts) for parts in zip(*found, strict=True))
    own, by_label = (float((guess == true).mean()) for guess in (networks, classes))
    return Whose(own, by_label, guessing([owners for owners, _, _ in found]))


def guessing(owners: Sequence[Indices]) -> float:
    """The share of members that are laid to their owner by naming, in each federation, the client that holds most."""
    return sum(int(np.bincount(part).max()) for part in owners) / sum(map(len, owners))


def guesses(arena: Arena, seen: Seen, held: Sequence[Indices]) -> tuple[Indices, Indices, Indices]:
    """Of each audited member its owner, and who it is laid to by the clients' own networks and by the class alone.

    Args:
        arena: What is audited.
        seen: The clients' own networks.
        held: What each client holds.
    """
    labels, known = labels_of(arena.world.split), seen.members.any(0)
    counts = [np.bincount(labels[part], minlength=labels.max() + 1) for part in held]
    by_networks = source(seen.confidence[:, known])
    return seen.members[:, known].argmax(0), by_networks, by_class(labels[arena.audited][known], counts)
