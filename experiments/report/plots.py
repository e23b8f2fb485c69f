"""Pictures of a run: accuracy of the stages and over the rounds, labels, climbs, interpolation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from experiments.compare.stages import stage_table
from experiments.records.runs import Climb, Curve, Run
from experiments.report import classes
from experiments.report.many import Many
from experiments.report.tables import percent
from experiments.report.theme import (
    GRID,
    INK,
    MARKS,
    MOST_SERIES,
    SERIES,
    SOFT,
    figure,
    figures,
    legend,
    mark,
    rows,
    styled,
    wrapped,
)
from fedmerge.errors import RunDirectoryError

FAMILIES: tuple[tuple[str, int, frozenset[str]], ...] = (
    (
        "merged after alignment",
        0,
        frozenset({"merged-paper-start", "merged", "repaired", "retrained", "chosen", "head"}),
    ),
    (
        "averaged without alignment",
        1,
        frozenset({"plain-average", "plain-average-retrained", "aggregated", "fedavg", "fedavg-recomputed"}),
    ),
    ("single clients", 6, frozenset({"client", "client-mean", "client-best", "client-best-retrained"})),
    (
        "other yardsticks",
        2,
        frozenset(
            {
                "pretrained",
                "ensemble",
                "ensemble-taught",
                "public-retrained",
                "public-only",
                "public-only-n",
                "centralised",
            }
        ),
    ),
)
"""Families of stages: name, index of the colour, members."""

_TELLING = frozenset({"merged", "repaired", "retrained", "chosen", "head", "aggregated", "plain-average", "ensemble"})
Vector = npt.NDArray[np.float64]


@styled
def stage_accuracy(run: Run) -> Figure:
    """Test accuracy of each stage of a run as bars; ± over clients.

    Raises:
        RunDirectoryError: the run has no measured stage.
    """
    table = stage_table(run)
    if table.empty:
        raise RunDirectoryError(f"nothing to draw: no stage was measured in {run.path}")
    return _bars(table, run, "clients")


@styled
def dots(many: Many) -> Figure:
    """Test accuracy of each stage over seeds: bars for one setup, a dot per setup for several."""
    if len(many.groups) == 1:
        return _bars(many.table, next(run for run in many.runs if run.finished), f"{many.table['n'].max()} seeds")
    return _dots(many)


def _bars(table: pd.DataFrame, run: Run, over: str) -> Figure:
    spread = f", ± sd over {over}" if table["sd"].notna().any() else ""
    rows_shown = table.to_dict("records")
    averaged = run.stage("aggregated") is not None
    fig, ax = figure("Accuracy of each stage", 1.35 + 0.3 * len(rows_shown))
    used: dict[str, str] = {}
    for y, row in enumerate(rows_shown):
        family, index = _family(row["stage"], averaged=averaged)
        colour = used[family] = SERIES[index]
        accuracy, sd = 100 * row["accuracy"], 100 * row["sd"]
        drawn: list[Artist] = [*ax.barh(y, accuracy, height=0.66, color=colour)]
        if math.isfinite(sd):
            drawn += ax.errorbar(accuracy, y, xerr=sd, color=INK, linewidth=1.2, capsize=2.5).get_children()
        said = percent(row["accuracy"], row["sd"])
        drawn.append(ax.text(np.nan_to_num(accuracy) + np.nan_to_num(sd) + 1.2, y, said, va="center", size=9.5))
        mark(*drawn, tip=f"{row['title']}: {said} %. {row['note']}", series=family)
    rows(ax, [row["title"] for row in rows_shown])
    ax.set(xlim=(0, 122), xticks=range(0, 101, 20), xlabel=f"accuracy on the test split, %{spread}")
    handles: list[Artist] = [Patch(color=colour, label=family) for family, colour in used.items()]
    legend(fig, handles + _mark_chance(ax, run), columns=2)
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
            line = ax.plot(
                np.arange(1, len(values) + 1),
                100 * values / (abs(values[-1]) or 1.0),
                color=SERIES[k % MOST_SERIES],
                marker=MARKS[k % len(MARKS)],
                alpha=1.0 if len(same) < 3 else 0.45,
                label=None if i else _climbed(name, same),
            )
            tip = f"{name}, round {climb.round}: {len(values)} sweeps, ends at {values[-1]:,.5g}"
            mark(*line, tip=tip, series=_climbed(name, same))
    ax.set(xlabel="sweep", ylabel="objective, % of its last value")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(names) <= MOST_SERIES:
        legend(fig, columns=1 if len(names) < 3 else 2)
    return fig


def interpolation(run: Run) -> Figure:
    """Loss and accuracy on the straight line between two clients, as they came and aligned, with the chord.

    The barrier in the legend is the largest height of the loss over its chord,
    ``max over alpha of L(alpha) - ((1 - alpha) L(0) + alpha L(1))``, or depth of the accuracy below it.

    Raises:
        RunDirectoryError: the run has no interpolation.
    """
    between = run.interpolation
    if between is None:
        raise RunDirectoryError(f"{run.path} has no interpolation between two clients")
    i, j = between.clients
    return line_between(
        f"From client {i} to client {j} in a straight line",
        f"α (0: client {i}, 1: client {j}); {between.split} split",
        between.alphas, between.naive, between.aligned,
    )  # fmt: skip


@styled
def line_between(title: str, label: str, alphas: Sequence[float], naive: Curve, aligned: Curve) -> Figure:
    """Loss and accuracy along two straight lines, as the networks came and aligned, each with its chord."""
    fig, (above, below) = figures(title, 5.2, rows=2)
    at = np.asarray(alphas)
    kinds: list[tuple[str, Curve, int, str, float]] = [
        ("as they came", naive, 1, "--", 3),
        ("aligned", aligned, 0, "-", 2),
    ]
    for ax, name, sign in ((above, "loss", 1), (below, "accuracy", -1)):
        for said, curve, colour, style, order in kinds:
            values = np.asarray(curve.loss if name == "loss" else [100 * a for a in curve.accuracy])
            chord = _chord(at, values)
            barrier = max(0.0, float(np.max(sign * (values - chord))))
            text = f"{barrier:.3f}" if name == "loss" else f"{barrier:.2f} points"
            said = f"{said}: barrier {text}"
            line = ax.plot(at, values, style, color=SERIES[colour], label=said, zorder=order)
            mark(*line, tip=said)
            ax.plot(at, chord, ":", color=SOFT, linewidth=1.2, zorder=1)
        if ax is above:
            ax.plot([], [], ":", color=SOFT, linewidth=1.2, label="chord between the ends")
        ax.set_ylabel("loss" if name == "loss" else "accuracy, %")
        ax.margins(x=0.01, y=0.08)
        ax.legend(loc="best", fontsize=9)
    below.set_xlabel(label)
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
        said = "clients: mean and range"
        band = ax.fill_between(rounds, 100 * clients["min"], 100 * clients["max"], color=SOFT, alpha=0.18, lw=0)
        mark(band, *ax.plot(rounds, 100 * clients["mean"], ":", color=SOFT, label=said), tip=said, series=said)
    titles = {stage.stage: stage.title for stage in run.stages}
    seen: dict[int, int] = {}
    for stage in server.columns:
        column = server[stage].dropna()
        _, colour = _family(str(stage), averaged="aggregated" in server)
        k = seen[colour] = seen.get(colour, -1) + 1
        name, at, values = titles.get(str(stage), str(stage)), column.index.to_numpy(), 100 * column.to_numpy()
        style: dict[str, Any] = {"color": SERIES[colour], "linestyle": ("-", "--", "-.", ":")[k % 4]}
        form = MARKS[k % len(MARKS)]
        mark(*ax.plot(at, values, linewidth=1.6, **style), tip=name, series=name)
        for one in range(0, len(at), max(1, len(at) // 12)):
            dot = ax.plot(at[one], values[one], form, color=SERIES[colour])
            mark(*dot, tip=f"{name}, round {at[one]}: {values[one]:.2f} %", series=name)
        ax.plot([], [], marker=form, linewidth=1.6, label=name, **style)
    ax.set(xlabel="round", ylabel="test accuracy, %")
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
        stage_accuracy,
    ),
    Picture(
        "accuracy-over-rounds",
        "Accuracy on the test split after each round. The axis does not begin at zero.",
        lambda run: run.rounds > 1,
        accuracy_over_rounds,
    ),
    Picture(
        "accuracy-by-class",
        "Share of each class's test images that a network gets right, worst class of the outcome first.",
        classes.known,
        classes.accuracy_by_class,
    ),
    Picture(
        "label-distribution",
        "Images of each class that each holder has, shaded by the class's share of the holder's images.",
        lambda run: bool(run.labels),
        classes.label_distribution,
    ),
    Picture(
        "reliability",
        "How often a prediction is right, given how sure the network is of it. On the diagonal it is as often right as "
        "it says; below it, it is too sure. ECE: expected calibration error, the mean distance weighted by images.",
        lambda run: bool(run.calibration),
        classes.reliability,
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


def _dots(many: Many) -> Figure:
    """Rows of stages with a dot per setup; only as much of the axis as the dots need."""
    table, setups = many.table, list(dict.fromkeys(many.table["setup"]))
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
        style: dict[str, Any] = {
            "fmt": MARKS[(k + k // MOST_SERIES) % len(MARKS)],
            "color": SERIES[k % MOST_SERIES],
            "markersize": 4.5,
            "linewidth": 1.2,
        }
        name = wrapped(many.name(setup), 58)
        for row in table[table["setup"] == setup].to_dict("records"):
            sd = 100 * np.nan_to_num(row["sd"])
            bar = ax.errorbar(100 * row["accuracy"], places[setup, row["stage"]], xerr=sd, **style)
            tip = f"{many.name(setup)}, {row['title']}: {percent(row['accuracy'], row['sd'])} %"
            mark(*bar.get_children(), tip=tip, series=name, setups=many.of_names([setup]))
        ax.errorbar([], [], xerr=[], label=name, **style)
    ax.set_yticks([(a + b) / 2 for a, b in pairwise(tops)], list(titles.values()), size=9)
    ax.set_ylim(y, 0)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")
    for top in tops[1:-1]:
        ax.axhline(top, color=GRID, linewidth=0.8)
    spread = f", ± sd over {table['n'].max()} seeds" if table["sd"].notna().any() else ""
    ax.set_xlabel(f"accuracy on the test split, %{spread}")
    ax.margins(x=0.04)
    legend(fig, columns=1)
    return fig


def _family(stage: str, *, averaged: bool) -> tuple[str, int]:
    """Name and colour of the family of ``stage``; ``averaged``: the strategy averages and aligns nothing."""
    if averaged and stage in ("retrained", "chosen", "head"):
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
