"""What a user brings in a module `mine` of a folder of their own, and the command called there."""

import sys

import pytest
from no_ray import simulate_here

from experiments import cli

MINE = '''
import numpy as np
import torch
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedmerge as fm
from fedmerge.align import Aligner
from fedmerge.models import Model, Recipe
from fedmerge.training import Training
from server import Control


class Net(nn.Module):
    """One hidden layer."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(self.hidden(x.flatten(1)).relu())

    def get_extra_state(self):
        return {"of": "this process"}

    def set_extra_state(self, state):
        assert state == {"of": "this process"}


net = Model("net", lambda classes, in_shape: Net(), "mine", recipe=Recipe(lr=0.25, batch_size=8, epochs=2))


def spots():
    """Three kinds of spots."""
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 3
    images = rng.integers(0, 90, (150, 1, 4, 4)) + 80 * np.eye(3, 16)[labels].reshape(150, 1, 4, 4)
    images = images.astype(np.uint8)
    return (images[:120], labels[:120]), (images[120:], labels[120:].astype(np.int32))


def alternating(labels, clients, rng):
    """One by one."""
    return [np.arange(client, len(labels), clients) for client in range(clients)]


def backwards(params, *, to, spec, rng, model, data, restarts=1, device="cpu"):
    """All units in reverse, whoever comes."""
    assert len(data) and isinstance(model, Net)
    return fm.Alignment({g: torch.arange(n).flip(0) for g, n in spec.sizes(params).items()}, 0.0, (0.0,), 1, True)


reverse = Aligner("reverse", backwards, "units in reverse", needs=frozenset({"model", "data"}))


def second(models, *, spec, weights, rng, aligner="", aligner_options=None, keep=1, **options):
    """The second of the networks, after the aligner."""
    perms = fm.align(models[keep], models[0], spec=spec, method=aligner, **aligner_options or {}).perms
    return fm.Merge(fm.permute(models[keep], perms, spec=spec), tuple(perms for _ in models), 0.0, (), 0, True)


def doubled(model, params, **given):
    """Everything twice."""
    return {name: 2 * tensor for name, tensor in params.items()}


def lifted(model, params, public, *, teachers, **given):
    """Everything plus one."""
    assert len(teachers) == 3
    return Training({name: tensor + 1 for name, tensor in params.items()}, (), (), steps=1, seconds=0.0)


def client_0(world, results, stage):
    """Client 0 alone."""
    yield world.measure(stage, results[0].params)


first = Control("first", client_0, "client 0", title="First", stage="first", note="of all", of_clients=True)


class Plain(FedAvg):
    """Flower's own, in a class of mine."""


def floats():
    """The spots as numbers that the network takes, in a loader."""
    train, test = (torch.utils.data.TensorDataset(d.normalise(d.images), d.labels) for d in parts("mine:spots"))
    return train, torch.utils.data.DataLoader(test, batch_size=7)


def parts(name):
    found = fm.data.load(name)
    return found.train, found.test


class Halves(Net):
    """Takes the halves of an image by their names."""

    def forward(self, left, right):
        return super().forward(torch.cat([left, right], 1))


halves = Model("halves", lambda classes, in_shape: Halves(), "mine", recipe=net.recipe)


def columns():
    """The same as rows of two halves."""
    rows = [(d.normalise(d.images).flatten(1), d.labels) for d in parts("mine:spots")]
    return tuple({"left": x[:, :8], "right": x[:, 8:], "label": y} for x, y in rows)


class Words(nn.Module):
    """The mean of a few tokens, classified."""

    def __init__(self):
        super().__init__()
        self.token, self.hidden, self.out = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, ids):
        return self.out(self.hidden(self.token(ids).mean(1)).relu())


def texts():
    """Kinds of texts, each with a word of its own; no test set."""
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 3
    ids = rng.integers(3, 9, (150, 5))
    ids[:, 2] = labels
    return (ids, labels), None
'''


def call(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    simulate_here(monkeypatch.setattr)
    monkeypatch.setattr(cli, "_report", lambda path, tracker: None)  # pictures have tests of their own
    monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def options(given: dict[str, object]) -> list[str]:
    return [part for key, value in given.items() for part in (f"--{key}", str(value))]
