"""Pictures of a run: accuracy of the stages and over the rounds, labels, climbs, interpolation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from experiments.compare.stages import compare, stage_table
from experiments.records.runs import Climb, Curve, Run
from experiments.report.tables import percent
from experiments.report.theme import (
    GRID,
    INK,
    MARKS,
    MOST_SERIES,
    PAGE,
    SERIES,
    SHADE,
    SOFT,
    figure,
    figures,
    legend,
    styled,
)
from fedmerge.errors import RunDirectoryError

FAMILIES: tuple[tuple[str, int, frozenset[str]], ...] = (
    ("merged after alignment", 0, frozenset({"merged-paper-start", "merged", "repaired", "retrained"})),
    (
        "averaged without alignment",
        1,
        frozenset({"plain-average", "plain-average-retrained", "aggregated"}),
    ),
    ("single clients", 6, frozenset({"client", "client-mean", "client-best", "client-best-retrained"})),
    ("other yardsticks", 2, frozenset({"pretrained", "ensemble", "public-only", "public-only-n", "centralised"})),
)
"""Families of stages: name, index of the colour, members."""

_TELLING = frozenset({"merged", "repaired", "retrained", "aggregated", "plain-average", "ensemble"})
Vector = npt.NDArray[np.float64]


@styled
def stage_accuracy(runs: Sequence[Run]) -> Figure:
    """Test accuracy of each stage: bars for one setup, a dot per setup for several; ± over seeds.

    Raises:
        RunDirectoryError: no run has a measured stage.
    """
    single = runs[0] if len(runs) == 1 else None
    table = _single(single) if single is not None else compare(runs)
    if table.empty:
        raise RunDirectoryError(f"nothing to draw: no stage was measured in {_names(runs)}")
    setups = list(dict.fromkeys(table["setup"]))
    if len(setups) > 1:
        return _dots(table, setups)
    over = "clients" if single is not None else f"{table['n'].max()} seeds"
    spread = f", ± sd over {over}" if table["sd"].notna().any() else ""
    rows = table.to_dict("records")
    averaged = runs[0].stage("aggregated") is not None
    fig, ax = figure("Accuracy of each stage", 1.35 + 0.3 * len(rows))
    used: dict[str, str] = {}
    for y, row in enumerate(rows):
        family, index = _family(row["stage"], averaged=averaged)
        colour = used[family] = SERIES[index]
        accuracy, sd = 100 * row["accuracy"], 100 * row["sd"]
        ax.barh(y, accuracy, height=0.66, color=colour)
        if math.isfinite(sd):
            ax.errorbar(accuracy, y, xerr=sd, color=INK, linewidth=1.2, capsize=2.5)
        ax.text(
            np.nan_to_num(accuracy) + np.nan_to_num(sd) + 1.2,
            y,
            percent(row["accuracy"], row["sd"]),
            va="center",
            size=9.5,
        )
    _stage_axis(ax, [row["title"] for row in rows])
    ax.set(xlim=(0, 122), xticks=range(0, 101, 20), xlabel=f"accuracy on the test split, %{spread}")
    handles: list[Artist] = [Patch(color=colour, label=family) for family, colour in used.items()]
    legend(fig, handles + _mark_chance(ax, runs[0]), columns=2)
    return fig


@styled
def label_distribution(run: Run) -> Figure:
    """Who holds how many images of which class: a row per holder, shaded by the class's share of that row.

    Raises:
        RunDirectoryError: the run has not said who holds what.
    """
    if not run.labels:
        raise RunDirectoryError(f"{run.path} does not say who holds which labels")
    holders, counts = list(run.labels), np.array(list(run.labels.values()))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, classes = counts.shape
    written = classes <= 12 and rows <= 30
    fig, ax = figure("Who holds which labels", 1.2 + (0.3 * rows if rows <= 40 else 6.0))
    # More or less of one colour, in shapes and not in an image: so a page can exchange it.
    ramp = ListedColormap([to_rgba(SHADE, level) for level in np.linspace(0, 1, 41)])
    top = max(float(share.max()), min(1.0, 3 / classes))  # equal shares stay pale
    image = ax.pcolormesh(range(classes), range(rows), share, cmap=ramp, vmin=0, vmax=top, linewidth=0)
    ax.invert_yaxis()
    if written:
        for (i, j), count in np.ndenumerate(counts):
            colour = SOFT if not count else INK if share[i, j] < 0.55 * top else PAGE
            ax.text(j, i, f"{count:,}" if count else "·", ha="center", va="center", size=8.5, color=colour)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    names = run.classes if classes <= 12 else [str(c) for c in range(classes)]
    longest = max(map(len, names))
    step = max(1, math.ceil(classes / 20))
    ax.set_xticks(range(0, classes, step), names[::step], rotation=30 if longest > 5 and step == 1 else 0,
                  ha="right" if longest > 5 and step == 1 else "center")  # fmt: skip
    step = max(1, math.ceil(rows / 40))
    totals = counts.sum(axis=1)
    ax.set_yticks(range(0, rows, step), [f"{holders[i]}  ({totals[i]:,})" for i in range(0, rows, step)])
    ax.set_xlabel("class" if written else "class (its number)")
    bar = fig.colorbar(image, ax=ax, fraction=0.03, pad=0.02, format=lambda v, _: f"{100 * v:.0f} %")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)
    bar.set_label("share of the holder's images", size=9)
    return fig


@styled
def merge_objective(run: Run) -> Figure:
    """How each merge climbs: its objective after each sweep as percent of where it ends.

    Objectives of different merges have different scales; divided by their last value they share one axis.

    Raises:
        RunDirectoryError: the run has no merge.
    """
    climbs = [climb for climb in run.merges if climb.objective]
    if not climbs:
        raise RunDirectoryError(f"{run.path} has no merge whose objective could be drawn")
    names = list(dict.fromkeys(climb.name for climb in climbs))
    fig, ax = figure("How the merges climb", 3.7)
    for k, name in enumerate(names):
        same = [climb for climb in climbs if climb.name == name]
        for i, climb in enumerate(same):
            values = np.asarray(climb.objective)
            ax.plot(
                np.arange(1, len(values) + 1),
                100 * values / (abs(values[-1]) or 1.0),
                color=SERIES[k % MOST_SERIES],
                marker=MARKS[k % len(MARKS)],
                alpha=1.0 if len(same) < 3 else 0.45,
                label=None if i else _climbed(name, same),
            )
    ax.set(xlabel="sweep", ylabel="objective, % of its last value")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(names) <= MOST_SERIES:
        legend(fig, columns=1 if len(names) < 3 else 2)
    return fig


@styled
def interpolation(run: Run) -> Figure:
    """Loss and accuracy on the straight line between two clients, as they came and aligned, with the chord.

    The barrier in the legend is the largest height of the loss over its chord,
    ``max over alpha of L(alpha) - ((1 - alpha) L(0) + alpha L(1))``, or depth of the accuracy below it.

    Raises:
        RunDirectoryError: the run has no interpolation.
    """
    line = run.interpolation
    if line is None:
        raise RunDirectoryError(f"{run.path} has no interpolation between two clients")
    i, j = line.clients
    fig, (above, below) = figures(f"From client {i} to client {j} in a straight line", 5.2, rows=2)
    alphas = np.asarray(line.alphas)
    kinds: list[tuple[str, Curve, int, str, float]] = [
        ("as they came", line.naive, 1, "--", 3),
        ("aligned", line.aligned, 0, "-", 2),
    ]
    for ax, name, sign in ((above, "loss", 1), (below, "accuracy", -1)):
        for label, curve, colour, style, order in kinds:
            values = np.asarray(curve.loss if name == "loss" else [100 * a for a in curve.accuracy])
            chord = _chord(alphas, values)
            barrier = max(0.0, float(np.max(sign * (values - chord))))
            text = f"{barrier:.3f}" if name == "loss" else f"{barrier:.2f} points"
            label = f"{label}: barrier {text}"
            ax.plot(alphas, values, style, color=SERIES[colour], label=label, zorder=order)
            ax.plot(alphas, chord, ":", color=SOFT, linewidth=1.2, zorder=1)
        if ax is above:
            ax.plot([], [], ":", color=SOFT, linewidth=1.2, label="chord between the ends")
        ax.set_ylabel("loss" if name == "loss" else "accuracy, %")
        ax.margins(x=0.01, y=0.08)
        ax.legend(loc="best", fontsize=9)
    below.set_xlabel(f"α (0: client {i}, 1: client {j}); {line.split} split")
    return fig


@styled
def accuracy_over_rounds(run: Run) -> Figure:
    """Test accuracy of the stages that were measured in more than one round, clients as mean and range.

    Where there are more stages than lines can be told apart, those of the strategy itself are drawn.

    Raises:
        RunDirectoryError: the run has one round or none.
    """
    test = run.metrics[run.metrics["split"] == "test"]
    server = test[test["client"].isna()].pivot_table("accuracy", "round", "stage", sort=False).sort_index()
    server = server.loc[:, server.notna().sum() > 1]
    if server.shape[1] > MOST_SERIES:
        server = server[[stage for stage in server.columns if stage in _TELLING]]
    clients = test[test["client"].notna()].groupby("round")["accuracy"].agg(["mean", "min", "max"])
    if len(clients) < 2 and server.empty:
        raise RunDirectoryError(f"{run.path} has no stage that was measured in two rounds or more")
    fig, ax = figure("Accuracy over the rounds", 4.2 + 0.1 * server.shape[1])
    if len(clients) > 1:
        rounds = clients.index.to_numpy()
        ax.fill_between(rounds, 100 * clients["min"], 100 * clients["max"], color=SOFT, alpha=0.18, lw=0)
        ax.plot(rounds, 100 * clients["mean"], ":", color=SOFT, label="clients: mean and range")
    titles = {stage.stage: stage.title for stage in run.stages}
    seen: dict[int, int] = {}
    for stage in server.columns:
        column = server[stage].dropna()
        _, colour = _family(str(stage), averaged="aggregated" in server)
        k = seen[colour] = seen.get(colour, -1) + 1
        ax.plot(
            column.index.to_numpy(),
            100 * column.to_numpy(),
            color=SERIES[colour],
            linestyle=("-", "--", "-.", ":")[k % 4],
            marker=MARKS[k % len(MARKS)],
            markevery=max(1, len(column) // 12),
            linewidth=1.6,
            label=titles.get(str(stage), str(stage)),
        )
    ax.set(xlabel="round", ylabel="accuracy on the test split, %")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(fig, columns=2)
    return fig


@dataclass(frozen=True)
class Picture:
    """A kind of picture of one run: file name, what it shows, when there is something to draw, and how."""

    name: str
    caption: str
    there: Callable[[Run], bool]
    draw: Callable[[Run], Figure]


PICTURES: tuple[Picture, ...] = (
    Picture(
        "stage-accuracy",
        "Accuracy on the test split of every network on the way, in the order of the table. "
        "A dashed line marks guessing.",
        lambda run: bool(run.stages),
        lambda run: stage_accuracy([run]),
    ),
    Picture(
        "accuracy-over-rounds",
        "Accuracy on the test split after each round. The axis does not begin at zero.",
        lambda run: run.rounds > 1,
        accuracy_over_rounds,
    ),
    Picture(
        "label-distribution",
        "Images of each class that each holder has, shaded by the class's share of the holder's images.",
        lambda run: bool(run.labels),
        label_distribution,
    ),
    Picture(
        "interpolation",
        "Loss and accuracy on the straight line between two clients' networks. What rises over the chord, or "
        "falls below it, is a barrier; alignment is meant to remove it.",
        lambda run: run.interpolation is not None,
        interpolation,
    ),
    Picture(
        "merge-objective",
        "Objective of each merge after each sweep over its layers, as percent of where it ends.",
        lambda run: any(climb.objective for climb in run.merges),
        merge_objective,
    ),
)
"""All pictures of a run, in the order of a report."""


def _single(run: Run) -> pd.DataFrame:
    """The stages of one run in the columns that :func:`compare` would give them."""
    return stage_table(run).assign(setup="", n=1)


def _dots(table: pd.DataFrame, setups: Sequence[str]) -> Figure:
    """Rows of stages with a dot per setup; only as much of the axis as the dots need."""
    titles = {
        str(stage): same.iloc[0] if same.nunique() == 1 else str(stage).replace("-", " ").capitalize()
        for stage, same in table.groupby("stage", sort=False)["title"]
    }
    tops, places, y = [], {}, 0.0
    for stage in titles:
        tops.append(y)
        for setup in table.loc[table["stage"] == stage, "setup"]:
            places[setup, stage] = y = y + 1
        y += 1
    tops.append(y)
    fig, ax = figure("Accuracy of each stage", 1.3 + 0.155 * y + 0.2 * len(setups))
    for k, setup in enumerate(setups):
        rows = table[table["setup"] == setup]
        ax.errorbar(
            100 * rows["accuracy"],
            [places[setup, stage] for stage in rows["stage"]],
            xerr=100 * rows["sd"].fillna(0),
            fmt=MARKS[(k + k // MOST_SERIES) % len(MARKS)],
            color=SERIES[k % MOST_SERIES],
            markersize=4.5,
            linewidth=1.2,
            label=setup,
        )
    _stage_axis(ax, list(titles.values()))
    ax.set_yticks([(a + b) / 2 for a, b in pairwise(tops)], list(titles.values()))
    ax.set_ylim(y, 0)
    for top in tops[1:-1]:
        ax.axhline(top, color=GRID, linewidth=0.8)
    spread = f", ± sd over {table['n'].max()} seeds" if table["sd"].notna().any() else ""
    ax.set_xlabel(f"accuracy on the test split, %{spread}")
    ax.margins(x=0.04)
    legend(fig, columns=1)
    return fig


def _stage_axis(ax: Axes, titles: Sequence[str]) -> None:
    ax.set_yticks(range(len(titles)), titles)
    ax.set_ylim(len(titles) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")


def _family(stage: str, *, averaged: bool) -> tuple[str, int]:
    """Name and colour of the family of ``stage``; ``averaged``: the strategy averages and aligns nothing."""
    if averaged and stage == "retrained":
        stage = "aggregated"
    for name, colour, members in FAMILIES:
        if stage in members:
            return name, colour
    return "others", 3


def _mark_chance(ax: Axes, run: Run) -> list[Artist]:
    """A dashed line at the accuracy of guessing, for the legend; none while the classes are unknown."""
    if not run.classes:
        return []
    chance = 100 / len(run.classes)
    return [ax.axvline(chance, color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), label="guessing")]


def _climbed(name: str, climbs: Sequence[Climb]) -> str:
    """``"merged: 8 sweeps"``, or for several climbs their number and the range of their sweeps."""
    sweeps = sorted(len(climb.objective) for climb in climbs)
    span = f"{sweeps[0]}" if sweeps[0] == sweeps[-1] else f"{sweeps[0]} to {sweeps[-1]}"
    stopped = sum(not climb.converged for climb in climbs)
    parts = [f"{len(climbs)} merges"] * (len(climbs) > 1)
    parts += [f"{span} sweep{'s' if sweeps[-1] > 1 else ''}"]
    parts += [f"{stopped} not converged" if len(climbs) > 1 else "not converged"] * bool(stopped)
    return f"{name}: {', '.join(parts)}"


def _chord(alphas: Vector, values: Vector) -> Vector:
    """The straight line between the ends of a curve."""
    first, last = float(values[0]), float(values[-1])
    return np.asarray((1 - alphas) * first + alphas * last)


def _names(runs: Sequence[Run]) -> str:
    return ", ".join(str(run.path) for run in runs) or "no run"
