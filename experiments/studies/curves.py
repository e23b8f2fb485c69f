"""Two trained networks connected by a line, a polygon chain and Bezier curves, as they are, aligned, and attacked."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

import fedmerge as fm
from experiments.report.theme import MARKS, SERIES, legend, styled
from experiments.studies.lines import barriers
from experiments.studies.networks import Networks, Trained
from experiments.studies.page import mean_ci, mean_sd, table
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.streams import torch_stream
from fedmerge.types import Params

TITLES = {
    "line": "straight line", "chain": "polygon chain", "bezier": "Bezier curve",
    "robust": "Bezier curve, trained on attacked images", "subspace": "line whose ends are trained too",
}  # fmt: skip


@dataclass(frozen=True)
class Curves(Trained):
    """What is run.

    Attributes:
        kinds: ``"line"``, the kinds of :func:`fedmerge.curve`, ``"robust"``, a Bezier curve that is trained on attacked
            images, and ``"subspace"``: :func:`fedmerge.subspace` of two.
        bends: Trained points of each curve.
        curve_epochs: Of the training of a curve.
        aligner: How the second network is aligned to the first.
        measured: On how many training images statistics of BatchNorm are measured anew at each point.
        epsilon: By how much the attack may move a pixel, of 255; test images are attacked at every point of every way.
        attack_steps: Of the attack.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: str = "digits"
    model: str = "resnet20"
    width: float = 0.25
    evaluated: int = 350
    epochs: int = 12
    points: int = 13
    kinds: tuple[str, ...] = ("line", "chain", "bezier", "robust", "subspace")
    bends: int = 1
    curve_epochs: int = 8
    aligner: str = "weight-matching"
    measured: int = 500
    epsilon: int = 16
    attack_steps: int = 7


def cells(config: Curves, work: Work) -> Iterator[Cell]:
    """A way to connect a pair, unaligned or aligned, is a cell."""
    nets, attack = Networks(config, work, augment=False), fm.PGD(config.epsilon, config.attack_steps)
    normed = any(isinstance(layer, _BatchNorm) for layer in nets.model.modules())

    def recomputed(params: Params) -> dict[str, Tensor]:
        few = nets.train.first(config.measured)
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
            trained |= {"kind": "bezier", "attack": attack} if kind == "robust" else {"kind": kind}
            along = fm.curve(nets.model, a, b, nets.train, bends=config.bends, generator=generator, **trained).at
        how: dict[str, Any] = {"along": along, "correct": recomputed if normed else None}
        hard = fm.interpolate(
            nets.model, a, b, nets.seen["test"], points=config.points, attack=attack, device=work.device, **how
        )
        rows = zip(nets.line(a, b, **how), hard.losses, hard.accuracies, strict=True)
        return [
            {**row, "attacked_loss": float(f"{loss:.6g}"), "attacked_error": float(f"{1 - accuracy:.6g}")}
            for row, loss, accuracy in rows
        ]

    return each(way, seed=config.seeds, aligner=("none", config.aligner), kind=config.kinds)


def _ways(rows: pd.DataFrame) -> dict[tuple[str, str], pd.DataFrame]:
    """Aligner and kind -> barriers, the highest test error along the way, errors on attacked images, a row a seed."""
    keys = ["seed", "aligner", "kind"]
    errors = [
        {
            **dict(zip(keys, key, strict=True)),
            "worst": way["test_error"].max(),
            "attacked_worst": way["attacked_error"].max(),
            "attacked_middle": way["attacked_error"].iloc[len(way) // 2],
            "attacked_ends": way["attacked_error"].iloc[[0, -1]].mean(),
        }
        for key, way in rows.groupby(keys, sort=False)
    ]
    found = barriers(rows.drop(columns=["attacked_loss", "attacked_error"]), keys).merge(pd.DataFrame(errors), on=keys)
    return dict(iter(found.groupby(["aligner", "kind"], sort=False)))


def _ours(rows: pd.DataFrame) -> str:
    lines = [
        [
            "as trained" if aligner == "none" else aligner, TITLES.get(kind, kind), mean_sd(of["train_loss"], 3, 1),
            mean_sd(of["test_loss"], 3, 1),
            *map(mean_sd, (of[name] for name in (
                "test_error", "worst", "test_error_ends", "attacked_middle", "attacked_worst", "attacked_ends"
            ))),
        ]
        for (aligner, kind), of in _ways(rows).items()
    ]  # fmt: skip
    head = [
        "networks", "way", "barrier of the training loss", "of the test loss", "of the test error, points",
        "worst test error on the way, %", "mean test error of the ends, %", "attacked: test error in the middle, %",
        "worst on the way, %", "mean of the ends, %",
    ]  # fmt: skip
    return table(head, lines)


def _answer(rows: pd.DataFrame) -> str:
    ways = _ways(rows)
    aligner = next(name for name, _ in ways if name != "none")
    raw, moved = ({kind: way for (name, kind), way in ways.items() if name == of} for of in ("none", aligner))
    learned = [kind for kind in raw if kind in ("chain", "bezier")]

    def barrier(way: pd.DataFrame) -> str:
        return mean_sd(way["train_loss"], 2, 1)

    def less(way: pd.DataFrame, other: pd.DataFrame, column: str, **shown: int) -> str:
        return mean_ci(way.set_index("seed")[column] - other.set_index("seed")[column], **shown)

    said = " and ".join(f"{barrier(raw[kind])} on a {TITLES[kind]}" for kind in learned)
    after = " and ".join(barrier(moved[kind]) for kind in learned)
    change = ", ".join(less(moved[kind], raw[kind], "train_loss", digits=2, factor=1) for kind in ("line", *learned))
    text = f"""
Between two networks as they are trained the barrier of the training loss, a mean over seeds, is {barrier(raw["line"])}
on the straight line, {said} found by training. Alignment alone leaves {barrier(moved["line"])} on the line; curves
between aligned networks end at {after}. Aligned less raw, in brackets 95 % intervals over seeds, these are
{change}."""
    if {"bezier", "robust"} <= set(raw):
        text += f"""
Of the test images, attacked by PGD, {mean_sd(raw["bezier"]["attacked_middle"])} % are mistaken in the middle of the
Bezier curve, {mean_sd(raw["robust"]["attacked_middle"])} % in the middle of one that is trained on attacked images
({less(raw["robust"], raw["bezier"], "attacked_middle")} points; between aligned networks
{less(moved["robust"], moved["bezier"], "attacked_middle")}), and {mean_sd(raw["robust"]["attacked_ends"])} % at the
ends of both."""
    return text


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(7.5, 8.2), layout="constrained")
    axes = fig.subplots(3, 2, sharex=True, sharey="row")
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
            axes[2, column].plot(mean.index, 100 * mean["attacked_error"], **drawn)
        axes[0, column].set_title("as trained" if aligner == "none" else f"aligned, {aligner}", size=10)
        axes[2, column].set(xlabel="t along the way")
    axes[0, 0].set(ylabel="training loss")
    axes[1, 0].set(ylabel="test error, %")
    axes[2, 0].set(ylabel="test error, attacked, %")
    legend(fig, columns=2)
    return fig


STUDY = Study(
    "curves",
    cells,
    "two networks connected by a line, a polygon chain, Bezier curves and a trained line, raw, aligned, and attacked",
    title="Curves between two networks",
    source="""T. Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018,
arXiv:1802.10026, and the code beside it; on attacked images P. Zhao et al., Bridging Mode Connectivity in Loss
Landscapes and Adversarial Robustness, ICLR 2020, arXiv:2005.00060, and R. Wang et al., Robust Mode
Connectivity-Oriented Adversarial Defense, 2023, arXiv:2303.10225""",
    question="""
How high are loss and error along the straight line between two independently trained networks, along a chain of
straight pieces and along a Bezier curve whose middle points are trained, and what does alignment add? And how
high are they on images that are attacked at each point, if the curve is trained on such images?""",
    cost="5 CPU minutes",
    sizes={
        "quick": Curves(
            seeds=(0,), model="mlp", width=16, images=400, evaluated=200, epochs=8, points=5, curve_epochs=8
        ),
        "default": Curves(),
        "full": Curves(
            seeds=(0,), dataset="cifar10", model="resnet20", width=1, images=0, evaluated=10000, epochs=60, points=61,
            curve_epochs=60, measured=10000, epsilon=8,
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
networks with BatchNorm it can bring weights closer and leave the line as high as it was.

Test images are attacked in the box of 16 of 255 by 7 steps of PGD, anew at each point of each way. The papers on
attacked images connect networks of which one or both were trained on such images; here both ends were trained as usual,
and only the bend has seen attacked images. What it gains there it pays for on images as they are.

Three seeds settle that curves found by training lie far below the straight line. They do not settle whether alignment
lowers that line, nor which of polygon chain and Bezier curve is the lower one; nor, but for aligned networks, whether
training on attacked images helps in the middle. All seeds have the same images, and the 350 of the test part leave a
standard error of up to 2.7 points that deviations over seeds do not hold.""",
    draw=_draw,
)  # fmt: skip
