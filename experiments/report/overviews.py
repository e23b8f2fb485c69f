"""Pictures of many runs, each drawn from one small table that can be shown and downloaded beside it.

A picture is there only where its table has something to say: accuracy over ``clients`` where their number varies,
ranks where there are several methods, and so on. The style is that of :mod:`experiments.report.theme`.
"""

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from experiments.compare.points import against, over, ranks, rounds, steps
from experiments.compare.stages import compare, full_title
from experiments.records.runs import Run
from experiments.report.plots import stage_accuracy
from experiments.report.theme import (
    INK,
    MARKS,
    MOST_SERIES,
    SERIES,
    SOFT,
    figure,
    legend,
    styled,
)

_AXES = {
    "clients": "number of clients",
    "partition-alpha": "Dirichlet α of the partition (smaller: less alike)",
    "rounds": "rounds of the whole run",
    "width": "width of the network",
}
_STEPS = (("merged", "align + merge", 0), ("repaired", "repair", 2), ("retrained", "retrain", 4))
_WRAP = 34
_MOST_ROWS = 20


def short(setup: str) -> str:
    """A setup's name without keys whose values are words: ``"krum, clients=3"`` of ``"strategy=krum, clients=3"``."""
    return re.sub(r"(^|, )[\w-]+=(?!true\b|false\b|none\b|–)(?=[A-Za-z])", r"\1", setup)


def stages(runs: Sequence[Run]) -> pd.DataFrame:
    """``setup, stage, n, accuracy, sd``; empty for more setups than a picture can tell apart."""
    table = compare(runs)
    if table["setup"].nunique() > MOST_SERIES:
        table = table.iloc[:0]
    titles = table.groupby("setup", sort=False)["title"].transform(lambda t: [full_title(list(t), k) for k in t])
    return table.assign(stage=titles if len(table) else table["title"])[["setup", "stage", "n", "accuracy", "sd"]]


@styled
def draw_steps(runs: Sequence[Run]) -> Figure:
    """A line of bars per setup, from its average to its outcome, a colour per step."""
    table = steps(runs)
    best = table.groupby("setup")["accuracy"].last().sort_values(ascending=False, kind="stable").index[:_MOST_ROWS]
    cut = table["setup"].nunique() - len(best)
    table = table[table["setup"].isin(best)]
    names = list(dict.fromkeys(table["setup"]))
    fig, ax = figure("Where the accuracy comes from", 1.2 + sum(0.24 + 0.15 * len(_wrapped(n)) for n in names))
    used: dict[str, str] = {}
    for y, (_, rows) in enumerate(table.groupby("setup", sort=False)):
        values = 100 * rows["accuracy"].to_numpy()
        ax.plot(values[0], y, "|", color=INK, markersize=13, markeredgewidth=2.2)
        for k, step in enumerate(rows["step"].iloc[1:], 1):
            _, label, colour = next(s for s in _STEPS if s[0] == step)
            used[label] = SERIES[colour]
            ax.barh(
                y + 0.16 * (k - len(values) / 2), values[k] - values[k - 1], 0.15, left=values[k - 1], color=used[label]
            )
        ax.plot(values[-1], y, "o", color=INK, markersize=5)
        gains = ", ".join(f"{step:+.1f}" for step in np.diff(values)).replace("-", "−")
        ax.annotate(f"{values[-1]:.1f}  ({gains})", (values.max(), y), xytext=(7, 0), textcoords="offset points",
                    va="center", size=8.5)  # fmt: skip
    _rows(ax, names)
    low, high = 100 * table["accuracy"].min(), 100 * table["accuracy"].max()
    ax.set_xlim(low - 0.06 * (high - low) - 0.5, high + 0.55 * (high - low) + 0.5)
    ax.set_xticks([tick for tick in ax.get_xticks() if low - 10 <= tick <= 100])
    ax.set_xlim(low - 0.06 * (high - low) - 0.5, high + 0.55 * (high - low) + 0.5)
    ax.set_xlabel(
        f"accuracy on the test split, %{f'; the best {len(best)} of {len(best) + cut} setups' if cut else ''}"
    )
    marks = [
        *ax.plot([], [], "|", color=INK, markersize=11, markeredgewidth=2.2, label="average, or first merge"),
        *(Patch(color=used[label], label=label) for _, label, _ in _STEPS if label in used),
        *ax.plot([], [], "o", color=INK, markersize=5, label="outcome"),
    ]
    legend(fig, marks, columns=5)
    return fig


@styled
def draw_lines(table: Callable[[Sequence[Run]], pd.DataFrame], title: str, label: str, runs: Sequence[Run]) -> Figure:
    """Accuracy of each setup over the second column of its table; of many setups the best in colour, the rest grey."""
    found = table(runs)
    x = found.columns[1]
    best = found.groupby("setup", sort=False)["accuracy"].last().sort_values(ascending=False, kind="stable").index
    coloured = [name for name in dict.fromkeys(found["setup"]) if name in set(best[:MOST_SERIES])]
    lines = sum(len(_wrapped(name, 2 * _WRAP)) for name in coloured)
    fig, ax = figure(title, 3.1 + 0.2 * lines)
    others = [name for name in best if name not in coloured]
    for k, name in enumerate([*others, *coloured]):
        rows = found[found["setup"] == name]
        at, mean = rows[x].to_numpy(dtype=float), 100 * rows["accuracy"].to_numpy()
        sd = 100 * rows["sd"].fillna(0).to_numpy()
        if name in others:
            ax.plot(at, mean, color=SOFT, alpha=0.35, linewidth=1.0, label=f"{len(others)} others" if k == 0 else None)
            continue
        i = coloured.index(name)
        colour = SERIES[i]
        ax.fill_between(at, mean - sd, mean + sd, color=colour, alpha=0.14, linewidth=0)
        ax.plot(
            at,
            mean,
            color=colour,
            marker=MARKS[i],
            markevery=max(1, len(at) // 12),
            linestyle=("-", "--", "-.", ":")[i % 4],
            linewidth=1.6,
            label="\n".join(_wrapped(name, 2 * _WRAP)) or "mean over seeds",
        )
    values = np.unique(found[x].to_numpy(dtype=float))
    if x != "round" and values.min() > 0 and values.max() / values.min() >= 8:
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set_xticks(values, [f"{v:g}" for v in values])
        ax.minorticks_off()
    elif x != "round":
        ax.set_xticks(values, [f"{v:g}" for v in values])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    spread = f", mean ± sd over {_seeds(found['n'])}" if found["sd"].notna().any() else ""
    ax.set(xlabel=label, ylabel="accuracy on the test split, %")
    ax.set_title(spread.removeprefix(", "), size=9, color=SOFT)
    legend(fig, columns=1)
    return fig


@styled
def draw_costs(cost: str, label: str, scale: float, runs: Sequence[Run]) -> Figure:
    """A mark per setup: what it took, what it reached; colours are methods, the best where there are many."""
    table = against(cost, runs)
    methods = list(dict.fromkeys(table["method"]))
    best = table.groupby("method")["accuracy"].max().sort_values(ascending=False, kind="stable").index[:MOST_SERIES]
    named = [method for method in methods if method in set(best)]
    fig, ax = figure("Accuracy against cost", 3.2 + 0.2 * sum(len(_wrapped(n, 2 * _WRAP)) or 1 for n in named))
    for method in [m for m in methods if m not in named] + named:
        rows = table[table["method"] == method]
        k = named.index(method) if method in named else -1
        ax.errorbar(
            rows[cost] / scale,
            100 * rows["accuracy"],
            yerr=100 * rows["sd"].fillna(0),
            fmt=MARKS[k] if k >= 0 else ".",
            color=SERIES[k] if k >= 0 else SOFT,
            alpha=0.9 if k >= 0 else 0.4,
            linewidth=1.2,
            markersize=7,
            label=("\n".join(_wrapped(method, 2 * _WRAP)) or "all setups") if k >= 0 else None,
        )
    values = table[cost]
    if values.min() > 0 and values.max() / values.min() > 10:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    else:
        ax.set_xlim(left=0)
    ax.set(xlabel=label, ylabel="accuracy on the test split, %")
    ax.margins(x=0.08, y=0.12)
    legend(fig, columns=1)
    return fig


@styled
def draw_ranks(runs: Sequence[Run]) -> Figure:
    """A dot per method at its mean rank, in a bar of Nemenyi's critical difference: what overlaps is not told apart."""
    table = ranks(runs)
    names = list(table["method"])
    fig, ax = figure("Mean rank", 1.15 + sum(0.17 + 0.15 * len(_wrapped(n)) for n in names))
    half = float(table["critical"].iloc[0]) / 2
    for y, row in enumerate(table.to_dict("records")):
        if math.isfinite(half):
            ax.barh(y, 2 * half, 0.3, left=row["rank"] - half, color=SERIES[0], alpha=0.25)
        ax.plot(row["rank"], y, "o", color=SERIES[0], markersize=7)
        ax.annotate(f"{row['rank']:.2f}", (row["rank"], y), xytext=(0, 8), textcoords="offset points",
                    ha="center", size=8.5)  # fmt: skip
    _rows(ax, names)
    reach = half if math.isfinite(half) else 0.2
    ax.set_xlim(min(0.8, table["rank"].min() - reach - 0.1), max(len(names) + 0.2, table["rank"].max() + reach + 0.1))
    ax.set_xticks(range(1, len(names) + 1, max(1, len(names) // 10)))
    ax.set_xlabel(f"mean rank over {table['blocks'].iloc[0]:.0f} blocks (1 is the best)")
    return fig


def _rows(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), ["\n".join(_wrapped(name)) for name in names], size=9)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")


def _wrapped(setup: str, width: int = _WRAP) -> list[str]:
    return textwrap.wrap(short(setup), width)


def _seeds(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{high} seeds" if low == high else f"{low} to {high} seeds"


@dataclass(frozen=True)
class Overview:
    """A kind of picture of many runs: file name, title, what it shows, its table (empty: no picture), how to draw."""

    name: str
    title: str
    caption: str
    data: Callable[[Sequence[Run]], pd.DataFrame]
    draw: Callable[[Sequence[Run]], Figure]


def _over(key: str, label: str) -> Overview:
    title = {"partition-alpha": "Accuracy over α"}.get(key, f"Accuracy over {key}")
    return Overview(
        f"accuracy-over-{'number-of-rounds' if key == 'rounds' else key}",
        title if key != "rounds" else "Accuracy over the number of rounds",
        "Test accuracy of each setup's outcome. The axis does not begin at zero.",
        partial(over, key),
        lambda runs: draw_lines(partial(over, key), title, label, runs),
    )


def _against(cost: str, name: str, label: str, scale: float, caption: str) -> Overview:
    return Overview(
        name,
        f"Accuracy against {name.removeprefix('accuracy-against-').replace('-', ' ')}",
        f"Test accuracy of each setup's outcome against what it took, means over seeds. {caption}",
        partial(against, cost),
        lambda runs: draw_costs(cost, label, scale, runs),
    )


OVERVIEWS: tuple[Overview, ...] = (
    Overview(
        "steps",
        "Where the accuracy comes from",
        "From the plain average of the clients (or the strategy's first network) to the outcome, each step's gain or "
        "loss in its own colour; means over seeds.",
        steps,
        draw_steps,
    ),
    Overview(
        "accuracy-over-rounds",
        "Accuracy over the rounds",
        "Test accuracy of each setup's outcome after each round, mean and standard deviation over seeds. The axis does "
        "not begin at zero.",
        rounds,
        lambda runs: draw_lines(rounds, "Accuracy over the rounds", "round", runs),
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
        ranks,
        draw_ranks,
    ),
    Overview(
        "stage-accuracy",
        "Accuracy of each stage",
        "Test accuracy of each stage, mean and standard deviation over seeds, as in the table of stages.",
        stages,
        stage_accuracy,
    ),
)
"""All pictures of many runs, in the order of a report."""
