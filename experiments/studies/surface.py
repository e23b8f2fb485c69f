"""The loss on the plane through three trained networks, as they are and aligned to the first."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

import fedmerge as fm
from experiments.report.theme import INK, styled
from experiments.studies.networks import Networks, Trained
from experiments.studies.page import table
from experiments.studies.study import Cell, Study, Work, each

_DIGITS = 6


@dataclass(frozen=True)
class Surface(Trained):
    """What is run; ``points`` are those of the grid along each axis.

    Attributes:
        aligner: How the second and the third network are aligned to the first.
        margin: How far the grid reaches beyond the three, as a share of their extent.
    """

    images: int = 5000
    evaluated: int = 500
    points: int = 15
    aligner: str = "weight-matching"
    margin: float = 0.2


def cells(config: Surface, work: Work) -> Iterator[Cell]:
    """A plane is a cell: three networks a seed, unaligned and aligned."""
    nets = Networks(config, work)

    def plane(seed: int, aligner: str) -> list[dict[str, object]]:
        a, *others = (nets.trained(3 * seed + i) for i in range(3))
        three = [a, *(nets.aligned(b, a, aligner, seed) for b in others)]
        first, second, third = three
        found = fm.plane(
            nets.model, first, second, third, nets.seen["test"], points=config.points, margin=config.margin,
            device=work.device,
        )  # fmt: skip
        rows: list[dict[str, object]] = [
            _row("grid", x, y, found.losses[j, i], found.accuracies[j, i])
            for j, y in enumerate(found.ys)
            for i, x in enumerate(found.xs)
        ]
        ends = [fm.evaluate(nets.model, params, nets.seen["test"], device=work.device) for params in three]
        for name, (x, y), end in zip("abc", found.corners, ends, strict=True):
            rows.append(_row(name, x, y, end.loss, end.accuracy))
        mean = fm.evaluate(nets.model, fm.average(three), nets.seen["test"], device=work.device)
        rows.append(_row("mean", *found.corners.mean(0), mean.loss, mean.accuracy))
        return rows

    return each(plane, seed=config.seeds, aligner=("none", config.aligner))


def _row(point: str, *numbers: float) -> dict[str, object]:
    values = (float(f"{number:.{_DIGITS}g}") for number in numbers)
    return {"point": point, **dict(zip(("x", "y", "loss", "accuracy"), values, strict=True))}


def _planes(rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The two planes of the first seed, by what they are called."""
    first = rows[rows["seed"] == rows["seed"].iloc[0]].groupby("aligner", sort=False)
    return [("as trained" if name == "none" else str(name), part) for name, part in first]


def _ours(rows: pd.DataFrame) -> str:
    lines = []
    for name, part in _planes(rows):
        at = part[part["point"] != "grid"].set_index("point")
        grid = part[part["point"] == "grid"]
        side = np.hypot(at.loc["b", "x"] - at.loc["a", "x"], at.loc["b", "y"] - at.loc["a", "y"])
        ends = at.loc[list("abc")]
        lines.append(
            [
                name, f"{ends['loss'].mean():.3f}", f"{at.loc['mean', 'loss']:.3f}",
                f"{100 * ends['accuracy'].mean():.1f}", f"{100 * at.loc['mean', 'accuracy']:.1f}",
                f"{grid['loss'].max():.2f}", f"{side:.1f}",
            ]
        )  # fmt: skip
    head = [
        "plane", "mean loss of the three", "loss of their mean", "mean accuracy of the three, %",
        "accuracy of their mean, %", "highest loss on the grid", "distance of the first two",
    ]  # fmt: skip
    return table(head, lines)


def _answer(rows: pd.DataFrame) -> str:
    raw, moved = (part.set_index("point") for _, part in _planes(rows))
    ends = raw.loc[list("abc"), "accuracy"].mean()
    return f"""
As they are trained, the mean of three networks is right on {100 * raw.loc["mean", "accuracy"]:.1f} % of the test
images, each of them on {100 * ends:.1f} % in the mean. With two of them aligned to the third, their mean is right on
{100 * moved.loc["mean", "accuracy"]:.1f} %, at a loss of {moved.loc["mean", "loss"]:.3f} against
{raw.loc["mean", "loss"]:.3f}."""


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(8.0, 3.9), layout="constrained")
    axes, planes = fig.subplots(1, 2), _planes(rows)
    grids = [part[part["point"] == "grid"].pivot_table("loss", "y", "x") for _, part in planes]
    low, high = (pick(float(pick(g.min().min(), g.max().max())) for g in grids) for pick in (min, max))
    levels = np.geomspace(max(low, 1e-3), high, 13)
    shown: Any = None
    for ax, (name, part), grid in zip(axes, planes, grids, strict=True):
        shown = ax.contourf(grid.columns, grid.index, grid.to_numpy(), levels=levels, cmap="viridis_r", extend="both")
        ax.contour(grid.columns, grid.index, grid.to_numpy(), levels=levels, colors=INK, linewidths=0.3)
        for point in ("a", "b", "c", "mean"):
            (at,) = part[part["point"] == point].itertuples()
            ax.plot(at.x, at.y, "o" if point != "mean" else "x", color="#ffffff", markeredgecolor=INK, markersize=7)
            said = f"{point} {100 * at.accuracy:.1f} %"
            label = ax.annotate(said, (at.x, at.y), size=8.5, ha="center", xytext=(0, 7), textcoords="offset points")
            label.set_path_effects([withStroke(linewidth=2, foreground="#ffffff")])
        ax.set_title(name.replace("-", " "), size=10)
        ax.set(xlabel="distance in the space of weights", aspect="equal")
        ax.grid(visible=False)
    bar = fig.colorbar(shown, ax=axes, label="test loss", shrink=0.85)
    bar.ax.set_yscale("log")
    return fig


STUDY = Study(
    "loss-surface",
    cells,
    "the loss on the plane through three networks, as they are and aligned",
    title="The loss surface through three networks",
    source="""T. Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018,
arXiv:1802.10026 (such planes); W. Li et al., Deep Model Fusion: A Survey, arXiv:2309.15698 (basins and averages)""",
    question="""
Three networks are trained from initialisations of their own. What does the loss look like on the plane through them,
and what if two of them are first aligned to the third?""",
    cost="a CPU minute",
    sizes={
        "quick": Surface(dataset="digits", width=16, images=400, evaluated=200, epochs=5, points=5),
        "default": Surface(),
        "full": Surface(dataset="cifar10", model="vgg11", images=0, evaluated=2000, epochs=30, points=25),
    },
    answer=_answer,
    theirs="""
No numbers: pictures of such planes, and from the survey, of weight averaging, "The models being combined must share
part of the training trajectory or be located in the same 'basin' in the loss landscape." """,
    ours=_ours,
    explains="""
The pictures of the paper are of trainings that curves connect; these are of trainings that have nothing in common but
their data. Both planes are drawn in the same colours and at true scale; all losses are on the same test images.""",
    draw=_draw,
)
