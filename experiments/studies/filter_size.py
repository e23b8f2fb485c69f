"""Do larger kernels make two networks easier to connect by a permutation?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.studies.bench import Bench
from experiments.studies.interpolation import ALIGNED, OWN, RAW, Rebasin, normalised, paths, shown, summary
from experiments.studies.page import mean_ci, mean_sd
from experiments.studies.pictures import lines
from experiments.studies.study import Cell, Study, Work, each


@dataclass(frozen=True)
class FilterSize(Rebasin):
    """``kernels``: sides of the convolutions' kernels; ``points``: of each path."""

    seeds: tuple[int, ...] = (0, 1, 2)
    width: float = 4
    images: int = 1000
    public_images: int = 250
    val_images: int = 250
    test_images: int = 500
    kernels: tuple[int, ...] = (3, 6, 9, 12, 15, 18)
    points: int = 7


def cells(config: FilterSize, work: Work) -> Iterator[Cell]:
    """Two networks of each kernel, and the paths between them."""

    def rows(seed: int, kernel: int) -> list[dict[str, object]]:
        bench = Bench(config, work, seed, kernel_size=kernel)
        return paths(bench, bench.trained(0), bench.trained(1), config.points)

    return each(rows, seed=config.seeds, kernel=config.kernels)


def _answer(rows: pd.DataFrame) -> str:
    found = summary(rows, "kernel").pivot(index=["path", "kernel"], columns="seed", values="error barrier")
    raw, aligned = found.loc[RAW], found.loc[ALIGNED]
    by_kernel = "; ".join(
        f"{kernel} x {kernel}, {mean_sd(raw.loc[kernel])} to {mean_sd(aligned.loc[kernel])}" for kernel in raw.index
    )
    return (
        f"Alignment lowers the error barrier from a to b in {(aligned < raw).to_numpy().sum()} of {raw.size} pairs; "
        f"raw less aligned is {mean_ci((raw - aligned).mean())} points on average over the kernels (in brackets 95 % "
        f"intervals over seeds), {by_kernel}.{_slopes(raw, aligned)}"
    )


def _slopes(raw: pd.DataFrame, aligned: pd.DataFrame) -> str:
    """How both barriers change with the kernel, where there are several kernels: a straight line through each seed."""
    if len(raw) < 2:
        return ""
    before, after = (np.polyfit(of.index.to_numpy(float), of.to_numpy(), 1)[0] for of in (raw, aligned))
    return (
        f" With each pixel of the kernels' side the barrier changes by {mean_ci(before, 2)} points as trained and by "
        f"{mean_ci(after, 2)} aligned, by least squares over the kernels of each seed."
    )


def _ours(rows: pd.DataFrame) -> str:
    return "Test accuracy in %, statistics recomputed at every point between.\n\n" + shown(rows, "kernel")


def _draw(rows: pd.DataFrame) -> Figure:
    together = rows[rows["path"] == ALIGNED].assign(kernel=rows["kernel"].map("{0} x {0}".format))
    moved = together.assign(accuracy=normalised(rows[rows["path"] == ALIGNED], "kernel", "accuracy"))
    panels = {f"{path}, raw": rows[rows["path"] == path] for path in (RAW, ALIGNED, OWN)}
    named = {k: v.assign(kernel=v["kernel"].map("{0} x {0}".format)) for k, v in panels.items()}
    named[f"{ALIGNED}, start points moved together"] = moved
    return lines(named, x="alpha", y="accuracy", by="kernel", label=("alpha", "test accuracy"), marks=False, columns=2)


STUDY = Study(
    "filter-size",
    cells,
    "the paths between two hlb networks before and after alignment, by the size of their kernels",
    title="Interpolation by kernel size",
    source="snimu, hlb-CIFAR10: Git re-basin results, 2023 (snimu/rebasin-results)",
    question="Two `hlb` networks with kernels of 3 to 18 pixels are trained from initialisations of their own. How "
    "high is the barrier between them before and after weight matching, and does it fall with the kernel?",
    cost="12 CPU minutes",
    sizes={
        "quick": FilterSize.quick(kernels=(0,), points=3),
        "default": FilterSize(),
        "full": FilterSize.full(points=101),
    },
    answer=_answer,
    theirs="One pair of base width 64 a kernel, trained on all of CIFAR-10 (their `results.png`; 101 points a path). "
    "3 x 3: "
    "ends 94.0 % and 94.0 %, middle 89.0 % after alignment, 59.0 % before, 72.3 % from b to b (aligned). Larger "
    "kernels train "
    'worse; with start points moved together the paths seem "noisy, though slightly better for larger filter-sizes".',
    ours=_ours,
    explains="Theirs is 16 times wider and saw 50 times as many images, so its barrier after alignment is lower: both "
    "matter more than the kernel. A network of 18 x 18 trains at a tenth of the speed of one of 3 x 3, which is why "
    "the default size is small. Their code never permutes the widest stream (512 channels, half of all parameters) and "
    "lets biases carry no signal; here every group moves. Their loss has label smoothing in it (1.01 at 94 %), ours "
    "has not. Both recompute BatchNorm at every point: theirs on the training images, ours on public ones. All "
    "accuracies rest on the same 500 test images, a standard error of 2.2 points that deviations over seeds do not "
    "hold.",
    draw=_draw,
)
