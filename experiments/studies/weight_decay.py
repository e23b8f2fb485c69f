"""Why does the path from b to b (aligned) look so good where weight decay is low?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import fedmerge as fm
from experiments.studies.bench import Bench, Params, Training
from experiments.studies.interpolation import ALIGNED, OWN, RAW, paths, shown, summary
from experiments.studies.pictures import lines
from experiments.studies.study import Cell, Study, Work

DRAWN, SHUFFLED = "as drawn", "units shuffled"
_SHRINKS = 1.64 * 580 / 512  # their peak rate and steps; their loss is the sum over 1,024 images, times 1/2


@dataclass(frozen=True)
class WeightDecay(Training):
    """``decays``: as theirs, scaled so that a whole training shrinks weights as much; ``points``: of each path."""

    seeds: tuple[int, ...] = (0,)
    width: float = 8
    images: int = 2000
    public_images: int = 250
    val_images: int = 250
    test_images: int = 500
    epochs: int = 6
    batch_size: int = 64
    lr: float = 0.5
    decays: tuple[float, ...] = (0.0, 0.3, 0.9)
    points: int = 7


def shuffled(bench: Bench, params: Params) -> Params:
    """The same network with the units of every group in a random order: its function is kept, its order is not."""
    rng = bench.rng("shuffle")
    perms = {
        group: torch.from_numpy(np.asarray(rng.permutation(size)))
        for group, size in bench.spec.sizes(params).items()
    }  # fmt: skip
    return fm.permute(params, perms, spec=bench.spec)


def cells(config: WeightDecay, work: Work) -> Iterator[Cell]:
    """Two networks of each decay; the second also from an initialisation whose units are shuffled."""

    def rows(seed: int, decay: float, start: str) -> list[dict[str, object]]:
        steps = config.epochs * math.ceil(config.images / config.batch_size)
        bench = Bench(config, work, seed, weight_decay=decay * _SHRINKS / (config.lr * steps))
        a = bench.trained(0)
        if start == DRAWN:
            return paths(bench, a, bench.trained(1), config.points)
        b = bench.trained(1, name="shuffled-", start=lambda: shuffled(bench, bench.fresh(1)))
        return paths(bench, a, b, config.points)

    for seed in config.seeds:
        for decay in config.decays:
            for start in (DRAWN, SHUFFLED):
                key = {"seed": seed, "decay": decay, "start": start}
                yield Cell(key, lambda key=key: rows(**key))  # type: ignore[misc]


def _answer(rows: pd.DataFrame) -> str:
    found = {s: summary(rows[rows["start"] == s], "decay").set_index(["path", "decay"]) for s in (DRAWN, SHUFFLED)}
    own, other = (found[s].loc[OWN] for s in (DRAWN, SHUFFLED))
    low, high = own.iloc[0], own.iloc[-1]
    return (
        f"b to b (aligned) looks good at low decay where few units move: at decay {own.index[0]:g} alignment moves "
        f"{100 * low['moved']:.0f} % of b's units (distance {low['distance']:.2f}, error barrier {100 * low['error barrier']:.0f} "
        f"points), at {own.index[-1]:g} {100 * high['moved']:.0f} % ({high['distance']:.2f}, "
        f"{100 * high['error barrier']:.0f} points). They stay because both networks begin with the same identity kernels, "
        "which order the channels and which only decay removes: begun with shuffled units, a network as good in every way, "
        f"{100 * other['moved'].min():.0f} to {100 * other['moved'].max():.0f} % move at every decay, and the barrier from b to "
        f"b (aligned) is {100 * other['error barrier'].min():.0f} to {100 * other['error barrier'].max():.0f} points."
    )


def _ours(rows: pd.DataFrame) -> str:
    parts = []
    for start in (DRAWN, SHUFFLED):
        text = shown(rows[rows["start"] == start], "decay")  # fmt: skip
        parts.append(f"Initialisation of b {start}:\n\n{text}")
    return "Test accuracy in %, statistics recomputed at every point between.\n\n" + "\n\n".join(parts)


def _draw(rows: pd.DataFrame) -> Figure:
    panels = {
        f"{path},\nb {start}": rows[(rows["path"] == path) & (rows["start"] == start)].assign(
            decay=rows["decay"].map("decay {:g}".format)
        )
        for start in (DRAWN, SHUFFLED)
        for path in (RAW, ALIGNED, OWN)
    }
    return lines(panels, x="alpha", y="accuracy", by="decay", label=("alpha", "test accuracy"), marks=False)


STUDY = Study(
    "weight-decay",
    cells,
    "the same paths by weight decay, and why b to b (aligned) looks good at low decay",
    title="Interpolation by weight decay",
    source="snimu, hlb-CIFAR10: Git re-basin results, 2023 (snimu/rebasin-results)",
    question="How does weight decay change the paths from a to b before and after alignment, and why is the path from b to "
    'b (aligned) "extremely good" at low decay? Their guess is that only one or two weights are permuted; "ultimately, though, '
    "I don't know\".",
    cost="7 CPU minutes",
    sizes={
        "quick": WeightDecay(
            dataset="digits",
            model="mlp",
            width=8,
            images=300,
            public_images=60,
            val_images=60,
            test_images=100,
            epochs=2,
            batch_size=32,
            lr=0.05,
            decays=(0.0,),
            points=3,
        ),
        "default": WeightDecay(),
        "full": WeightDecay(
            seeds=(0, 1, 2),
            width=64,
            images=45000,
            public_images=2500,
            val_images=2500,
            test_images=10000,
            epochs=12,
            batch_size=512,
            lr=1.6,
            decays=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
            points=101,
        ),
    },
    answer=_answer,
    theirs="THEIRS",
    ours=_ours,
    explains="EXPLAINS",
    draw=_draw,
)
