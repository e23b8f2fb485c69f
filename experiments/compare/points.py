"""Many runs in small tables, a row per point: their outcomes, over rounds, over a config key, against a cost.

Each table is empty where it would say nothing: of ``clients`` where all runs have as many.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.compare.ranks import mean_ranks
from experiments.compare.stages import RESULTS, outcome
from experiments.records.keys import METHOD_KEYS, differing_keys, setups, spelt, used
from experiments.records.results import costs
from experiments.records.runs import Run


@dataclass(frozen=True)
class Points:
    """What a picture shows, and of which runs.

    Attributes:
        means: A row per point, means over seeds; the first column is a name, of a setup or of several.
        seeds: A row per run and point: ``setup`` (that name), ``of`` (the run's own setup), ``seed``, and the rest.
    """

    means: pd.DataFrame
    seeds: pd.DataFrame

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return len(self.means) == 0

    @property
    def members(self) -> Mapping[str, list[str]]:
        """Each name's own setups."""
        found: dict[str, dict[str, None]] = {}
        for name, setup in zip(self.seeds["setup"], self.seeds["of"], strict=True):
            found.setdefault(str(name), {})[str(setup)] = None
        return {name: list(setups) for name, setups in found.items()}


def finals(runs: Sequence[Run]) -> Points:
    """``setup, n, accuracy, sd``: the outcome of each setup; of each seed ``setup, of, seed, accuracy``."""
    rows = [
        (setup, setup, run.seed, result.accuracy)
        for setup, run in _finished(runs)
        if (result := outcome(run)) is not None and math.isfinite(result.accuracy)
    ]
    seeds = pd.DataFrame(rows, columns=["setup", "of", "seed", "accuracy"])
    return Points(_mean_sd(seeds, ["setup"]), seeds)


def steps(runs: Sequence[Run]) -> Points:
    """``setup, step, n, accuracy, gain``: from the average, or the first merge there is, to the outcome.

    Only seeds that have all stages of a setup count, so that gains add up. Empty where no setup takes a step.
    """
    rows = []
    for setup, members in setups([run for run in runs if run.finished]).items():
        found = [{s.stage: s.accuracy for s in run.stages} for run in members]
        chain = [
            stage
            for stage in ("plain-average", "aggregated", "merged", "repaired", "retrained", "chosen", "head")
            if all(stage in one for one in found)
        ]
        means = [float(np.mean([f[stage] for f in found])) for stage in chain]
        if "aggregated" in chain and "plain-average" in chain:
            chain, means = chain[1:], means[1:]
        if len(chain) > 1:
            gains = [math.nan, *np.diff(means)]
            rows += [(setup, *step) for step in zip(chain, [len(members)] * len(chain), means, gains, strict=True)]
    return Points(pd.DataFrame(rows, columns=["setup", "step", "n", "accuracy", "gain"]), _nothing())


def rounds(runs: Sequence[Run]) -> Points:
    """``setup, round, n, accuracy, sd``: the outcome after each round; empty unless some setup has two.

    A head is made after the last round alone: before it stands the network that would have got one.
    """
    parts = [_nothing("round")]
    for setup, run in _finished(runs):
        result = outcome(run)
        if result is not None:
            m = run.metrics
            m = m[(m["split"] == "test") & m["client"].isna() & m["stage"].isin(RESULTS)]
            last = m[m["stage"] == result.stage]
            earlier = m[m["round"] < last["round"].min()]
            before = next((stage for stage in RESULTS if (earlier["stage"] == stage).any()), "")
            line = pd.concat([earlier[earlier["stage"] == before], last])
            parts.append(line[["round", "accuracy"]].assign(setup=setup, of=setup, seed=run.seed))
    seeds = pd.concat([part for part in parts if len(part)] or parts, ignore_index=True)
    seeds = seeds if seeds["round"].nunique() > 1 else seeds[:0]
    return Points(_mean_sd(seeds, ["setup", "round"]), seeds)


def over(key: str, runs: Sequence[Run]) -> Points:
    """``setup, <key>, n, accuracy, sd`` of the outcomes, setups named by other keys; empty if ``key`` is constant."""
    finished = [(setup, run) for setup, run in _finished(runs) if isinstance(used(run.config).get(key), int | float)]
    others = [k for k in differing_keys([run for _, run in finished]) if k != key] if finished else []
    rows = [
        (spelt(run.config, others), setup, run.seed, run.config[key], result.accuracy)
        for setup, run in finished
        if (result := outcome(run)) is not None
    ]
    seeds = pd.DataFrame(rows, columns=["setup", "of", "seed", key, "accuracy"])
    seeds = seeds.drop_duplicates(["setup", "seed", key], keep="last")
    varies = seeds.groupby("setup")[key].nunique().max() if len(seeds) else 0
    seeds = seeds if varies > 1 else seeds[:0]
    return Points(_mean_sd(seeds, ["setup", key]), seeds)


def against(cost: str, runs: Sequence[Run]) -> Points:
    """``setup, n, accuracy, sd, method, <cost>`` of the outcomes; empty unless ``cost`` is known and differs.

    ``cost`` is a column of :data:`experiments.records.results.COSTS`, or ``bytes``: those up and down together.
    """
    finished = [run for run in runs if run.finished]
    keys = [key for key in differing_keys(finished) if key in METHOD_KEYS] if finished else []
    rows = []
    for setup, run in _finished(runs):
        took, result = costs(run), outcome(run)
        both = (took["bytes_up"], took["bytes_down"])
        spent = (None if None in both else sum(filter(None, both))) if cost == "bytes" else took[cost]
        if spent is not None and result is not None:
            rows.append((setup, setup, run.seed, result.accuracy, spelt(run.config, keys), float(spent)))
    seeds = pd.DataFrame(rows, columns=["setup", "of", "seed", "accuracy", "method", cost])
    spent_by = seeds.groupby("setup", sort=False).agg({"method": "first", cost: "mean"}).reset_index()
    means = _mean_sd(seeds, ["setup"]).merge(spent_by, on="setup")
    return Points(means, seeds) if means[cost].nunique() > 1 else Points(means[:0], seeds[:0])


def sureness(runs: Sequence[Run]) -> Points:
    """``setup, confidence, accuracy, images, ece``: how often predictions of outcomes are right that are so sure.

    Bins of the seeds are put together by tenths of their confidence, weighted by images; ``ece`` is the mean over
    seeds. Empty where no run says how sure its networks are.
    """
    rows = [
        (
            setup,
            setup,
            run.seed,
            of.ece,
            int(b.confidence * 9.999),
            b.examples,
            b.examples * b.confidence,
            b.examples * b.accuracy,
        )
        for setup, run in _finished(runs)
        for of in run.calibration
        if (end := outcome(run)) is not None and of.stage == end.stage
        for b in of.bins
    ]
    names = ["setup", "of", "seed", "ece", "tenth", "images", "confidence", "accuracy"]
    seeds = pd.DataFrame(rows, columns=names)
    ece = seeds.groupby(["setup", "seed"], sort=False)["ece"].first().groupby("setup", sort=False).mean()
    sums = seeds.groupby(["setup", "tenth"])[["confidence", "accuracy", "images"]].sum().reset_index()
    sums = sums[sums["images"] > 0]
    means = sums.assign(
        confidence=sums["confidence"] / sums["images"],
        accuracy=sums["accuracy"] / sums["images"],
        ece=sums["setup"].map(ece),
    )
    return Points(means[["setup", "confidence", "accuracy", "images", "ece"]], seeds)


def ranks(runs: Sequence[Run]) -> Points:
    """``method, rank, blocks, critical``, best first; empty with fewer than two methods."""
    found = mean_ranks(runs)
    if found is None:
        return Points(pd.DataFrame({"method": [], "rank": [], "blocks": [], "critical": []}), _nothing())
    finished = _finished(runs)
    keys = [key for key in differing_keys([run for _, run in finished]) if key in METHOD_KEYS]
    of_method = [(spelt(run.config, keys), setup, run.seed, math.nan) for setup, run in finished]
    means = pd.DataFrame({"method": found.methods, "rank": found.ranks})
    return Points(
        means.assign(blocks=found.blocks, critical=found.critical),
        pd.DataFrame(of_method, columns=["setup", "of", "seed", "accuracy"]),
    )


def _finished(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """The finished runs that count, each with its setup."""
    groups = setups([run for run in runs if run.finished])
    return [(setup, run) for setup, members in groups.items() for run in members]


def _nothing(*columns: str) -> pd.DataFrame:
    return pd.DataFrame({name: [] for name in ("setup", "of", "seed", *columns, "accuracy")})


def _mean_sd(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """``by, n, accuracy, sd``: a row per group, in the order of the runs within a setup, by the second key."""
    grouped = table.groupby(by, sort=False)["accuracy"].agg(["count", "mean", "std"]).reset_index()
    named = grouped.rename(columns={"count": "n", "mean": "accuracy", "std": "sd"})
    order = {setup: k for k, setup in enumerate(dict.fromkeys(table["setup"]))}
    return named.sort_values(
        by, key=lambda c: c.map(order) if c.name == "setup" else c, kind="stable", ignore_index=True
    )
