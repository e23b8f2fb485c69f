"""The verdict on a run, or on each setup of many: what it ends with, and how that stands to FedAvg and the controls.

Terminal and page say it in the words that are made here, from the numbers of
:func:`experiments.compare.stages.compare`.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from experiments.compare.paired import CONFIDENCE, Paired
from experiments.compare.stages import CONTROL, Reference, compare, full_title, handed_out, outcomes
from experiments.records.keys import setups
from experiments.records.runs import Run

YARDSTICKS: Mapping[str, str] = {
    "fedavg": "FedAvg",
    CONTROL: "best client + retrain",
    "public-only": "public only",
    "public-only-n": "public only with all compute",
    "public-retrained": "public labels + retrain",
    "ensemble": "the ensemble of clients",
}
"""What an outcome is held against, in this order: a stage (or strategy), and its name in a sentence."""

_PUBLIC = ("public-only", "public-only-n")
_UNUSUAL = ("public-only-n", "public-retrained")
_LEVEL = 0.05


@dataclass(frozen=True)
class Against:
    """How an outcome stands to one of :data:`YARDSTICKS`.

    Attributes:
        stage: Which.
        accuracy: Its mean accuracy over the seeds of the pairs.
        difference: The outcome's accuracy minus it, paired by seed.
        p: The p-value, corrected for all tests of the comparison; NaN where it is not tested.
    """

    stage: str
    accuracy: float
    difference: Paired
    p: float = math.nan


@dataclass(frozen=True)
class Verdict:
    """What a setup ends with, and how that stands.

    Attributes:
        setup: What tells it from the other setups; ``""`` where there is no other.
        title: The whole name of its outcome, and which networks that are where it was chosen on val.
        accuracy: Mean accuracy over seeds.
        sd: Its sample standard deviation over seeds; NaN for one seed.
        n: Number of seeds.
        against: The yardsticks that it could be held against.
        missing: Those that were not computed, the unusual ones aside.
        images: How many test images an accuracy rests on; 0 where the run does not say.
    """

    setup: str
    title: str
    accuracy: float
    sd: float
    n: int
    against: tuple[Against, ...]
    missing: tuple[str, ...]
    images: int


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """A verdict on each setup of ``runs`` that has an outcome, the best accuracy first; of one run, one.

    Runs that did not finish are left out.
    """
    table = compare(runs)
    groups = setups([run for run in runs if run.finished])
    references = {name: Reference(name, [run for group in groups.values() for run in group]) for name in YARDSTICKS}
    found = []
    for _, row in outcomes(table).iterrows():
        members = groups[row["setup"]]
        tested = {row["reference"]: row["p_holm"], CONTROL: row["control_p_holm"]}
        against, missing = [], []
        for name, reference in references.items():
            pairs, difference = reference.pairs(members, row["stage"]), reference.contrast(members, row["stage"])
            if pairs and math.isfinite(difference.mean):
                mean = float(np.mean([other.accuracy for _, other in pairs]))
                p = float(tested.get(name, math.nan))
                against.append(Against(name, mean, difference, p))
            elif not pairs and name not in _UNUSUAL and all(reference.of(run) is None for run in members):
                missing.append(name)
        found.append(
            Verdict(
                setup=row["setup"],
                title=full_title(list(table.loc[table["setup"] == row["setup"], "title"]), row["title"])
                + _handed_out(members),
                accuracy=row["accuracy"],
                sd=row["sd"],
                n=row["n"],
                against=tuple(against),
                missing=tuple(missing),
                images=sum(members[0].labels.get("test", ())),
            )
        )
    return sorted(found, key=lambda verdict: (math.isnan(verdict.accuracy), -verdict.accuracy))


def sentence(verdict: Verdict) -> str:
    """``verdict`` as one sentence of plain text, every number in percent or points as in the tables."""
    better = [YARDSTICKS[a.stage] for a in verdict.against if a.stage in _PUBLIC and _shown(a) < 0]
    lead = f"Public data alone is better ({' and '.join(better)}): " if better else ""
    spread = f" ± {_percent(verdict.sd)}" if math.isfinite(verdict.sd) else ""
    seeds = f" over {verdict.n} seeds" if verdict.n > 1 else ""
    if not math.isfinite(verdict.accuracy):
        return f"{verdict.setup}: " * bool(verdict.setup) + f"{verdict.title} has no accuracy{seeds}."
    stands = ", ".join(_standing(against, verdict.n, first=i == 0) for i, against in enumerate(verdict.against))
    parts = [f"{verdict.title} ends at {_percent(verdict.accuracy)}{spread} %{seeds}" + (stands and f": {stands}")]
    if verdict.missing:
        parts.append(f"not computed: {', '.join(YARDSTICKS[name] for name in verdict.missing)}")
    parts.append(_certainty(verdict))
    return f"{verdict.setup}: " * bool(verdict.setup) + lead + "; ".join(filter(None, parts)) + "."


def _handed_out(runs: Sequence[Run]) -> str:
    """In brackets what was chosen on val, and by how many of several seeds."""
    counts = Counter(filter(None, map(handed_out, runs)))
    named = [f"{count} × {name}" if len(runs) > 1 else name for name, count in counts.most_common()]
    return f" ({', '.join(named)})" if named else ""


def _shown(against: Against) -> float:
    """The difference in points, as it is written."""
    return float(_percent(against.difference.mean))


def _standing(against: Against, seeds: int, *, first: bool) -> str:
    found, name = against.difference, YARDSTICKS[against.stage]
    half = (found.high - found.low) / 2
    unit = " points" if first else ""
    between = f" ± {_percent(half)}" if math.isfinite(half) else ""
    shown = _percent(abs(found.mean))
    if _shown(against) == 0:
        way = f"{shown}{between}{unit} from" if between else "level with"
    else:
        way = f"{shown}{between}{unit} {'above' if found.mean > 0 else 'below'}"
    p = "" if math.isnan(against.p) else ", p < 0.001" if against.p < 0.001 else f", p = {against.p:.3f}"
    of = f" over {found.n} of the seeds" if found.n < seeds else ""
    return f"{way} {name} ({_percent(against.accuracy)} %{of}{p})"


def _certainty(verdict: Verdict) -> str:
    """Whether the seeds can tell the outcome from what it is tested against; of one seed, what its test set leaves."""
    if verdict.n < 2:
        return "one seed cannot tell whether that is chance" + _left_by_images(verdict)
    tested = [a for a in verdict.against if a.stage in ("fedavg", CONTROL)]
    told, untold = [a for a in tested if a.p < _LEVEL], [a for a in tested if not a.p < _LEVEL]
    if not tested:
        return ""
    if not told:
        return f"{_seeds(untold)} cannot tell it from {_named(untold, 'or')}"
    but = f" but not from {_named(untold, 'or')}" if untold else ""
    return f"{_seeds(told)} tell it from {_named(told, 'and')}{but}"


def _seeds(tested: Sequence[Against]) -> str:
    """How many seeds the tests rest on."""
    counts = sorted({a.difference.n for a in tested})
    return f"{' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''}"


def _named(tested: Sequence[Against], word: str) -> str:
    return f" {word} ".join(YARDSTICKS[a.stage] for a in tested)


def _left_by_images(verdict: Verdict) -> str:
    """Wilson's interval of a share of so many test images (Wilson, JASA 22, 1927)."""
    if not verdict.images or not math.isfinite(verdict.accuracy):
        return ""
    correct = round(verdict.accuracy * verdict.images)
    between = stats.binomtest(correct, verdict.images).proportion_ci(CONFIDENCE, method="wilson")
    return (
        f", and its {verdict.images} test images alone leave {_percent(between.low)} to {_percent(between.high)} % "
        "(95 %, binomial)"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"
