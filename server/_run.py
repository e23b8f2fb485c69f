"""One federated run: clients train, the strategy aggregates, every stage is evaluated, everything is written."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp import Grid
from torch import Tensor, nn

import strategies
from fedmerge import PermSpec, interpolate, perm_spec, repair
from fedmerge.data import Split, label_counts
from fedmerge.merge import Merge, ordered
from fedmerge.tasks import CORRECTION, device_of
from fedmerge.training import evaluate
from server import controls, records
from server._costs import Costs
from server._events import Events
from server._grid import WatchedGrid, meet
from server._predictions import Predictions
from server._stages import in_order, title
from server.config import RunConfig
from server.directory import RunDirectory
from server.records import Climb, Curve, Interpolation, Kept, Row, Sizes, Stage, Summary
from strategies import ClientResult, Failure, Federation, Pipeline, Workbench

Params = dict[str, Tensor]
_AVERAGE = "server-average/"  # what its tensors are called among those of the strategy


class Observer:
    """What a run tells whoever watches; every method may be overridden, none has to be."""

    def say(self, text: str) -> None:
        """A line about what happens now."""

    def waiting(self, what: str, total: int) -> None:
        """``total`` clients were asked for ``what``."""

    def replied(self, client: int | None, error: bool) -> None:
        """One of them answered."""

    def stage(self, row: Mapping[str, Any]) -> None:
        """A network was evaluated: a line of ``metrics.jsonl``."""

    def failure(self, failure: Failure) -> None:
        """A client's answer could not be used."""


@dataclass
class Run:
    """The state of one run at the server."""

    config: RunConfig
    directory: RunDirectory
    observer: Observer = field(default_factory=Observer)

    def __post_init__(self) -> None:
        self.device = device_of(self.config.device)
        self.results: list[ClientResult] = []
        self.failures: list[records.Failure] = []
        self.asked = self.answered = 0
        self.corrections = 0  # bytes sent to clients beside the networks
        self.final: dict[str, Stage] = {}
        self.merges: list[Climb] = []
        self.names: dict[int, int] = {}  # Flower node id -> client
        self.aligned: Merge | None = None
        self.average = self.config.running_average()
        self.costs = Costs()
        self.events: Events | None = None

    @cached_property
    def split(self) -> Split:
        """Who holds which images."""
        return self.config.setup().split()

    @cached_property
    def model(self) -> nn.Module:
        """The server's network, freshly initialised: with a shared initialisation, where everyone begins."""
        return self.config.setup().network()

    @cached_property
    def predictions(self) -> Predictions:
        """What the networks of the last round answer."""
        return Predictions(self.split.test_images)

    @cached_property
    def spec(self) -> PermSpec:
        """Its permutation symmetries."""
        public = self.split.public_images
        return perm_spec(self.model, public.normalise(public.images[:2]))

    @cached_property
    def bench(self) -> Workbench:
        """What strategy and controls have to work with."""
        c = self.config
        return Workbench(
            model=self.model,
            spec=self.spec,
            public=self.split.public_images,
            val=self.split.val_images,
            recipe=c.recipe(),
            retrain_epochs=c.retrain_passes(),
            seed=c.seed,
            device=self.device,
        )

    @cached_property
    def pipeline(self) -> Pipeline:
        """Which method for which step."""
        return self.config.pipeline()

    # -- what is recorded ---------------------------------------------------------------------------------

    def record(
        self, server_round: int, stage: str, loss: float, accuracy: float, *, examples: int, seconds: float,
        client: int | None = None, split: str = "test", sd: float | None = None,
    ) -> None:  # fmt: skip
        """Write one result; the last one of a stage on the test split is a row of the final table."""
        row = Row(
            round=server_round, stage=stage, client=client, split=split, loss=loss,
            accuracy=accuracy, examples=examples, seconds=round(seconds, 3),
        )  # fmt: skip
        self.directory.metric(row)
        if self.events is not None:
            self.events.add(asdict(row))
        if client is None and split == "test":
            c = self.config
            name, note = title(stage, strategy=c.strategy, merger=self.pipeline.merger, init=c.init)
            self.final.pop(stage, None)
            self.final[stage] = Stage(stage, name, accuracy, loss, sd, note)
        self.observer.stage(asdict(row))

    def evaluate(self, server_round: int, stage: str, params: Params, client: int | None = None) -> float:
        """Evaluate ``params`` on the test split and record it; returns the accuracy."""
        started = time.perf_counter()
        test = self.split.test_images
        found = evaluate(self.model, params, test, device=self.device, answers=server_round == self.config.rounds)
        self.predictions.add(stage, found.answers)
        self.record(
            server_round, stage, found.loss, found.accuracy, examples=len(test), client=client,
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        return found.accuracy

    def on_results(self, server_round: int, results: list[ClientResult]) -> None:
        """The usable answers of a round, before they are aggregated."""
        self.results = results
        self.answered += len(results)
        for r in results:
            self.record(
                server_round, "client", r.loss, r.accuracy, split="local",
                client=r.client, examples=r.examples, seconds=r.seconds,
            )  # fmt: skip
        if server_round == self.config.rounds:
            self._clients(server_round)
            controls.compute(self, server_round, of_clients=True)
        self.costs.resume()

    def on_stage(self, server_round: int, stage: str, params: Params) -> None:
        """A network that the strategy made on its way."""
        self.costs.pause()
        self.evaluate(server_round, stage, params)
        self.costs.resume()

    def on_merge(self, server_round: int, merged: Merge) -> None:
        """How the clients of a round were merged; that of the last round alone is kept."""
        self.add_merge(server_round, self.pipeline.merger, merged)
        if server_round == self.config.rounds:
            self.aligned = merged

    def on_failure(self, failure: Failure) -> None:
        """An answer that could not be used."""
        self.failures.append(_recorded(failure))
        self.observer.failure(failure)

    def _clients(self, server_round: int) -> None:
        """Every client's network on the test split, their mean, and the best on val."""
        found = []
        for r in self.results:
            started = time.perf_counter()
            e = evaluate(self.model, r.params, self.split.test_images, device=self.device, answers=True)
            self.predictions.add(r.client, e.answers)
            self.record(
                server_round, "client", e.loss, e.accuracy, client=r.client, examples=e.examples,
                seconds=time.perf_counter() - started,
            )  # fmt: skip
            found.append(e)
        accuracies = [e.accuracy for e in found]
        self.record(
            server_round, "client-mean", float(np.mean([e.loss for e in found])), float(np.mean(accuracies)),
            examples=found[0].examples, seconds=0.0, sd=float(np.std(accuracies, ddof=1)) if len(found) > 1 else None,
        )  # fmt: skip
        best = found[self.best]
        self.predictions.same("client-best", self.results[self.best].client)
        self.record(server_round, "client-best", best.loss, best.accuracy, examples=best.examples, seconds=0.0)

    @property
    def best(self) -> int:
        """Position of the client that is best on the validation split."""
        return strategies.reference_client("best", self.results, self.bench)

    # -- the run ------------------------------------------------------------------------------------------

    def execute(self, grid: Grid) -> Summary:
        """Run all rounds; returns the summary that was written, the last of the run's files.

        Raises:
            RoundError: Too few usable replies. What was finished stays readable, with that status.
        """
        c = self.config
        status = "failed: interrupted"
        self.costs.begin()
        try:
            self._rounds(grid)
            if c.keep_clients:
                for r in self.results:
                    self.directory.write_model(f"clients/round-{c.rounds}-client-{r.client}.safetensors", r.params)
            status = "finished"
        except BaseException as error:
            status = f"failed: {str(error) or type(error).__name__}"
            raise
        finally:
            if self.events is not None:
                self.events.close()
            summary = self.summary(status)
            self.directory.write_env(self.device, **self.costs.end())
            self.directory.write_summary(summary)
        self.directory.finish()
        return summary

    def _rounds(self, grid: Grid) -> None:
        c = self.config
        watched = WatchedGrid(grid, self._on_send, self._on_reply)
        resumed = self.directory.resume()
        self.events = Events(self.directory.path)
        self.observer.say(f"{c.strategy} on {c.dataset}, {c.clients} clients, {c.init} initialisation, seed {c.seed}")
        held = [len(rows) for rows in self.split.clients]
        meeting = meet(watched, held, task=c.client_task(), fewest=c.min_replies)
        watched.nodes = list(meeting.nodes.values())
        self.names = {node: client for client, node in meeting.nodes.items()}
        strategy = strategies.build(
            c.strategy, bench=self.bench, pipeline=self.pipeline, options=c.options(),
            on_stage=self.on_stage,
        )  # fmt: skip
        offset = 0
        if resumed is None:
            params = self._begin()
        else:
            offset, params, state, kept = resumed
            self.failures, self.merges = list(kept.failures), list(kept.merges)
            self.final = {s.stage: s for s in kept.stages}
            self.asked, self.answered = kept.asked, kept.answered
            self.corrections, self.costs.seconds = kept.corrections, kept.server_seconds
            self.observer.say(f"continuing after round {offset}")
        for failure in (f for f in meeting.failures if _recorded(f) not in self.failures):
            self.on_failure(failure)
        strategy.join(
            Federation(
                nodes=meeting.nodes,
                images=meeting.images,
                task=c.client_task(),
                parameters=self.spec.parameters,
                fraction=c.fraction_train,
                min_replies=c.min_replies,
                offset=offset,
                on_results=self.on_results,
                on_merge=self.on_merge,
                on_failure=self.on_failure,
            )
        )
        if resumed is not None:
            strategy.load_server_state({k: v for k, v in state.items() if not k.startswith(_AVERAGE)})
            if self.average is not None:
                own = {k: torch.from_numpy(v) for k, v in state.items() if k.startswith(_AVERAGE)}
                self.average.load_state({k.removeprefix(_AVERAGE): v for k, v in own.items()}, params)
        if not c.local_evaluation:
            strategy.fraction_evaluate = 0.0
        self.params = params

        def after_round(r: int, arrays: ArrayRecord) -> None:
            self.costs.pause()
            if r == 0:
                return
            self.params = arrays.to_torch_state_dict()
            self._after_round(r + offset, strategy)

        strategy.start(
            grid=watched,
            initial_arrays=ArrayRecord(params),
            num_rounds=c.rounds - offset,
            timeout=c.timeout,
            evaluate_fn=after_round,
        )
        self.directory.write_model("model.safetensors", self.params)
        if self.average is not None:
            self.directory.write_model("averaged.safetensors", self._averaged())
        controls.compute(self, c.rounds, of_clients=False)

    def _begin(self) -> Params:
        """Where clients begin round 1, unless each has its own initialisation."""
        params: Params = self.model.state_dict()
        if epochs := self.config.pretrain_passes():
            self.observer.say(f"pretraining: {epochs} epochs of {len(self.bench.public)} public images")
            self.costs.resume()
            bench = replace(self.bench, retrain_epochs=epochs)
            params = strategies.retrain_on_public(params, (), bench=bench, how="labels", server_round=0)
            self.costs.pause()
            self.evaluate(0, "pretrained", params)
        return params

    def _after_round(self, server_round: int, strategy: strategies.Federated) -> None:
        state = strategy.server_state()
        if self.average is not None:
            self.average.update(self.params)
            self.evaluate(server_round, "averaged", self._averaged())
            state |= {f"{_AVERAGE}{name}": tensor.numpy() for name, tensor in self.average.state().items()}
        if server_round < self.config.rounds:
            kept = Kept(
                stages=self._stages(),
                failures=tuple(self.failures),
                asked=self.asked,
                answered=self.answered,
                merges=tuple(self.merges),
                corrections=self.corrections,
                server_seconds=self.costs.seconds,
            )
            self.directory.checkpoint(server_round, self.params, state, kept)

    def _averaged(self) -> Params:
        """The average over the rounds; REPAIR would need its sources, so BatchNorm is measured anew instead."""
        assert self.average is not None
        method = "none" if self.config.repair == "none" else "recompute"
        return repair(self.model, self.average.params, data=self.split.public_images, method=method, device=self.device)

    def add_merge(self, server_round: int, name: str, merged: Merge) -> None:
        """Keep how the objective of a merge rose."""
        if merged.history:
            self.merges.append(Climb(server_round, name, tuple(merged.history), merged.converged))

    def _on_send(self, kind: str, messages: list[Message]) -> None:
        self.costs.pause()
        if kind == "train":
            self.asked += len(messages)
            given: list[Any] = [m.content[CORRECTION] for m in messages if CORRECTION in m.content]
            self.corrections += sum(array.numpy().nbytes for record in given for array in record.values())
        if kind != "query":
            self.observer.waiting("training" if kind == "train" else "evaluating", len(messages))

    def _on_reply(self, reply: Message) -> None:
        self.observer.replied(self.names.get(reply.metadata.src_node_id), reply.has_error())

    # -- the summary --------------------------------------------------------------------------------------

    def summary(self, status: str) -> Summary:
        """The contents of ``summary.json``."""
        bytes_of_model = sum(t.numel() * t.element_size() for t in self.model.state_dict().values())
        return Summary(
            status=status,
            classes=tuple(self.split.dataset.classes),
            labels={holder: tuple(counts) for holder, counts in label_counts(self.split).items()},
            stages=self._stages(),
            failures=tuple(self.failures),
            asked=self.asked,
            answered=self.answered,
            merges=tuple(self.merges),
            interpolation=self._interpolation() if status == "finished" else None,
            sizes=Sizes(
                parameters=sum(p.numel() for p in self.model.parameters()),
                aligned_share=self.spec.permutable_share(),
                log10_symmetries=self.spec.log10_symmetries(),
                bytes_up=self.answered * bytes_of_model,
                bytes_down=self.asked * bytes_of_model + self.corrections,
            ),
            **self.predictions.summed([s.stage for s in self._stages()]),
        )

    def _stages(self) -> tuple[Stage, ...]:
        return tuple(self.final[stage] for stage in in_order(self.final) if stage in self.final)

    def _interpolation(self) -> Interpolation | None:
        """Loss and accuracy on val between the first two clients, as they are and as they were aligned."""
        merged = self.aligned
        if merged is None or not merged.history or len(self.results) < 2:
            return None
        a, b = (r.params for r in self.results[:2])
        pair = replace(merged, perms=merged.perms[:2], maps=merged.maps[:2])
        left, right = ordered((a, b), pair, spec=self.spec)
        val, device = self.split.val_images, self.device
        naive = interpolate(self.model, a, b, val, points=11, device=device)
        aligned = interpolate(self.model, left, right, val, points=11, device=device)
        return Interpolation(
            clients=(self.results[0].client, self.results[1].client),
            split="val",
            alphas=tuple(naive.alphas.tolist()),
            naive=Curve(tuple(naive.losses.tolist()), tuple(naive.accuracies.tolist())),
            aligned=Curve(tuple(aligned.losses.tolist()), tuple(aligned.accuracies.tolist())),
        )


def _recorded(failure: Failure) -> records.Failure:
    return records.Failure(failure.server_round, failure.client, failure.reason)
