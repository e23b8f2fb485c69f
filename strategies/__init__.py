"""Flower strategies by name: fedmerge's own, and Flower's with the same checks around them."""

from fedmerge.merge import ORDERS
from fedmerge.pipeline import STEPS, Pipeline
from strategies._central import DPFedAvg
from strategies._federated import Federated, Federation, Served, Summed
from strategies._fedma import FedMA
from strategies._fednova import FedNova
from strategies._flower import FLOWER
from strategies._masked import Masked
from strategies._merge_many import FedAvgRetrain, MergeMany
from strategies._papa import Papa
from strategies._registry import (
    STRATEGIES,
    Range,
    Strategy,
    build,
    check,
    networks_read,
    preset,
    summaries,
    uses,
)
from strategies._replies import (
    ClientResult,
    Introduction,
    LocalEvaluation,
    read_evaluation,
    read_head_sums,
    read_introduction,
    read_training,
)
from strategies._scaffold import Scaffold

__all__ = [
    "STRATEGIES",
    "ClientResult",
    "DPFedAvg",
    "FedAvgRetrain",
    "FedMA",
    "FedNova",
    "Federated",
    "Federation",
    "Introduction",
    "LocalEvaluation",
    "Masked",
    "MergeMany",
    "Papa",
    "Range",
    "Scaffold",
    "Served",
    "Strategy",
    "Summed",
    "build",
    "check",
    "networks_read",
    "preset",
    "read_evaluation",
    "read_head_sums",
    "read_introduction",
    "read_training",
    "summaries",
    "uses",
]


def _by_steps(pipeline: Pipeline, optimizer: str, init: str) -> str:
    """What rules out a strategy that divides a client's way from the global network by how far its steps reach."""
    if optimizer != "sgd":
        return (
            f"divides a client's way by how far its steps reach, and {optimizer}'s are no sum of gradients; "
            "use --optimizer sgd"
        )
    if init == "independent":
        return (
            f"measures a client's way from the global network, and with init = {init!r} clients begin round 1 "
            "elsewhere; use --init shared"
        )
    return ""


def _by_mean(pipeline: Pipeline, optimizer: str, init: str) -> str:
    """What rules out a strategy that pulls clients towards their mean."""
    if pipeline.merger in ORDERS:
        return ""
    return (
        f"pulls clients towards their mean, and merger {pipeline.merger} is none; use {', '.join(ORDERS)} (which does "
        "not align)"
    )


STRATEGIES.add(
    Strategy(
        "merge-many",
        MergeMany,
        "align, merge, repair, retrain on the public split",
        title="MergeMany",
        reads=STEPS,
        aligns=True,
        sums=True,
    ),
    Strategy(
        "fedavg-retrain",
        FedAvgRetrain,
        "FedAvg, then the same retraining: the fair control of merge-many",
        title="FedAvg",
        reads=frozenset({"retrain", "teacher"}),
        sums=True,
    ),
    Strategy(
        "papa",
        Papa,
        "clients keep their networks, pulled towards the mean (PAPA)",
        title="PAPA",
        reads=STEPS - {"retrain", "teacher"},
        options={"alpha": "how much of itself a network keeps in a pull", "every": "rounds from one pull to the next"},
        check=_by_mean,
    ),
    Strategy(
        "fedavg-aligned",
        MergeMany,
        "FedAvg of clients aligned to each other in each round; no public images",
        title="FedAvg, aligned",
        reads=STEPS,
        # Clients that began a round at one network are aligned already, so aligning them to that network or to each
        # other is the same; in round 1 of independent initialisation there is no such network.
        fixes={"merger": "merge-many", "repair": "none", "retrain": "none"},
        aligns=True,
        sums=True,
    ),
    Strategy(
        "fedma",
        FedMA,
        "layers matched and frozen one a round, without FedMA's growth (Wang et al. 2020)",
        title="FedMA",
        reads=frozenset({"reference", "repair"}),
        fixes={"merger": "layer-wise", "retrain": "none"},
        aligns=True,
    ),
    Strategy(
        "feddf",
        FedAvgRetrain,
        "FedAvg, then distillation of the clients' ensemble (Lin et al. 2020)",
        title="FedAvg",
        reads=frozenset({"retrain"}),
        fixes={"retrain": "distill", "teacher": "mean"},
        sums=True,
    ),
    Strategy(
        "scaffold",
        Scaffold,
        "control variates against the drift of clients (Karimireddy et al. 2020)",
        title="SCAFFOLD",
        options={"server_lr": "factor of the server's step"},
        check=_by_steps,
    ),
    Strategy(
        "fednova",
        FedNova,
        "directions normalised by the clients' own steps (Wang et al. 2020)",
        title="FedNova",
        check=_by_steps,
    ),
    *FLOWER,
)
