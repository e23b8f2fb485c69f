"""Federated learning in plain PyTorch: the oracle of the strategies' tests. Of fedmerge it takes who holds which
images, pixels made ready for the network, where networks begin and the draws of the random streams; batches, steps and
means are written out here.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.data import Images, augment
from fedmerge.streams import torch_stream
from server import RunConfig

Params = dict[str, Tensor]


@dataclass
class Local:
    """A client after its round: its network, its number of images and the learning rate of each step."""

    params: Params
    examples: int
    rates: list[float]


def train_locally(
    model: nn.Module, start: Mapping[str, Tensor], images: Images, config: RunConfig, server_round: int, client: int,
    *, add: Mapping[str, Tensor] | None = None,
) -> Local:  # fmt: skip
    """SGD with momentum and weight decay on one client; ``add`` is put onto every gradient."""
    recipe = config.recipe()
    model.load_state_dict(start)
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )
    pixels, labels = images.images, images.labels
    draws = torch_stream(config.seed, "local-training", server_round, client)
    torch.randint(2**62, (), generator=draws)  # what dropout would draw from
    batches = math.ceil(len(labels) / recipe.batch_size)
    rates: list[float] = []
    for _ in range(config.epochs()):
        for rows in torch.randperm(len(labels), generator=draws).tensor_split(batches):
            batch = augment(pixels[rows], draws) if recipe.augment else pixels[rows]
            rates.append(recipe.rate((len(rates) + 0.5) / (batches * config.epochs())))
            optimizer.param_groups[0]["lr"] = rates[-1]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images.normalise(batch)), labels[rows]).backward()
            for name, weight in model.named_parameters() if add else ():
                weight.grad += add[name]
            optimizer.step()
    return Local({k: v.detach().clone() for k, v in model.state_dict().items()}, len(labels), rates)


def mean(clients: Sequence[Local], trained: Collection[str]) -> Params:
    """Every number weighed by examples; of counters, the largest."""
    total = sum(c.examples for c in clients)
    merged: Params = {}
    for name, first in clients[0].params.items():
        if name in trained:  # in single precision as Flower adds: later steps make much of the last bit
            merged[name] = sum(np.float32(c.examples / total) * c.params[name] for c in clients)
        elif first.is_floating_point():
            merged[name] = sum(c.params[name].double() * (c.examples / total) for c in clients).float()
        else:
            merged[name] = max(c.params[name] for c in clients)
    return merged


def federate(
    config: RunConfig,
    server: Callable[[int, Params, list[Local], Params], Params] = lambda r, sent, clients, mean: mean,
    add: Callable[[int, int], Params | None] = lambda r, client: None,
) -> Params:
    """All rounds of a federation with a shared initialisation in which every client takes part.

    ``server`` makes the next global network of the round, what was sent, the clients and their mean; ``add`` says what
    is put onto the gradients of a client.
    """
    split, model = config.setup().split(), config.setup().network()
    trained = dict(model.named_parameters())
    params = {k: v.clone() for k, v in model.state_dict().items()}
    for r in range(1, config.rounds + 1):
        clients = [
            train_locally(model, params, split.client(i), config, r, i, add=add(r, i)) for i in range(config.clients)
        ]
        params = server(r, params, clients, mean(clients, trained))
    return params
