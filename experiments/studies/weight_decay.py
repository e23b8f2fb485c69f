"""Why does the path from b to b (aligned) look so good where weight decay is low?"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

import fedmerge as fm
from experiments.studies.bench import Bench, Params
from experiments.studies.interpolation import ALIGNED, OWN, RAW, Rebasin, paths, shown, summary
from experiments.studies.page import mean_ci, mean_sd, table
from experiments.studies.pictures import lines
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.streams import torch_stream

THEIRS, SHUFFLED, OURS = "their climb", "their climb, units of b shuffled at its start", "ours"
_SHRINKS = 1.64 * 580 / 512  # their peak rate and steps; their loss is the sum over 1,024 images, times 1/2


@dataclass(frozen=True)
class WeightDecay(Rebasin):
    """``decays``: as theirs, scaled so that a whole training shrinks weights as much; ``points``: of each path."""

    seeds: tuple[int, ...] = (0, 1, 2)
    width: float = 8
    images: int = 2000
    public_images: int = 250
    val_images: int = 250
    test_images: int = 500
    decays: tuple[float, ...] = (0.0, 0.1, 0.3, 0.6, 0.9)
    points: int = 7


def shuffled(bench: Bench, params: Params) -> Params:
    """The same network with the units of every group in a random order: its function is kept, its order is not."""
    return fm.permute(params, bench.spec.random(torch_stream(bench.seed, "shuffle"), params), spec=bench.spec)


def cells(config: WeightDecay, work: Work) -> Iterator[Cell]:
    """Two networks of each decay, aligned as they did and as we do; the second also begun with its units shuffled."""

    def rows(seed: int, decay: float, way: str) -> list[dict[str, object]]:
        steps = config.epochs * math.ceil(config.images / config.batch_size)
        bench = Bench(config, work, seed, weight_decay=decay * _SHRINKS / (config.lr * steps))
        if way == SHUFFLED:
            b = bench.trained(1, name="shuffled-", start=lambda: shuffled(bench, bench.fresh(1)))
        else:
            b = bench.trained(1)
        return paths(bench, bench.trained(0), b, config.points, theirs=way != OURS)

    return each(rows, seed=config.seeds, decay=config.decays, way=(THEIRS, SHUFFLED, OURS))


def _barriers(rows: pd.DataFrame, way: str, path: str) -> pd.DataFrame:
    """Error barriers of one path, a row a decay and a column a seed."""
    found = summary(rows[(rows["way"] == way) & (rows["path"] == path)], "decay")
    return found.pivot(index="decay", columns="seed", values="error barrier")


def _answer(rows: pd.DataFrame) -> str:
    moved = rows.groupby(["way", "decay", "seed"])["moved"].first()
    own = {way: _barriers(rows, way, OWN) for way in (THEIRS, SHUFFLED, OURS)}
    gain = {way: _barriers(rows, way, RAW) - _barriers(rows, way, ALIGNED) for way in own}
    low = rows["decay"].min()
    said = "; ".join(
        f"at decay {decay:g} {mean_sd(moved[THEIRS, decay], 0)} % of the units move, barrier {mean_sd(of)}"
        for decay, of in own[THEIRS].iterrows()
    )
    other, better = (own[way] - own[THEIRS] for way in (SHUFFLED, OURS))
    still = moved[THEIRS, low].mean() < min(moved[way, low].mean() for way in (SHUFFLED, OURS))
    worse = min(better.loc[low].mean(), other.loc[low].mean()) > 0
    return (
        ("Because there the climb moves little." if still and worse else "Not because the climb moves little there.")
        + " b's kernels begin as the identity, as a's do, so the order in which "
        "both stand is near an optimum for a climb that begins there, until decay has worn the identity away "
        f"({said} points). At decay {low:g} a climb from another start moves {mean_sd(moved[OURS, low], 0)} % and makes"
        f" the path from b to b (aligned) worse by {mean_ci(better.loc[low])} points (in brackets 95 % intervals over "
        f"seeds), though it takes {mean_ci(gain[OURS].loc[low])} points off the barrier from a to b, and theirs "
        f"{mean_ci(gain[THEIRS].loc[low])}; their own climb, where b began with its units shuffled, moves "
        f"{mean_sd(moved[SHUFFLED, low], 0)} % and makes it worse by {mean_ci(other.loc[low])}, by "
        f"{mean_ci(other.mean())} on average over the decays."
        + (
            " So the path from b to b (aligned) says how much was moved, and nothing about how well."
            if still and worse
            else ""
        )
    )


def _ours(rows: pd.DataFrame) -> str:
    parts = ["Test accuracy in %, statistics recomputed at every point between."]
    for way in (THEIRS, SHUFFLED, OURS):
        parts += [f"Alignment: {way}.", shown(rows[rows["way"] == way], "decay")]
    return "\n\n".join(parts)


def _draw(rows: pd.DataFrame) -> Figure:
    panels = {
        f"{path},\n{way.replace(', ', ',' + chr(10))}": rows[(rows["path"] == path) & (rows["way"] == way)].assign(
            decay=rows["decay"].map("decay {:g}".format)
        )
        for way in (THEIRS, SHUFFLED, OURS)
        for path in (RAW, ALIGNED, OWN)
    }
    return lines(panels, x="alpha", y="accuracy", by="decay", label=("alpha", "test accuracy"), marks=False)


STUDY = Study(
    "weight-decay",
    cells,
    "the same paths by weight decay, and why b to b (aligned) looks good at low decay",
    title="Interpolation by weight decay",
    source="snimu, hlb-CIFAR10: Git re-basin results, 2023 (snimu/rebasin-results)",
    question="How does weight decay change the paths from a to b before and after alignment, and why is the path "
    "from b to "
    'b (aligned) "extremely good" at low decay? Their guess is that only one or two weights are permuted; '
    '"ultimately, though, '
    "I don't know\".",
    cost="9 CPU minutes",
    sizes={
        "quick": WeightDecay.quick(decays=(0.0,), points=3),
        "default": WeightDecay(),
        "full": WeightDecay.full(decays=(0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), points=101),
    },
    answer=_answer,
    theirs="Kernel 3 x 3, base width 64, all of CIFAR-10, one pair a decay; test accuracy in % half-way (loss there, "
    "with label smoothing in it):\n\n"
    + table(
        ["decay", "a", "a to b", "a to b (aligned)", "b to b (aligned)"],
        [
            ["0", 92.6, "60.1 (1.757)", "62.2 (1.727)", "92.3 (1.045)"],
            ["0.1", 93.4, "53.2 (1.884)", "55.6 (1.857)", "92.3 (1.054)"],
            ["0.3", 93.4, "50.3 (1.972)", "84.9 (1.482)", "78.4 (1.322)"],
            ["0.6", 93.6, "52.5 (2.028)", "88.4 (1.403)", "63.2 (1.599)"],
            ["0.9", 93.1, "55.4 (2.002)", "88.5 (1.406)", "66.3 (1.581)"],
        ],
    ),
    ours=_ours,
    explains="Size, and at decay 0 nothing else: their two observations are both here. Their climb begins with the "
    "order in which b stands, and every second kernel of hlb begins as the identity, in a as in b; while the identity "
    "is there, it rewards that order, and few units leave it. So at decay 0 a to b (aligned) is hardly better than a "
    "to b, and b to b (aligned) hardly worse than b: two sides of one fact, and their third guess was right. At decay "
    "0.1, where theirs still stand as at 0, ours are on their way, each seed at another place. At high decay their "
    "climb gains less here than there, and three seeds do not settle how much. The networks are 8 instead of 64 wide "
    "and see 2,000 images; decays are scaled so that a whole training shrinks weights by as much as theirs did. Every "
    "accuracy rests on the same 500 test images, a standard error of some 2.2 points that deviations over seeds do not "
    "hold. Their loss has label smoothing in it.",
    draw=_draw,
)
