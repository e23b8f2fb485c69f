"""Is a merge of briefly trained networks a better start of training than training on?"""

from collections.abc import Iterator

import pandas as pd

from experiments.studies.bench import Bench
from experiments.studies.merge_many import ACTIVATIONS, PAPER, SIZES, MergeMany, draw, merged
from experiments.studies.page import table
from experiments.studies.study import Cell, Study, Work, each

ONE, TWO_SCHEDULES = "one network, 2e epochs", "one network, e epochs twice"


def cells(config: MergeMany, work: Work) -> Iterator[Cell]:
    """N networks trained e epochs and merged, the merge trained e more; beside them one network trained 2e."""

    def rows(seed: int, kernel: int, n: int) -> list[dict[str, object]]:
        bench = Bench(config, work, seed, kernel_size=kernel)
        networks = [bench.trained(i) for i in range(n)]
        last = {
            how: bench.trained(n, name=f"{label}-", start=lambda how=how: merged(bench, networks, how))  # type: ignore[misc]
            for label, how in (("paper", PAPER), ("activations", ACTIVATIONS))
        }
        last[ONE] = bench.trained(0, name="long-", epochs=2 * config.epochs)
        last[TWO_SCHEDULES] = bench.trained(1, name="again-", start=lambda: networks[0])
        return [{"network": name, **bench.score(params)} for name, params in last.items()]

    return each(rows, seed=config.seeds, kernel=config.kernels, n=config.ns)


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby(["network", "n", "kernel"], sort=False)[["loss", "accuracy"]].mean()


def _ours(rows: pd.DataFrame) -> str:
    found, parts = _means(rows), []
    control = found.loc[ONE]
    for network in rows["network"].unique():
        if network == ONE:
            continue
        body = [
            [
                f"{n} --- {kernel} x {kernel}", f"{own['loss']:.3f}", f"{control.loc[(n, kernel), 'loss']:.3f}",
                f"{100 * own['loss'] / control.loc[(n, kernel), 'loss']:.1f} %", f"{own['accuracy']:.3f}",
                f"{control.loc[(n, kernel), 'accuracy']:.3f}",
                f"{100 * own['accuracy'] / control.loc[(n, kernel), 'accuracy']:.1f} %",
            ]
            for (n, kernel), own in found.loc[network].sort_index().iterrows()
        ]  # fmt: skip
        parts.append(f"{network}:\n\n" + table(["networks --- kernel", "L", "LC", "L/LC", "A", "AC", "A/AC"], body))
    return "L and A: loss and accuracy on test; LC and AC: those of one network trained 2e epochs.\n\n" + "\n\n".join(
        parts
    )


def _answer(rows: pd.DataFrame) -> str:
    found = _means(rows)["accuracy"]
    shares = {name: 100 * found[name] / found[ONE] for name in rows["network"].unique()}
    low, high = rows["n"].min(), rows["n"].max()

    def of(name: str) -> str:
        by_n = shares[name].groupby(level="n").mean()
        return f"{by_n[low]:.0f} % at n = {low} and {by_n[high]:.0f} % at n = {high}"

    return (
        "Merging is no pre-training: merged as in the paper and trained on, n networks reach on average over the "
        f"kernels {of(PAPER)} of the accuracy of one network trained as long, merged by activations {of(ACTIVATIONS)}, "
        f"and one of them simply trained on, without any merge, {of(TWO_SCHEDULES)}."
    )


_THEIRS = """
3 --- 3 x 3,1.064,1.030,103.3 %,0.914,0.932,98.1 %
3 --- 6 x 6,1.053,1.018,103.4 %,0.906,0.924,98.1 %
3 --- 9 x 9,1.079,1.046,103.2 %,0.889,0.904,98.3 %
6 --- 3 x 3,1.077,1.034,104.2 %,0.907,0.929,97.6 %
6 --- 6 x 6,1.069,1.018,105.0 %,0.897,0.923,97.2 %
6 --- 9 x 9,1.087,1.042,104.3 %,0.879,0.906,97.0 %
9 --- 3 x 3,1.103,1.032,106.9 %,0.895,0.931,96.1 %
9 --- 6 x 6,1.078,1.022,105.5 %,0.893,0.921,97.0 %
9 --- 9 x 9,1.113,1.041,106.9 %,0.872,0.909,95.9 %
12 --- 3 x 3,1.111,1.032,107.7 %,0.890,0.929,95.8 %
12 --- 6 x 6,1.143,1.019,112.2 %,0.859,0.921,93.2 %
12 --- 9 x 9,1.135,1.045,108.6 %,0.858,0.905,94.8 %
"""

STUDY = Study(
    "train-merge-train",
    cells,
    "n networks trained, merged and trained on, beside one trained as long",
    title="Merging as pre-training",
    source="snimu, hlb-CIFAR10: Git re-basin results, 2023 (snimu/rebasin-results), section Train-Merge-Train",
    question="n networks are trained e epochs on the same images, merged, and the merge is trained e epochs more. Is "
    "it better than one network trained 2e epochs?",
    cost="5 CPU minutes",
    sizes=SIZES,
    answer=_answer,
    theirs="Base width 64, e = 5, all of CIFAR-10, one seed; the loss has label smoothing in it:\n\n"
    + table(
        ["networks --- kernel", "L", "LC", "L/LC", "A", "AC", "A/AC"],
        [line.split(",") for line in _THEIRS.split("\n") if line],
    ),
    ours=_ours,
    explains="On average over the kernels every merge lies below the network that was trained as long, as theirs do. "
    "At the default size single cells do not all: 400 test images and one seed give a standard error of 2.4 points, "
    "6 % of a ratio, so nothing is said of single kernels or of neighbouring n. The row that theirs lack, one network "
    "in the same two schedules, loses nothing, so what is lost is lost by the merge. Ratios are lower here than theirs "
    "because e epochs of 500 images are a hundredth of the steps that 50,000 give: what a merge destroys is less often "
    "learned again.",
    draw=draw,
)
