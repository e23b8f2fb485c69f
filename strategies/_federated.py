"""What every strategy of fedmerge does around its aggregation, Flower's own included."""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedmerge.dp_sgd import DPSGD
from fedmerge.errors import ConfigError, RoundError
from fedmerge.flower.replies import MOST_IMAGES, Failure, T, sift
from fedmerge.flower.sanity import Expected, Probe, check_made
from fedmerge.merge import Merge, average
from fedmerge.pipeline import Aggregate, OnStage, Pipeline, Workbench
from fedmerge.streams import numpy_stream
from fedmerge.tasks import ARRAYS, EXAMPLES, METRICS, ClientTask
from strategies._replies import ClientResult, LocalEvaluation, read_evaluation, read_training
from strategies._state import arrays, marks, named, restore

_OF_OPTIONS = (AppExitException, ArithmeticError, ValueError, TypeError, LookupError)
"""Flower's own exception, and what options that it lets pass end in."""


@contextmanager
def _quick_collections() -> Iterator[None]:
    """Within, garbage is looked for among new objects only, unless somebody had frozen objects of their own.

    Flower's strategies that read replies as NumPy arrays collect garbage once a reply, and a process with torch has
    half a million objects.
    """
    if _frozen():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@cache
def _frozen() -> bool:
    return gc.get_freeze_count() > 0  # it counts them one by one


@dataclass(frozen=True)
class Summed:
    """What is known of clients of whom only sums are: how many, their images, and the mean of their last epochs."""

    clients: int
    examples: int
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Federation:
    """Who takes part, and on what terms.

    Attributes:
        nodes: Client (partition id) -> Flower node id.
        task: What every client is told; the round is filled in.
        parameters: Names of the tensors that are trained; the others are buffers.
        images: Client -> the most images that it may say it has; no bound for those left out.
        fraction: Share of the clients asked in each round, drawn from the seed.
        min_replies: Fewer usable answers than this fail the round.
        timeout: Seconds to wait for answers to further messages of a round.
        offset: Rounds finished before this start (a resumed run).
        classes: How many there are, where the task asks clients for their label counts.
        on_asked: Called with the round and its clients before they are asked to train.
        on_results: Called with the round and its usable answers before they are aggregated.
        on_summed: Called instead with the round and what is known, by strategies that see no client's answer.
        on_merge: Called with the round and how its clients were merged, where they were.
        on_note: Called with the round and what a reader of its record has to know.
        on_evaluated: Called with the round and what its clients found of the new global network on their own images.
        on_failure: Called with every broken answer.
    """

    nodes: Mapping[int, int]
    task: ClientTask
    parameters: frozenset[str]
    images: Mapping[int, int] = field(default_factory=dict)
    fraction: float = 1.0
    min_replies: int = 1
    timeout: float = 3600.0
    offset: int = 0
    classes: int = 0
    on_asked: Callable[[int, list[int]], None] = lambda r, clients: None
    on_results: Callable[[int, list[ClientResult]], None] = lambda r, results: None
    on_summed: Callable[[int, Summed], None] = lambda r, summed: None
    on_merge: Callable[[int, Merge], None] = lambda r, merged: None
    on_note: Callable[[int, str], None] = lambda r, note: None
    on_evaluated: Callable[[int, list[LocalEvaluation]], None] = lambda r, found: None
    on_failure: Callable[[Failure], None] = lambda failure: None

    @property
    def size(self) -> int:
        """How many clients a round asks."""
        return max(1, round(self.fraction * len(self.nodes)))

    def cohort(self, server_round: int) -> dict[int, int]:
        """Flower node id -> client, for the clients asked in this round, in the order of clients."""
        rng = numpy_stream(self.task.seed, "cohort", server_round)
        chosen = rng.choice(sorted(self.nodes), size=self.size, replace=False)
        return {self.nodes[int(client)]: int(client) for client in sorted(chosen)}


class Federated(FedAvg):
    """Repeatable cohorts, checked replies, a policy for buffers, resuming: around any Flower strategy.

    Stands before that strategy among the bases of a class.

    The strategy aggregates trained parameters only. Buffers (BatchNorm statistics) are averaged by
    number of examples, integers stay integers. A broken reply is reported and left out: what
    :func:`fedmerge.flower.replies.sift` makes of the replies is all that a strategy sees of them.

    Attributes:
        federation: Who takes part.
        probe: Runs the clients' networks before they are used; without it only their numbers are looked at.
        central: How it blurs what the global network tells of a client; None if it does not.
        by_reach: Whether the strategy divides a client's way by how far its steps reach, which it must say then.
        by_distance: Whether it chooses by the distances of clients, which Flower takes as a difference of squares: in
            float32 those of clients that lie near each other are round-off.
        keeps: The attributes that the strategy carries from round to round, each a dict or a list of arrays; they
            go into the checkpoint of a run. A class states its own, those of its bases count too. Here are those of
            Flower's optimisers on the server, which state none themselves.
        passes: The attributes that every round sets anew before it reads them. What changes and is in neither is
            refused, because a resumed run would lose it.
    """

    federation: Federation
    probe: Probe | None = None
    by_reach = False
    by_distance = False
    central: DPSGD | None = None
    keeps: ClassVar[tuple[str, ...]] = ("current_arrays", "m_t", "momentum_vector", "v_t")
    passes: ClassVar[tuple[str, ...]] = ("_asked", "_expected", "_questions", "_sent", "probe")

    def join(self, federation: Federation) -> None:
        """Say who takes part; before ``start``.

        Raises:
            ConfigError: A round asks fewer clients than the strategy or the federation needs.
        """
        self.federation = federation
        if federation.size < federation.min_replies:
            raise ConfigError(
                f"min-replies is {federation.min_replies}, and a round asks {federation.size} of the "
                f"{len(federation.nodes)} clients that are there; start the others, or ask a larger share"
            )
        if federation.size < self.fewest():
            raise ConfigError(
                f"{self._needs()} replies, and a round asks {federation.size}; take more clients or another strategy"
            )
        self._begun = self._marks()

    def fewest(self) -> int:
        """How many usable replies the strategy needs to make anything of them."""
        return 1

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask this round's cohort to train."""
        server_round += self.federation.offset
        self._sent, self._expected = arrays, Expected(arrays, self.federation.parameters, self.probe)
        self._asked = self.federation.cohort(server_round)
        self.federation.on_asked(server_round, list(self._asked.values()))
        trained = ArrayRecord({k: a for k, a in arrays.items() if k in self.federation.parameters})
        messages = super().configure_train(server_round, trained, self._config(config, server_round), grid)
        return self._addressed(messages, arrays)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask this round's cohort to evaluate the new global network on its own data."""
        server_round += self.federation.offset
        messages = super().configure_evaluate(server_round, arrays, self._config(config, server_round), grid)
        return self._addressed(messages, arrays)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Drop broken replies, let the strategy aggregate the parameters, average the buffers."""
        server_round += self.federation.offset
        results, failures = self._read(
            replies,
            server_round,
            lambda client, content: read_training(
                client,
                content,
                expected=self._expected,
                most=self._most(client),
                reach=self.federation.task.reach if self.by_reach else None,
                private=self.federation.task.is_private,
                classes=self.federation.classes if self.federation.task.label_counts else 0,
            ),
        )
        fewest = max(self.federation.min_replies, self.fewest())
        if len(results) < fewest:
            reasons = "; ".join(f"client {f.client}: {f.reason}" for f in failures)
            need = f" ({self._needs()})" if fewest > self.federation.min_replies else ""
            raise RoundError(
                f"round {server_round} got {len(results)} usable replies of {len(self._asked)}, "
                f"expected at least {fewest}{need}: {reasons}"
            )
        self.federation.on_results(server_round, results)
        found = self.aggregate(server_round, results)
        if found.merge is not None:
            self.federation.on_merge(server_round, found.merge)
        if found.note:
            self.federation.on_note(server_round, found.note)
        check_made(found.params, f"round {server_round}: {type(self).__name__}", of=len(results))
        metrics = MetricRecord({"clients": len(results), EXAMPLES: sum(r.examples for r in results)})
        return ArrayRecord(found.params), metrics

    def aggregate(self, server_round: int, results: list[ClientResult]) -> Aggregate:
        """The new global network: the strategy's own aggregation of parameters, plainly averaged buffers."""
        buffers = average(
            [{k: v for k, v in r.params.items() if k not in self.federation.parameters} for r in results],
            [r.examples for r in results],
        )
        trained = [name for name in self._sent if name in self.federation.parameters]  # in the order they were sent
        asked = {self._asked[message.metadata.dst_node_id]: message for message in self._questions}
        replies = []
        for r in results:
            sent = {name: r.params[name] for name in trained}
            if self.by_distance:
                sent = {name: tensor.double() for name, tensor in sent.items()}
            arrays = ArrayRecord(sent)
            metrics = MetricRecord({EXAMPLES: r.examples, "train-loss": r.loss})
            replies.append(Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=asked[r.client]))
        name = type(self).__name__
        try:
            with _quick_collections():
                found, _ = super().aggregate_train(server_round, replies)
        except _OF_OPTIONS as error:
            raise RoundError(
                f"round {server_round}: {name} makes nothing of {len(results)} replies "
                f"({type(error).__name__}: {error}); check its options or try another strategy"
            ) from error
        if found is None:
            raise RoundError(f"round {server_round}: {name} returned no arrays; try another strategy")
        merged = {**found.to_torch_state_dict(), **buffers}
        return Aggregate({name: merged[name].to(like.dtype) for name, like in results[0].params.items()})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Weighted mean of the clients' own loss and accuracy; nothing where they were not asked for them."""
        if not self.fraction_evaluate:
            return None
        server_round += self.federation.offset
        found, _ = self._read(
            replies,
            server_round,
            lambda client, content: read_evaluation(client, content, most=self._most(client)),
            prefix="evaluation: ",
        )
        if not found:
            return None
        self.federation.on_evaluated(server_round, found)
        shares = np.array([e.examples for e in found], dtype=float)
        means = {"loss": [e.loss for e in found], "accuracy": [e.accuracy for e in found]}
        return MetricRecord({k: float(np.average(values, weights=shares)) for k, values in means.items()})

    def server_state(self) -> dict[str, np.ndarray]:
        """The arrays in the attributes that the strategy states (``keeps``).

        Raises:
            RoundError: An attribute that a checkpoint cannot hold.
        """
        return arrays(self, named(type(self), "keeps"))

    def load_server_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from :meth:`server_state`."""
        restore(self, state)

    def check_kept(self, server_round: int) -> None:
        """Refuse to go on where a resumed run could not: an attribute changed that no checkpoint holds.

        Raises:
            RoundError: Names the attributes.
        """
        now = self._marks()
        changed = [name for name in now if name not in self._begun or now[name] != self._begun[name]]
        if changed:
            raise RoundError(
                f"round {server_round}: strategy {type(self).__name__} changed {', '.join(map(repr, changed))}, which "
                "its keeps does not name, so that a resumed run would lose it; name it in keeps (a dict or a list of "
                "arrays), or in passes if every round sets it anew"
            )

    def _marks(self) -> dict[str, Any]:
        cls = type(self)
        return marks(self, ["_begun", *named(cls, "keeps"), *named(cls, "passes")])

    def _config(self, config: ConfigRecord, server_round: int) -> ConfigRecord:
        """A copy, because Flower's strategies write into it."""
        task = replace(self.federation.task, server_round=server_round)
        return ConfigRecord({**config, **task.to_config()})

    def _addressed(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        kept = [m for m in messages if m.metadata.dst_node_id in self._asked]
        for message in kept:
            message.content[ARRAYS] = arrays
        self._questions = sorted(kept, key=lambda m: self._asked[m.metadata.dst_node_id])
        return self._questions

    def _read(
        self, replies: Iterable[Message], server_round: int, read: Callable[[int, RecordDict], T], prefix: str = ""
    ) -> tuple[list[T], list[Failure]]:
        """Results of the usable replies to the last messages; the failures of the others are reported."""
        results, failures = sift(replies, read, server_round=server_round, asked=self._asked, questions=self._questions)
        for failure in failures:
            self.federation.on_failure(replace(failure, reason=prefix + failure.reason))
        return results, failures

    def _most(self, client: int) -> int:
        return self.federation.images.get(client, MOST_IMAGES)

    def _needs(self) -> str:
        return f"{type(self).__name__} needs at least {self.fewest()}"


class Served(Federated):
    """A strategy that works with what the server has.

    Args:
        bench: What that is.
        pipeline: Which method for which step.
        on_stage: Called with every intermediate network.
        options: Of Flower's FedAvg.
    """

    def __init__(self, *, bench: Workbench, pipeline: Pipeline, on_stage: OnStage, **options: Any) -> None:
        super().__init__(**options)
        self.bench, self.pipeline, self.on_stage = bench, pipeline, on_stage
