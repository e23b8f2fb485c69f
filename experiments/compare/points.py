"""Many runs in small tables, a row per point: their outcomes over rounds, over a config key, against a cost.

Each table is empty where it would say nothing: of ``clients`` where all runs have as many.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd

from experiments.compare.ranks import mean_ranks
from experiments.compare.stages import outcome
from experiments.records.keys import METHOD_KEYS, differing_keys, setups, spelt, used
from experiments.records.results import costs
from experiments.records.runs import Run


def steps(runs: Sequence[Run]) -> pd.DataFrame:
    """``setup, step, n, accuracy, gain``: from the average, or the first merge there is, to the outcome.

    Only seeds that have all stages of a setup count, so that gains add up. Empty where no setup takes a step.
    """
    rows = []
    for setup, members in setups([run for run in runs if run.finished]).items():
        found = [{s.stage: s.accuracy for s in run.stages} for run in members]
        chain = [
            s for s in ("plain-average", "aggregated", "merged", "repaired", "retrained") if all(s in f for f in found)
        ]
        means = [float(np.mean([f[stage] for f in found])) for stage in chain]
        if "aggregated" in chain and "plain-average" in chain:
            chain, means = chain[1:], means[1:]
        if len(chain) > 1:
            gains = [math.nan, *np.diff(means)]
            rows += [(setup, *step) for step in zip(chain, [len(members)] * len(chain), means, gains, strict=True)]
    return pd.DataFrame(rows, columns=["setup", "step", "n", "accuracy", "gain"])


def rounds(runs: Sequence[Run]) -> pd.DataFrame:
    """``setup, round, n, accuracy, sd``: the outcome after each round; empty unless some setup has two."""
    parts = []
    for setup, members in setups([run for run in runs if run.finished]).items():
        for run in members:
            result = outcome(run)
            if result is not None:
                m = run.metrics
                of_stage = m[(m["stage"] == result.stage) & (m["split"] == "test") & m["client"].isna()]
                parts.append(of_stage[["round", "accuracy"]].assign(setup=setup))
    whole = pd.concat(parts) if parts else pd.DataFrame({"setup": [], "round": [], "accuracy": []})
    return (
        _mean_sd(whole, ["setup", "round"]) if whole["round"].nunique() > 1 else _mean_sd(whole[:0], ["setup", "round"])
    )


def over(key: str, runs: Sequence[Run]) -> pd.DataFrame:
    """``setup, <key>, n, accuracy, sd`` of the outcomes, setups named by other keys; empty if ``key`` is constant."""
    finished = [run for run in runs if run.finished and isinstance(used(run.config).get(key), int | float)]
    others = [k for k in differing_keys(finished) if k != key] if finished else []
    rows = [
        (spelt(run.config, others), run.seed, run.config[key], result.accuracy)
        for run in finished
        if (result := outcome(run)) is not None
    ]
    table = pd.DataFrame(rows, columns=["setup", "seed", key, "accuracy"]).drop_duplicates(
        ["setup", "seed", key], keep="last"
    )
    varies = table.groupby("setup")[key].nunique().max() if len(table) else 0
    return _mean_sd(table if varies > 1 else table[:0], ["setup", key])


def against(cost: str, runs: Sequence[Run]) -> pd.DataFrame:
    """``setup, n, accuracy, sd, method, <cost>`` of the outcomes; empty unless ``cost`` is known and differs.

    ``cost`` is a column of :data:`experiments.records.results.COSTS`, or ``bytes``: those up and down together.
    """
    finished = [run for run in runs if run.finished]
    keys = [key for key in differing_keys(finished) if key in METHOD_KEYS] if finished else []
    rows = []
    for setup, members in setups(finished).items():
        for run in members:
            took, result = costs(run), outcome(run)
            both = (took["bytes_up"], took["bytes_down"])
            spent = (None if None in both else sum(filter(None, both))) if cost == "bytes" else took[cost]
            if spent is not None and result is not None:
                rows.append((setup, result.accuracy, spelt(run.config, keys), float(spent)))
    table = pd.DataFrame(rows, columns=["setup", "accuracy", "method", cost])
    spent_by = table.groupby("setup", sort=False).agg({"method": "first", cost: "mean"}).reset_index()
    means = _mean_sd(table, ["setup"]).merge(spent_by, on="setup")
    return means if means[cost].nunique() > 1 else means[:0]


def ranks(runs: Sequence[Run]) -> pd.DataFrame:
    """``method, rank, blocks, critical``, best first; empty with fewer than two methods."""
    found = mean_ranks(runs)
    if found is None:
        return pd.DataFrame({"method": [], "rank": [], "blocks": [], "critical": []})
    return pd.DataFrame({"method": found.methods, "rank": found.ranks}).assign(
        blocks=found.blocks, critical=found.critical
    )


def _mean_sd(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """``by, n, accuracy, sd``: a row per group, in the order of the runs within a setup, by the second key."""
    grouped = table.groupby(by, sort=False)["accuracy"].agg(["count", "mean", "std"]).reset_index()
    named = grouped.rename(columns={"count": "n", "mean": "accuracy", "std": "sd"})
    order = {setup: k for k, setup in enumerate(dict.fromkeys(table["setup"]))}
    return named.sort_values(
        by, key=lambda c: c.map(order) if c.name == "setup" else c, kind="stable", ignore_index=True
    )
