"""The controls of a claim about private data, computed in the run they belong to, from the same clients.

A control is a function from a run and its last round to a row of the table, and one entry of :data:`CONTROLS`.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

import strategies
from fedmerge.data import Images
from fedmerge.merge import average, ensemble, merge
from fedmerge.registry import Entry, Registry
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.training import Answers, train
from strategies import Params

if TYPE_CHECKING:
    from server._run import Run


@dataclass(frozen=True)
class Control(Entry):
    """A control. ``make(run, server_round, stage)`` computes it from the run at its last round and records its row.

    Attributes:
        stage: The key of its row.
        note: What its row means.
        of_clients: Whether it is made of the clients' networks, before the strategy aggregates them.
        retrains: Whether it reads how a run retrains.
    """

    stage: str = ""
    note: str = ""
    of_clients: bool = False
    retrains: bool = False

    called = ("run server_round stage", "")

    def problem(self) -> str:
        """Why this entry cannot be used; empty if it can."""
        missing = "stage" if not self.stage else "note" if not self.note else ""
        return super().problem() or (f"it has no {missing}; give what its row in the table needs" if missing else "")


CONTROLS: Registry[Control] = Registry("control", Control, "controls")


def compute(run: "Run", server_round: int, *, of_clients: bool) -> None:
    """Compute the controls that a run asks for: those made of its clients, or those that need no client."""
    for name in run.config.control_names():
        control = CONTROLS[name]
        if control.of_clients == of_clients:
            control.make(run, server_round, control.stage)


def _clients(run: "Run") -> tuple[list[Params], list[float]]:
    return [r.params for r in run.results], [float(r.examples) for r in run.results]


def _ensemble(run: "Run", server_round: int, stage: str) -> None:
    started = time.perf_counter()
    test = run.split.test_images
    probabilities = ensemble(run.model, _clients(run)[0], test, device=run.device).double()
    loss = float(F.nll_loss(probabilities.clamp_min(1e-12).log(), test.labels))
    predicted = probabilities.argmax(1)
    accuracy = float((predicted == test.labels).double().mean())
    run.predictions.add(stage, Answers(predicted, probabilities.amax(1)))
    run.record(server_round, stage, loss, accuracy, examples=len(test), seconds=time.perf_counter() - started)


def _plain_average(run: "Run", server_round: int, stage: str) -> None:
    if strategies.aligns(run.config.strategy):
        run.evaluate(server_round, stage, average(*_clients(run)))


def _paper_start(run: "Run", server_round: int, stage: str) -> None:
    if run.config.merger == run.config.strategy == "merge-many":
        models, weights = _clients(run)
        rng = numpy_stream(run.config.seed, "merge", server_round)
        merged = merge(models, spec=run.spec, method="merge-many-paper", weights=weights, rng=rng)
        run.add_merge(server_round, "merge-many-paper", merged)
        run.evaluate(server_round, stage, merged.params)


def _plain_average_retrain(run: "Run", server_round: int, stage: str) -> None:
    run.observer.say("control: plain-average-retrain")
    _retrain(run, server_round, stage, average(*_clients(run)))


def _best_client_retrain(run: "Run", server_round: int, stage: str) -> None:
    run.observer.say("control: best-client-retrain")
    _retrain(run, server_round, stage, run.results[run.best].params)


def _retrain(run: "Run", server_round: int, stage: str, start: Params) -> None:
    how = run.pipeline.retrain if run.pipeline.retrain != "none" else "labels"
    models, _ = _clients(run)
    retrained = strategies.retrain_on_public(start, models, bench=run.bench, how=how, server_round=server_round)
    run.evaluate(server_round, stage, retrained)


def _public_only(run: "Run", server_round: int, stage: str) -> None:
    _on_public(run, server_round, stage, clients=1)


def _public_only_n(run: "Run", server_round: int, stage: str) -> None:
    _on_public(run, server_round, stage, clients=len(run.results))


def _on_public(run: "Run", server_round: int, stage: str, clients: int) -> None:
    """As many images as so many clients see, and the server's own training: all of them public."""
    c, public = run.config, run.split.public_images
    local = c.rounds * c.epochs() * sum(r.examples for r in run.results) / max(1, len(run.results))
    retraining = c.rounds * c.retrain_passes() if run.pipeline.retrain != "none" else 0
    seen = local * clients + (c.pretrain_passes() + retraining) * len(public)
    _from_scratch(run, server_round, stage, public, max(1, round(seen / len(public))))


def _centralised(run: "Run", server_round: int, stage: str) -> None:
    c = run.config
    union = _union([run.split.public_images, *(run.split.client(i) for i in range(c.clients))])
    _from_scratch(run, server_round, stage, union, c.rounds * c.epochs())


def _from_scratch(run: "Run", server_round: int, control: str, images: Images, epochs: int) -> None:
    run.observer.say(f"control: {control} ({epochs} epochs of {len(images)} images)")
    start: dict[str, Tensor] = run.config.setup().network().state_dict()
    found = train(
        run.model, start, images, recipe=run.bench.recipe, epochs=epochs,
        generator=torch_stream(run.config.seed, control), device=run.device,
    )  # fmt: skip
    run.evaluate(server_round, control, found.params)


def _union(parts: list[Images]) -> Images:
    first = parts[0]
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    return Images(images, labels, first.classes, first.mean, first.std, "all images")


CONTROLS.add(
    Control(
        "ensemble", _ensemble, "the clients' mean prediction", title="Ensemble of clients", stage="ensemble",
        note="mean prediction of all clients; as many networks as clients", of_clients=True,
    ),
    Control(
        "plain-average", _plain_average, "the clients' mean without alignment", title="Plain average",
        stage="plain-average", note="mean of the clients' weights, without alignment", of_clients=True,
    ),
    Control(
        "paper-start", _paper_start, "MergeMany from the paper's own start", title="MergeMany, paper's start",
        stage="merged-paper-start", note="all clients aligned to each other from their own order", of_clients=True,
    ),
    Control(
        "plain-average-retrain", _plain_average_retrain, "the clients' mean, then the same retraining",
        title="Plain average + retrain", stage="plain-average-retrained",
        note="the same retraining from the plain average", of_clients=True, retrains=True,
    ),
    Control(
        "best-client-retrain", _best_client_retrain, "the best client on val, then the same retraining",
        title="Best client + retrain", stage="client-best-retrained",
        note="the same retraining from the best client", of_clients=True, retrains=True,
    ),
    Control(
        "public-only", _public_only,
        "one network trained on the public split alone, as long as a client and the server's own training",
        title="Public only", stage="public-only",
        note="trained on the public split alone, as long as a client and the server's own training", retrains=True,
    ),
    Control(
        "public-only-n", _public_only_n, "the same, with the compute of all clients and the server's own training",
        title="Public only, all compute", stage="public-only-n", note="the same with the compute of all clients",
        retrains=True,
    ),
    Control(
        "centralised", _centralised,
        "one network trained on public and private images together: what privacy costs",
        title="Centralised", stage="centralised", note="trained on public and private images together",
    ),
)  # fmt: skip
