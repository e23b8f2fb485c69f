"""Flower strategies by name: fedmerge's own, and Flower's with the same checks around them."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from logging import INFO
from typing import Any

from flwr.common import log
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg

from fedmerge._registry import Registry
from fedmerge.align import check_observable, needs_images
from fedmerge.errors import ConfigError, UnknownNameError
from fedmerge.merge import takes
from strategies._federated import Federated, Federation
from strategies._fedma import FedMA
from strategies._fednova import FedNova
from strategies._merge_many import (
    FedAvgRetrain,
    MergeMany,
    OnStage,
    Pipeline,
    Workbench,
    align_merge_retrain,
    reference_client,
    retrain_on_public,
)
from strategies._papa import Papa
from strategies._replies import (
    ClientResult,
    Failure,
    Introduction,
    LocalEvaluation,
    Params,
    plain,
    read_evaluation,
    read_introduction,
    read_training,
    sift,
)
from strategies._retrain import retrain, retrainings
from strategies._sanity import Expected, Probe
from strategies._scaffold import Scaffold

__all__ = [
    "ClientResult",
    "Expected",
    "Failure",
    "FedAvgRetrain",
    "FedMA",
    "FedNova",
    "Federated",
    "Federation",
    "Introduction",
    "LocalEvaluation",
    "MergeMany",
    "Papa",
    "Params",
    "Pipeline",
    "Probe",
    "Scaffold",
    "Workbench",
    "align_merge_retrain",
    "aligns",
    "build",
    "check_options",
    "check_training",
    "names",
    "plain",
    "preset",
    "read_evaluation",
    "read_introduction",
    "read_training",
    "reference_client",
    "retrain",
    "retrain_on_public",
    "retrainings",
    "sift",
    "summaries",
    "uses",
]

Builder = Callable[..., Federated]
_STRATEGIES: Registry[Builder] = Registry("strategy")
_STRATEGIES.add("merge-many", MergeMany, "align, merge, repair, retrain on the public split")
_STRATEGIES.add("fedavg-retrain", FedAvgRetrain, "FedAvg, then the same retraining: the fair control of merge-many")

_STRATEGIES.add("papa", Papa, "clients keep their networks, pulled towards the mean (PAPA); alpha, every")
_STRATEGIES.add("fedavg-aligned", MergeMany, "FedAvg of clients aligned to each other in each round; no public images")
_STRATEGIES.add("fedma", FedMA, "layers matched and frozen one a round, without FedMA's growth (Wang et al. 2020)")
_STRATEGIES.add("feddf", FedAvgRetrain, "FedAvg, then distillation of the clients' ensemble (Lin et al. 2020)")
_STRATEGIES.add("scaffold", Scaffold, "control variates against the drift of clients (Karimireddy et al. 2020)")
_STRATEGIES.add("fednova", FedNova, "directions normalised by the clients' own steps (Wang et al. 2020)")

_PRESETS: dict[str, dict[str, Any]] = {
    # Clients that began a round at one network are aligned already, so aligning them to that network or to each other
    # is the same; in round 1 of independent initialisation there is no such network.
    "fedavg-aligned": {"merger": "merge-many", "repair": "none", "retrain": "none"},
    "fedma": {"merger": "layer-wise", "retrain": "none"},
    "feddf": {"retrain": "distill"},
}
"""Steps of the pipeline that a strategy fixes, whatever the run asks for."""

_READS: dict[Builder, frozenset[str]] = {
    MergeMany: frozenset(f.name for f in fields(Pipeline)),
    FedAvgRetrain: frozenset({"retrain"}),
    Papa: frozenset(f.name for f in fields(Pipeline)) - {"retrain"},
    FedMA: frozenset({"reference", "repair"}),
}
"""What a strategy reads of the pipeline; the others read nothing."""

_ALIGNMENT = frozenset({"aligner", "reference", "restarts"})
_AS_THEY_COME = ("average", "merge-many-paper")
"""Mergers that align no network to a reference."""

_FIXED = set(inspect.signature(FedAvg).parameters)
_OPTIONS: dict[str, tuple[str, ...]] = {"papa": ("alpha", "every"), "scaffold": ("server_lr",)}
_PER_WRONG = {flower.Krum: 2, flower.MultiKrum: 2, flower.Bulyan: 4}
"""Replies that a robust aggregator needs for each client that may be wrong, beside three."""

_BY_STEPS = ("scaffold", "fednova")
"""Strategies that divide a client's way from the global network by how far its optimiser's steps reach."""


def _flower(base: type[FedAvg], **defaults: Any) -> Builder:
    """Flower's strategy ``base`` with fedmerge's checks; reports the aggregate as a stage."""

    def aggregate(self: Any, server_round: int, results: list[ClientResult]) -> Params:
        params = Federated.aggregate(self, server_round, results)
        self.on_stage(server_round, "aggregated", params)
        return params

    def fewest(self: Any) -> int:
        wrong = int(getattr(self, "num_malicious_nodes", 0))
        return wrong * _PER_WRONG[base] + 3 if base is flower.Bulyan or wrong else 1

    checked = type(
        base.__name__, (Federated, base), {"aggregate": aggregate, "fewest": fewest, "__doc__": base.__doc__}
    )

    def build(*, bench: Workbench, pipeline: Pipeline, on_stage: OnStage, **options: Any) -> Federated:
        try:
            strategy: Any = checked(**{**defaults, **options})
        except ValueError as error:
            raise ConfigError(f"{base.__name__}: {error}") from error
        strategy.on_stage = on_stage
        return strategy  # type: ignore[no-any-return]

    return build


for _name, _base, _defaults, _summary in (
    ("fedavg", flower.FedAvg, {}, "the clients' mean weighted by examples (McMahan et al. 2017)"),
    (
        "fedprox",
        flower.FedProx,
        {"proximal_mu": 0.01},
        "FedAvg with a proximal term on the client (Li et al. 2020)",
    ),
    ("fedavgm", flower.FedAvgM, {"server_momentum": 0.9}, "FedAvg with server momentum (Hsu et al. 2019)"),
    ("fedadam", flower.FedAdam, {}, "Adam on the server (Reddi et al. 2021)"),
    ("fedyogi", flower.FedYogi, {}, "Yogi on the server (Reddi et al. 2021)"),
    ("fedadagrad", flower.FedAdagrad, {}, "Adagrad on the server (Reddi et al. 2021)"),
    ("fedmedian", flower.FedMedian, {}, "coordinate-wise median (Yin et al. 2018)"),
    ("fedtrimmedavg", flower.FedTrimmedAvg, {}, "coordinate-wise trimmed mean (Yin et al. 2018)"),
    ("krum", flower.Krum, {}, "the one client nearest to its neighbours (Blanchard et al. 2017)"),
    ("multikrum", flower.MultiKrum, {"num_nodes_to_select": 2}, "mean of the clients that Krum scores best"),
    (
        "qfedavg",
        flower.QFedAvg,
        {"client_learning_rate": 0.01, "train_loss_key": "train-loss"},
        "weighs clients by their loss, for fairness (Li et al. 2020)",
    ),
    ("bulyan", flower.Bulyan, {}, "Krum selection and a trimmed mean (El Mhamdi et al. 2018)"),
):
    _STRATEGIES.add(_name, _flower(_base, **_defaults), _summary)
    _OPTIONS[_name] = tuple(p for p in inspect.signature(_base).parameters if p not in _FIXED)


def names() -> tuple[str, ...]:
    """Known strategies."""
    return _STRATEGIES.names()


def summaries() -> dict[str, str]:
    """Name -> one-line summary of every strategy."""
    return _STRATEGIES.summaries()


def preset(name: str, pipeline: Pipeline) -> Pipeline:
    """``pipeline`` with the steps that the strategy ``name`` fixes."""
    return replace(pipeline, **_PRESETS.get(name, {}))


def uses(name: str, pipeline: Pipeline) -> frozenset[str]:
    """The choices that decide what the strategy ``name`` makes of the clients.

    Names of steps of ``pipeline``, which it does not fix and does not pass over, and ``retrain_epochs``. Steps that it
    has and that are ``"none"`` are among them: that is a choice too.

    Raises:
        UnknownNameError: No such strategy or merger.
    """
    pipeline = preset(name, pipeline)
    reads = _READS.get(_STRATEGIES[name], frozenset())
    used = reads - _PRESETS.get(name, {}).keys()
    if "merger" in reads:
        wanted = takes(pipeline.merger)
        if pipeline.merger in _AS_THEY_COME:
            used -= _ALIGNMENT
        elif "order" not in wanted:
            used -= _ALIGNMENT - wanted
        if "epochs" in wanted:
            used |= {"retrain_epochs"}
    return used | {"retrain_epochs"} if "retrain" in reads and pipeline.retrain != "none" else used


def aligns(name: str) -> bool:
    """Whether the strategy ``name`` brings the clients' units into one order, so a plain mean is another network."""
    return name in ("merge-many", "fedavg-aligned", "fedma")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that the strategy ``name`` does not have.

    Raises:
        UnknownNameError: Names the option and those that there are.
    """
    for option in options:
        if option not in _OPTIONS.get(name, ()):
            raise UnknownNameError(f"option of strategy {name}", option, _OPTIONS.get(name, ()) or ("(none)",))


def check_training(name: str, *, optimizer: str, init: str) -> None:
    """Refuse clients that train in a way from which the strategy ``name`` can make nothing.

    Raises:
        ConfigError: Says what to change.
    """
    if name in _BY_STEPS and optimizer != "sgd":
        raise ConfigError(
            f"{name} divides a client's way by how far its steps reach, and {optimizer}'s are no sum of gradients; "
            "use --optimizer sgd"
        )
    if name in _BY_STEPS and init == "independent":
        raise ConfigError(
            f"{name} measures a client's way from the global network, and with init = {init!r} clients begin round 1 "
            "elsewhere; use --init shared"
        )


def build(
    name: str,
    *,
    bench: Workbench,
    pipeline: Pipeline,
    on_stage: OnStage = lambda r, stage, params: None,
    options: Mapping[str, Any] | None = None,
) -> Federated:
    """The strategy called ``name``.

    Args:
        name: A name from :func:`names`.
        bench: What the server has to work with.
        pipeline: Which method for which step, where the strategy has that step and does not fix it.
        on_stage: Called with every intermediate network.
        options: The strategy's own constructor arguments, for example ``{"server_momentum": 0.9}``.

    Raises:
        UnknownNameError: No such strategy, or an option that it does not have.
        ConfigError: An option out of its range.
        SpecError: The aligner compares activations, and the network cannot be traced on public images.
    """
    check_options(name, options or {})
    pipeline = preset(name, pipeline)
    if "aligner" in uses(name, pipeline):
        model = copy.deepcopy(bench.model)
        left = check_observable(pipeline.aligner, model, bench.spec, bench.public, bench.device)
        if left:
            log(
                INFO, "%s leaves in their order units that show in no activation: %s", pipeline.aligner, ", ".join(left)
            )
    built = _STRATEGIES[name](
        bench=bench, pipeline=pipeline, on_stage=on_stage, min_train_nodes=1, min_evaluate_nodes=1,
        min_available_nodes=1, **(options or {}),
    )  # fmt: skip
    built.probe = Probe(bench.model, bench.public, bench.device, measured=_measures(name, pipeline))
    return built


def _measures(name: str, pipeline: Pipeline) -> bool:
    """Whether the strategy runs the clients' networks on images, each with its own statistics."""
    reads = _READS.get(_STRATEGIES[name], frozenset())
    return (
        ("aligner" in reads and needs_images(pipeline.aligner))
        or ("merger" in reads and "data" in takes(pipeline.merger))
        or ("repair" in reads and pipeline.repair == "repair")
        or ("retrain" in reads and pipeline.retrain in ("distill", "both"))
    )
