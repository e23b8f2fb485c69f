"""Does merging networks of private data pay? The plan, and a setting: its clients, what a server makes of them."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import fedmerge as fm
from experiments.studies.study import Config, Work
from fedmerge.data import Images
from fedmerge.pipeline import Pipeline, Workbench, align_merge_retrain, retrain_on_public
from fedmerge.tasks import ClientTask
from fedmerge.teachers import TEACHERS, Teaching, probabilities
from strategies import ClientResult

Params = dict[str, Tensor]

TASKS = {
    "cnn": ClientTask(dataset="cifar10", model="cnn", client_images=2500, public_fraction=0.1, val_fraction=0.05),
    "mlp": ClientTask(dataset="mnist", model="mlp", client_images=1000, public_fraction=1 / 12, val_fraction=0.05),
    "hlb": ClientTask(
        dataset="cifar10",
        model="hlb",
        width=8,
        client_images=2500,
        public_fraction=0.1,
        val_fraction=0.05,
        training=replace(fm.models.recipe("hlb"), channels_last=True),
    ),
    "digits": ClientTask(dataset="digits", model="mlp", width=16, client_images=60, public_fraction=0.3),
}
EVEN, HALF, TENTH, CLASSES = "iid", "dirichlet 0.5", "dirichlet 0.1", "two classes"
PARTITIONS: Mapping[str, dict[str, Any]] = {
    EVEN: {"partition": "iid"},
    HALF: {"partition": "dirichlet", "partition_alpha": 0.5},
    TENTH: {"partition": "dirichlet", "partition_alpha": 0.1},
    CLASSES: {"partition": "classes"},
}
ALL_CLASSES = 5
"""So many clients of two classes each hold all ten."""
CLIENT, MERGED, BEST, PUBLIC = "client", "merged", "best client", "public labels"
ENSEMBLE, FEDAVG, RECOMPUTED = "ensemble", "FedAvg", "FedAvg, recomputed"
RIVALS, COEFFICIENTS, FOLDED = "rivals", "learned coefficients", "FS-Merge"
ROUNDS = "few rounds"
TAUGHT = {COEFFICIENTS: "learned-coefficients", FOLDED: "fs-merge"}
"""Networks merged by what a teacher says, each by its merger."""
NONE = "none"


SEEDS = (0, 1, 2, 3, 4)
SKEWED_FIRST = (TENTH, EVEN, CLASSES, HALF)
INITS = ("independent", "pretrained")


@dataclass(frozen=True)
class Grid:
    """Cells of one model, every combination of what is given.

    ``what`` is :data:`MERGED`, with all that it is compared to; :data:`FEDAVG`; :data:`RIVALS`, other methods; or
    :data:`ROUNDS`, the pipeline in more than one.
    """

    model: str
    n: tuple[int, ...] = (6,)
    seeds: tuple[int, ...] = SEEDS
    partitions: tuple[str, ...] = SKEWED_FIRST
    inits: tuple[str, ...] = INITS
    what: str = MERGED

    def settings(self, seeds: tuple[int, ...]) -> Iterator[tuple[int, int, str, str]]:
        """Seed, number of clients, partition, initialisation; the seed changes last.

        Without those of too few clients for all classes to be somebody's.
        """
        allowed = [seed for seed in self.seeds if seed in seeds]
        for seed, n, partition, init in itertools.product(allowed, self.n, self.partitions, self.inits):
            if partition != CLASSES or n >= ALL_CLASSES:
                yield seed, n, partition, init


PLANS: Mapping[str, tuple[Grid, ...]] = {
    "a toy": (
        Grid("digits", n=(2,), partitions=(TENTH,), inits=("independent",)),
        Grid("digits", n=(2,), partitions=(TENTH,), inits=("independent",), what=FEDAVG),
        Grid("digits", n=(2,), partitions=(TENTH,), inits=("independent",), what=RIVALS),
        Grid("digits", n=(2,), partitions=(TENTH,), inits=("independent",), what=ROUNDS),
    ),
    # What tells most comes first, the merge against its controls: a study that was stopped has whole cells.
    "all cells": (
        Grid("cnn", seeds=(0,), partitions=(TENTH,), inits=("independent",)),
        Grid("mlp"),
        Grid("cnn", seeds=(0, 1, 2)),
        Grid("mlp", what=FEDAVG),
        Grid("mlp", what=RIVALS),
        Grid("cnn"),
        Grid("hlb", seeds=(0, 1, 2), partitions=(TENTH, EVEN)),
        Grid("mlp", n=(3, 12)),
        Grid("cnn", n=(3, 12)),
        Grid("cnn", seeds=(0, 1, 2), what=RIVALS),
        Grid("hlb", seeds=(0, 1, 2), partitions=(TENTH, EVEN), what=RIVALS),
        Grid("hlb", seeds=(0, 1, 2), partitions=(TENTH, EVEN), what=FEDAVG),
        Grid("cnn", n=(3, 6, 12), what=FEDAVG),
        Grid("mlp", n=(3, 12), what=FEDAVG),
        Grid("mlp", what=ROUNDS),
        Grid("cnn", seeds=(0, 1, 2), what=ROUNDS),
        Grid("hlb", seeds=(0, 1, 2), partitions=(TENTH, EVEN), what=ROUNDS),
    ),
}
"""Name -> what is measured, in this order; what stands in two grids is measured once."""


@dataclass(frozen=True)
class Pays(Config):
    """``labels``: public images that keep their labels; ``epochs``: of clients and of the retraining alike.

    ``plan`` is a name from :data:`PLANS`, ``fedavg`` the rounds of FedAvg, each with its local epochs, ``rounds`` those
    of the pipeline.
    """

    seeds: tuple[int, ...] = SEEDS
    plan: str = "all cells"
    labels: int = 1000
    epochs: int = 10
    fedavg: tuple[tuple[int, int], ...] = ((1, 10), (5, 2), (20, 1))
    rounds: tuple[int, int] = (5, 2)


class Setting:
    """One cell and seed: its clients, and what a server makes of them. What is made is kept in ``work``."""

    def __init__(self, work: Work, config: Pays, model: str, seed: int, n: int, partition: str, init: str) -> None:
        self.work, self.config, self.init = work, config, init
        where = {"model": model, "partition": partition, "n": n, "init": init, "seed": seed}
        self.where: dict[str, object] = where
        self.name = "-".join(str(value).replace(" ", "") for value in where.values())
        self.task = replace(
            TASKS[model], clients=n, seed=seed, init=init, local_epochs=config.epochs, public_labels=config.labels,
            device=work.device, **PARTITIONS[partition],
        )  # fmt: skip

    @cached_property
    def split(self) -> fm.data.Split:
        """Who holds which images."""
        return self.task.split()

    @cached_property
    def model(self) -> torch.nn.Module:
        """The architecture, with the weights that all begin at."""
        return self.task.network()

    @cached_property
    def val(self) -> Images:
        """On which choices are made."""
        return self.split.val_images

    @cached_property
    def test(self) -> Images:
        """On which results are reported."""
        return self.split.test_images

    @cached_property
    def public(self) -> Images:
        """With labels and without."""
        return self.split.public_images

    @cached_property
    def best(self) -> int:
        """The client that is best on val."""
        right = [float((p.argmax(1) == self.val.labels).double().mean()) for p in self.predicted("val")]
        return max(range(len(right)), key=lambda i: (right[i], -i))

    def bench(self, *, unlabelled: bool) -> Workbench:
        """What the server has."""
        public = self.public if unlabelled else self.public.labelled
        return Workbench(
            model=self.model, spec=self.task.spec(self.model), public=public,
            val=self.val, recipe=self.task.recipe(), retrain_epochs=self.config.epochs, seed=self.task.seed,
            device=self.work.device,
        )  # fmt: skip

    def pretrained(self) -> Params:
        """A network of the public labels alone, trained as long as a client."""
        fresh, bench = self.model.state_dict(), self.bench(unlabelled=False)
        name = f"public-{self.where['model']}-{self.where['seed']}"
        return self.work.kept(name, lambda: retrain_on_public(fresh, (), bench=bench, how="labels", server_round=0))

    def start(self) -> Params:
        """Where all clients begin, unless each at a network of its own."""
        return self.pretrained() if self.init == "pretrained" else self.model.state_dict()

    def client(self, i: int) -> Params:
        """The network of a client."""
        return self.work.kept(f"{self.name}-{i}", lambda: self.task.train(i, self.start())[0].params)

    @cached_property
    def results(self) -> list[ClientResult]:
        """What the clients answered."""
        held = [len(rows) for rows in self.split.clients]
        return [ClientResult(i, self.client(i), images) for i, images in enumerate(held)]

    def predicted(self, on: str) -> list[Tensor]:
        """What each client predicts on ``"public"``, ``"val"`` or ``"test"``."""
        if on not in self._predicted:
            members = [r.params for r in self.results]
            self._predicted[on] = probabilities(self.model, members, getattr(self, on), device=self.work.device)
        return self._predicted[on]

    @cached_property
    def _predicted(self) -> dict[str, list[Tensor]]:
        return {}

    def teaching(self, teacher: str, *, unlabelled: bool) -> Teaching:
        """What the clients teach."""
        predictions, public = self.predicted("public"), self.public
        if not unlabelled:
            predictions, public = [p[public.labels >= 0] for p in predictions], public.labelled
        entry = TEACHERS[teacher]
        counts = [self.split.client(i).counts() for i in range(self.task.clients)]
        supplies = {"counts": counts}
        return entry.make(predictions, public, **{need: supplies[need] for need in entry.needs})

    def made(self, network: str, *, unlabelled: bool, teacher: str = NONE) -> Params:
        """A network before its retraining; ``teacher`` is what a merger of :data:`TAUGHT` goes by, or else the mean."""
        if network == BEST:
            return self.client(self.best)
        if network == PUBLIC:
            return self.pretrained()
        bench, found, name = self.bench(unlabelled=unlabelled), Pipeline(retrain="none"), MERGED
        if network != MERGED:
            found = replace(found, merger=TAUGHT[network], teacher="mean" if teacher == NONE else teacher)
            name = f"{found.merger}-{found.teacher}"
        name = f"{self.name}-{name}{'-all' if unlabelled else ''}"
        return self.work.kept(name, lambda: align_merge_retrain(self.results, bench=bench, pipeline=found).params)

    def scores(self, params: Params) -> dict[str, object]:
        """On val and on test, with the head that it has and with the best one from the clients' sums."""
        total: fm.HeadSums | None = None
        for i in range(self.task.clients):
            sums = fm.head_sums(self.model, params, self.split.client(i), device=self.work.device)
            total = sums if total is None else total + sums
        assert total is not None
        head = fm.best_head(self.model, params, total, self.val, device=self.work.device)
        own, with_head = (self.accuracy(p) for p in (params, head.params))
        return {**own, **{f"head_{k}": v for k, v in with_head.items()}, "strength": head.strength or 0}

    def accuracy(self, params: Params) -> dict[str, float]:
        """On val and on test."""
        both = {"val": self.val, "test": self.test}
        return {k: fm.evaluate(self.model, params, on, device=self.work.device).accuracy for k, on in both.items()}
