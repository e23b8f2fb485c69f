"""Two networks of data biased to different classes: is their merge worth the data that neither saw whole?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import fedmerge as fm
from experiments.studies.bench import Bench, Params, Training
from experiments.studies.page import table
from experiments.studies.pictures import lines
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.data import Images

UNALIGNED, WEIGHTS, ACTIVATIONS, REPAIRED, SHARED = (
    "plain average",
    "merged, weights",
    "merged, activations",
    "merged, activations, REPAIR",
    "one initialisation, plain average",
)
FULL, ENSEMBLE = "all of the data", "ensemble of A and B"


@dataclass(frozen=True)
class BiasedSplit(Training):
    """``share``: of the classes of the first half that A holds, and B of the second; ``points``: of each line."""

    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "cnn"
    images: int = 4000
    public_images: int = 500
    test_images: int = 1500
    epochs: int = 8
    batch_size: int = 32
    lr: float = 0.02
    share: float = 0.2
    points: int = 5


def biased(images: Images, share: float, rng: np.random.Generator) -> tuple[Images, Images]:
    """Images cut in two: ``share`` of the first half of the classes and the rest of the others, and what is left."""
    labels, first = images.labels.numpy(), []
    for label in range(len(images.classes)):
        held = rng.permutation(np.flatnonzero(labels == label))
        part = share if label < len(images.classes) / 2 else 1 - share
        first.append(held[: round(part * len(held))])
    chosen = np.sort(np.concatenate(first))
    return images.select(chosen), images.select(np.setdiff1d(np.arange(len(labels)), chosen))


def said(probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Loss, accuracy, and expected calibration error in 15 bins of equal width (Guo et al., ICML 2017)."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.float64).index_add(0, bins, right - confidence)
    return {
        "loss": float(F.nll_loss(probabilities.clamp(min=1e-12).log(), labels)),
        "accuracy": float(right.mean()),
        "calibration": float(gaps.abs().sum() / len(labels)),
        "confidence": float(confidence.mean()),
    }


def cells(config: BiasedSplit, work: Work) -> Iterator[Cell]:
    """A, B and a network of all data of one seed, what becomes of A and B, and the lines between them."""

    def rows(seed: int) -> Iterator[dict[str, object]]:
        bench = Bench(config, work, seed)
        parts = biased(bench.parts[0], config.share, bench.rng("bias"))
        a, b = (bench.trained(i, images, name="biased-") for i, images in enumerate(parts))
        alike = bench.trained(1, parts[1], name="alike-", start=lambda: bench.fresh(0))

        def row(network: str, params: Params, alpha: float = -1.0) -> dict[str, object]:
            return {"network": network, "alpha": alpha, **said(bench.probabilities(params), bench.test.labels)}

        yield row("A", a)
        yield row("B", b)
        yield row(FULL, bench.trained(2))
        together = (bench.probabilities(a) + bench.probabilities(b)) / 2
        yield {"network": ENSEMBLE, "alpha": -1.0, **said(together, bench.test.labels)}
        images = {"model": bench.model, "data": bench.public, "device": bench.device}
        orders = {
            WEIGHTS: fm.align(b, to=a, spec=bench.spec, rng=bench.rng("align"), restarts=5),
            ACTIVATIONS: fm.align(
                b, to=a, spec=bench.spec, rng=bench.rng("align"), method="activation-matching", **images
            ),
        }
        ends = {UNALIGNED: b, SHARED: alike} | {
            name: fm.permute(b, found.perms, spec=bench.spec) for name, found in orders.items()
        }
        for name, last in ends.items():
            for alpha in np.linspace(0, 1, config.points).round(6).tolist():
                yield row(name, fm.average([a, last], [1 - alpha, alpha]), alpha)
        for alpha in np.linspace(0, 1, config.points).round(6).tolist()[1:-1]:
            sources, weights = [a, ends[ACTIVATIONS]], [1 - alpha, alpha]
            fixed = fm.repair(
                bench.model, fm.average(sources, weights), data=bench.public, method="repair", sources=sources,
                weights=weights, device=bench.device,
            )  # fmt: skip
            yield row(REPAIRED, fixed, alpha)

    return each(rows, seed=config.seeds)


def _middle(rows: pd.DataFrame) -> pd.DataFrame:
    """The networks, and the lines half-way."""
    measures = ["accuracy", "loss", "calibration", "confidence"]
    chosen = rows[rows["alpha"].isin([-1.0, 0.5])]
    return chosen.groupby("network", sort=False)[measures].agg(["mean", "std"])


def _ours(rows: pd.DataFrame) -> str:
    body = []
    for name, row in _middle(rows).iterrows():
        cells = [f"{100 * row['accuracy', 'mean']:.1f} ± {100 * row['accuracy', 'std']:.1f}"]
        cells += [f"{row['loss', 'mean']:.3f} ± {row['loss', 'std']:.3f}"]
        cells += [f"{100 * row[key, 'mean']:.1f}" for key in ("calibration", "confidence")]
        body.append([name, *cells])
    return "Lines half-way; mean ± sd over the seeds.\n\n" + table(
        ["network", "accuracy, %", "loss", "calibration error, points", "mean confidence, %"],
        [[cell.replace(" ± nan", "") for cell in line] for line in body],
    )


def _answer(rows: pd.DataFrame) -> str:
    at = _middle(rows).xs("mean", axis=1, level=1)
    one = at.loc[["A", "B"]].mean()
    best = at.loc[[WEIGHTS, ACTIVATIONS, REPAIRED], "accuracy"].idxmax()
    calmer = bool(at.loc[best, "calibration"] < one["calibration"])
    why = "which is why " if calmer and at.loc[best, "loss"] < one["loss"] else ""
    return (
        f"The best merge half-way ({best}) reaches {100 * at.loc[best, 'accuracy']:.1f} %, where A and B reach "
        f"{100 * one['accuracy']:.1f} %, their plain average {100 * at.loc[UNALIGNED, 'accuracy']:.1f} %, their "
        f"ensemble {100 * at.loc[ENSEMBLE, 'accuracy']:.1f} %, and a network of all data "
        f"{100 * at.loc[FULL, 'accuracy']:.1f} %. It is {'' if calmer else 'not '}better calibrated than its "
        f"parts ({100 * at.loc[best, 'calibration']:.1f} against {100 * one['calibration']:.1f} points of calibration "
        f"error), {why}its loss is {at.loc[best, 'loss']:.2f} against their {one['loss']:.2f}. From one "
        f"initialisation, without alignment, the plain average reaches {100 * at.loc[SHARED, 'accuracy']:.1f} %."
    )


def _draw(rows: pd.DataFrame) -> Figure:
    on_lines = rows[rows["alpha"] >= 0]
    flat = pd.concat(
        rows[rows["network"] == name].assign(alpha=alpha) for name in (ENSEMBLE, FULL) for alpha in (0.0, 1.0)
    )
    shown = pd.concat([on_lines, flat])
    panels = {measure: shown.assign(value=shown[measure]) for measure in ("accuracy", "loss", "calibration")}
    return lines(
        panels, x="alpha", y="value", by="network", label=("alpha, from A to B", "on test"), marks=False, shared=False
    )


STUDY = Study(
    "biased-split",
    cells,
    "two networks of data biased to different classes, merged: loss, accuracy, calibration",
    title="Merging networks of biased data",
    source="Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836, section 5.4 and the slides on it",
    question="A sees 20 % of the images of one half of the classes and 80 % of the other, B the rest. Can they be "
    "merged so that the result performs well on the whole data set?",
    cost="4 CPU minutes",
    sizes={
        "quick": BiasedSplit.quick(
            width=16, images=600, public_images=100, val_images=100, test_images=1500, epochs=3, lr=0.05, points=3
        ),
        "default": BiasedSplit(),
        "full": BiasedSplit.full(dataset="cifar100", model="resnet20", width=32, epochs=200, batch_size=128, lr=0.1),
    },
    answer=_answer,
    theirs="CIFAR-100, A with 20 % of the images labelled 0 to 49 and 80 % of those labelled 50 to 99, B with the "
    "rest; ResNet-20 of 32 times its width. A picture without numbers (slides, figure 9): half-way the merged network "
    "has a far lower test loss than A and B, which the paper lays to calibration; the ensemble of both and training on "
    "all data are better still.",
    ours=_ours,
    explains="Theirs is a ResNet of 32 times its width on 100 classes, ours a small CNN without normalisation on 10; "
    "width is what lets a merge reach its parts. The order is theirs: the ensemble and training on all of the data "
    "stay above every merge, and averaging two networks makes one that is less sure of itself, which lowers the loss "
    "of networks that are too sure. REPAIR gives back the sureness with the accuracy. The best merge is named by its "
    "accuracy on test, a little too good for it.",
    draw=_draw,
)
