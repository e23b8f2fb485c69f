"""Does merging pay: what is measured of a setting. Clients, ensembles, networks in all ways, FedAvg, rivals, rounds."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import fedmerge as fm
from experiments.studies.does_merging_pay import (
    BEST,
    CLIENT,
    COEFFICIENTS,
    ENSEMBLE,
    FEDAVG,
    FOLDED,
    MERGED,
    NONE,
    PLANS,
    PUBLIC,
    RECOMPUTED,
    RIVALS,
    ROUNDS,
    TASKS,
    Params,
    Pays,
    Setting,
)
from experiments.studies.study import Cell, Work
from fedmerge.errors import SpecError
from fedmerge.merge import MERGERS, stages
from fedmerge.pipeline import Pipeline, align_merge_retrain, retrain_on_public
from fedmerge.streams import numpy_stream
from strategies import ClientResult, FedMA

VALUES = ("val", "test", "head_val", "head_test", "strength")
WAYS = ((NONE, False), ("mean", False), ("stacked", False), ("stacked", True))
"""Teacher of the retraining, and whether it answers unlabelled images too; of the least to the most."""
FEDDF, FEDMA, WEIGHTS = "FedDF", "FedMA", "learned weights"
ONE, CYCLE = "one round", "a cycle"
"""Rounds of FedMA: all layers matched at once, or one a round and the clients retrained in between."""

Found = dict[str, object]


def cells(config: Pays, work: Work) -> Iterator[Cell]:
    """Of each setting its clients, the ensembles, and every network in every way; or what else its grid asks for."""
    kinds: dict[str, Callable[[Setting], Iterator[Cell]]] = {
        MERGED: _networks,
        FEDAVG: partial(_fedavg, config=config),
        RIVALS: _rivals,
        ROUNDS: partial(_rounds, config=config),
    }
    for grid in PLANS[config.plan]:
        for seed, n, partition, init in grid.settings(config.seeds):
            yield from kinds[grid.what](Setting(work, config, grid.model, seed, n, partition, init))


def _cell(
    one: Setting, measure: Callable[[], Any], network: str, teacher: str = "", unlabelled: object = "", of: object = ""
) -> Cell:
    key = {**one.where, "network": network, "teacher": teacher, "unlabelled": unlabelled, "of": of}

    def rows() -> list[Found]:
        found = measure()
        return [{**key, **dict.fromkeys(VALUES, ""), **row} for row in (found if isinstance(found, list) else [found])]

    return Cell(key, rows)


def _networks(one: Setting) -> Iterator[Cell]:
    for i in range(one.task.clients):
        yield _cell(one, partial(of_client, one, i), CLIENT, of=i)
    for teacher in ("mean", "stacked", "by-class"):
        yield _cell(one, partial(of_ensemble, one, teacher), ENSEMBLE, teacher, False)
    yield from _retrained(one, MERGED, BEST, PUBLIC)


def _retrained(one: Setting, *networks: str) -> Iterator[Cell]:
    for teacher, unlabelled in WAYS:
        for network in networks:
            measure = partial(retrained, one, network, teacher, unlabelled=unlabelled)
            yield _cell(one, measure, network, teacher, unlabelled)


def _fedavg(one: Setting, config: Pays) -> Iterator[Cell]:
    for rounds, epochs in config.fedavg:
        yield _cell(one, partial(fedavg, one, rounds, epochs), FEDAVG, of=rounds)


def _rounds(one: Setting, config: Pays) -> Iterator[Cell]:
    rounds, epochs = config.rounds
    yield _cell(one, partial(few_rounds, one, rounds, epochs), ROUNDS, "stacked", True, of=rounds)


def _rivals(one: Setting) -> Iterator[Cell]:
    yield _cell(one, partial(weighed, one), ENSEMBLE, WEIGHTS, False)
    yield _cell(one, partial(feddf, one), FEDDF, "mean", True)
    for rounds in (ONE, CYCLE):
        yield _cell(one, partial(fedma, one, rounds), FEDMA, of=rounds)
    if _folds(str(one.where["model"])):
        yield from _retrained(one, FOLDED)
    yield from _retrained(one, COEFFICIENTS)


@cache
def _folds(model: str) -> bool:
    """Whether FS-Merge knows the network of a task: not if it has norms."""
    task = TASKS[model]
    network = fm.models.build(task.model, classes=10, in_shape=(3, 32, 32), seed=0, width=task.width)
    with suppress(SpecError):
        MERGERS["fs-merge"].check(network)
        return True
    return False


# -- how it is measured ---------------------------------------------------------------------------------


def of_client(one: Setting, i: int) -> dict[str, float]:
    """A client's own network."""
    return one.accuracy(one.client(i))


def _of_rule(one: Setting, rule: Callable[[Sequence[Tensor]], Tensor]) -> dict[str, float]:
    """What the clients' predictions made one are worth, on val and on test."""
    found = {}
    for on in ("val", "test"):
        right = rule(one.predicted(on)).argmax(1) == getattr(one, on).labels
        found[on] = float(right.double().mean())
    return found


def of_ensemble(one: Setting, teacher: str) -> dict[str, float]:
    """All clients together, as many networks as clients."""
    return _of_rule(one, one.teaching(teacher, unlabelled=False).rule)


def retrained(one: Setting, network: str, teacher: str, *, unlabelled: bool) -> Found:
    """A network with the one retraining that all have, or without any where the teacher is :data:`NONE`."""
    params = one.made(network, unlabelled=unlabelled, teacher=teacher)
    if teacher != NONE:
        bench, taught = one.bench(unlabelled=unlabelled), one.teaching(teacher, unlabelled=unlabelled)
        params = retrain_on_public(params, (), bench=bench, how="both", server_round=1, taught=taught)
    return one.scores(params)


def fedavg(one: Setting, rounds: int, epochs: int) -> list[Found]:
    """FedAvg, as it is and with statistics measured anew where the network has any."""
    params, held = one.start(), [len(rows) for rows in one.split.clients]
    for r in range(1, rounds + 1):
        task = replace(one.task, init="shared", server_round=r, local_epochs=epochs)
        if r == 1 and epochs == one.config.epochs and one.init != "independent":
            trained = [result.params for result in one.results]  # the same clients, trained already
        else:
            trained = [task.train(i, params)[0].params for i in range(task.clients)]
        params = fm.average(trained, held)
    measured = fm.repair(one.model, params, data=one.public, method="recompute", device=one.work.device)
    same = all(torch.equal(params[name], measured[name]) for name in params)
    rows = [{"network": FEDAVG, **one.scores(params)}]
    return rows if same else [*rows, {"network": RECOMPUTED, **one.scores(measured)}]


def few_rounds(one: Setting, rounds: int, epochs: int) -> list[Found]:
    """The pipeline round by round: each merged network before its retraining, and after it as the next round's start.

    One row each, the teacher of the former :data:`NONE`.
    """
    params, bench, pipeline = one.start(), one.bench(unlabelled=True), Pipeline(teacher="stacked")
    held, found, passed = [len(rows) for rows in one.split.clients], [], list[Params]()

    def keep(server_round: int, name: str, stage: Params) -> None:
        passed.append(stage)

    for r in range(1, rounds + 1):
        task = replace(one.task, server_round=r, local_epochs=epochs)
        results = [ClientResult(i, task.train(i, params)[0].params, images) for i, images in enumerate(held)]
        passed.clear()
        params = align_merge_retrain(results, bench=bench, pipeline=pipeline, server_round=r, on_stage=keep).params
        *_, before, after = passed
        found += [
            {"teacher": NONE, "of": r, **one.scores(before)},
            {"of": r, **one.scores(after)},
        ]
    return found


# -- rivals ---------------------------------------------------------------------------------------------


def mixture(predictions: Sequence[Tensor], labels: Tensor, steps: int = 500) -> Tensor:
    r"""The weights of an ensemble's members under which labels are most likely, by expectation and maximisation.

    Of all w with :math:`w_i \ge 0, \sum_i w_i = 1` those of the largest :math:`\sum_x \log \sum_i w_i p_i(y_x | x)`.
    The problem is concave, and no step lowers it (Dempster, Laird, Rubin, JRSS B 1977).
    """
    said = torch.stack([one.double()[torch.arange(len(labels)), labels] for one in predictions], 1).clamp_min(1e-12)
    weights = torch.full((said.shape[1],), 1 / said.shape[1], dtype=torch.float64)
    for _ in range(steps):
        shares = said * weights
        weights = (shares / shares.sum(1, keepdim=True)).mean(0)
    return weights


def weighed(one: Setting) -> dict[str, float]:
    """The ensemble whose members have one weight each, learned on the public labels."""
    known = one.public.labels >= 0
    weights = mixture([p[known] for p in one.predicted("public")], one.public.labels[known])
    return _of_rule(one, lambda said: sum((w * p for w, p in zip(weights, said, strict=True)), torch.zeros(())))


def feddf(one: Setting) -> Found:
    """From the plain average, the mean ensemble distilled on all public images without their labels."""
    bench = one.bench(unlabelled=True)
    found = fm.merge(
        [r.params for r in one.results], spec=bench.spec, method="ensemble-distillation", order="average",
        weights=[float(r.examples) for r in one.results], rng=numpy_stream(one.task.seed, "feddf"), model=bench.model,
        data=bench.public, recipe=bench.recipe, epochs=bench.retrain_epochs, device=bench.device,
    )  # fmt: skip
    return one.scores(found.params)


def fedma(one: Setting, rounds: str) -> Found:
    """Layers matched and averaged, at once or one a round, and clients retrain what is not fixed yet in between.

    The epochs of all later rounds together are no more than those of the first.
    """
    bench, results = one.bench(unlabelled=True), one.results
    strategy = FedMA(bench=bench, pipeline=Pipeline(), on_stage=lambda r, name, params: None)
    layers = stages(bench.spec, one.model.state_dict())
    epochs = max(1, one.config.epochs // len(layers))
    for r in range(1, (len(layers) if rounds == CYCLE else 1) + 1):
        if r > 1:
            fixed = ",".join(sorted(set().union(*(names for _, names in layers[: r - 1]))))
            task = replace(one.task, server_round=r, local_epochs=epochs, frozen=fixed)
            results = [
                ClientResult(was.client, task.train(was.client, _own(strategy, was.client))[0].params, was.examples)
                for was in results
            ]
        params = strategy.aggregate(r, results).params
    return one.scores(params)


def _own(strategy: FedMA, client: int) -> Params:
    before = f"{client}/"
    return {k.removeprefix(before): torch.tensor(v) for k, v in strategy.own.items() if k.startswith(before)}
