"""Pictures of many runs with an axis of numbers: accuracy over rounds and keys, and against costs."""

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.compare.points import Points
from experiments.report.many import Many
from experiments.report.tables import percent
from experiments.report.theme import (
    MARKS,
    MOST_SERIES,
    SERIES,
    SOFT,
    diagonal,
    figure,
    legend,
    logarithmic,
    mark,
    styled,
    wrapped,
)

_WIDE = 58
_LINES = ("-", "--", "-.", ":")


def measured(row: Any) -> str:
    """A mean with its deviation and its number of seeds."""
    return f"{percent(row['accuracy'], row['sd'])} %, n = {int(row['n'])}"


def spread(sd: float) -> float:
    """A standard deviation in percent, none where there is but one seed."""
    return 100 * sd if math.isfinite(sd) else 0.0


@styled
def draw_lines(title: str, label: str, many: Many, found: Points) -> Figure:
    """Accuracy of each name over the second column of its table; of many the best in colour, the rest grey.

    Behind each mean in colour, a thin line per seed.
    """
    means, x = found.means, str(found.means.columns[1])
    best = means.groupby("setup", sort=False)["accuracy"].last().sort_values(ascending=False, kind="stable").index
    coloured, others = list(best[:MOST_SERIES]), list(best[MOST_SERIES:])
    keys = {name: wrapped(many.name(name), _WIDE) for name in coloured}
    fig, ax = figure(title, 3.5 + 0.19 * sum(key.count("\n") + 1 for key in keys.values()))
    rest = f"{len(others)} other{'s' if len(others) != 1 else ''}"
    for name in reversed(others):
        rows = means[means["setup"] == name]
        line = ax.plot(rows[x].to_numpy(dtype=float), 100 * rows["accuracy"], color=SOFT, alpha=0.35, linewidth=1.0)
        tip = f"{many.name(name)}; at {rows[x].iloc[-1]:g}: {measured(rows.iloc[-1])}"
        mark(*line, tip=tip, series=rest, setups=many.of_names(found.members[name]))
    handles = []
    for i, (name, key) in enumerate(keys.items()):
        rows, ids, order = means[means["setup"] == name], many.of_names(found.members[name]), 4 - i / 10
        style: dict[str, Any] = {"color": SERIES[i], "zorder": order}
        at, mean, sd = rows[x].to_numpy(dtype=float), 100 * rows["accuracy"], 100 * rows["sd"].fillna(0)
        band = ax.fill_between(at, mean - sd, mean + sd, color=SERIES[i], alpha=0.14, linewidth=0)
        for seed, own in found.seeds[found.seeds["setup"] == name].groupby("seed"):
            thin = ax.plot(own[x].to_numpy(dtype=float), 100 * own["accuracy"], alpha=0.3, linewidth=0.7, **style)
            mark(*thin, tip=f"{many.name(name)}, seed {seed}", series=key, setups=ids, seed=int(str(seed)))
        line = ax.plot(at, mean, linestyle=_LINES[i % 4], linewidth=1.6, **style)
        mark(band, *line, tip=many.name(name), series=key, setups=ids)
        for k in range(0, len(at), max(1, len(at) // 12)):
            dot = ax.plot(at[k], mean.iloc[k], MARKS[i], **style)
            mark(*dot, tip=f"{many.name(name)}; {x} {at[k]:g}: {measured(rows.iloc[k])}", series=key, setups=ids)
        handles += ax.plot([], [], color=SERIES[i], marker=MARKS[i], linestyle=_LINES[i % 4], label=key)
    if others:
        handles += ax.plot([], [], color=SOFT, alpha=0.5, linewidth=1.0, label=rest)
    if x == "round":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    else:
        _values(ax, np.unique(means[x].to_numpy(dtype=float)))
        ax.set_ylim(*many.limits)
    ax.set(xlabel=label, ylabel="test accuracy, %")
    ax.set_title(f"mean ± sd over {_seeds(means['n'])}" if means["sd"].notna().any() else "", size=9, color=SOFT)
    legend(fig, handles, columns=1)
    return fig


def _values(ax: Any, values: Any) -> None:
    """Ticks at the values that were run, as far as they have room."""
    if values.min() > 0 and values.max() / values.min() >= 8:
        ax.set_xscale("log")
        ax.minorticks_off()
        values = [v for k, v in enumerate(values) if k == 0 or math.log10(v / values[k - 1]) > 0.06]
    elif len(values) > 8:
        ax.xaxis.set_major_locator(MaxNLocator(8))
        return
    ax.set_xticks(values, [f"{v:g}" for v in values])


@styled
def draw_costs(title: str, cost: str, label: str, scale: float, many: Many, found: Points) -> Figure:
    """A mark per setup: what it took, what it reached; colours are methods, the best where there are many.

    Around each mark in colour, a small one per seed.
    """
    table = found.means.assign(at=found.means[cost] / scale)
    best = table.groupby("method")["accuracy"].max().sort_values(ascending=False, kind="stable").index
    keys = {method: wrapped(many.name(method), _WIDE) for method in best[:MOST_SERIES]}
    fig, ax = figure(title, 3.5 + 0.19 * sum(key.count("\n") + 1 for key in keys.values()))
    others = len(best) - len(keys)
    rest = f"{others} other{'s' if others != 1 else ''}"
    handles = []
    for method in reversed(best):
        k = list(keys).index(method) if method in keys else -1
        style: dict[str, Any] = {"color": SERIES[k] if k >= 0 else SOFT, "alpha": 0.9 if k >= 0 else 0.4}
        form, key = (MARKS[k], keys[method]) if k >= 0 else (".", rest)
        for row in table[table["method"] == method].to_dict("records"):
            ids = many.of_names([row["setup"]])
            bar = ax.errorbar(row["at"], 100 * row["accuracy"], yerr=spread(row["sd"]), fmt=form, linewidth=1.2,
                              markersize=7, **style)  # fmt: skip
            said = f"{many.name(row['setup'])}: {measured(row)}; {row['at']:,.3g} {label.rpartition(' ')[2]}"
            mark(*bar.get_children(), tip=said, series=key, setups=ids)
            if 100 * row["accuracy"] < many.limits[0]:
                arrow = ax.plot(row["at"], many.limits[0], "v", clip_on=False, markersize=6, **style)
                mark(*arrow, tip=f"below the axis: {said}", series=key, setups=ids)
            own = found.seeds[found.seeds["setup"] == row["setup"]] if k >= 0 and row["n"] > 1 else table.iloc[:0]
            for one in own.to_dict("records"):
                dot = ax.plot(one[cost] / scale, 100 * one["accuracy"], form, markersize=2.5, **style)
                tip = f"{many.name(row['setup'])}, seed {one['seed']}: {percent(one['accuracy'])} %"
                mark(*dot, tip=tip, series=key, setups=ids, seed=int(one["seed"]))
    for k, key in enumerate(keys.values()):
        handles += ax.plot([], [], MARKS[k], color=SERIES[k], label=key)
    if others:
        handles += ax.plot([], [], ".", color=SOFT, alpha=0.6, label=rest)
    low, high = table["at"].min(), table["at"].max()
    ax.set(xlabel=label, ylabel="test accuracy, %")
    ax.margins(x=0.08)
    if low > 0 and high / low > 10:
        ax.set_xscale("log")
        logarithmic(ax.xaxis, low, high)
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.set_ylim(*many.limits)
    legend(fig, handles, columns=1)
    return fig


@styled
def draw_sureness(title: str, many: Many, found: Points) -> Figure:
    """Share of right predictions over their confidence: a line per setup, of many the best; larger: more images."""
    there = set(found.means["setup"])
    names = [setup for setup in many.groups if setup in there][:MOST_SERIES]
    keys = {}
    for name in names:
        ece = found.means.loc[found.means["setup"] == name, "ece"].iloc[0]
        keys[name] = wrapped(f"{many.name(name)}: ECE {100 * ece:.2f} points", _WIDE)
    fig, ax = figure(title, 4.3 + 0.19 * sum(key.count("\n") + 1 for key in keys.values()))
    handles = diagonal(ax)
    for i, (name, key) in enumerate(keys.items()):
        rows, ids = found.means[found.means["setup"] == name], many.of_names([name])
        line = ax.plot(100 * rows["confidence"], 100 * rows["accuracy"], color=SERIES[i], linewidth=1.4)
        mark(*line, tip=key, series=key, setups=ids)
        for row in rows.to_dict("records"):
            size = 3 + 6 * math.sqrt(row["images"] / rows["images"].max())
            dot = ax.plot(100 * row["confidence"], 100 * row["accuracy"], MARKS[i], color=SERIES[i], markersize=size)
            right = f"{row['images']:,} images at {percent(row['confidence'])} %: {percent(row['accuracy'])} % right"
            mark(*dot, tip=f"{many.name(name)}; {right}", series=key, setups=ids)
        handles += ax.plot([], [], color=SERIES[i], marker=MARKS[i], linewidth=1.4, label=key)
    legend(fig, handles, columns=1)
    return fig


def _seeds(counts: pd.Series) -> str:
    low, high = int(counts.min()), int(counts.max())
    return f"{high} seed{'s' if high != 1 else ''}" if low == high else f"{low} to {high} seeds"
