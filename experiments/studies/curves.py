"""Two trained networks connected by a line, a polygon chain and a Bezier curve, as they are and aligned."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import fedmerge as fm
from experiments.report.theme import MARKS, SERIES, styled
from experiments.studies.lines import barriers
from experiments.studies.networks import Networks, Trained
from experiments.studies.page import table
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.streams import torch_stream
from fedmerge.types import Params

TITLES = {
    "line": "straight line", "chain": "polygon chain", "bezier": "Bezier curve",
    "subspace": "line whose ends are trained too",
}  # fmt: skip


@dataclass(frozen=True)
class Curves(Trained):
    """What is run.

    Attributes:
        kinds: ``"line"``, the kinds of :func:`fedmerge.curve`, and ``"subspace"``: :func:`fedmerge.subspace` of two.
        bends: Trained points of each curve.
        curve_epochs: Of the training of a curve.
        aligner: How the second network is aligned to the first.
        measured: On how many training images statistics of BatchNorm are measured anew at each point.
    """

    dataset: str = "digits"
    model: str = "resnet20"
    width: float = 0.25
    evaluated: int = 350
    epochs: int = 12
    points: int = 13
    kinds: tuple[str, ...] = ("line", "chain", "bezier", "subspace")
    bends: int = 1
    curve_epochs: int = 8
    aligner: str = "weight-matching"
    measured: int = 500


def cells(config: Curves, work: Work) -> Iterator[Cell]:
    """A way to connect a pair, unaligned or aligned, is a cell."""
    nets = Networks(config, work, augment=False)
    normed = any(isinstance(layer, _BatchNorm) for layer in nets.model.modules())

    def recomputed(params: Params) -> dict[str, Tensor]:
        few = nets.train.select(range(min(config.measured, len(nets.train))))
        return fm.repair(nets.model, params, data=few, method="recompute", device=work.device)

    def way(seed: int, aligner: str, kind: str) -> list[dict[str, float]]:
        a, b = nets.trained(2 * seed), nets.trained(2 * seed + 1)
        b = nets.aligned(b, a, aligner, seed)
        along, generator = None, torch_stream(seed, "curve")
        trained: dict[str, Any] = {"recipe": nets.recipe, "epochs": config.curve_epochs, "device": work.device}
        if kind == "subspace":
            a, b = fm.subspace(nets.model, [a, b], nets.train, generator=generator, **trained).vertices
            a, b = (recomputed(a), recomputed(b)) if normed else (a, b)  # they have moved away from their statistics
        elif kind != "line":
            along = fm.curve(
                nets.model, a, b, nets.train, kind=kind, bends=config.bends, generator=generator, **trained
            ).at  # fmt: skip
        return nets.line(a, b, along=along, correct=recomputed if normed else None)

    return each(way, seed=config.seeds, aligner=("none", config.aligner), kind=config.kinds)


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Barriers, and the highest test error along the way, as means over seeds."""
    keys = ["seed", "aligner", "kind"]
    worst = rows.groupby(keys, sort=False)["test_error"].max().rename("worst").reset_index()
    found = barriers(rows, keys).merge(worst, on=keys)
    return found.groupby(["aligner", "kind"], sort=False).mean(numeric_only=True)


def _ours(rows: pd.DataFrame) -> str:
    lines = [
        [
            "as trained" if aligner == "none" else aligner, TITLES.get(kind, kind), f"{of.train_loss:+.3f}",
            f"{of.test_loss:+.3f}", f"{100 * of.test_error:+.1f}", f"{100 * of.worst:.1f}",
            f"{100 * of.test_error_ends:.1f}",
        ]
        for (aligner, kind), of in _means(rows).iterrows()
    ]  # fmt: skip
    head = [
        "networks", "way", "barrier of the training loss", "of the test loss", "of the test error, points",
        "worst test error on the way, %", "mean test error of the ends, %",
    ]  # fmt: skip
    return table(head, lines)


def _answer(rows: pd.DataFrame) -> str:
    means = _means(rows)["train_loss"]
    aligner = next(name for name, _ in means.index if name != "none")
    raw, moved = means["none"], means[aligner]
    learned = [kind for kind in raw.index if kind in ("chain", "bezier")]
    said = " and ".join(f"{raw[kind]:+.3f} on a {TITLES[kind]}" for kind in learned)
    after = " and ".join(f"{moved[kind]:+.3f}" for kind in learned)
    return f"""
Between two networks as they are trained the barrier of the training loss is {raw["line"]:+.3f} on the straight line,
{said} found by training. Alignment alone leaves {moved["line"]:+.3f}
on the line; curves between aligned networks end at {after}."""


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(7.5, 5.4), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(2, 2, sharex=True, sharey="row")
    for column, (aligner, part) in enumerate(rows.groupby("aligner", sort=False)):
        for i, (kind, ways) in enumerate(part.groupby("kind", sort=False)):
            mean = ways.groupby("alpha").mean(numeric_only=True)
            drawn: dict[str, Any] = {
                "color": SERIES[i],
                "marker": MARKS[i],
                "label": TITLES.get(str(kind), kind),
                "markersize": 4,
            }
            axes[0, column].plot(mean.index, mean["train_loss"], **drawn)
            axes[1, column].plot(mean.index, 100 * mean["test_error"], **drawn)
        axes[0, column].set_title("as trained" if aligner == "none" else f"aligned, {aligner}", size=10)
        axes[1, column].set(xlabel="t along the way")
    axes[0, 0].set(ylabel="training loss")
    axes[1, 0].set(ylabel="test error, %")
    axes[0, 1].legend(fontsize=8.5)
    return fig


STUDY = Study(
    "curves",
    cells,
    "two networks connected by a line, a polygon chain, a Bezier curve and a trained line, as they are and aligned",
    title="Curves between two networks",
    source="""T. Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018,
arXiv:1802.10026, and the code beside it""",
    question="""
How high are loss and error along the straight line between two independently trained networks, along a chain of
straight pieces and along a Bezier curve whose middle points are trained, and what does alignment add?""",
    cost="a CPU minute",
    sizes={
        "quick": Curves(
            model="mlp", width=16, images=400, evaluated=200, epochs=8, points=5, curve_epochs=8
        ),
        "default": Curves(),
        "full": Curves(
            dataset="cifar10", model="resnet20", width=1, images=0, evaluated=10000, epochs=60, points=61,
            curve_epochs=60, measured=10000,
        ),
    },
    answer=_answer,
    theirs="""
CIFAR-10, VGG16, test error: ends 6.79 to 6.94 %; worst along a Bezier curve 7.75 %, along a polygon chain with one bend
8.08 %. Figures show a line whose middle is no better than chance.""",
    ours=_ours,
    explains="""
A smaller residual network, some 1,300 digits and few epochs, where they train VGG16 on all of CIFAR-10 for 200 and a
curve for 600. As theirs, statistics of BatchNorm are measured anew at each point between the ends, here on 500
training images. They do not align. The line whose ends are trained too is not theirs: a subspace of two vertices
(Wortsman et al., arXiv:2102.10472), from the same two networks on. Weight matching looks at weights alone; in narrow
networks with BatchNorm it can bring weights closer and leave the line as high as it was.""",
    draw=_draw,
)  # fmt: skip
