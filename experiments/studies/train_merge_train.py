"""Is a merge of briefly trained networks a better start of training than training on?"""

from collections.abc import Iterator
from math import isfinite

import pandas as pd

from experiments.compare.paired import paired
from experiments.studies.bench import Bench
from experiments.studies.merge_many import (
    ACTIVATIONS,
    PAPER,
    SIZES,
    MergeMany,
    draw,
    merged,
    of_all_seeds,
    over_kernels,
)
from experiments.studies.page import mean_ci, mean_sd, table
from experiments.studies.study import Cell, Study, Work

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

    return config.settings(rows)


def _beside(rows: pd.DataFrame) -> pd.DataFrame:
    """Every network beside the one that was trained as long from the same seed, and its ratios to it."""
    keys = ["n", "kernel", "seed"]
    control = rows[rows["network"] == ONE][[*keys, "loss", "accuracy"]]
    found = rows[rows["network"] != ONE].merge(control, on=keys, suffixes=("", " of one"))
    return found.assign(**{f"{of} ratio": found[of] / found[f"{of} of one"] for of in ("loss", "accuracy")})


def _ours(rows: pd.DataFrame) -> str:
    parts = []
    for network, found in _beside(rows).groupby("network", sort=False):
        body = [
            [
                f"{n} --- {kernel} x {kernel}", mean_sd(own["loss"], 3, 1), mean_sd(own["loss of one"], 3, 1),
                f"{mean_sd(own['loss ratio'])} %", mean_sd(own["accuracy"], 3, 1),
                mean_sd(own["accuracy of one"], 3, 1), f"{mean_sd(own['accuracy ratio'])} %",
            ]
            for (n, kernel), own in found.groupby(["n", "kernel"])
        ]  # fmt: skip
        parts.append(f"{network}:\n\n" + table(["networks --- kernel", "L", "LC", "L/LC", "A", "AC", "A/AC"], body))
    head = "L and A: loss and accuracy on test; LC and AC: those of one network trained 2e epochs; ratios seed by seed."
    return "\n\n".join([head, *parts])


def _answer(rows: pd.DataFrame) -> str:
    rows = of_all_seeds(rows)
    shares = _beside(rows).groupby(["network", "n", "seed"])["accuracy ratio"].mean()
    ns = dict.fromkeys((rows["n"].min(), rows["n"].max()))

    def of(name: str) -> str:
        return " and ".join(f"{mean_sd(shares[name, n])} % at n = {n}" for n in ns)

    less = {name: (shares[name] - shares[TWO_SCHEDULES]).groupby(level="seed").mean() for name in (PAPER, ACTIVATIONS)}
    tests = [paired(of.tolist()) for of in less.values()]
    gains = any((found.low if isfinite(found.low) else found.mean) > 0 for found in tests)
    return (
        f"Merging shows {'a' if gains else 'no'} gain as pre-training. {over_kernels(rows)}, ± deviation over seeds, "
        f"n networks merged as in the paper and trained on reach {of(PAPER)} of the accuracy of one network trained as "
        f"long, merged by activations {of(ACTIVATIONS)}, and one of them simply trained on, without any merge, "
        f"{mean_sd(shares[TWO_SCHEDULES, rows['n'].min()])} %. Less that last one, on average over n and with 95 % "
        f"intervals over seeds in brackets, these are {mean_ci(less[PAPER])} and {mean_ci(less[ACTIVATIONS])} points."
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
    cost="35 CPU minutes",
    sizes=SIZES,
    answer=_answer,
    theirs="Base width 64, e = 5, all of CIFAR-10, one seed; the loss has label smoothing in it:\n\n"
    + table(
        ["networks --- kernel", "L", "LC", "L/LC", "A", "AC", "A/AC"],
        [line.split(",") for line in _THEIRS.split("\n") if line],
    ),
    ours=_ours,
    explains="In the mean every merge lies below the network that was trained as long, as theirs do, but each "
    "interval of three seeds holds 100 % of its accuracy. Three seeds settle two things: merged as in the "
    "paper, what is reached falls from n = 3 to 12, as it does there, and a merge by activations is the "
    "better start. They do not tell that merge from the row that theirs lack, one network in the same two "
    "schedules, which lies as low in the mean and costs an n-th: n - 1 trainings more show no gain, and "
    "little of what is lost is lost by the merge. Kernels of 3 x 3 have three seeds, 6 x 6 and 9 x 9 have "
    "one; an epoch sees a twenty-fifth of their images. All accuracies rest on the same 1,000 test images, a"
    " standard error of 1.6 points or 2.6 % of a ratio that deviations over seeds do not hold. The n "
    "networks of the published rows are those of `merge-many`, so their training is not in the minutes "
    "above.",
    draw=draw,
)
