"""Pictures of many runs, each drawn from one small table that can be shown and downloaded beside it.

A picture is there only where its table has something to say: accuracy over ``clients`` where their number varies,
ranks where there are several methods, and so on. The style is that of :mod:`experiments.report.theme`; pictures of
outcomes alone share one scale.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from experiments.compare.points import Points, against, finals, over, ranks, steps, sureness
from experiments.compare.points import rounds as rounds_of
from experiments.compare.stages import full_title
from experiments.report.lines import draw_costs, draw_lines, draw_sureness, measured, spread
from experiments.report.many import Many
from experiments.report.plots import dots
from experiments.report.tables import percent, points
from experiments.report.theme import (
    INK,
    MOST_SERIES,
    PAGE,
    SERIES,
    SOFT,
    figure,
    height_of,
    legend,
    mark,
    rows,
    styled,
)

_AXES = {
    "clients": "number of clients",
    "partition-alpha": "Dirichlet α of the partition (smaller: less alike)",
    "rounds": "rounds of the whole run",
    "width": "width of the network",
}
_STEPS = (
    *(("merged", "align + merge", 0, ""), ("repaired", "repair", 2, "////"), ("retrained", "retrain", 4, "....")),
    *(("chosen", "best on val", 5, "xxxx"), ("head", "head", 3, "||||")),
)
"""Stage, what it is called, its colour, and its hatching, which tells it in grey."""
_YARDSTICKS = ("centralised", "fedavg", "ensemble", "client-best-retrained", "public-only")
_MOST_ROWS = 24


@styled
def draw_outcomes(many: Many, found: Points) -> Figure:
    """A row per setup, best first: its mean with its deviation, and a small dot per seed; then controls, in grey."""
    there = set(found.means["setup"])
    names = [setup for setup in many.groups if setup in there][:_MOST_ROWS]
    cut = len(found.means) - len(names)
    controls = _controls(many)
    titles = [many.name(name) for name in names] + [title for title, _ in controls]
    fig, ax = figure("What each setup ends with", 1.15 + height_of(titles, row=0.33))
    means = found.means.set_index("setup")
    for y, name in enumerate(names):
        row, ids = means.loc[name], many.of_names([name])
        own = found.seeds[found.seeds["setup"] == name]
        for seed, accuracy in zip(own["seed"], own["accuracy"], strict=True):
            dot = ax.plot(100 * accuracy, y + 0.24, "o", color=SOFT, alpha=0.65, markersize=3)
            mark(*dot, tip=f"{many.name(name)}, seed {seed}: {percent(accuracy)} %", setups=ids, seed=int(seed))
        bar = ax.errorbar(100 * row["accuracy"], y, xerr=spread(row["sd"]), fmt="o", color=SERIES[0], linewidth=2)
        mark(*bar.get_children(), tip=f"{many.name(name)}: {measured(row)}", setups=ids)
        if 100 * row["accuracy"] < many.limits[0]:
            note = ax.annotate(f"◂ {percent(row['accuracy'], row['sd'])}", (0.01, y), va="center", size=9,
                               xycoords=("axes fraction", "data"), color=SERIES[0])  # fmt: skip
            mark(note, tip=f"{many.name(name)}: {measured(row)}", setups=ids)
    for y, (title, row) in enumerate(controls, len(names)):
        bar = ax.errorbar(100 * row["accuracy"], y, xerr=spread(row["sd"]), fmt="D", color=SERIES[1], markersize=4.5)
        mark(*bar.get_children(), tip=f"{title} of {many.name(row['setup'])}: {measured(row)}",
             setups=many.of_names([row["setup"]]))  # fmt: skip
    rows(ax, titles, [many.of_names([n]) for n in [*names, *(row["setup"] for _, row in controls)]])
    low, high = many.limits
    held = [100 * row["accuracy"] for _, row in controls]
    ax.set_xlim(min([low, *(h - 0.5 for h in held if h > low - (high - low))]), max([high, *(h + 0.5 for h in held)]))
    of = f"; the best {len(names)} of {len(names) + cut} setups" if cut else ""
    ax.set_xlabel(f"accuracy on the test split, %{of}")
    marks = [
        *ax.plot([], [], "o", color=SERIES[0], label=f"outcome, mean{' ± sd' if means['sd'].notna().any() else ''}"),
        *ax.plot([], [], "o", color=SOFT, markersize=3, label="one seed"),
        *(ax.plot([], [], "D", color=SERIES[1], markersize=4.5, label="yardstick") if controls else []),
    ]
    legend(fig, marks, columns=3)
    return fig


def _controls(many: Many) -> list[tuple[str, pd.Series]]:
    """The yardsticks, each of the best setup that measured it; none where setups solve different problems."""
    table = many.table
    if table["setup"].nunique() > MOST_SERIES:
        return []
    found = [table[table["stage"] == stage] for stage in _YARDSTICKS]
    return [(str(of_stage.iloc[0]["title"]), of_stage.iloc[0]) for of_stage in found if len(of_stage)]


@styled
def draw_steps(many: Many, found: Points) -> Figure:
    """A line of bars per setup, from its average to its outcome, a colour per step."""
    table = found.means
    there = set(table["setup"])
    best = [setup for setup in many.groups if setup in there][:_MOST_ROWS]
    cut = table["setup"].nunique() - len(best)
    titles = [many.name(name) for name in best]
    fig, ax = figure("Where the accuracy comes from", 1.2 + height_of(titles, row=0.42))
    used: dict[str, dict[str, Any]] = {}
    for y, (setup, title) in enumerate(zip(best, titles, strict=True)):
        own, ids = table[table["setup"] == setup], many.of_names([setup])
        values = 100 * own["accuracy"].to_numpy()
        mark(*ax.plot(values[0], y, "|", color=INK, markersize=13, markeredgewidth=2.2),
             tip=f"{title}: begins at {values[0]:.2f} %", setups=ids)  # fmt: skip
        for k, step in enumerate(own["step"].iloc[1:], 1):
            _, label, colour, hatch = next(s for s in _STEPS if s[0] == step)
            used[label] = {"facecolor": SERIES[colour], "hatch": hatch, "edgecolor": PAGE, "linewidth": 0}
            gain = values[k] - values[k - 1]
            bar = ax.barh(y + 0.16 * (k - len(values) / 2), gain, 0.15, left=values[k - 1], **used[label])
            mark(*bar, tip=f"{title}, {label}: {points(gain / 100)} points", series=label, setups=ids)
        mark(*ax.plot(values[-1], y, "o", color=INK, markersize=5),
             tip=f"{title}: ends at {values[-1]:.2f} %", setups=ids)  # fmt: skip
        gains = ", ".join(f"{step:+.1f}" for step in np.diff(values)).replace("-", "−")
        note = ax.annotate(f"{values[-1]:.1f}  ({gains})", (values.max(), y), xytext=(7, 0),
                           textcoords="offset points", va="center", size=8.5)  # fmt: skip
        mark(note, setups=ids)
    rows(ax, titles, [many.of_names([setup]) for setup in best])
    shown = table[table["setup"].isin(best)]
    low, high = 100 * shown["accuracy"].min(), 100 * shown["accuracy"].max()
    ax.set_xlim(low - 0.06 * (high - low) - 0.5, high + 0.55 * (high - low) + 0.5)
    ax.set_xticks([tick for tick in MaxNLocator(6).tick_values(low, high) if low - 10 <= tick <= 100])
    ax.set_xlim(low - 0.06 * (high - low) - 0.5, high + 0.55 * (high - low) + 0.5)
    ax.set_xlabel(
        f"accuracy on the test split, %{f'; the best {len(best)} of {len(best) + cut} setups' if cut else ''}"
    )
    marks = [
        *ax.plot([], [], "|", color=INK, markersize=11, markeredgewidth=2.2, label="average, or first merge"),
        *(Patch(**used[label], label=label) for _, label, *_ in _STEPS if label in used),
        *ax.plot([], [], "o", color=INK, markersize=5, label="outcome"),
    ]
    legend(fig, marks, columns=3)
    return fig


@styled
def draw_ranks(many: Many, found: Points) -> Figure:
    """A dot per method at its mean rank, in a bar of Nemenyi's critical difference: what overlaps is not told apart."""
    table = found.means
    titles = [many.name(method) for method in table["method"]]
    ids = [many.of_names(found.members.get(method, [])) for method in table["method"]]
    fig, ax = figure("Mean rank", 1.15 + height_of(titles, row=0.32))
    half = float(table["critical"].iloc[0]) / 2
    for y, (row, title, setups) in enumerate(zip(table.to_dict("records"), titles, ids, strict=True)):
        if math.isfinite(half):
            mark(*ax.barh(y, 2 * half, 0.3, left=row["rank"] - half, color=SERIES[0], alpha=0.25), setups=setups)
        dot = ax.plot(row["rank"], y, "o", color=SERIES[0], markersize=7)
        mark(*dot, tip=f"{title}: mean rank {row['rank']:.2f}", setups=setups)
        note = ax.annotate(f"{row['rank']:.2f}", (row["rank"], y), xytext=(0, 6), textcoords="offset points",
                           ha="center", size=8.5)  # fmt: skip
        mark(note, setups=setups)
    rows(ax, titles, ids)
    reach = half if math.isfinite(half) else 0.2
    ax.set_xlim(min(0.8, table["rank"].min() - reach - 0.1), max(len(titles) + 0.2, table["rank"].max() + reach + 0.1))
    ax.set_xticks(range(1, len(titles) + 1, math.ceil(len(titles) / 8)))
    ax.set_xlabel(f"mean rank over {table['blocks'].iloc[0]:.0f} blocks (1 is the best)")
    return fig


def stages(many: Many) -> Points:
    """``setup, stage, n, accuracy, sd``; empty for more setups than a picture can tell apart."""
    table = many.table
    if table["setup"].nunique() > MOST_SERIES:
        table = table.iloc[:0]
    titles = table.groupby("setup", sort=False)["title"].transform(lambda t: [full_title(list(t), k) for k in t])
    shown = table.assign(stage=titles if len(table) else table["title"])[["setup", "stage", "n", "accuracy", "sd"]]
    return Points(shown, shown.iloc[:0])


@dataclass(frozen=True)
class Overview:
    """A kind of picture of many runs: file name, what it shows, the points behind it, and how they are drawn."""

    name: str
    title: str
    caption: str
    data: Callable[[Many], Points]
    draw: Callable[[Many, Points], Figure]


def _over(key: str, label: str) -> Overview:
    title = {"partition-alpha": "Accuracy over α", "rounds": "Accuracy over the number of rounds"}
    return Overview(
        f"accuracy-over-{'number-of-rounds' if key == 'rounds' else key}",
        title.get(key, f"Accuracy over {key}"),
        "Test accuracy of each setup's outcome; thin: each seed. The axis does not begin at zero.",
        lambda many: over(key, many.runs),
        partial(draw_lines, title.get(key, f"Accuracy over {key}"), label),
    )


def _against(cost: str, name: str, label: str, scale: float, caption: str) -> Overview:
    title = f"Accuracy against {name.removeprefix('accuracy-against-').replace('-', ' ')}"
    return Overview(
        name,
        title,
        f"Test accuracy of each setup's outcome against what it took, means over seeds; small: each seed. {caption}",
        lambda many: against(cost, many.runs),
        partial(draw_costs, title, cost, label, scale),
    )


OVERVIEWS: tuple[Overview, ...] = (
    Overview(
        "outcomes",
        "What each setup ends with",
        "Test accuracy of each setup's outcome, best first, and of what it should be held against. The axis does not "
        "begin at zero; an arrow stands for what lies below it.",
        lambda many: finals(many.runs),
        draw_outcomes,
    ),
    Overview(
        "steps",
        "Where the accuracy comes from",
        "From the plain average of the clients (or the strategy's first network) to the outcome, each step's gain or "
        "loss in its own colour; means over seeds.",
        lambda many: steps(many.runs),
        draw_steps,
    ),
    Overview(
        "accuracy-over-rounds",
        "Accuracy over the rounds",
        "Test accuracy of each setup's outcome after each round, mean and standard deviation over seeds; thin: each "
        "seed. A new head is made after the last round alone. The axis does not begin at zero.",
        lambda many: rounds_of(many.runs),
        partial(draw_lines, "Accuracy over the rounds", "round"),
    ),
    *(_over(key, label) for key, label in _AXES.items()),
    _against(
        "bytes", "accuracy-against-traffic", "sent up and down, MB", 1e6, "Traffic counts networks, not protocol."
    ),
    _against(
        "client_seconds",
        "accuracy-against-client-time",
        "local training, seconds summed over clients",
        1.0,
        "Seconds are those of the machine and its load; training shared between setups counts for each.",
    ),
    _against(
        "server_seconds",
        "accuracy-against-server-time",
        "alignment, merging, repair and retraining at the server, seconds",
        1.0,
        "Seconds are those of the machine and its load, without evaluations and controls.",
    ),
    Overview(
        "ranks",
        "Mean rank",
        "Outcomes ranked within each block (one problem, one seed), then averaged. Bars are as wide as Nemenyi's "
        "critical difference at 5 %: methods whose bars meet are not told apart by their ranks.",
        lambda many: ranks(many.runs),
        draw_ranks,
    ),
    Overview(
        "reliability",
        "How sure, and how often right",
        "How often a prediction of each setup's outcome is right, given how sure it is, over all seeds. On the "
        "diagonal it is as often right as it says; below it, it is too sure. ECE: expected calibration error, mean "
        "over seeds.",
        lambda many: sureness(many.runs),
        partial(draw_sureness, "How sure, and how often right"),
    ),
    Overview(
        "stage-accuracy",
        "Accuracy of each stage",
        "Test accuracy of each stage, mean and standard deviation over seeds, as in the table of stages.",
        stages,
        lambda many, _: dots(many),
    ),
)
"""All pictures of many runs, in the order of a report."""
