"""What the server has in a run, and what it can measure with it."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from flwr.serverapp import Grid
from torch import Tensor, nn

from fedmerge import PermSpec
from fedmerge.data import Split
from fedmerge.heads import HeadSums
from fedmerge.pipeline import Params, Pipeline, Workbench, reference_client, retrain_on_public, teaching
from fedmerge.progress import counted
from fedmerge.tasks import ClientTask, device_of, state_of
from fedmerge.teachers import Teaching
from fedmerge.training import Answers, evaluate
from server._grid import Meeting
from server.callbacks import Callback
from server.config import RunConfig
from server.records import Row
from strategies import ClientResult

MaskedSums = Callable[[Params, HeadSums], tuple[HeadSums, int]]


@dataclass(frozen=True)
class Measured:
    """A row, and what does not stand in it.

    Attributes:
        row: The line of ``metrics.jsonl``.
        answers: To each image of the test split, of a network of the last round.
        sd: Deviation over clients, of a row that is their mean.
    """

    row: Row
    answers: Answers | None = None
    sd: float | None = None


class World:
    """What the server has: its clients, and what follows from the configuration alone, made when first asked for.

    Attributes:
        config: The run's configuration.
        tell: Who is told what goes on.
        device: Where the server computes.
        grid: How clients are reached, and
        meeting: who they are, and
        cohort: whom the last round asks; from when the run has met them.
        masked: How sums for a head are taken under masks, from a network and the same sums over public images; None
            where clients tell their own.
    """

    masked: MaskedSums | None = None

    grid: Grid
    meeting: Meeting
    cohort: Sequence[int]

    def __init__(self, config: RunConfig, tell: Callback) -> None:
        self.config, self.tell = config, tell
        self.device = device_of(config.device)
        self._taught: tuple[Sequence[ClientResult], Teaching | None] | None = None

    @cached_property
    def split(self) -> Split:
        """Who holds which images."""
        return self.config.setup().split()

    @cached_property
    def task(self) -> ClientTask:
        """What each client is told."""
        return replace(self.config.client_task(), dataset_digest=self.config.setup().digest())

    @cached_property
    def model(self) -> nn.Module:
        """The server's network, freshly initialised: with a shared initialisation, where everyone begins."""
        return self.config.setup().network()

    @cached_property
    def spec(self) -> PermSpec:
        """Its permutation symmetries."""
        with counted("tracing the network", 1):
            return self.config.setup().spec(self.model)

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """Where clients begin round 1, unless each has a network of its own: the server's, fresh or pretrained."""
        fresh = state_of(self.model)
        if not (epochs := self.config.pretrain_passes()):
            return fresh
        bench = replace(self.bench, retrain_epochs=epochs)
        self.tell.say(f"pretraining: {epochs} epochs of {len(bench.public.labelled)} public images")
        return retrain_on_public(fresh, (), bench=bench, how="labels", server_round=0)

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

    def taught(self, results: Sequence[ClientResult]) -> Teaching | None:
        """What those clients teach on the public images where a control retrains; made once for all controls."""
        if self._taught is None or self._taught[0] is not results:
            pipeline = replace(self.pipeline, retrain=self.retraining)
            self._taught = results, teaching(results, bench=self.bench, pipeline=pipeline)
        return self._taught[1]

    @property
    def retraining(self) -> str:
        """How controls retrain: as the run does, or on labels if it does not."""
        return self.pipeline.retrain if self.pipeline.retrain != "none" else "labels"

    def best(self, results: Sequence[ClientResult]) -> int:
        """Position of the client that is best on the validation split."""
        return reference_client("best", results, self.bench)

    def measure(
        self, stage: str, params: dict[str, Tensor], *, server_round: int | None = None, client: int | None = None
    ) -> Measured:
        """A network on the test split, in the last round unless another is given."""
        started, last = time.perf_counter(), server_round in (None, self.config.rounds)
        found = evaluate(self.model, params, self.split.test_images, device=self.device, answers=last)
        return self.measured(
            stage, found.loss, found.accuracy, found.answers, started=started, server_round=server_round, client=client
        )

    def measured(
        self, stage: str, loss: float, accuracy: float, answers: Answers | None = None, *,
        started: float | None = None, server_round: int | None = None, client: int | None = None,
        sd: float | None = None,
    ) -> Measured:  # fmt: skip
        """What was measured on the test split, since ``started`` by :func:`time.perf_counter`."""
        row = Row(
            round=self.config.rounds if server_round is None else server_round, stage=stage, client=client,
            split="test", loss=loss, accuracy=accuracy, examples=len(self.split.test_images),
            seconds=0.0 if started is None else round(time.perf_counter() - started, 3),
        )  # fmt: skip
        return Measured(row, answers, sd)
