"""Does merging pay: the study's entry, its answer and its picture."""

import math

import pandas as pd
from matplotlib.figure import Figure

from experiments.report.theme import INK, MARKS, SERIES, figure, legend, styled
from experiments.studies.does_merging_pay import BEST, MERGED, PUBLIC, Pays
from experiments.studies.pays_cells import cells
from experiments.studies.pays_tables import (
    LEVEL,
    SETTING,
    beside_ensemble,
    best_way,
    called,
    coverage,
    family,
    ours,
    read,
    settings,
)
from experiments.studies.study import Study


def _answer(rows: pd.DataFrame) -> str:
    rows = read(rows)
    parts = settings(rows)
    tests, within, own = family(parts), [*beside_ensemble(parts).values()], []
    for _, part in parts:
        own.append((best_way(part, MERGED) - best_way(part, BEST)).mean())
    said = []
    for other in (BEST, PUBLIC):
        means = [one.difference.mean for one in tests if one.other == other]
        sure = [one.difference.mean > 0 for one in tests if one.other == other and one.p < LEVEL]
        said.append(
            f"{_range(means)} points (above 0 in {sum(m > 0 for m in means)} of {len(means)} settings, significantly "
            f"so in {sum(sure)}, significantly below in {len(sure) - sum(sure)})"
        )
    whole, measured = map(sum, zip(*coverage(rows).values(), strict=True))
    return f"""
With the same retraining, stacked teacher, unlabelled images and head, the merged network less the best client is
{said[0]}, and less a network of the public labels alone {said[1]}. Less the best ensemble of clients it is
{_range(within)} points, and within a point of it or above in {sum(d >= -1 for d in within)} of {len(within)} settings.
Each in the way that is best for it on val, it is {_range(own)} points from the best client.
{measured} of the plan's {whole} settings and seeds are measured."""


def _range(values: list[float]) -> str:
    ends = dict.fromkeys(f"{value:+.1f}" for value in (min(values), max(values)))
    return " to ".join(ends)


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    tests = family(settings(read(rows)))
    shown = list(dict.fromkeys(one.setting for one in tests))
    fig, ax = figure("Merged less the other, everything the same", 1.5 + 0.32 * len(shown))
    for k, other in enumerate((BEST, PUBLIC)):
        chosen = [one for one in tests if one.other == other]
        y = [-shown.index(one.setting) - 0.22 * k for one in chosen]
        x = [one.difference.mean for one in chosen]
        half = [0 if math.isnan(one.difference.high) else one.difference.high - one.difference.mean for one in chosen]
        ax.errorbar(x, y, xerr=half, fmt=MARKS[k], color=SERIES[k], label=f"less {other}", linestyle="none", capsize=2)
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_yticks([-i for i in range(len(shown))], [*map(called, shown)])
    ax.set_ylim(-len(shown) + 0.3, 0.5)
    ax.set_xlabel("points on the test split, 95 % interval")
    legend(fig, columns=2)
    return fig


STUDY = Study(
    "does-merging-pay",
    cells,
    "merged, best client and public labels alone with everything the same, over skew, clients, starts; rivals",
    title="Does merging pay?",
    source="a question of fedmerge's own, and of anyone who holds private data",
    question="""
Clients train on private images from independent or from pretrained networks, and send their networks once. Is the
network that a server merges of theirs better than the best of them, and than a network of the server's own labelled
images, when all three get the same retraining, the same teacher, the same unlabelled images and the same sums for
their last layer? How much is the merge, how much the teacher, how much the sums?""",
    cost="some 20 hours on one core, shared by --jobs; rows as they come, so stop it and go on with --resume",
    apart=(*SETTING, "seed"),
    sizes={
        "quick": Pays(seeds=(0,), plan="a toy", labels=100, epochs=1, fedavg=((1, 1),), rounds=(2, 1)),
        "default": Pays(),
    },
    answer=_answer,
    theirs=f"""
Nothing is published for these settings. A trial before the study (CIFAR-10, 6 clients of 2,500 images, 10 epochs,
independent, one seed, Dirichlet 0.1 three) had, as {BEST} / merged / {PUBLIC}:

| | `cnn` Dirichlet 0.1 | two classes | Dirichlet 0.5 | IID | `hlb` 8 Dirichlet 0.1 |
|---|--:|--:|--:|--:|--:|
| ensemble, mean / stacked | 31.5 / 46.6 | 21.1 / 44.9 | 43.3 / 47.4 | 46.6 / 47.7 | 47.9 / 65.1 |
| mean teacher | 36.3 / 42.2 | 31.3 / 41.3 | 44.0 / 43.7 | 45.6 / 44.9 | 60.9 / 60.6 |
| stacked | 39.7 / 43.4 | 35.2 / 42.8 | 44.8 / 44.2 | 44.9 / 45.0 | 61.3 / 60.8 |
| stacked, 4,000 unlabelled | 43.2 / 45.1 | 36.8 / 42.2 | 46.2 / 46.1 | 46.1 / 46.0 | 64.1 / 64.0 |
| all of that + head | 45.3 / 46.8 / 46.6 | 40.5 / 45.3 / – | 46.9 / 47.6 / 46.2 | 46.6 / 47.2 / 45.9 | 65.5 / 65.4 / 63.3 |""",  # noqa: E501
    ours=ours,
    explains="""
The best client is chosen on val, as is the ridge strength of a head; test is looked at once. All that is compared with
the merge has its retraining (half on labels, half on the teacher; unlabelled images on the teacher alone), the same
draws, and a head from sums over the same private images, so what is left is the start: merged weights, one client's, or
those of the public labels. That the last one is near shows how much of the whole comes from teacher and sums, which
carry private data too. The merge falls short of what was aimed at where starts are near each other already (clients of
one pretrained network, or mildly skewed) and where the retraining brings them together: of a lead that the merge has
with a new head alone little is left after all public images have been seen ten times. It falls short of the public
labels where clients know two digits each, for there the clients' ensemble knows less than those labels tell. On `hlb`,
from independent networks, it is the merge itself that loses, as the column of a head alone shows, and the retraining
makes up for most of it.

More rounds help the pipeline as they help FedAvg, and each has something that the other has not: the pipeline learns
from public labels and from what its teacher says after every round, FedAvg from private images alone. What of the lead
is the merge is not separated there, for from the second round on all clients begin at one network. On IID clients the
last retraining costs: the merged network before it is the better one.

FedMA here keeps the width of its layers, which the paper lets grow, and FedDF averages probabilities, the paper logits.
DIMAT (Saadati et al., CVPR 2024) is not among the rivals: the aggregator of APPFL 1.12 that has its name reads units
from graphs written by hand for its own ResNets, VGGs and one network of two convolutions and two linear layers, and
none of these networks has one.""",
    draw=_draw,
)
