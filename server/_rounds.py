"""The rounds of a run: clients train, the strategy aggregates, every stage is measured."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid

import strategies
from fedmerge import DPSGD, repair
from fedmerge.merge import Merge
from fedmerge.pipeline import Params
from fedmerge.progress import counted, progress, steps
from fedmerge.provenance import made_of
from fedmerge.tasks import CORRECTION
from fedmerge.teachers import TEACHERS
from server import controls
from server._account import check_clients, spent
from server._best import Best
from server._costs import Clock
from server._events import Events
from server._grid import Meeting, WatchedGrid, meet
from server._head import with_head
from server._ledger import Ledger, climbs, line
from server._world import Measured, World
from server.callbacks import Callback, Callbacks
from server.config import LABELS, RunConfig
from server.directory import RunDirectory
from server.records import Kept, Row, Summary
from strategies import ClientResult, Federated, Federation, LocalEvaluation, Masked, Summed

_AVERAGE, _BEST = "server-average/", "handed-out/"  # what their tensors are called among those of the strategy


class Run:
    """One federated run. ``callbacks`` are told what happens, after its event file and its directory.

    Attributes:
        results: The usable answers of the last round.
        params: The global network.
    """

    def __init__(self, config: RunConfig, directory: RunDirectory, *callbacks: Callback) -> None:
        self.config, self.directory = config, directory
        self.tell = Callbacks(Events(), directory, *callbacks)
        self.world = World(config, self.tell)
        self.ledger, self.clock = Ledger(self.world), Clock()
        self.average = config.running_average()
        self.best = Best(self.world) if config.hand_out == "best-on-val" else None
        self.results: list[ClientResult] = []
        self.params: Params = {}
        self._aligned: Merge | None = None
        self._reported = False  # has the strategy told any of its networks?
        self._asked: Counter[int] = Counter()  # client -> the rounds that asked it
        self._central: DPSGD | None = None
        self._cut: Counter[int] = Counter()  # client -> how often it was asked already for the round that begins

    def execute(self, grid: Grid) -> Summary:
        """Run all rounds; returns the summary that was written, the last of the run's files.

        Raises:
            RoundError: Too few usable replies. What was finished stays readable, with that status.
        """
        status, between = "failed: interrupted", None
        self.world.grid = grid
        try:
            with progress(self.tell.step):
                self._rounds(WatchedGrid(grid, self._on_send, self._on_reply))
                between = line(self.world, self.results, self._aligned)
            status = "finished"
        except BaseException as error:
            status = f"failed: {str(error) or type(error).__name__}"
            raise
        finally:
            chosen = None if self.best is None else self.best.chosen
            privacy = spent(self.world, self._asked, self._central) if self._asked else None
            summary = self.ledger.summary(status, between, privacy, chosen)
            self.tell.end(summary, self.clock.end(self.world.device))
        return summary

    def _rounds(self, grid: WatchedGrid) -> None:
        c = self.config
        self.directory.made_of = made_of(c.setup(), (v for k, v in c.flat().items() if k not in LABELS))
        resumed = self.directory.resume()
        self.tell.begin(self.directory.path)
        self.tell.say(f"{c.strategy} on {c.dataset}, {c.clients} clients, {c.init} initialisation, seed {c.seed}")
        if left := c.left_out():
            self.tell.say(
                f"left out, for it takes long with {c.clients} clients: {', '.join(left)}; "
                f"--controls 'default, {', '.join(left)}' asks for it"
            )
        if replace(self.world.pipeline, retrain=self.world.retraining).teaches:
            TEACHERS[self.world.pipeline.teacher].check(self.world.bench.public)
        held = [len(rows) for rows in self.world.split.clients]
        check_clients(self.world, held)
        meeting = meet(grid, held, task=self.world.task, fewest=c.min_replies)
        self.world.meeting, grid.nodes = meeting, list(meeting.nodes.values())
        with counted("warming up", 1):
            self.world.task.warm_up()
        strategy = strategies.build(
            c.strategy,
            bench=self.world.bench,
            pipeline=self.world.pipeline,
            options=c.options(),
            on_stage=self.on_stage,
            masked=c.secure_sums if c.secure else 0,
        )
        if not c.local_evaluation:
            strategy.fraction_evaluate = 0.0
        self._central = strategy.central
        if isinstance(strategy, Masked):
            self.world.masked = partial(strategy.head_sums, server_round=c.rounds)
        offset = 0
        if resumed is None:
            self.params = self._begin()
        else:
            offset, self.params, state, kept = resumed
            self._restore(kept, offset)
        for failure in (f for f in meeting.failures if not self.ledger.knows(f)):
            self.ledger.fail(failure)
        federation = self._federation(meeting, offset)
        strategy.join(federation)
        self.world.cohort = list(federation.cohort(c.rounds).values())
        if resumed is not None:
            # A checkpoint of an older version does not say whom its rounds asked.
            before = (i for r in range(offset) for i in federation.cohort(r + 1).values())
            self._asked.update(kept.rounds_of or before)
            self._load(strategy, state)
        self._cut, ever = self.directory.asked_before(offset + 1)
        self._asked.update(self._cut)
        if c.secret_noise:  # what was told stays told, also where rounds begin again because their checkpoint is gone
            self._asked |= ever

        def after_round(r: int, arrays: ArrayRecord) -> None:
            self.clock.pause()
            if r > 0:
                self.params = arrays.to_torch_state_dict()
                self._after_round(r + offset, strategy)
                advance(1)

        with counted("rounds", c.rounds - offset) as advance:
            strategy.start(
                grid=grid,
                initial_arrays=ArrayRecord(self.params),
                num_rounds=c.rounds - offset,
                timeout=c.timeout,
                evaluate_fn=after_round,
            )
        if self.best is not None:
            self._hand_out(self.best)
        if c.head == "analytic":
            self._head()
        self.tell.keep("model.safetensors", self.params)
        if self.average is not None:
            self.tell.keep("averaged.safetensors", self._averaged())
        self._controls(of_clients=False)
        if c.keep_clients:
            for r in self.results:
                self.tell.keep(f"clients/round-{c.rounds}-client-{r.client}.safetensors", r.params)

    def _hand_out(self, best: Best) -> None:
        """Make the network that is best on val the global one."""
        if best.chosen is None:
            self.ledger.note(f"handed out as it was: strategy {self.config.strategy} reports no network to choose from")
            return
        self.params = best.params
        self.tell.say(f"handed out: {best.chosen.stage} of round {best.chosen.round}, the best on val")

    def _head(self) -> None:
        """Give the global network its head, after the last round; of a strategy that tells no stage, that is one."""
        if not self._reported:
            self.ledger.add(self.world.measure("aggregated", self.params))
        clients = self.world.cohort if self.config.secure else [r.client for r in self.results]
        found = with_head(self.world, self.params, clients)
        for failure in found.failures:
            self.ledger.fail(failure)
        self.ledger.note(found.note)
        self.ledger.head_down, self.ledger.head_up = found.bytes_down, found.bytes_up
        self.params = found.params
        self.ledger.add(self.world.measure("head", self.params))

    def _on_asked(self, server_round: int, clients: Sequence[int]) -> None:
        now, cut, c = Counter(clients), self._cut, self.config
        self._cut = Counter()
        # Asked again, a client says the same again, unless its noise is another.
        self._asked.update(now if c.secret_noise else now - cut)
        if c.is_private or strategies.STRATEGIES[c.strategy].central:
            self.directory.asked(server_round, cut + now if c.secret_noise else cut | now, self._asked)

    def _federation(self, meeting: Meeting, offset: int) -> Federation:
        c = self.config
        return Federation(
            nodes=meeting.nodes,
            images=meeting.images,
            task=self.world.task,
            parameters=self.world.spec.parameters,
            fraction=c.fraction_train,
            min_replies=c.min_replies,
            timeout=c.timeout,
            offset=offset,
            classes=len(self.world.split.dataset.classes),
            on_note=lambda r, note: self.ledger.note(f"round {r}: {note}"),
            on_asked=self._on_asked,
            on_results=self.on_results,
            on_summed=self.on_summed,
            on_merge=self.on_merge,
            on_evaluated=self.on_evaluated,
            on_failure=self.ledger.fail,
        )

    # -- before the first round ---------------------------------------------------------------------------

    def _begin(self) -> Params:
        """Where clients begin round 1; a pretrained start is a stage of its own."""
        if self.config.pretrain_passes():
            self.clock.resume()
            self.on_stage(0, "pretrained", self.world.start)
            self.clock.pause()
        return self.world.start

    def _restore(self, kept: Kept, offset: int) -> None:
        self.ledger.restore(kept)
        self.clock.seconds = kept.server_seconds
        if self.best is not None:
            self.best.chosen = kept.handed_out
        self.tell.say(f"continuing after round {offset}")

    def _load(self, strategy: Federated, state: dict[str, np.ndarray]) -> None:
        strategy.load_server_state({k: v for k, v in state.items() if not k.startswith((_AVERAGE, _BEST))})

        def own(prefix: str) -> Params:
            return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in state.items() if k.startswith(prefix)}

        if self.average is not None:
            self.average.load_state(own(_AVERAGE), self.params)
        if self.best is not None:
            self.best.params = own(_BEST)

    # -- a round ------------------------------------------------------------------------------------------

    def _on_send(self, kind: str, messages: list[Message]) -> None:
        self.clock.pause()
        if self.config.secure and kind == "query":
            self.ledger.corrections += sum(_bytes(m) for m in messages)
        if kind == "evaluate":
            self.ledger.evaluations += len(messages)
        if kind == "train":
            self.ledger.asked += len(messages)
            given: list[Any] = [m.content[CORRECTION] for m in messages if CORRECTION in m.content]
            self.ledger.corrections += sum(array.numpy().nbytes for record in given for array in record.values())

    def _on_reply(self, reply: Message) -> None:
        if self.config.secure and not reply.has_error():
            self.ledger.masked += _bytes(reply)

    def on_results(self, server_round: int, results: list[ClientResult]) -> None:
        """The usable answers of a round, before they are aggregated."""
        self.results = results
        self.ledger.answered += len(results)
        for r in results:
            self._told(server_round, "client", r)
        if server_round == self.config.rounds:
            for found in _of_clients(self.world, results):
                self.ledger.add(found)
            self._controls(of_clients=True)
        self.clock.resume()

    def on_evaluated(self, server_round: int, found: list[LocalEvaluation]) -> None:
        """What clients find of the new global network on their own images."""
        for one in found:
            self._told(server_round, "global", one)

    def _told(self, server_round: int, stage: str, of: ClientResult | LocalEvaluation) -> None:
        """Add what a client says of a network on its own images."""
        row = Row(
            round=server_round, stage=stage, client=of.client, split="local", loss=of.loss, accuracy=of.accuracy,
            examples=of.examples, seconds=round(of.seconds, 3),
        )  # fmt: skip
        self.ledger.add(Measured(row))

    def on_summed(self, server_round: int, summed: Summed) -> None:
        """What masked sums say of the clients of a round."""
        self.ledger.answered += summed.clients
        row = Row(
            round=server_round, stage="client-mean", split="local", loss=summed.loss, accuracy=summed.accuracy,
            examples=summed.examples,
        )  # fmt: skip
        self.ledger.add(Measured(row))

    def on_stage(self, server_round: int, stage: str, params: Params) -> None:
        """A network that the server made on its way."""
        self.clock.pause()
        self._reported |= server_round > 0
        self.ledger.add(self.world.measure(stage, params, server_round=server_round))
        if self.best is not None and server_round > 0:
            self.ledger.add(Measured(self.best.offer(server_round, stage, params)))
        self.clock.resume()

    def on_merge(self, server_round: int, merged: Merge) -> None:
        """How the clients of a round were merged; that of the last round alone is kept."""
        for climb in climbs(server_round, self.world.pipeline.merger, merged):
            self.ledger.add(climb)
        if server_round == self.config.rounds:
            self._aligned = merged

    def _after_round(self, server_round: int, strategy: Federated) -> None:
        state = strategy.server_state()
        if self.average is not None:
            self.average.update(self.params)
            self.ledger.add(self.world.measure("averaged", self._averaged(), server_round=server_round))
            state |= {f"{_AVERAGE}{name}": tensor.numpy() for name, tensor in self.average.state().items()}
        chosen = None
        if self.best is not None and (chosen := self.best.chosen) is not None:
            self.ledger.add(self.world.measure("chosen", self.best.params, server_round=server_round))
            state |= {f"{_BEST}{name}": tensor.cpu().numpy() for name, tensor in self.best.params.items()}
        if server_round < self.config.rounds:
            strategy.check_kept(server_round)
            self.tell.after_round(
                server_round, self.params, state, self.ledger.kept(self.clock.seconds, self._asked, chosen)
            )

    def _averaged(self) -> Params:
        """The average over the rounds; REPAIR would need its sources, so BatchNorm is measured anew instead."""
        assert self.average is not None
        world, method = self.world, "none" if self.config.repair == "none" else "recompute"
        public = world.split.public_images
        return repair(world.model, self.average.params, data=public, method=method, device=world.device)

    def _controls(self, *, of_clients: bool) -> None:
        """The controls that the run asks for: those made of its clients, or those that need no client."""
        for found in controls.compute(self.world, self.results, of_clients=of_clients):
            self.ledger.add(found)


def _bytes(message: Message) -> int:
    """What arrays, keys and shares in a message take: numbers and words beside them are not counted."""
    found = 0
    for record in message.content.values():
        for value in record.values():
            parts = value if isinstance(value, list) else [getattr(value, "data", value)]
            found += sum(len(part) for part in parts if isinstance(part, bytes))
    return found


def _of_clients(world: World, results: list[ClientResult]) -> Iterator[Measured]:
    """Every client's network on the test split, their mean with its deviation, and the best on val."""
    found = []
    for r in steps("evaluating clients", results):
        found.append(world.measure("client", r.params, client=r.client))
        yield found[-1]
    losses, accuracies = [one.row.loss for one in found], [one.row.accuracy for one in found]
    sd = float(np.std(accuracies, ddof=1)) if len(found) > 1 else None
    yield world.measured("client-mean", float(np.mean(losses)), float(np.mean(accuracies)), sd=sd)
    best = found[world.best(results)]
    yield world.measured("client-best", best.row.loss, best.row.accuracy, best.answers)
