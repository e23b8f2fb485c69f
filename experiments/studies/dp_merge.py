"""What differential privacy costs a merge: accuracy, attacks, an audit from below, and orders that are still found."""

import math

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.studies.dp_networks import (
    ALIGNERS,
    AVERAGE,
    CLIENT,
    COLUMNS,
    MERGED,
    PUBLIC,
    RETRAINED,
    DPMerge,
    cells,
)
from experiments.studies.page import mean_sd, table
from experiments.studies.pictures import lines
from experiments.studies.study import Study


def _shown(epsilon: float) -> str:
    return f"{epsilon:g}" if math.isfinite(epsilon) else "∞"


def _part(found: pd.DataFrame, part: str) -> pd.DataFrame:
    """The rows of one part, as numbers; a column that says nothing of it is NaN."""
    some = found[found["part"] == part]
    return some.assign(**{name: pd.to_numeric(some[name]) for name in ("epsilon", *COLUMNS[1:])})


def _ours(found: pd.DataFrame) -> str:
    networks, aligners = _part(found, "networks"), _part(found, "aligners")
    epsilons = list(networks["epsilon"].unique())
    by = dict(iter(networks.groupby(["of", "epsilon"], sort=False)))
    ways = dict(iter(aligners.groupby(["of", "epsilon"], sort=False)))
    heads = [f"ε = {_shown(e)}" for e in epsilons]
    names = list(networks["of"].unique())
    told = [
        [
            of, _shown(e), f"{rows['accounted'].max():.2f}".replace("inf", "∞"),
            f"{rows['audited'].mean():.2f} ({rows['audited'].max():.2f})", mean_sd(rows["auc_loss"], 3, 1),
            mean_sd(rows["auc_rmia"], 3, 1), mean_sd(rows["tpr_1"]),
        ]
        for (of, e), rows in by.items()
    ]  # fmt: skip
    delta = "at the delta of the set-up"
    return "\n\n".join(
        [
            f"Accuracy on the test set in percent, mean ± deviation over seeds; epsilon {delta}, over all rounds.",
            table(["network", *heads], [[of, *(mean_sd(by[of, e]["accuracy"]) for e in epsilons)] for of in names]),
            "What the networks tell: the accounted epsilon of a client (at most), the bound from below by the audit of "
            "the first client's canaries (mean over seeds, and the highest), and members told from images of nobody.",
            table(
                [
                    "network", "ε", "accounted", "audited from below", "AUC of the loss", "AUC of RMIA",
                    "found at 1 % false alarms, %",
                ],
                told,
            ),
            "Units of a known order that are found again, in percent, by two clients from one start:",
            table(["aligner", *heads], [[of, *(mean_sd(ways[of, e]["planted"]) for e in epsilons)] for of in ALIGNERS]),
            "Two clients from a start each: the cosine of their weights once aligned, and the error barrier in points "
            "between them.",
            table(
                ["aligner", *heads, "CPU s"],
                [
                    [
                        of,
                        *(
                            f"{ways[of, e]['similarity'].mean():.2f}, {100 * ways[of, e]['barrier'].mean():.1f}"
                            for e in epsilons
                        ),
                        f"{aligners[aligners['of'] == of]['seconds'].mean():.2f}",
                    ]
                    for of in ALIGNERS
                ],
            ),
        ]
    )  # fmt: skip


def _answer(found: pd.DataFrame) -> str:
    networks, aligners = _part(found, "networks"), _part(found, "aligners")
    bounded = networks[np.isfinite(networks["epsilon"]) & (networks["of"] != PUBLIC)]
    most = networks["of"][networks["of"].str.startswith("FedAvg") & ~networks["of"].str.endswith("retrained")].iloc[-1]

    def at(of: str, epsilon: float, column: str = "accuracy", rows: pd.DataFrame = networks) -> float:
        return 100 * float(rows[(rows["of"] == of) & (rows["epsilon"] == epsilon)][column].mean())

    def by_epsilon(of: str) -> str:
        return ", ".join(f"{at(of, e):.1f}" for e in networks["epsilon"].unique())

    ends = [_shown(e) for e in networks["epsilon"].unique()]
    strict = bounded["epsilon"].min()
    order = ", ".join(f"{of} {at(of, strict, 'planted', aligners):.0f} %" for of in ALIGNERS[1:])
    above = int((bounded["audited"] > bounded["accounted"]).sum())
    free = networks[~np.isfinite(networks["epsilon"]) & (networks["of"] == CLIENT)]
    told = [at(of, math.inf, "auc_rmia") / 100 for of in (CLIENT, MERGED, most)]
    return f"""
At epsilon {", ".join(ends)} merging in one round reaches {by_epsilon(MERGED)} % before the default retraining and
{by_epsilon(RETRAINED)} % after it, FedAvg in {most.split(", ")[1]} {by_epsilon(most)} % at the same account, the plain
average of the merged networks {by_epsilon(AVERAGE)} %, and the public images alone {at(PUBLIC, strict):.1f} %.
At epsilon {strict:g} the order that was planted is found again by {order}.
Without noise a member is told from another image with an AUC (RMIA) of {told[0]:.2f} in a client's own network,
{told[1]:.2f} in the merged one and {told[2]:.2f} in FedAvg's; with noise it is at most {bounded["auc_rmia"].max():.2f}.
The audit bounds the epsilon of a client trained without noise by {free["audited"].mean():.1f} from below, of networks
with noise by {bounded["audited"].max():.2f} at most: in {above} of {len(bounded)} cases above what was accounted."""


def _draw(found: pd.DataFrame) -> Figure:
    networks, aligners = _part(found, "networks"), _part(found, "aligners")
    places = {e: i for i, e in enumerate(networks["epsilon"].unique())}
    shown = [networks[networks["of"] != PUBLIC], aligners.assign(accuracy=aligners["planted"])]
    titles = ("test accuracy", "units of a planted order found")
    panels = {t: part.assign(place=part["epsilon"].map(places)) for t, part in zip(titles, shown, strict=True)}
    fig = lines(panels, x="place", y="accuracy", by="of", label=("epsilon of a client", "share"), shared=False)
    for ax in fig.axes:
        ax.set_xticks(range(len(places)), [_shown(e) for e in places])
    return fig


STUDY = Study(
    "dp-merge",
    cells,
    "merging and FedAvg of clients under differential privacy, attacked, audited, and aligned through the noise",
    title="Merging under differential privacy",
    source="ours; DP-SGD by Abadi et al. 2016 (Opacus), audit by Steinke, Nasr, Jagielski 2023, RMIA by Zarifzadeh et "
    "al. 2024",
    question="""
Clients train with DP-SGD at epsilon 1, 4 and 8 and without bounds. What do merging in one round, the plain average and
FedAvg make of them at the same account, what can be told of the images, and is the order of units still found?""",
    cost="four CPU minutes",
    sizes={
        "quick": DPMerge(
            seeds=(0,), dataset="digits", width=16, clients=3, client_images=200, epochs=4, rounds=2, batch_size=200,
            epsilons=(8.0,), delta=1e-3, canaries=60, attacked=40, public=0.1,
        ),
        "default": DPMerge(),
    },
    answer=_answer,
    theirs="""
None of merging by permutation under differential privacy that we know of. One published pair of audited and accounted
epsilon on MNIST: Yoon, Jeung, No (2024, arXiv:2412.01756, abstract) find 4.9 by crafted
examples, and 4.4 by those of before, where 10 is accounted and the final network alone is seen.""",
    ours=_ours,
    explains="""
All networks of one epsilon have one account: FedAvg's rounds share the passes out, so the noise of a step is that of
the one round. Retraining, teachers and alignment read public images and what was published under that account; they
spend nothing. The first client holds the canaries in every procedure, images with a wrong label, half of them trained
on, so a few percent of one client's labels are wrong in all networks of a column. The score of a canary is how sure the
network is of the wrong label. An audit by one training with so many canaries proves less than is true: from final
networks, of mislabelled images, bounds far below the account are usual, and a bound of 0 proves nothing. Attacks are
the loss threshold and offline RMIA whose references are the other clients' own networks; shadow federations (LiRA)
would cost a federation each and were left out.""",
    draw=_draw,
)  # fmt: skip
