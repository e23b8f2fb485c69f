"""Two trainings that part after k1 epochs: are they still connected by a straight line k2 epochs later?"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
from matplotlib.figure import Figure

import fedmerge as fm
from experiments.report.theme import SERIES, styled
from experiments.studies.lines import barriers, gap, heat
from experiments.studies.networks import Networks, Trained
from experiments.studies.page import table
from experiments.studies.study import Cell, Study, Work

BY = ("seed", "k1", "k2", "aligner")
OTHER = -1
"""The k1 of a branch that never was the main training: it has an initialisation of its own."""
APART = 1000
"""Between the seeds of the two."""


@dataclass(frozen=True)
class Lmc(Trained):
    """What is run.

    Attributes:
        share: What share of the images an epoch sees, drawn anew each time.
        k1: Epochs after which a branch leaves the main training, or :data:`OTHER`.
        k2: Epochs after that; pairs beyond the end of the main training are left out.
        batch_size: Of both.
        patience: The main training ends when its loss on val has not been lowest for so many epochs; 0 for never.
        aligner: How the branch is aligned to the main training.
    """

    seeds: tuple[int, ...] = (0, 1)
    model: str = "lenet5"
    epochs: int = 6
    share: float = 0.5
    k1: tuple[int, ...] = (OTHER, 0, 1, 2, 4)
    k2: tuple[int, ...] = (1, 2)
    batch_size: int = 128
    patience: int = 3
    aligner: str = "weight-matching"


def cells(config: Lmc, work: Work) -> Iterator[Cell]:
    """A pair of networks a cell: the main training and its branch, k1 + k2 epochs old, and both lines between them."""
    nets = Networks(config, work, share=config.share, batch_size=config.batch_size, schedule="constant")

    def ends(seed: int) -> int:
        """After how many epochs the main training stops."""
        losses: list[float] = []
        for epoch in range(1, config.epochs + 1):
            losses.append(fm.evaluate(nets.model, nets.stage(seed, epoch), nets.val, device=work.device).loss)
            if config.patience and len(losses) - losses.index(min(losses)) > config.patience:
                work.say(f"seed {seed}: stopped early after {epoch} epochs")
                return epoch
        return config.epochs

    def pair(seed: int, k1: int, k2: int) -> list[dict[str, object]]:
        if k1 == OTHER:
            main, branch = nets.stage(seed, k2), nets.stage(seed + APART, k2)
        else:
            main, branch = nets.stage(seed, k1 + k2), nets.stage(seed, k1 + k2, branch=k1)
        found: list[dict[str, object]] = []
        agree = fm.agreement(nets.model, main, branch, nets.seen["test"], device=work.device).same
        accuracy = fm.evaluate(nets.model, main, nets.test, device=work.device).accuracy
        for aligner in ("none", config.aligner):
            moved = nets.aligned(branch, main, aligner, seed)
            told = {
                "aligner": aligner, "l2": round(fm.distance(main, moved).l2, 4), "agreement": round(agree, 6),
                "accuracy": round(accuracy, 6),
            }  # fmt: skip
            found += [{**told, **point} for point in nets.line(main, moved)]
        return found

    for seed in config.seeds:
        last = ends(seed)
        for k1, k2 in itertools.product(config.k1, config.k2):
            if max(k1, 0) + k2 <= last:
                yield Cell({"seed": seed, "k1": k1, "k2": k2}, partial(pair, seed, k1, k2))


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """The barriers of each pair of epochs, with and without alignment, as means over seeds."""
    found = barriers(rows, BY)
    return found.groupby(["k1", "k2", "aligner"], sort=False).mean(numeric_only=True).reset_index()


def _named(k1: int) -> str:
    return "another start" if k1 == OTHER else str(k1)


def _aligner(rows: pd.DataFrame) -> str:
    return str(next(name for name in rows["aligner"].unique() if name != "none"))


def _ours(rows: pd.DataFrame) -> str:
    means, name = _means(rows).set_index(["aligner", "k1", "k2"]), _aligner(rows)
    lines = []
    for k1, k2 in sorted(set(zip(rows["k1"], rows["k2"], strict=True))):
        raw, moved = means.loc["none", k1, k2], means.loc[name, k1, k2]
        lines.append(
            [
                _named(k1), k2, f"{raw.train_loss:+.3f}", f"{moved.train_loss:+.3f}", f"{raw.test_loss:+.3f}",
                f"{100 * raw.train_error:+.1f}", f"{100 * raw.test_error:+.1f}", f"{100 * moved.test_error:+.1f}",
                f"{raw.l2:.1f}", f"{moved.l2:.1f}", f"{100 * raw.agreement:.1f}",
            ]
        )  # fmt: skip
    head = [
        "k1", "k2", "barrier of training loss", "aligned", "of test loss", "of training error, points",
        "of test error, points", "aligned", "L2 distance", "aligned", "agreement on test images, %",
    ]  # fmt: skip
    epochs = (rows["k1"] + rows["k2"]).max()
    final = rows[rows["k1"] + rows["k2"] == epochs].groupby("seed")["accuracy"].first()
    said = ", ".join(f"{100 * value:.2f} % (seed {seed})" for seed, value in final.items())
    return (
        f"Test accuracy of the main training after {epochs} epochs: {said}. Means over seeds:\n\n{table(head, lines)}"
    )


def _answer(rows: pd.DataFrame) -> str:
    means = _means(rows)
    k2 = int(means.groupby("k2")["k1"].nunique().sort_index().idxmax())
    raw = means[(means["aligner"] == "none") & (means["k2"] == k2)].sort_values("k1").set_index("k1")
    moved = means[(means["aligner"] != "none") & (means["k2"] == k2)].sort_values("k1").set_index("k1")
    later, apart = f"{k2} epoch{'s' * (k2 > 1)} later", ""
    if OTHER in raw.index:
        apart = f"""
Between two initialisations the barrier of the training loss is {raw.train_loss[OTHER]:+.3f} {later}, of the test error
{100 * raw.test_error[OTHER]:+.1f} points; aligned {moved.train_loss[OTHER]:+.3f} and
{100 * moved.test_error[OTHER]:+.1f} points."""
        raw, moved = raw.drop(OTHER), moved.drop(OTHER)
    loss, error = raw.train_loss, 100 * raw.test_error
    first, last = loss.index[0], loss.index[-1]
    if loss.max() <= 0:
        return f"""{apart}
Between two trainings of one that part after {first} to {last} epochs there is none: the training loss stays below its
chord, {later} by {-loss.max():.3f} to {-loss.min():.3f}, and the barrier of the test error is at most
{error.max():.1f} points. Nothing is left that could fall with k1, or that alignment could take away."""
    falls = "falls with every k1" if loss.is_monotonic_decreasing else "does not fall with every k1"
    gain = loss[first] - moved.train_loss[first]
    aligned = (
        f"takes the first of them to {moved.train_loss[first]:+.3f}" if gain > 5e-4 else "takes nothing from either"
    )
    return f"""{apart}
Between two trainings of one that part after k1 epochs it {falls}: {later} it is {loss[first]:+.3f} for k1 = {first} and
{loss[last]:+.3f} for k1 = {last}, in test error {error[first]:+.1f} and {error[last]:+.1f} points.
Alignment {aligned}."""


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(8.2, 7.2), layout="constrained")
    means, name = _means(rows), _aligner(rows)
    axes = fig.subplots(3, 2, height_ratios=[1, 1, 1.1])
    for column, (measure, said, times) in enumerate(
        (("train_loss", "training loss", 1), ("test_error", "test error, points", 100))
    ):
        largest = float(times * means[measure].abs().max()) or 1.0
        for row, aligner in enumerate(("none", name)):
            part = means[means["aligner"] == aligner].assign(shown=times * means[measure])
            grid = part.pivot_table("shown", "k1", "k2", dropna=False).rename(index=_named)
            heat(
                axes[row, column], grid, f"barrier of {said}, {'as trained' if row == 0 else 'aligned'}", largest,
                "{:.3f}" if measure == "train_loss" else "{:.2f}",
            )  # fmt: skip
    k2 = int(means.groupby("k2")["k1"].nunique().sort_index().idxmax())
    for column, aligner in enumerate(("none", name)):
        ax = axes[2, column]
        chosen = rows[(rows["aligner"] == aligner) & (rows["k2"] == k2)]
        for i, (k1, part) in enumerate(chosen.groupby("k1")):
            lines = [gap(line, "train_loss") for _, line in part.groupby("seed")]
            alphas = part["alpha"].unique()
            ax.plot(
                alphas,
                sum(lines) / len(lines),
                color=SERIES[i % len(SERIES)],
                label="another start" if k1 == OTHER else f"k1 = {k1}",
            )
        ax.set_title(f"gap of training loss, k2 = {k2}, {'as trained' if column == 0 else 'aligned'}", size=9.5)
        ax.set(xlabel="α", ylabel="loss over the chord")
    axes[2, 1].legend(fontsize=8)
    low, high = (pick(ax.get_ylim()[i] for ax in axes[2]) for i, pick in ((0, min), (1, max)))
    for ax in axes[2]:
        ax.set_ylim(low, high)
    return fig


_TABLE = """
| Network | Data | Parameters | Most steps | Most epochs | Batch | Images | Final accuracy | Optimiser |
|---|---|--:|--:|--:|--:|--:|--:|---|
| LeNet5 | MNIST | 62K | 580 | 10 | 1024 | 60,000 | 0.9818 | Adam |
| ReducedVGG | CIFAR-10 | 855K | 11,310 | 29 | 128 | 50,000 | 0.7136 | Adam |
| AlexNet | TinyImageNet | 60M | 14,058 | 9 | 64 | 100,000 | 0.4064 | Adam |

Barriers are in its pictures only. What it says of them: main training and branch are compared at 25 values of α; the
barrier is the largest gap between the loss on the line and the chord, and negative where the line dips below it."""


def _study(name: str, title: str, cost: str, explains: str, default: Lmc, full: Lmc) -> Study:
    quick = Lmc(
        seeds=(0,), dataset="digits", model="mlp", width=16, images=400, evaluated=200, epochs=4, points=5,
        k1=(OTHER, 0, 3), k2=(1,), batch_size=32, share=1.0,
    )  # fmt: skip
    return Study(
        name,
        cells,
        f"{title}: barriers over the epochs before and after two trainings part",
        title=f"Linear mode connectivity: {title}",
        source="I. Shapira, Linear Mode Connectivity, Harvard CS229br, 2023, its table of networks",
        question="""
A training is left by a branch after k1 epochs, with its network and its optimiser as they are then; the branch sees the
images in another order. How high is the barrier between both after k2 epochs more, with and without alignment, and
beside that between two trainings from initialisations of their own (k1 = -1)?""",
        cost=cost,
        sizes={"quick": quick, "default": default, "full": full},
        answer=_answer,
        theirs=_TABLE,
        ours=_ours,
        explains=explains,
        draw=_draw,
    )


MNIST = _study(
    "lmc",
    "LeNet5 on MNIST",
    "six CPU minutes",
    """
Batches of 128 and twice as many steps; what counts as an epoch here sees half of the images; fewer pairs of epochs; and
barriers on 1,000 training and 1,000 test images. Units are hyperbolic
tangents, which have a symmetry of sign besides that of order; alignment here looks for the order alone. That LeNet on
MNIST is stable to the order of its images from the first step on is what Frankle et al. (ICML 2020, arXiv:1912.05671)
found of their LeNet as well. A branch of a few epochs from one initialisation stays near; the full size goes on to
k2 = 10.""",
    Lmc(seeds=(0, 1, 2)),
    Lmc(batch_size=1024, epochs=10, share=1.0, k1=tuple(range(OTHER, 10)), k2=tuple(range(1, 11)), evaluated=10000),
)
CIFAR = _study(
    "lmc-cifar10",
    "ReducedVGG on CIFAR-10",
    "nine CPU minutes",
    """
Half of their width, a sixth of their images and a fifth of their epochs: networks that are less accurate and further
from an end of training; barriers on 300 training and 300 test images. The branch drops other units than the main
training.""",
    Lmc(
        dataset="cifar10", model="reduced-vgg", width=0.5, images=8000, evaluated=300, epochs=6, share=1.0,
    ),
    Lmc(
        dataset="cifar10", model="reduced-vgg", evaluated=10000, epochs=29, share=1.0, k1=(OTHER, 0, 1, 2, 4, 8, 16),
        k2=(1, 2, 4, 8, 13),
    ),
)  # fmt: skip
TINY = _study(
    "lmc-tiny-imagenet",
    "AlexNet on TinyImageNet",
    "some hours on a GPU",
    """
Torchvision's AlexNet has no BatchNorm, theirs has it after the first two convolutions; it takes images of 64 x 64.""",
    Lmc(
        dataset="tiny-imagenet", model="alexnet", epochs=9, share=1.0, k1=(OTHER, 0, 1, 3, 6), k2=(1, 3), batch_size=64,
    ),
    Lmc(
        dataset="tiny-imagenet", model="alexnet", evaluated=10000, epochs=9, share=1.0, k1=tuple(range(OTHER, 9)),
        k2=tuple(range(1, 10)), batch_size=64,
    ),
)  # fmt: skip
STUDIES = (MNIST, CIFAR, TINY)
