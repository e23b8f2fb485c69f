"""Strategies that describe themselves, and what follows from their entries and those of the methods of their steps."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from logging import INFO
from typing import Any, NamedTuple

from flwr.common import log
from flwr.serverapp.strategy import FedAvg

from fedmerge.align import ALIGNERS, check_observable
from fedmerge.errors import ConfigError, UnknownNameError
from fedmerge.flower.sanity import Probe
from fedmerge.merge import MERGERS, takes
from fedmerge.normalisation import REPAIRS
from fedmerge.pipeline import STEPS, Aggregate, OnStage, Pipeline, Workbench, measures
from fedmerge.registry import Entry, Registry, keywords_of, listed, returned, summary_of
from fedmerge.retraining import RETRAININGS
from fedmerge.teachers import TEACHERS
from strategies._federated import Federated
from strategies._masked import Masked
from strategies._replies import ClientResult

_METHODS: Mapping[str, Registry[Any]] = {
    "aligner": ALIGNERS, "merger": MERGERS, "repair": REPAIRS, "retrain": RETRAININGS,
    "teacher": TEACHERS,
}  # fmt: skip
_ALIGNMENT = frozenset({"aligner", "reference", "restarts"})


class Range(NamedTuple):
    """Numbers that an option may be: from ``low`` to ``high``, both or neither among them, or whole ones only.

    Example:
        >>> from strategies import Range
        >>> 0.5 in Range(0, 1, open=True), 1 in Range(0, 1, open=True), 2.5 in Range(1, whole=True)
        (True, False, False)
    """

    low: float
    high: float = math.inf
    whole: bool = False
    open: bool = False

    def __contains__(self, value: object) -> bool:
        """Whether ``value`` is one of them; NaN and infinity are in no range."""
        if not isinstance(value, int | float) or not math.isfinite(value) or (self.whole and value != int(value)):
            return False
        return self.low < value < self.high if self.open else self.low <= value <= self.high

    def __str__(self) -> str:
        what = "a whole number" if self.whole else "a number"
        if self.high == math.inf:
            return f"{what} {'above' if self.open else 'from'} {self.low:g}"
        return f"{what} {'between' if self.open else 'from'} {self.low:g} {'and' if self.open else 'to'} {self.high:g}"


@dataclass(frozen=True)
class Strategy(Entry):
    """A Flower strategy: ``make(*, bench, pipeline, on_stage, **options)`` with the arguments of Flower's FedAvg.

    Attributes:
        reads: Steps of the pipeline that it takes; the others change nothing.
        fixes: Steps that it fixes, whatever the run asks for, each with its method.
        options: The arguments that ``strategy-options`` may set, each with what it is.
        ranges: Which numbers options may be, where not any.
        told: Those options that clients are told (fields of :class:`fedmerge.tasks.ClientTask`), with their defaults.
        aligns: Whether it brings the clients' units into one order, so that a plain mean is another network.
        sums: Whether a sum of the clients' networks (aligned by themselves, if it aligns) is all that it has to read,
            so that it can go on under masks.
        losses: Whether it reads the clients' losses, which are not said under differential privacy.
        central: Whether it blurs what the global network tells of a client, and says how (``Federated.central``).
        check: From the pipeline, the clients' optimiser and their initialisation, why it can make nothing of them, as
            a sentence that begins after the name; empty if it can.
    """

    make: Callable[..., Federated]
    _: KW_ONLY
    reads: frozenset[str] = frozenset()
    fixes: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    told: Mapping[str, float] = field(default_factory=dict)
    aligns: bool = False
    sums: bool = False
    losses: bool = False
    central: bool = False
    check: Callable[[Pipeline, str, str], str] = lambda pipeline, optimizer, init: ""

    called = ("", "bench pipeline on_stage min_train_nodes min_evaluate_nodes min_available_nodes")

    def problem(self) -> str:
        """As of every entry; and what it reads, fixes and tells must be there."""
        if unknown := (self.reads | self.fixes.keys()) - STEPS:
            return f"it reads or fixes {listed(unknown)}; the steps are {listed(STEPS)}"
        for step, method in self.fixes.items():
            if step in _METHODS and method not in _METHODS[step]:
                return f"it fixes an {UnknownNameError(step, method, _METHODS[step])}"
        if unbound := self.ranges.keys() - self.options:
            return f"it bounds {listed(unbound)}, which are not among its options; name them there"
        if untold := self.told.keys() - self.options:
            return f"clients are told {listed(untold)}, which are not among its options; name them there"
        return super().problem()


def checked(
    base: type[FedAvg],
    fewest: Callable[[int], int] = lambda wrong: 1,
    *,
    by_distance: bool = False,
    **defaults: Any,
) -> Callable[..., Federated]:
    """Flower's strategy ``base`` with fedmerge's checks; reports the aggregate as a stage.

    ``fewest`` says how many replies it needs where so many clients may be wrong, ``by_distance`` that it chooses by
    the distances of clients.
    """

    def aggregate(self: Any, server_round: int, results: list[ClientResult]) -> Aggregate:
        found = Federated.aggregate(self, server_round, results)
        self.on_stage(server_round, "aggregated", found.params)
        return found

    def needed(self: Any) -> int:
        return fewest(int(getattr(self, "num_malicious_nodes", 0)))

    own = {"aggregate": aggregate, "fewest": needed, "by_distance": by_distance, "__doc__": base.__doc__}
    both = type(base.__name__, (Federated, base), own)

    def build(*, bench: Workbench, pipeline: Pipeline, on_stage: OnStage, **options: Any) -> Federated:
        try:
            strategy: Any = both(**{**defaults, **options})
        except ValueError as error:
            raise ConfigError(f"{base.__name__}: {error}") from error
        strategy.on_stage = on_stage
        return strategy  # type: ignore[no-any-return]

    return build


def _of_class(name: str, make: Any) -> Strategy:
    """A strategy of a user: a class or function with the arguments of an entry, or a class of Flower's kind."""
    numbers = [p.name for p in keywords_of(make, Strategy) if isinstance(p.default, int | float)]
    options = {option: "" for option in numbers if option not in inspect.signature(FedAvg).parameters}
    if inspect.isclass(make) and issubclass(make, FedAvg) and not issubclass(make, Federated):
        return Strategy(name, checked(make), summary_of(make, name), options=options)
    return Strategy(name, make, summary_of(make, name), options=options)


STRATEGIES: Registry[Strategy] = Registry("strategy", Strategy, "strategies", _of_class)
"""The strategies, Flower's among them."""


def summaries() -> dict[str, str]:
    """Name -> one line about every strategy, with the options that it has."""

    def line(entry: Strategy) -> str:
        return "; ".join([entry.summary, ", ".join(f"{name}: {what}" for name, what in entry.options.items())])

    return {name: line(entry).removesuffix("; ") for name, entry in STRATEGIES.items()}


def preset(name: str, pipeline: Pipeline) -> Pipeline:
    """``pipeline`` with the steps that the strategy ``name`` fixes."""
    return replace(pipeline, **STRATEGIES[name].fixes)


def uses(name: str, pipeline: Pipeline) -> frozenset[str]:
    """The choices that decide what the strategy ``name`` makes of the clients.

    Names of steps of ``pipeline``, which it does not fix and does not pass over, and ``retrain_epochs``. Steps that it
    has and that are ``"none"`` are among them: that is a choice too.

    Raises:
        UnknownNameError: No such strategy or merger.
    """
    entry, pipeline = STRATEGIES[name], preset(name, pipeline)
    used = entry.reads - entry.fixes.keys()
    retrains = "retrain" in entry.reads and pipeline.retrain != "none"
    teaches = retrains and "target" in RETRAININGS[pipeline.retrain].needs
    if not teaches and not ("merger" in entry.reads and "target" in takes(pipeline.merger)):
        used -= {"teacher"}
    if "merger" in entry.reads:
        merger = MERGERS[pipeline.merger]
        used -= _ALIGNMENT - merger.reads
        retrains |= "epochs" in merger.needs
    return used | {"retrain_epochs"} if retrains else used


def networks_read(name: str, pipeline: Pipeline) -> list[str]:
    """Which of the methods that strategy ``name`` uses read the network of a single client, as ``"retrain = 'both'"``.

    Aligners are none of them: each client can align itself.
    """
    entry, pipeline = STRATEGIES[name], preset(name, pipeline)
    found = [] if entry.sums else [f"strategy = {name!r}"]
    if "merger" in entry.reads and pipeline.merger != "merge-many":
        found.append(f"merger = {pipeline.merger!r}")
    for step, registry in (("repair", REPAIRS), ("retrain", RETRAININGS)):
        method = getattr(pipeline, step)
        if step in entry.reads | entry.fixes.keys() and registry[method].reads_networks:
            found.append(f"{step} = {method!r}")
    return found


def _check_options(name: str, given: Mapping[str, Any]) -> None:
    STRATEGIES.check_options(name, given)
    for option, value in given.items():
        within = STRATEGIES[name].ranges.get(option)
        if within is not None and value not in within:
            raise ConfigError(f"strategy {name}: option {option} is {value}; expected {within}")


def check(
    name: str, pipeline: Pipeline, *, options: Mapping[str, Any], optimizer: str, init: str, private: bool = False
) -> None:
    """Refuse a run from whose clients the strategy ``name`` can make nothing.

    Args:
        name: A name from :data:`STRATEGIES`.
        pipeline: Which method for which step.
        options: The strategy's own.
        optimizer: How clients train.
        init: Where they begin.
        private: Whether they train under differential privacy.

    Raises:
        UnknownNameError: An option that the strategy does not have.
        ConfigError: Says what to change.
    """
    _check_options(name, options)
    entry = STRATEGIES[name]
    if problem := entry.check(pipeline, optimizer, init):
        raise ConfigError(f"{name} {problem}")
    if private and entry.losses:
        raise ConfigError(
            f"{name} reads the losses of clients on their own images, which are not said under differential privacy; "
            "choose another strategy, or leave dp-epsilon and dp-noise out"
        )
    if private and entry.central:
        raise ConfigError(
            f"{name} blurs the mean of the clients, and dp-epsilon or dp-noise the clients themselves: two accounts in "
            "one run; choose another strategy, or leave dp-epsilon and dp-noise out"
        )
    merger = preset(name, pipeline).merger
    if "merger" in entry.reads and init == "independent" and "base" in MERGERS[merger].needs:
        # Round 1 is what rules it out: later rounds have a common base, but no round may be left out.
        raise ConfigError(
            f"merger {merger} adds up steps from a network that all clients began from, and with init = 'independent' "
            "there is none in round 1; use --init shared, or another merger"
        )


def build(
    name: str,
    *,
    bench: Workbench,
    pipeline: Pipeline,
    on_stage: OnStage = lambda r, stage, params: None,
    options: Mapping[str, Any] | None = None,
    masked: int = 0,
) -> Federated:
    """The strategy called ``name``.

    Args:
        name: A name from :data:`STRATEGIES`.
        bench: What the server has to work with.
        pipeline: Which method for which step, where the strategy has that step and does not fix it.
        on_stage: Called with every intermediate network.
        options: The strategy's own constructor arguments, for example ``{"server_momentum": 0.9}``.
        masked: How many masked sums it gets of a round's clients, and no client's network; 0 for their networks.

    Raises:
        UnknownNameError: No such strategy, or an option that it does not have.
        ConfigError: An option out of its range.
        SpecError: The aligner compares activations, and the network cannot be traced on public images; or the merger
            does not know its layers.
    """
    _check_options(name, options or {})
    pipeline = preset(name, pipeline)
    if "aligner" in uses(name, pipeline):
        left = check_observable(pipeline.aligner, bench.model, bench.spec, bench.public, bench.device)
        if left:
            log(
                INFO, "%s leaves in their order units that show in no activation: %s", pipeline.aligner, ", ".join(left)
            )
    if "merger" in uses(name, pipeline):
        MERGERS[pipeline.merger].check(bench.model)
    entry = STRATEGIES[name]
    make: Callable[..., Federated] = entry.make
    if masked:
        make = partial(Masked, aligned=entry.aligns, sums=masked)
        idle = {"repair", "retrain"} - entry.reads - entry.fixes.keys()
        none: dict[str, Any] = dict.fromkeys(idle, "none")
        pipeline = replace(pipeline, **none)
    made = make(
        bench=bench, pipeline=pipeline, on_stage=on_stage, min_train_nodes=1, min_evaluate_nodes=1,
        min_available_nodes=1, **(options or {}),
    )  # fmt: skip
    built = returned(f"strategy {name!r}", made, Federated)
    built.probe = Probe(bench.model, bench.public, bench.device, measured=measures(pipeline, entry.reads))
    return built
