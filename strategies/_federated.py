"""What every strategy of fedmerge does around its aggregation, Flower's own included."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedmerge._streams import numpy_stream
from fedmerge.errors import RoundError
from fedmerge.merge import average
from fedmerge.tasks import ARRAYS, CLIENT, EXAMPLES, METRICS, REACH, ClientTask
from strategies._replies import Failure, sift

Params = dict[str, torch.Tensor]


@dataclass(frozen=True)
class ClientResult:
    """One usable answer: the client's network and its metrics."""

    client: int
    params: Params
    metrics: Mapping[str, Any]

    @property
    def examples(self) -> int:
        """Number of images that the client trained on."""
        return int(self.metrics[EXAMPLES])

    @property
    def reach(self) -> float:
        """How far its steps reach: the sum of the weights with which gradients moved the network.

        Raises:
            RoundError: The client did not say, or its optimiser has none.
        """
        reach = float(self.metrics.get(REACH, 0.0))
        if not reach > 0:
            raise RoundError(f"client {self.client} does not say how far its steps reach; train with SGD")
        return reach


@dataclass(frozen=True)
class Federation:
    """Who takes part, and on what terms.

    Attributes:
        nodes: Client (partition id) -> Flower node id.
        task: What every client is told; the round is filled in.
        parameters: Names of the tensors that are trained; the others are buffers.
        fraction: Share of the clients asked in each round, drawn from the seed.
        min_replies: Fewer usable answers than this fail the round.
        offset: Rounds finished before this start (a resumed run).
        on_results: Called with the round and its usable answers before they are aggregated.
        on_failure: Called with every broken answer.
    """

    nodes: Mapping[int, int]
    task: ClientTask
    parameters: frozenset[str]
    fraction: float = 1.0
    min_replies: int = 1
    offset: int = 0
    on_results: Callable[[int, list[ClientResult]], None] = lambda r, results: None
    on_failure: Callable[[Failure], None] = lambda failure: None

    def cohort(self, server_round: int) -> dict[int, int]:
        """Flower node id -> client, for the clients asked in this round, in the order of clients."""
        size = max(1, round(self.fraction * len(self.nodes)))
        rng = numpy_stream(self.task.seed, "cohort", server_round)
        chosen = rng.choice(sorted(self.nodes), size=size, replace=False)
        return {self.nodes[int(client)]: int(client) for client in sorted(chosen)}


class Federated(FedAvg):
    """Repeatable cohorts, checked replies, a policy for buffers, resuming: around any Flower strategy.

    Stands before that strategy among the bases of a class.

    The strategy aggregates trained parameters only. Buffers (BatchNorm statistics) are averaged by
    number of examples, integers stay integers. A broken reply is reported and left out.
    """

    federation: Federation

    def join(self, federation: Federation) -> None:
        """Say who takes part; before ``start``."""
        self.federation = federation

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask this round's cohort to train."""
        server_round += self.federation.offset
        self._sent = arrays
        self._asked = self.federation.cohort(server_round)
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
        good, failures = sift(replies, server_round=server_round, asked=self._asked, like=self._sent)
        for failure in failures:
            self.federation.on_failure(failure)
        if len(good) < self.federation.min_replies:
            reasons = "; ".join(f"client {f.client}: {f.reason}" for f in failures)
            raise RoundError(
                f"round {server_round} got {len(good)} usable replies of {len(self._asked)}, "
                f"expected at least {self.federation.min_replies}: {reasons}"
            )
        results = [_result(reply.content) for reply in good]
        self.federation.on_results(server_round, results)
        merged = self.aggregate(server_round, results, good)
        metrics = MetricRecord({"clients": len(good), EXAMPLES: sum(r.examples for r in results)})
        return ArrayRecord(merged), metrics

    def aggregate(self, server_round: int, results: list[ClientResult], replies: list[Message]) -> Params:
        """The new global network: the strategy's own aggregation of parameters, plainly averaged buffers."""
        buffers = average(
            [{k: v for k, v in r.params.items() if k not in self.federation.parameters} for r in results],
            [r.examples for r in results],
        )
        trained = [name for name in self._sent if name in self.federation.parameters]  # in the order they were sent
        for reply, result in zip(replies, results, strict=True):
            reply.content[ARRAYS] = ArrayRecord({name: result.params[name] for name in trained})
            loss = float(result.metrics["train-loss"])
            reply.content[METRICS] = MetricRecord({EXAMPLES: result.examples, "train-loss": loss})
        arrays, _ = super().aggregate_train(server_round, replies)
        if arrays is None:
            raise RoundError(f"round {server_round}: {type(self).__name__} returned no arrays; try another strategy")
        merged = {**arrays.to_torch_state_dict(), **buffers}
        return {name: merged[name].to(like.dtype) for name, like in results[0].params.items()}

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Weighted mean of the clients' own loss and accuracy; nothing where they were not asked for them."""
        if not self.fraction_evaluate:
            return None
        server_round += self.federation.offset
        good, failures = sift(replies, server_round=server_round, asked=self._asked, like=None)
        for failure in failures:
            self.federation.on_failure(replace(failure, reason=f"evaluation: {failure.reason}"))
        if not good:
            return None
        rows = [reply.content[METRICS] for reply in good]
        shares = np.array([row[EXAMPLES] for row in rows], dtype=float)
        return MetricRecord(
            {k: float(np.average([row[k] for row in rows], weights=shares)) for k in ("loss", "accuracy")}
        )

    def server_state(self) -> dict[str, np.ndarray]:
        """Arrays that the strategy carries from round to round (moments, velocities), by ``attribute:key``."""
        state: dict[str, np.ndarray] = {}
        for attribute, value in sorted(vars(self).items()):
            if attribute.startswith("_"):
                continue
            if isinstance(value, ArrayRecord):
                value = {key: array.numpy() for key, array in value.items()}
            items = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
            state |= {f"{attribute}:{key}": array for key, array in items if isinstance(array, np.ndarray)}
        return state

    def load_server_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from :meth:`server_state`."""
        grouped: dict[str, dict[str, np.ndarray]] = {}
        for flat, array in state.items():
            attribute, key = flat.split(":", 1)
            grouped.setdefault(attribute, {})[key] = array
        for attribute, items in grouped.items():
            if attribute == "current_arrays":  # FedAvgM keeps its own, unrounded global network
                self.current_arrays = ArrayRecord({key: Array(array) for key, array in items.items()})
            elif all(key.isdigit() for key in items):
                setattr(self, attribute, [items[key] for key in sorted(items, key=int)])
            else:
                setattr(self, attribute, items)

    def _config(self, config: ConfigRecord, server_round: int) -> ConfigRecord:
        """A copy, because Flower's strategies write into it."""
        task = replace(self.federation.task, server_round=server_round)
        return ConfigRecord({**config, **task.to_config()})

    def _addressed(self, messages: Iterable[Message], arrays: ArrayRecord) -> list[Message]:
        kept = [m for m in messages if m.metadata.dst_node_id in self._asked]
        for message in kept:
            message.content[ARRAYS] = arrays
        return sorted(kept, key=lambda m: self._asked[m.metadata.dst_node_id])


def _result(content: Any) -> ClientResult:
    metrics = dict(content[METRICS])
    return ClientResult(int(metrics[CLIENT]), content[ARRAYS].to_torch_state_dict(), metrics)
