"""Attacks on stages of federations: scores pooled over targets, and what they achieve."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields

import numpy as np

from experiments.records.audits import AttackRow, Curve
from fedmerge.errors import ConfigError
from fedmerge.privacy import ATTACKS, Flags, Labels, Rates, Seen, Vector, rates

LEAST = 4
"""Fewer shadow federations than this leave most images without one that lacks them."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Networks of one stage under attack, and the shadows that the attacker has for them.

    Attributes:
        target: The networks, and what is true of them.
        shadows: Networks of other federations.
        labels: The class of each image, int64 ``(N,)``.
    """

    target: Seen
    shadows: Seen
    labels: Labels


def in_turn(federations: Sequence[Seen], labels: Labels) -> list[Trial]:
    """Each federation as the target of all others."""
    return [
        Trial(one, Seen.stack([other for j, other in enumerate(federations) if j != i]), labels)
        for i, one in enumerate(federations)
    ]


@dataclass(frozen=True, eq=False)
class Scores:
    """What one attack says of the images of every network under attack.

    Attributes:
        values: Float ``(networks, N)``.
        members: Bool ``(networks, N)``.
        outside: Likewise: whether it is among those that members are told from.
        labels: Int64 ``(networks, N)``: the class.
    """

    values: Vector
    members: Flags
    outside: Flags
    labels: Labels

    def rates(self) -> Rates:
        """Of all networks together. A member is held against outsiders of its class, of the same network."""
        asked = self.members | self.outside
        kinds = self.labels + (1 + self.labels.max()) * np.arange(len(self.labels))[:, None]
        return rates(self.values[asked], self.members[asked], kinds=kinds[asked])

    def areas(self) -> Vector:
        """The area under the ROC of each network that has members, and outsiders of their classes."""
        found = []
        for k in range(len(self.values)):
            with suppress(ConfigError):
                found.append(Scores(*(getattr(self, f.name)[k : k + 1] for f in fields(self))).rates())
        return np.array([one.auc.value for one in found])


def scored(attack: str, trials: Sequence[Trial]) -> Scores:
    """Carry out ``attack`` on every network of ``trials``."""
    make = ATTACKS[attack].make
    values = [
        make(seen, population, trial.shadows)
        for trial in trials
        for seen, population in zip(trial.target.confidence, trial.target.population, strict=True)
    ]
    members, outside = ([getattr(trial.target, side) for trial in trials] for side in ("members", "outside"))
    labels = [np.broadcast_to(trial.labels, trial.target.members.shape) for trial in trials]
    return Scores(np.stack(values), *map(np.concatenate, (members, outside, labels)))


def rows(
    trials: Mapping[str, Sequence[Trial]], titles: Mapping[str, str], accuracy: Mapping[str, float], setup: str = ""
) -> tuple[list[AttackRow], list[Curve]]:
    """Every attack on every stage, and the ROC of each.

    Raises:
        ConfigError: Too few shadows for any attack.
    """
    found, curves = [], []
    for stage, of_stage in trials.items():
        shadows = min(len(trial.shadows) for trial in of_stage)
        if shadows < LEAST:
            raise ConfigError(f"{shadows} shadows of {stage} are too few; an attack needs at least {LEAST}")
        for attack in ATTACKS:
            scores = scored(attack, of_stage)
            made, areas = scores.rates(), scores.areas()
            one, tenth = made.tpr[0.01], made.tpr[0.001]
            found.append(
                AttackRow(
                    setup=setup, stage=stage, title=titles.get(stage, stage), attack=attack,
                    targets=len(scores.values), shadows=shadows, members=made.members, outsiders=made.outsiders,
                    auc=made.auc.value, auc_low=made.auc.low, auc_high=made.auc.high,
                    auc_sd=float(areas.std(ddof=1)) if len(areas) > 1 else None,
                    balanced_accuracy=made.balanced_accuracy, tpr_1=one.value, tpr_1_low=one.low, tpr_1_high=one.high,
                    tpr_01=tenth.value, tpr_01_low=tenth.low, tpr_01_high=tenth.high, enough_1=made.enough(0.01),
                    enough_01=made.enough(0.001), accuracy=accuracy.get(stage, float("nan")),
                )
            )  # fmt: skip
            curves.append(_curve(setup, stage, titles.get(stage, stage), attack, made))
    return found, curves


def _curve(setup: str, stage: str, title: str, attack: str, found: Rates, points: int = 60) -> Curve:
    """The ROC at rates of false alarms that are spread evenly on a logarithmic axis."""
    false, true = found.roc
    at = np.geomspace(1 / found.outsiders, 1, points)
    last = np.searchsorted(false, at * (1 + 1e-12), side="right") - 1
    return Curve(
        setup=setup, stage=stage, title=title, attack=attack, false=tuple(at.tolist()), true=tuple(true[last].tolist())
    )
