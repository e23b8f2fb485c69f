"""The barrier between two independent trainings, unaligned and aligned: while they train, and against their width."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from experiments.report.theme import MARKS, SERIES, figures, legend, logarithmic, styled
from experiments.studies.lines import barriers
from experiments.studies.networks import Networks, Trained
from experiments.studies.page import table
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.types import Params

ALIGNERS = ("none", "weight-matching", "activation-matching", "ste")
TITLES = {
    "none": "as trained", "weight-matching": "weight matching", "activation-matching": "activation matching",
    "ste": "straight-through",
}  # fmt: skip


@dataclass(frozen=True)
class Pairs(Trained):
    """Pairs of networks, a pair a seed, each from its own initialisation; how the second is aligned to the first."""

    seeds: tuple[int, ...] = (0, 1, 2)
    images: int = 5000
    evaluated: int = 500
    points: int = 11
    aligners: tuple[str, ...] = ALIGNERS


@dataclass(frozen=True)
class Training(Pairs):
    """``at``: the epochs at which the pair is looked at."""

    epochs: int = 10
    at: tuple[int, ...] = (0, 1, 2, 4, 7, 10)


@dataclass(frozen=True)
class Width(Pairs):
    """``widths``: in the unit of the model."""

    widths: tuple[float, ...] = (8, 16, 32, 64, 128, 256)


def _line(nets: Networks, a: Params, b: Params, aligner: str, seed: int) -> list[dict[str, object]]:
    """The line between two networks after alignment, and the CPU seconds that the alignment took."""
    nets.spec, nets.val  # noqa: B018  # traced and read before the clock runs
    began = time.process_time()
    moved = nets.aligned(b, a, aligner, seed)
    spent = round(time.process_time() - began, 4)
    return [{"seconds": spent, **point} for point in nets.line(a, moved)]


def during(config: Training, work: Work) -> Iterator[Cell]:
    """A pair, an epoch and a way to align it are a cell."""
    nets = Networks(config, work, schedule="constant")

    def measure(seed: int, epoch: int, aligner: str) -> list[dict[str, object]]:
        return _line(nets, nets.stage(2 * seed, epoch), nets.stage(2 * seed + 1, epoch), aligner, seed)

    return each(measure, seed=config.seeds, epoch=config.at, aligner=config.aligners)


def across(config: Width, work: Work) -> Iterator[Cell]:
    """A pair, a width and a way to align it are a cell."""
    by_width = {width: Networks(config, work, width=width) for width in config.widths}

    def measure(seed: int, width: float, aligner: str) -> list[dict[str, object]]:
        nets = by_width[width]
        return _line(nets, nets.trained(2 * seed), nets.trained(2 * seed + 1), aligner, seed)

    for width, seed, aligner in product(config.widths, config.seeds, config.aligners):
        key = {"seed": seed, "width": width, "aligner": aligner}
        yield Cell(key, partial(measure, seed, width, aligner))


def _means(rows: pd.DataFrame, axis: str) -> pd.DataFrame:
    """Mean over seeds of each barrier, and ``spread``: the standard deviation of that of the test loss."""
    grouped = barriers(rows, ["seed", axis, "aligner"]).groupby([axis, "aligner"], sort=False)
    return grouped.mean(numeric_only=True).assign(spread=grouped["test_loss"].std().fillna(0.0)).reset_index()


def _ours(rows: pd.DataFrame, axis: str) -> str:
    means, lines = _means(rows, axis), []
    for value, part in means.groupby(axis):
        of = part.set_index("aligner")
        found = [f"{of.loc[a, 'test_loss']:+.3f} ± {of.loc[a, 'spread']:.3f}" for a in of.index]
        errors = [f"{100 * of.loc[a, 'test_error']:+.1f}" for a in of.index]
        lines.append([f"{value:g}", f"{100 * (1 - of['test_error_ends'].iloc[0]):.1f}", *found, *errors])
    titles = [TITLES.get(a, a) for a in rows["aligner"].unique()]
    head = [axis, "mean accuracy of the ends, %", *titles, *(f"{title}, error" for title in titles)]
    seconds = means.groupby("aligner", sort=False)["seconds"].mean()
    said = ", ".join(f"{TITLES.get(str(a), a)} {s:.2f}" for a, s in seconds.items() if a != "none")
    return (
        f"Barrier of the test loss as mean ± standard deviation over {rows['seed'].nunique()} seeds, then of the test "
        f"error in points:\n\n{table(head, lines)}\n\nCPU seconds of an alignment, mean: {said}."
    )


@styled
def _draw(rows: pd.DataFrame, axis: str) -> Figure:
    means = _means(rows, axis)
    fig, (over, under) = figures("Barrier between two independent trainings", 5.6, rows=2)
    for i, (aligner, part) in enumerate(means.groupby("aligner", sort=False)):
        drawn: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "marker": MARKS[i % len(MARKS)]}
        label = TITLES.get(str(aligner), aligner)
        over.errorbar(part[axis], part["test_loss"], yerr=part["spread"], label=label, capsize=2.5, **drawn)
        if aligner != "none":
            under.plot(part[axis], part["seconds"], **drawn)
    over.set(ylabel="barrier of the test loss")
    under.set(xlabel=axis, ylabel="CPU seconds to align", yscale="log")
    spent = means[means["aligner"] != "none"]["seconds"].clip(lower=1e-4)
    logarithmic(under.yaxis, float(spent.min()), float(spent.max()))
    if axis == "width":
        under.set_xscale("log")
        logarithmic(under.xaxis, float(means[axis].min()), float(means[axis].max()))
    legend(fig, columns=2)
    return fig


def _barrier(means: pd.DataFrame, axis: str, value: float, aligner: str) -> float:
    return float(means[(means[axis] == value) & (means["aligner"] == aligner)]["test_loss"].iloc[0])


def _answer_training(rows: pd.DataFrame) -> str:
    means = _means(rows, "epoch")
    first, last = means["epoch"].min(), means["epoch"].max()
    peak = means[means["aligner"] == "none"].sort_values("test_loss").iloc[-1]
    low = [_barrier(means, "epoch", last, a) for a in means["aligner"].unique() if a != "none"]
    start, learned = _barrier(means, "epoch", first, "none"), low[-1] < min(low[:-1]) - 0.0005
    return f"""
Unaligned, the barrier between two trainings is {start:+.3f} before they begin and rises to {peak.test_loss:+.3f} (epoch
{peak.epoch:.0f}); aligned after epoch {last} it is {min(low):+.3f} to {max(low):+.3f}. The straight-through estimator
{"lowers" if learned else "does not lower"} it further."""


def _answer_width(rows: pd.DataFrame) -> str:
    means = _means(rows, "width")
    narrow, wide = means["width"].min(), means["width"].max()

    def say(aligner: str) -> str:
        values = [_barrier(means, "width", width, aligner) for width in (narrow, wide)]
        return f"{values[0]:+.3f} to {values[1]:+.3f} with {TITLES.get(aligner, aligner)}"

    aligners = [a for a in means["aligner"].unique() if a != "none"]
    kept = [_barrier(means, "width", width, "none") for width in (narrow, wide)]
    falls = all(_barrier(means, "width", narrow, a) > _barrier(means, "width", wide, a) for a in aligners)
    return f"""
From width {narrow:g} to {wide:g} the barrier of the test loss goes from
{", from ".join(map(say, aligners))};
unaligned from {kept[0]:+.3f} to {kept[1]:+.3f}. So width {"makes" if falls else "does not make"} aligned networks
easier to connect."""


def _study(
    name: str, axis: str, make: Callable[..., Iterator[Cell]], title: str, summary: str, question: str, cost: str,
    answer: Callable[[pd.DataFrame], str], theirs: str, explains: str, sizes: Sequence[Pairs],
) -> Study:  # fmt: skip
    return Study(
        name, make, summary, title=title, question=question, cost=cost, answer=answer, theirs=theirs, explains=explains,
        source="Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836, as shown on slides",
        sizes=dict(zip(("quick", "default", "full"), sizes, strict=True)),
        ours=partial(_ours, axis=axis), draw=partial(_draw, axis=axis),
    )  # fmt: skip


TRAINING = _study(
    "barrier-training",
    "epoch",
    during,
    "The barrier while two networks train",
    "the barrier between two trainings, epoch by epoch, unaligned and aligned in three ways",
    """
Two networks train from initialisations of their own. How high is the barrier of the straight line between them after
some epochs, as they are and after alignment by weights, by activations, and learned straight through?""",
    "a CPU minute",
    _answer_training,
    """
A figure without printed numbers. What it is said to show: "Although one could guess that entire weight space is in a
single basin modulo permutation symmetry, it is not true. The LMC seems to be a property of SGD training."; of the three
methods: "As expected the STE matching performed the best (by surprisingly small margin), however at the great cost.
Activation matching and weight matching performed similarly, but the latter is faster and does not require the
data." """,
    """
Their networks are wider (512 units a layer) and train for longer on all images. Before training both ends are at
chance,
above which a loss hardly rises: the barrier of 0 there says nothing. Negative barriers come from ends that have learned
few images by heart and are surer than they are right; half-way they are less sure. Here the straight-through estimator
begins at the result of weight matching and looks at 500 images of val, on which activations are compared too.
Their barrier is the highest loss on the line less the mean of both ends, and never below 0; ours is over the chord, at
points between the ends, and negative where the line stays below it.""",
    (
        Training(seeds=(0,), dataset="digits", width=16, images=400, evaluated=200, epochs=2, points=5, at=(0, 2)),
        Training(),
        Training(
            seeds=(0, 1, 2, 3, 4),
            width=512,
            images=0,
            epochs=25,
            at=(0, 1, 2, 4, 8, 15, 25),
            evaluated=10000,
            points=25,
        ),
    ),
)
WIDTH = _study(
    "barrier-width",
    "width",
    across,
    "The barrier against the width of two networks",
    "the barrier between two trained networks, from narrow to wide, unaligned and aligned in three ways",
    """
Two networks of one width are trained from initialisations of their own. How high is the barrier between them, as they
are and after each of three alignments, and what does the alignment cost, as both grow wider?""",
    "two CPU minutes",
    _answer_width,
    """
A figure without printed numbers, of which is said: "It is a conventional wisdom that wider architecture is easier to
optimize. Similarly there is a clear relationship between model width and linear mode connectivity." """,
    """
Their figure has MLPs on MNIST, VGG16 and ResNet20 on CIFAR-10, each trained to its end; ours are two hidden layers on
5,000 images of MNIST. The direction is the same, and so is the order of the methods in cost; where they are closer to
each other than the ± over seeds, their order in height says nothing. Their
barrier is the highest loss on the line less the mean of both ends, and never below 0; ours is over the chord, at points
between the ends, and negative where the line stays below it.""",
    (
        Width(seeds=(0,), dataset="digits", images=400, evaluated=200, epochs=3, points=5, widths=(4, 16)),
        Width(),
        Width(
            seeds=(0, 1, 2, 3, 4),
            images=0,
            epochs=25,
            widths=(8, 16, 32, 64, 128, 256, 512, 1024),
            evaluated=10000,
            points=25,
        ),
    ),
)
STUDIES = (TRAINING, WIDTH)
