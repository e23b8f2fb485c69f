"""Does Sinkhorn re-basin find anything, or does it return what it began with?

Question: on pairs of which one is a permuted copy of the other (the paper's first experiment), on noisy copies, and
on independently trained networks, what share of weight matching's objective does it reach, at which step, and where
does it begin? Beside the default stand the paper's cost (the squared distance) from the same start, both costs from a
forward-greedy start, and the authors' own code, if ``--authors`` names a copy of it (it needs torchviz and graphviz).

Expected: from the barycentre every planted permutation is recovered. On trained pairs the inner product comes
within 3 % of weight matching and the squared distance stays 5 to 9 % below; from a forward-greedy start the squared
distance returns that start.

Cost: some four CPU minutes for ``mlp`` and ``cnn``, a third of it training.

    python -m experiments.benchmarks.sinkhorn [--networks mlp cnn] [--seeds 3 4 5] [--authors FOLDER]
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedmerge as fm
from experiments.benchmarks import clients
from experiments.benchmarks.alignment import CLIENTS, noisy, objective
from experiments.benchmarks.clients import trained
from experiments.benchmarks.zoo import single_thread
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.tasks import ClientTask

Params = dict[str, Tensor]
_SMALL = replace(clients.TASK, clients=2, device="cpu")
NETWORKS: Mapping[str, ClientTask] = {
    "mlp": replace(_SMALL, dataset="digits", model="mlp", width=64, client_images=600, local_epochs=20),
    "mlp-mnist": replace(_SMALL, dataset="mnist", model="mlp", width=256, client_images=6000, local_epochs=4),
    "cnn": replace(_SMALL, model="cnn", client_images=6000, local_epochs=6),
    "vgg11": replace(_SMALL, model="vgg11", width=0.25, client_images=2000, local_epochs=3),
}
KINDS = ("planted", "noisy", "trained")
_BEFORE = {"start": "forward-greedy", "lr": 0.3, "steps": 50}
OURS: Mapping[str, dict[str, Any]] = {
    "default (inner product, barycentre)": {},
    "squared distance, barycentre": {"cost": "l2"},
    "inner product, forward-greedy": {"start": "forward-greedy"},
    "squared distance, forward-greedy, lr .3, 50 steps": {"cost": "l2", **_BEFORE},
}


def pair(task: ClientTask, kind: str) -> tuple[Params, Params]:
    """The reference and the network that moves.

    Planted pairs are an initialisation and its permuted copy; noisy ones a trained network twice, each time with noise
    of its own size, one of them permuted.
    """
    model, images = task.network(), task.split().public_images
    spec = fm.perm_spec(model, images.normalise(images.images[:2]))
    generator = torch_stream(task.seed, "benchmark-orders")
    if kind == "trained":
        a, b = trained(CLIENTS, task, range(2))
        return a, b
    if kind == "planted":
        a = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        b = a
    else:
        (truth,) = trained(CLIENTS, task, range(1))
        a, b = noisy(truth, 0), noisy(truth, 1)
    return a, fm.permute(b, spec.random(generator, b), spec=spec)


def by_authors(model: nn.Module, a: Params, b: Params, shape: tuple[int, ...], spec: fm.PermSpec) -> list[float]:
    """The objective at the start and after each step of the authors' code, set as in their example of perceptrons."""
    from rebasin import RebasinNet  # the authors' package bears the name of another one
    from rebasin.loss import DistL2Loss

    reference, moving = copy.deepcopy(model), copy.deepcopy(model)
    reference.load_state_dict(a)
    moving.load_state_dict(b)
    net = RebasinNet(moving, input_shape=(1, *shape))
    net.identity_init()
    loss = DistL2Loss(reference)
    optimizer = torch.optim.AdamW(net.p.parameters(), lr=0.1)

    def value() -> float:
        net.eval()
        with torch.no_grad():
            return objective(a, dict(net().state_dict()), spec)

    history = [value()]
    for _ in range(50):
        net.train()
        optimizer.zero_grad()
        loss(net()).backward()
        optimizer.step()
        history.append(value())
    return history


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if the default returned its start or missed a planted permutation."""
    parser = argparse.ArgumentParser(description="Sinkhorn re-basin: where it begins and what it finds")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--authors", type=Path, help="a copy of the authors' repository, fagp/sinkhorn-rebasin")
    given = parser.parse_args(arguments)
    if given.authors:
        sys.path.insert(0, str(given.authors))
    print("| network | weights | method | start | reached, mean (lowest) | best step, median (lowest) | CPU s |")
    print("|---|---|---|--:|--:|--:|--:|")
    fine = True
    with single_thread():
        for name in given.networks:
            for kind in given.kinds:
                rows: dict[str, list[tuple[float, float, int, float]]] = {}
                for seed in given.seeds:
                    task = replace(NETWORKS[name], seed=seed)
                    model, images = task.network(), task.split().public_images
                    shape = tuple(images.images.shape[1:])
                    spec = fm.perm_spec(model, images.normalise(images.images[:2]))
                    a, b = pair(task, kind)
                    best = fm.align(b, to=a, spec=spec, rng=numpy_stream(seed, "align")).objective
                    for title, run in contenders(model, a, b, shape, spec, seed, bool(given.authors)).items():
                        began = time.process_time()
                        history = run()
                        spent = time.process_time() - began
                        top = max(history)
                        rows.setdefault(title, []).append((history[0] / best, top / best, history.index(top), spent))
                for title, found in rows.items():
                    starts, reached, steps, seconds = zip(*found, strict=True)
                    print(
                        f"| {name} | {kind} | {title} | {statistics.mean(starts):.3f} | "
                        f"{statistics.mean(reached):.3f} ({min(reached):.3f}) | "
                        f"{statistics.median(steps):.0f} ({min(steps)}) | {statistics.median(seconds):.1f} |",
                        flush=True,
                    )
                ours = rows[next(iter(OURS))]
                fine = fine and all(step > 0 and (kind != "planted" or share > 1 - 1e-9) for _, share, step, _ in ours)
    return 0 if fine else 1


def contenders(
    model: nn.Module, a: Params, b: Params, shape: tuple[int, ...], spec: fm.PermSpec, seed: int, authors: bool
) -> dict[str, Callable[[], list[float]]]:
    """Name -> what runs it and returns the objective at the start and after each step."""

    def ours(options: dict[str, Any]) -> list[float]:
        rng = numpy_stream(seed, "align")
        return list(fm.align(b, to=a, spec=spec, method="sinkhorn-rebasin", rng=rng, **options).history[:-1])

    found: dict[str, Callable[[], list[float]]] = {title: partial(ours, options) for title, options in OURS.items()}
    if authors:
        found["the authors' code, identity, 50 steps"] = partial(by_authors, model, a, b, shape, spec)
    return found


if __name__ == "__main__":
    sys.exit(main())
