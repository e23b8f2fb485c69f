"""Networks of clients under differential privacy: what becomes of them, what they tell, and which order aligners find.

Networks of one seed and one epsilon share everything: images, coins of the canaries, passes over the images, and so the
noise. Each client makes the same number of steps in every procedure, hence the same account stands beside all of them.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

import fedmerge as fm
from experiments.studies.study import Cell, Config, Work, each
from fedmerge.align import needs_images
from fedmerge.data import Images
from fedmerge.models import Recipe
from fedmerge.pipeline import Params, Pipeline, Workbench, align_merge_retrain, retrain_on_public
from fedmerge.privacy import Seen, Vector, confidence, loss_threshold, one_run, rates, rmia
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.tasks import ClientTask
from fedmerge.training import predict
from strategies import ClientResult

CLIENT, AVERAGE, MERGED, RETRAINED, PUBLIC = "client", "plain average", "merged", "merged, retrained", "public only"
ALIGNERS = ("none", "weight-matching", "activation-matching", "ste")
COLUMNS = (
    "of", "accounted", "accuracy", "auc_loss", "auc_rmia", "tpr_1", "audited", "right", "guesses", "planted",
    "similarity", "barrier", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class DPMerge(Config):
    """What is trained.

    Attributes:
        width: Units of a hidden layer of the perceptron.
        clients: How many owners.
        client_images: Of each.
        epochs: Passes of each over its images, in all rounds together.
        rounds: Of FedAvg; each has as many of these passes.
        epsilons: What each may spend; once more without any bound.
        delta: With which probability that may protect less.
        canaries: Images of the first client that have a wrong label; a coin says of each whether it is trained on.
        attacked: Images of each client whose membership is asked for, and as many of nobody.
        public: Share of the training images that is public, and that choices are made on.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: str = "mnist"
    width: float = 64
    clients: int = 4
    client_images: int = 6000
    epochs: int = 10
    rounds: int = 5
    batch_size: int = 250
    lr: float = 0.1
    epsilons: tuple[float, ...] = (1.0, 4.0, 8.0)
    delta: float = 1e-5
    canaries: int = 1000
    attacked: int = 500
    public: float = 0.01


class Setting:
    """One seed and one epsilon: its clients, what becomes of them, and what that tells."""

    def __init__(self, config: DPMerge, work: Work, seed: int, epsilon: float) -> None:
        self.config, self.work, self.epsilon = config, work, epsilon
        self.name = f"{seed}-{epsilon:g}"
        recipe = Recipe(lr=config.lr, batch_size=config.batch_size, schedule="one-cycle")
        self.task = ClientTask(
            dataset=config.dataset, clients=config.clients, client_images=config.client_images, width=config.width,
            public_fraction=config.public, val_fraction=config.public, seed=seed, local_epochs=config.epochs,
            training=recipe, dp_epsilon=epsilon if math.isfinite(epsilon) else -1.0, dp_delta=config.delta,
            device=work.device,
        )  # fmt: skip
        self.split, self.model = self.task.split(), self.task.network()
        public = self.split.public_images
        self.bench = Workbench(
            model=self.model, spec=self.task.spec(self.model), public=public,
            val=self.split.val_images, recipe=recipe, retrain_epochs=config.epochs, seed=seed, device=work.device,
        )  # fmt: skip

    # -- who holds what -----------------------------------------------------------------------------------

    @cached_property
    def canaries(self) -> tuple[Images, np.ndarray]:
        """The first images of the first client with a wrong label each, and which of them it is trained on."""
        rng, own = numpy_stream(self.task.seed, "canaries"), self.split.client(0)
        some = own.select(range(self.config.canaries))
        shift = torch.from_numpy(rng.integers(1, len(own.classes), len(some)))
        return replace(some, labels=(some.labels + shift) % len(own.classes)), rng.random(len(some)) < 0.5

    def images(self, client: int) -> Images:
        """What a client is trained on."""
        own = self.split.client(client)
        if client:
            return own
        wrong, kept = self.canaries
        return wrong.select(np.flatnonzero(kept)).joined(own.select(range(len(wrong), len(own))))

    @cached_property
    def asked(self) -> tuple[Images, np.ndarray]:
        """The images whose membership is asked for, and the client of each; -1 is nobody."""
        config, split = self.config, self.split
        skip = [config.canaries, *[0] * (config.clients - 1)]
        mine = [split.client(i).select(range(s, s + config.attacked)) for i, s in enumerate(skip)]
        used = np.concatenate(
            [split.public, split.val, *split.clients, *([split.test] if split.dataset.test is None else [])]
        )
        free = np.setdiff1d(np.arange(len(split.dataset.train)), used)[: config.attacked * config.clients]
        nobodys = split.dataset.train.select(free)
        owners = np.repeat([*range(config.clients), -1], [*map(len, mine), len(nobodys)])
        return mine[0].joined(*mine[1:], nobodys), owners

    # -- networks -----------------------------------------------------------------------------------------

    @cached_property
    def clients(self) -> list[Params]:
        """Each from an initialisation of its own."""
        return self._trained(self.task, {})

    def fedavg(self, rounds: int, server_round: int) -> list[Params]:
        """The clients after a round of FedAvg, whose ``rounds`` share out the passes."""
        start = self.mean(self.fedavg(rounds, server_round - 1)) if server_round > 1 else self.model.state_dict()
        epochs = self.config.epochs // rounds
        task = replace(self.task, init="shared", rounds=rounds, server_round=server_round, local_epochs=epochs)
        return self._trained(task, start)

    def _trained(self, task: ClientTask, start: Mapping[str, Tensor]) -> list[Params]:
        name = f"{self.name}-{task.init}-{task.server_round}-of-{task.rounds}"
        return [self.work.kept(f"{name}-{i}", partial(self._train, task, i, start)) for i in range(self.config.clients)]

    def _train(self, task: ClientTask, client: int, start: Mapping[str, Tensor]) -> Params:
        return task.train(client, start, images=self.images(client))[0].params

    def mean(self, networks: list[Params]) -> Params:
        """The clients' networks averaged by what they hold."""
        return fm.average(networks, [len(self.images(i)) for i in range(self.config.clients)])

    def networks(self) -> Iterator[tuple[str, Params]]:
        """What a server can make of the clients, and what it has without them."""
        yield AVERAGE, self.mean(self.clients)
        stages: dict[str, Params] = {}
        answers = [ClientResult(i, params, len(self.images(i))) for i, params in enumerate(self.clients)]
        align_merge_retrain(
            answers,
            bench=self.bench,
            pipeline=Pipeline(teacher="mean"),
            on_stage=lambda _, s, params: stages.update({s: params}),
        )
        yield MERGED, stages.get("repaired", stages["merged"])
        yield RETRAINED, stages["retrained"]
        for rounds in (1, self.config.rounds):
            last = self.fedavg(rounds, rounds)
            yield f"FedAvg, {rounds} round{'s' * (rounds > 1)}", self.mean(last)
        yield f"FedAvg, {self.config.rounds} rounds, retrained", self._again(self.mean(last), last, Pipeline().retrain)
        yield PUBLIC, self._again(self.model.state_dict(), [], "labels")

    def _again(self, params: Params, teachers: list[Params], how: str) -> Params:
        """Retrained as the merged network is."""
        return retrain_on_public(params, teachers, bench=self.bench, how=how, server_round=1)

    # -- what they tell -----------------------------------------------------------------------------------

    def sure(self, params: Params, images: Images) -> Vector:
        """How sure a network is of the label of each image."""
        return confidence(predict(self.model, params, images, device=self.work.device), images.labels)

    @cached_property
    def references(self) -> tuple[Vector, Vector]:
        """How sure the clients' own networks are of the images asked for, and of the population."""
        some = (self.asked[0], self.split.val_images)
        asked, population = (np.stack([self.sure(p, images) for p in self.clients]) for images in some)
        return asked, population

    def scores(self, params: Params, owner: int | None = None) -> tuple[np.ndarray, tuple[Vector, Vector]]:
        """Who of the images asked for is a member, and the scores of each attack; ``owner`` if it is a client's own.

        References are the networks of the clients that were not trained on an image. Of nobody's image one of them is
        left out too, so that all images have as many.
        """
        _, owners = self.asked
        n, (asked, population) = self.config.clients, self.references
        mine = np.full(len(owners), True) if owner is None else (owners == owner) | (owners < 0)
        left = np.where(owners < 0, np.arange(len(owners)) % n if owner is None else owner, owners)
        shadows = Seen(asked[:, mine], left[mine] == np.arange(n)[:, None], population)
        sure, others = self.sure(params, self.asked[0])[mine], self.sure(params, self.split.val_images)
        found = loss_threshold(sure, others, shadows), rmia(sure, others, shadows, references=n - 1)
        return owners[mine] >= 0, found

    def row(self, of: str, networks: Sequence[tuple[int | None, Params]]) -> dict[str, object]:
        """Accuracy, attacks and audit of one network, or of each client's own, with its owner."""
        found = [self.scores(params, owner) for owner, params in networks]
        members = np.concatenate([inside for inside, _ in found])
        loss, others = (rates(np.concatenate([s[k] for _, s in found]), members) for k in (0, 1))
        test = [fm.evaluate(self.model, p, self.split.test_images, device=self.work.device) for _, p in networks]
        wrong, kept = self.canaries
        audit = one_run(self.sure(networks[0][1], wrong), kept, delta=self.config.delta)
        return {
            "of": of, "accuracy": float(np.mean([one.accuracy for one in test])), "auc_loss": loss.auc.value,
            "auc_rmia": others.auc.value, "tpr_1": others.tpr[0.01].value, "audited": audit.epsilon,
            "right": audit.correct, "guesses": audit.guesses,
        }  # fmt: skip

    def order(self, aligner: str, params: Params, to: Params) -> Params:
        """How an aligner reorders the units of ``params``; ``"none"`` leaves them."""
        if aligner == "none":
            return {group: torch.arange(n) for group, n in self.bench.spec.sizes(params).items()}
        images = {"model": self.model, "data": self.split.public_images} if needs_images(aligner) else {}
        rng = numpy_stream(self.task.seed, "align")
        return dict(fm.align(params, to, spec=self.bench.spec, method=aligner, rng=rng, **images).perms)

    def accounted(self) -> float:
        """The most that a client has spent, by its accountant."""
        return max(self.task.spent(len(self.images(i)), 1) for i in range(self.config.clients))


def cells(config: DPMerge, work: Work) -> Iterator[Cell]:
    """The networks of one seed and one epsilon, then the aligners."""
    measures = {"networks": _networks, "aligners": _aligners}

    def rows(seed: int, epsilon: float, part: str) -> Iterator[dict[str, object]]:
        one = Setting(config, work, seed, epsilon)
        blank = {**dict.fromkeys(COLUMNS, ""), "accounted": one.accounted()}
        for row in measures[part](one):
            yield {k: round(v, 6) if isinstance(v, float) else v for k, v in {**blank, **row}.items()}

    return each(rows, seed=config.seeds, epsilon=(*config.epsilons, math.inf), part=measures)


def _networks(one: Setting) -> Iterator[dict[str, object]]:
    yield one.row(CLIENT, list(enumerate(one.clients)))
    for of, params in one.networks():
        yield one.row(of, [(None, params)]) | ({"accounted": 0.0} if of == PUBLIC else {})


def _aligners(one: Setting) -> Iterator[dict[str, object]]:
    """Two clients from one start, one of them moved to a known order; and two from a start each."""
    spec, test = one.bench.spec, one.split.test_images
    planted = spec.random(torch_stream(one.task.seed, "planted"))
    pair, apart = one.fedavg(1, 1)[1:3], one.clients[1:3]
    few = test.first(2000)
    for aligner in ALIGNERS:
        began = time.process_time()
        order = one.order(aligner, fm.permute(pair[1], planted, spec=spec), pair[0])
        right = [(planted[group][perm] == torch.arange(len(perm))).double() for group, perm in order.items()]
        moved = fm.permute(apart[1], one.order(aligner, apart[1], apart[0]), spec=spec)
        spent = (time.process_time() - began) / 2
        line = fm.interpolate(one.model, apart[0], moved, few, points=11, device=one.work.device)
        yield {
            "of": aligner, "planted": float(torch.cat(right).mean()),
            "similarity": fm.distance(apart[0], moved).cosine, "barrier": fm.barrier(line).error, "seconds": spent,
        }  # fmt: skip
