"""What a page says before its tables: what was run, the headline numbers, what went wrong."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.compare.ranks import mean_ranks
from experiments.compare.stages import full_title, handed_out, outcome, outcomes
from experiments.records.keys import used
from experiments.records.runs import Run
from experiments.report.many import Many
from experiments.report.sortable import row_title
from experiments.report.tables import percent, points, probability
from server.records import Sizes

YARDSTICKS = (("fedavg", "aggregated", "plain-average"), ("client-best-retrained", "client-best"), ("ensemble",))
"""Stages that the outcome is held against in the headline; of each group the first that there is."""


@dataclass(frozen=True)
class Fact:
    """A headline number."""

    name: str
    value: str
    remark: str = ""


def what(config: Mapping[str, Any]) -> str:
    """What was run on what, as far as all runs agree."""
    doer, data = config.get("strategy"), config.get("dataset")
    return f"{doer or 'Strategies'} on {data}" if data else str(doer or "Runs")


def setting(run: Run) -> str:
    """The problem in one sentence."""
    c = run.config
    parts = [str(c["model"])] if "model" in c else []
    if "clients" in c:
        parts.append(f"{c['clients']} clients")
    if "partition" in c:
        alpha = f" (α = {c['partition-alpha']})" if "partition-alpha" in used(c) else ""
        parts.append(f"{c['partition']} partition{alpha}")
    if "init" in c:
        parts.append(f"{c['init']} initialisation")
    if "rounds" in c:
        parts.append(f"{c['rounds']} round{'s' if c['rounds'] != 1 else ''}")
    return ", ".join([*parts, f"seed {run.seed}"]) + "."


def problems(runs: Sequence[Run]) -> list[str]:
    """A line for each run that did not finish."""
    return [f"{'This run' if len(runs) == 1 else run.name} {run.problem}." for run in runs if not run.finished]


def headline(run: Run) -> Iterator[Fact]:
    """The outcome, and how it stands to the yardsticks that the run has."""
    result = outcome(run)
    if result is None:
        return
    yield Fact(
        full_title([s.title for s in run.stages], result.title),
        f"{percent(result.accuracy)} %",
        "; ".join(filter(None, ("accuracy on the test split", handed_out(run)))),
    )
    for names in YARDSTICKS:
        others = (other for name in names if (other := run.stage(name)) not in (None, result))
        if (other := next(others, None)) is not None:
            yield Fact(
                f"against {other.title}",
                f"{points(result.accuracy - other.accuracy)}",
                f"points; it has {percent(other.accuracy)} %",
            )


def effort(run: Run) -> Iterator[Fact]:
    """Replies, time and size, as far as known."""
    if run.asked is not None and run.answered is not None:
        yield Fact("Replies", f"{run.answered} of {run.asked}", "of what clients were asked for")
    if run.env and isinstance(run.env.get("seconds"), int | float):
        yield Fact("Time", _duration(float(run.env["seconds"])), f"on {run.env.get('device', 'unknown')}")
    sizes = run.sizes or Sizes()
    if sizes.parameters is not None:
        share = sizes.aligned_share
        remark = "" if share is None else f"{100 * share:.0f} % of them can be aligned"
        yield Fact("Parameters", f"{sizes.parameters:,}", remark)
    if sizes.bytes_up is not None and sizes.bytes_down is not None:
        yield Fact("Sent by clients", _bytes(sizes.bytes_up), f"and {_bytes(sizes.bytes_down)} sent to them")
    if privacy := run.privacy:
        bound = "no bound" if run.epsilon is None else f"ε ≤ {run.epsilon:.2f}"
        what, how = "of an image of any client, over all rounds", "DP-SGD"
        if privacy.unit == "client":
            what, how = "of any client, by the global networks of all rounds", "central"
        yield Fact("Privacy", bound, f"{what}, at δ = {privacy.delta:g} ({how})")


def best_setups(many: Many) -> Iterator[Fact]:
    """The outcome of each setup, best first, at most four."""
    for _, row in outcomes(many.table).head(4).iterrows():
        spread = f"± {percent(row['sd'])}, " if np.isfinite(row["sd"]) else ""
        yield Fact(
            many.name(row["setup"]),
            f"{percent(row['accuracy'])} %",
            f"{spread}n = {row['n']}, {row_title(many.table, row)}",
        )


def ranking(runs: Sequence[Run]) -> str:
    """What the picture of ranks rests on, in words."""
    found = mean_ranks(runs)
    if found is None:
        return ""
    text = f"Ranks over {found.blocks} block{'s' if found.blocks != 1 else ''} of one problem and one seed each"
    text += f"; {found.left_out} more lack a method and do not count" if found.left_out else ""
    text += (
        f". Friedman's test that all methods rank alike: p = {probability(found.p)}" if math.isfinite(found.p) else ""
    )
    text += f". Critical difference: {found.critical:.2f} ranks" if math.isfinite(found.critical) else ""
    return text + "."


def seeds(counts: Sequence[int]) -> str:
    """``[3, 3]`` -> ``"3 seeds each"``, ``[2, 3]`` -> ``"2 to 3 seeds each"``."""
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low} to {high} seeds each" if low != high else f"{high} seed{'s' if high != 1 else ''} each"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _bytes(count: float) -> str:
    power = min(int(math.log10(max(count, 1)) // 3), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
