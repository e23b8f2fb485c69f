"""The controls of a claim about private data, computed in the run they belong to, from the same clients.

A control is a function from what the server has and what the clients answered in the last round to rows of the table,
and one entry of :data:`CONTROLS`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import strategies
from fedmerge.data import Images
from fedmerge.merge import average, ensemble, merge
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.training import Answers, train
from server._control import CONTROLS, Control
from server._fedavg import fedavg
from server._ledger import climbs
from server._world import Measured, World
from server.records import Climb
from strategies import ClientResult, Failure, Params

Results = Sequence[ClientResult]
Found = Iterator[Measured | Climb | Failure]


def compute(world: World, results: Results, *, of_clients: bool) -> Found:
    """The controls that a run asks for: those made of its clients, or those that need no client."""
    for name in world.config.control_names():
        control = CONTROLS[name]
        if control.of_clients == of_clients:
            yield from control.make(world, results, control.stage)


def _clients(results: Results) -> tuple[list[Params], list[float]]:
    return [r.params for r in results], [float(r.examples) for r in results]


def _ensemble(world: World, results: Results, stage: str) -> Found:
    started, test = time.perf_counter(), world.split.test_images
    probabilities = ensemble(world.model, _clients(results)[0], test, device=world.device).double()
    loss = float(F.nll_loss(probabilities.clamp_min(1e-12).log(), test.labels))
    predicted = probabilities.argmax(1)
    accuracy = float((predicted == test.labels).double().mean())
    yield world.measured(stage, loss, accuracy, Answers(predicted, probabilities.amax(1)), started=started)


def _plain_average(world: World, results: Results, stage: str) -> Found:
    if strategies.aligns(world.config.strategy):
        yield world.measure(stage, average(*_clients(results)))


def _paper_start(world: World, results: Results, stage: str) -> Found:
    c = world.config
    if c.merger == c.strategy == "merge-many":
        models, weights = _clients(results)
        rng = numpy_stream(c.seed, "merge", c.rounds)
        merged = merge(models, spec=world.spec, method="merge-many-paper", weights=weights, rng=rng)
        yield from climbs(c.rounds, "merge-many-paper", merged)
        yield world.measure(stage, merged.params)


def _plain_average_retrain(world: World, results: Results, stage: str) -> Found:
    world.tell.say("control: plain-average-retrain")
    yield _retrained(world, results, stage, average(*_clients(results)))


def _best_client_retrain(world: World, results: Results, stage: str) -> Found:
    world.tell.say("control: best-client-retrain")
    yield _retrained(world, results, stage, results[world.best(results)].params)


def _retrained(world: World, results: Results, stage: str, start: Params) -> Measured:
    how = world.pipeline.retrain if world.pipeline.retrain != "none" else "labels"
    models, _ = _clients(results)
    params = strategies.retrain_on_public(start, models, bench=world.bench, how=how, server_round=world.config.rounds)
    return world.measure(stage, params)


def _public_only(world: World, results: Results, stage: str) -> Found:
    yield _on_public(world, results, stage, clients=1)


def _public_only_n(world: World, results: Results, stage: str) -> Found:
    yield _on_public(world, results, stage, clients=len(results))


def _on_public(world: World, results: Results, stage: str, clients: int) -> Measured:
    """As many images as so many clients see, and the server's own training: all of them public."""
    c, public = world.config, world.split.public_images
    local = c.rounds * c.epochs() * sum(r.examples for r in results) / max(1, len(results))
    retraining = c.rounds * c.retrain_passes() if world.pipeline.retrain != "none" else 0
    seen = local * clients + (c.pretrain_passes() + retraining) * len(public)
    return _from_scratch(world, stage, public, max(1, round(seen / len(public))))


def _centralised(world: World, results: Results, stage: str) -> Found:
    c, split = world.config, world.split
    union = _union([split.public_images, *(split.client(i) for i in range(c.clients))])
    yield _from_scratch(world, stage, union, c.rounds * c.epochs())


def _from_scratch(world: World, stage: str, images: Images, epochs: int) -> Measured:
    world.tell.say(f"control: {stage} ({epochs} epochs of {len(images)} images)")
    start: dict[str, Tensor] = world.config.setup().network().state_dict()
    found = train(
        world.model, start, images, recipe=world.bench.recipe, epochs=epochs,
        generator=torch_stream(world.config.seed, stage), device=world.device,
    )  # fmt: skip
    return world.measure(stage, found.params)


def _fedavg(world: World, results: Results, stage: str) -> Found:
    if not world.config.is_fedavg:
        yield from fedavg(world, stage)


def _union(parts: list[Images]) -> Images:
    first = parts[0]
    images, labels = torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])
    return replace(first, images=images, labels=labels, name="all images")


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
    Control(
        "fedavg", _fedavg,
        "FedAvg of the same clients from one shared network, as many rounds; trains all clients once more",
        title="FedAvg", stage="fedavg", note="the same clients, trained as long, from one shared network",
    ),
)  # fmt: skip
