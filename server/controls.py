"""The controls of a claim about private data, computed in the run they belong to, from the same clients.

A control is a function from what the server has and what the clients answered in the last round to rows of the table,
and one entry of :data:`CONTROLS`.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import strategies
from fedmerge.align import weight_matching
from fedmerge.data import Images
from fedmerge.flower.replies import Failure
from fedmerge.memory import usable_cores
from fedmerge.merge import average, merge
from fedmerge.pipeline import Params, retrain_on_public
from fedmerge.progress import counted, duration
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.tasks import state_of
from fedmerge.teachers import TEACHERS, probabilities
from fedmerge.training import Answers, train
from server._best import Best
from server._control import CONTROLS, Control
from server._fedavg import fedavg
from server._head import with_head
from server._ledger import climbs
from server._world import Measured, World
from server.records import Climb
from strategies import ClientResult

Results = Sequence[ClientResult]
Found = Iterator[Measured | Climb | Failure]
_LONG = 30.0
"""Seconds from which on a control is announced."""
_SWEEPS = 50
"""The bound on the sweeps of :func:`fedmerge.merge_many`."""


def compute(world: World, results: Results, *, of_clients: bool) -> Found:
    """The controls that a run asks for: those made of its clients, or those that need no client."""
    for name in world.config.control_names():
        control = CONTROLS[name]
        if control.of_clients == of_clients and control.applies(world.config):
            if (seconds := control.seconds(world, results)) >= _LONG:
                world.tell.say(f"control {name} takes about {duration(seconds)}")
            with counted(f"control {name}", 1):
                yield from control.make(world, results, control.stage)


def _clients(results: Results) -> tuple[list[Params], list[float]]:
    return [r.params for r in results], [float(r.examples) for r in results]


def _ensemble(world: World, results: Results, stage: str) -> Found:
    started, test = time.perf_counter(), world.split.test_images
    predictions = probabilities(world.model, _clients(results)[0], test, device=world.device)
    yield _together(world, stage, TEACHERS["mean"].make(predictions, test).on_public, started)
    if world.pipeline.teacher != "mean" and (taught := world.taught(results)) is not None:
        yield _together(world, f"{stage}-taught", taught.rule(predictions), time.perf_counter())


def _together(world: World, stage: str, predicted: Tensor, started: float) -> Measured:
    predicted, labels = predicted.double(), world.split.test_images.labels
    loss = float(F.nll_loss(predicted.clamp_min(1e-12).log(), labels))
    answers = Answers(predicted.argmax(1), predicted.amax(1))
    accuracy = float((answers.predicted == labels).double().mean())
    return world.measured(stage, loss, accuracy, answers, started=started)


def _plain_average(world: World, results: Results, stage: str) -> Found:
    yield world.measure(stage, average(*_clients(results)))


def _paper_start(world: World, results: Results, stage: str) -> Found:
    c = world.config
    models, weights = _clients(results)
    rng = numpy_stream(c.seed, "merge", c.rounds)
    merged = merge(models, spec=world.spec, method="merge-many-paper", weights=weights, rng=rng)
    yield from climbs(c.rounds, "merge-many-paper", merged)
    yield world.measure(stage, merged.params)


def _plain_average_retrain(world: World, results: Results, stage: str) -> Found:
    yield from _finished(world, results, stage, average(*_clients(results)))


def _best_client_retrain(world: World, results: Results, stage: str) -> Found:
    yield from _finished(world, results, stage, results[world.best(results)].params)


def _public_retrain(world: World, results: Results, stage: str) -> Found:
    c, alone = world.config, world.start
    if not c.pretrain_passes():  # a pretrained start is such a network
        passes = c.rounds * c.epochs()
        world.tell.say(f"control: {stage} ({passes} epochs of public labels, then the same retraining)")
        bench = replace(world.bench, retrain_epochs=passes)
        alone = retrain_on_public(alone, (), bench=bench, how="labels", server_round=0)
    yield from _finished(world, results, stage, alone)


def _finished(world: World, results: Results, stage: str, start: Params) -> Found:
    """``start`` with the retraining of this run, its teacher and its head; chosen on val as the run chooses."""
    params = retrain_on_public(
        start, _clients(results)[0], bench=world.bench, how=world.retraining, server_round=world.config.rounds,
        taught=world.taught(results),
    )  # fmt: skip
    if world.config.hand_out == "best-on-val":
        best = Best(world)
        for each in (start, params):
            best.offer(world.config.rounds, stage, each)
        params = best.params
    if world.config.head == "analytic":
        headed = with_head(world, params, [r.client for r in results])
        yield from (Failure(f.server_round, f.client, f"control {stage}: {f.reason}") for f in headed.failures)
        params = headed.params
    yield world.measure(stage, params)


def _public_only(world: World, results: Results, stage: str) -> Found:
    yield _on_public(world, results, stage, clients=1)


def _public_only_n(world: World, results: Results, stage: str) -> Found:
    yield _on_public(world, results, stage, clients=len(_held(world, results)))


def _on_public(world: World, results: Results, stage: str, clients: int) -> Measured:
    """As many images as so many clients see, and the server's own training: all of them public."""
    public = world.split.public_images.labelled
    return _from_scratch(world, stage, public, _passes(world, results, clients))


def _passes(world: World, results: Results, clients: int) -> int:
    """Over the labelled public images, so that as many images are seen."""
    c, public, held = world.config, world.split.public_images.labelled, _held(world, results)
    local = c.rounds * c.epochs() * sum(held) / len(held)
    retraining = c.rounds * c.retrain_passes() if world.pipeline.retrain != "none" else 0
    retrained_on = public if world.pipeline.retrain == "labels" else world.split.public_images
    seen = local * clients + c.pretrain_passes() * len(public) + retraining * len(retrained_on)
    return max(1, round(seen / len(public)))


def _held(world: World, results: Results) -> list[int]:
    """Images of each client of the last round; under masks, where no answer is seen, of each that was asked."""
    return [r.examples for r in results] or [world.meeting.images[client] for client in world.cohort]


def _centralised(world: World, results: Results, stage: str) -> Found:
    c, split = world.config, world.split
    union = split.public_images.labelled.joined(*(split.client(i) for i in range(c.clients)))
    yield _from_scratch(world, stage, replace(union, name="all images"), c.rounds * c.epochs())


def _from_scratch(world: World, stage: str, images: Images, epochs: int) -> Measured:
    start = state_of(world.config.setup().network())
    found = train(
        world.model, start, images, recipe=world.bench.recipe, epochs=epochs,
        generator=torch_stream(world.config.seed, stage), device=world.device,
    )  # fmt: skip
    return world.measure(stage, found.params)


def _fedavg(world: World, results: Results, stage: str) -> Found:
    yield from fedavg(world, stage)


# -- about how long they take -------------------------------------------------------------------------------


def _matching(world: World, results: Results) -> float:
    """A sweep takes a weight matching a client, and from many clients as they are no fewer sweeps than there may be."""
    started = time.perf_counter()
    weight_matching(results[0].params, to=results[-1].params, spec=world.spec, rng=numpy_stream(0, "estimate"))
    return (time.perf_counter() - started) * len(results) * _SWEEPS


def _training(world: World, results: Results, images: int) -> float:
    """Training on so many images, as fast as the clients were."""
    seen = sum(r.examples for r in results) * world.config.epochs()
    return images * sum(r.seconds for r in results) / max(1, seen)


def _retraining(world: World, results: Results) -> float:
    return _training(world, results, world.config.retrain_passes() * len(world.split.public_images))


def _once_more(world: World, results: Results) -> float:
    at_once = min(len(results), usable_cores())
    return world.config.rounds * sum(r.seconds for r in results) / max(1, at_once)


def _public(world: World, results: Results, clients: int) -> float:
    return _training(world, results, _passes(world, results, clients) * len(world.split.public_images))


def _all_images(world: World, results: Results) -> float:
    c, split = world.config, world.split
    images = len(split.public_images) + sum(len(rows) for rows in split.clients)
    return _training(world, results, c.rounds * c.epochs() * images)


CONTROLS.add(
    Control(
        "ensemble", _ensemble, "the clients' mean prediction", title="Ensemble of clients", stage="ensemble",
        note="mean prediction of all clients; as many networks as clients", of_clients=True, usual=True,
    ),
    Control(
        "plain-average", _plain_average, "the clients' mean without alignment", title="Plain average",
        stage="plain-average", note="mean of the clients' weights, without alignment", of_clients=True, usual=True,
        applies=lambda config: strategies.STRATEGIES[config.strategy].aligns,
    ),
    Control(
        "paper-start", _paper_start, "MergeMany from the paper's own start", title="MergeMany, paper's start",
        stage="merged-paper-start", note="all clients aligned to each other from their own order", of_clients=True,
        usual=True, most_clients=20, seconds=_matching,
        applies=lambda config: config.merger == config.strategy == "merge-many",
    ),
    Control(
        "plain-average-retrain", _plain_average_retrain, "the clients' mean, then the same retraining",
        title="Plain average + retrain", stage="plain-average-retrained",
        note="the same retraining from the plain average", of_clients=True, retrains=True, follows=True,
        seconds=_retraining,
    ),
    Control(
        "best-client-retrain", _best_client_retrain, "the best client on val, then the same retraining",
        title="Best client + retrain", stage="client-best-retrained",
        note="the same retraining from the best client", of_clients=True, retrains=True, usual=True, follows=True,
        seconds=_retraining,
    ),
    Control(
        "public-retrain", _public_retrain,
        "one network trained on the public labels as long as a client, then the same retraining, teacher and head",
        title="Public labels + retrain", stage="public-retrained",
        note="the same retraining from a network of the public labels alone", of_clients=True, retrains=True,
        follows=True, seconds=_retraining,
    ),
    Control(
        "public-only", _public_only,
        "one network trained on the public split alone, as long as a client and the server's own training",
        title="Public only", stage="public-only",
        note="trained on the public split alone, as long as a client and the server's own training", retrains=True,
        usual=True, seconds=partial(_public, clients=1),
    ),
    Control(
        "public-only-n", _public_only_n, "the same, with the compute of all clients and the server's own training",
        title="Public only, all compute", stage="public-only-n", note="the same with the compute of all clients",
        retrains=True, seconds=lambda world, results: _public(world, results, len(_held(world, results))),
    ),
    Control(
        "centralised", _centralised,
        "one network trained on public and private images together: what privacy costs",
        title="Centralised", stage="centralised", note="trained on public and private images together",
        seconds=_all_images, pools=True,
    ),
    Control(
        "fedavg", _fedavg,
        "FedAvg of the same clients from one shared network, as many rounds; trains all clients once more",
        title="FedAvg", stage="fedavg", note="the same clients, trained as long, from one shared network", usual=True,
        applies=lambda config: not config.is_fedavg, seconds=_once_more, asks=True,
    ),
)  # fmt: skip
