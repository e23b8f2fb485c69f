"""What is left of n networks of the same images when they are merged, by n, kernel and way of merging?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import fedmerge as fm
from experiments.studies.bench import Bench, Params
from experiments.studies.interpolation import Rebasin
from experiments.studies.page import mean_ci, mean_sd, table
from experiments.studies.pictures import lines
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.merge import ensemble

PAPER, ANCHORED, ACTIVATIONS, AVERAGE = (
    "MergeMany, paper's start",
    "MergeMany, anchored",
    "MergeMany, anchored, activations",
    "plain average",
)


@dataclass(frozen=True)
class MergeMany(Rebasin):
    """``ns``: numbers of networks; ``kernels``: sides of their kernels; ``more``: further seeds of the first kernel."""

    seeds: tuple[int, ...] = (0,)
    width: float = 8
    images: int = 2000
    public_images: int = 250
    val_images: int = 250
    test_images: int = 1000
    ns: tuple[int, ...] = (3, 6, 9, 12)
    kernels: tuple[int, ...] = (3, 6, 9)
    more: tuple[int, ...] = (1, 2)

    def settings(self, rows: Callable[..., Any]) -> Iterator[Cell]:
        """A cell for each seed, kernel and number of networks."""
        yield from each(rows, seed=self.seeds, kernel=self.kernels, n=self.ns)
        more = tuple(seed for seed in self.more if seed not in self.seeds)
        yield from each(rows, seed=more, kernel=self.kernels[:1], n=self.ns)


SIZES = {
    "quick": MergeMany.quick(ns=(2,), kernels=(0,), more=()),
    "default": MergeMany(),
    "full": MergeMany.full(more=()),
}


def merged(bench: Bench, networks: list[Params], how: str) -> Params:
    """The networks merged in one of the ways above, statistics recomputed."""
    images = {"model": bench.model, "data": bench.public, "device": bench.device}
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        PAPER: ("merge-many-paper", {}),
        ANCHORED: ("merge-many", {"restarts": 3}),
        ACTIVATIONS: ("merge-many", {"restarts": 1, "aligner": "activation-matching", "aligner_options": images}),
        AVERAGE: ("average", {}),
    }
    method, options = ways[how]
    found = fm.merge(networks, spec=bench.spec, method=method, rng=bench.rng("merge", len(networks)), **options)
    return bench.recomputed(found.params)


def cells(config: MergeMany, work: Work) -> Iterator[Cell]:
    """N networks of one kernel, all trained on the same images, and every merge of them."""

    def rows(seed: int, kernel: int, n: int) -> list[dict[str, object]]:
        bench = Bench(config, work, seed, kernel_size=kernel)
        networks = [bench.trained(i) for i in range(n)]
        scores = pd.DataFrame([bench.score(params) for params in networks])
        right = ensemble(bench.model, networks, bench.test, device=bench.device).argmax(1) == bench.test.labels
        found: list[dict[str, object]] = [
            {"network": "mean of the n", "accuracy": scores["accuracy"].mean()},
            {"network": "ensemble", "accuracy": float(right.double().mean())},
        ]
        return found + [
            {"network": how, "accuracy": bench.score(merged(bench, networks, how))["accuracy"]}
            for how in (PAPER, ANCHORED, ACTIVATIONS, AVERAGE)
        ]

    return config.settings(rows)


def _ours(rows: pd.DataFrame) -> str:
    found = dict(iter(rows.groupby(["network", "kernel", "n"], sort=False)["accuracy"]))
    ns = list(rows["n"].unique())
    body = [
        [network, f"{kernel} x {kernel}", *(mean_sd(found[network, kernel, n]) for n in ns)]
        for network in rows["network"].unique()
        for kernel in rows["kernel"].unique()
    ]
    return "Test accuracy in %, statistics recomputed.\n\n" + table(
        ["network", "kernel", *(f"n = {n}" for n in ns)], body
    )


def of_all_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of kernels that every seed has."""
    seeds = rows.groupby("kernel")["seed"].nunique()
    return rows[rows["kernel"].isin(seeds[seeds == rows["seed"].nunique()].index)]


def over_kernels(rows: pd.DataFrame) -> str:
    """What a mean over all kernels is a mean of."""
    kernels = rows["kernel"].unique()
    return "On average over the kernels" if len(kernels) > 1 else f"With kernels of {kernels[0]} x {kernels[0]}"


def _answer(rows: pd.DataFrame) -> str:
    rows = of_all_seeds(rows)
    found = rows.groupby(["network", "n", "seed"], sort=False)["accuracy"].mean().unstack("seed")
    low, high = rows["n"].min(), rows["n"].max()

    def fall(network: str) -> str:
        at = (f"{mean_sd(found.loc[(network, n)])} % at n = {n}" for n in dict.fromkeys((low, high)))
        return " to ".join(at)

    def over(network: str, n: int) -> str:
        return f"{mean_ci(found.loc[(network, n)] - found.loc[(AVERAGE, n)])} at n = {n}"

    above = "; ".join(
        f"{name} {', '.join(over(network, n) for n in dict.fromkeys((low, high)))}"
        for name, network in (("the paper's", PAPER), ("anchored", ANCHORED), ("with activations", ACTIVATIONS))
    )
    anchored = (found.loc[ANCHORED] - found.loc[PAPER]).mean()
    return (
        f"{over_kernels(rows)}, ± deviation over seeds: begun at unaligned networks, as in the paper, the merge goes "
        f"from {fall(PAPER)}, begun at an alignment to one of them from {fall(ANCHORED)}, with activations from "
        f"{fall(ACTIVATIONS)}; the plain average from {fall(AVERAGE)}. Points above the plain average, 95 % interval "
        f"over seeds: {above}; over all n the anchored merge is {mean_ci(anchored)} points above the "
        f"paper's. The networks themselves have {mean_sd(found.loc[('mean of the n', low)])} %."
    )


def draw(rows: pd.DataFrame) -> Figure:
    """Accuracy by n, a panel a kernel."""
    panels = {f"{kernel} x {kernel}": part for kernel, part in rows.groupby("kernel")}
    return lines(panels, x="n", y="accuracy", by="network", label=("networks n", "test accuracy"))


STUDY = Study(
    "merge-many",
    cells,
    "3, 6, 9 and 12 networks of the same images merged, by kernel and way of merging",
    title="MergeMany by number of networks and kernel",
    source="snimu, hlb-CIFAR10: Git re-basin results, 2023 (snimu/rebasin-results), section Simple MergeMany",
    question="n `hlb` networks are trained on the same images from initialisations of their own and merged, without "
    "any training afterwards. How accurate is the result by n and kernel, and what decides that?",
    cost="25 CPU minutes",
    sizes=SIZES,
    answer=_answer,
    theirs="Test accuracy of MergeMany in %, base width 64, each network trained on all of CIFAR-10 to about 94 (3 x "
    "3), one seed:\n\n"
    + table(
        ["kernel", "n = 3", "n = 6", "n = 9", "n = 12"],
        [
            ["3 x 3", 82.1, 44.0, 24.5, 18.5],
            ["6 x 6", 85.8, 37.6, 17.4, 13.0],
            ["9 x 9", 83.0, 42.6, 27.0, 21.3],
        ],
    )
    + '\n\n"Clearly, MergeMany significantly reduces performance instead of improving it. The more models are merged, '
    'the greater the loss in performance."',
    ours=_ours,
    explains="Kernels of 3 x 3 have three seeds, 6 x 6 and 9 x 9, which take two to three times as long, have one. "
    "The order of the ways is as elsewhere: an alignment to one of the networks is a better start than the "
    "paper's, which their code uses too, because the mean of n unaligned networks, to which each is then "
    "aligned, is noise when n is large. Three seeds settle that for 3 x 3 in the mean over all n, and that "
    "every merge is above the plain average at n = 12 and below a single network. They settle neither by how"
    " much a merge falls with n (each does in the mean, and every interval of a fall from n = 3 to 12 "
    "reaches 0), nor whether weights or activations align better. At base width 16 and some 3,540 images a "
    "network (the page `mergers`) the paper's start falls with n, and an alignment to one network hardly "
    "does. Levels cannot be compared: theirs is 8 times wider and trained far longer, and both help a merge."
    " BatchNorm does not explain it: their evaluation measures all statistics anew, on the training images, "
    "as ours does on public ones. Their code also never permutes the widest stream and lets biases carry no "
    "signal. All accuracies rest on the same 1,000 test images, a standard error of 1.6 points that "
    "deviations over seeds do not hold.",
    draw=draw,
)
