"""What the tests of training share: a few digits, two small networks, and a call of `train` with defaults."""

from typing import Any

import numpy as np
import torch
from torch import nn

import fedmerge.data
from fedmerge.data import Images
from fedmerge.models import Recipe
from fedmerge.training import train

DIGITS = fedmerge.data.load("digits").train
PLAIN = Recipe(lr=0.1, momentum=0.0, batch_size=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def normed() -> nn.Module:
    """Where BatchNorm sees one value per channel and image, so a batch of one image has no variance."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def some_digits(count: int) -> Images:
    return DIGITS.select(np.arange(count))


def fit(model: nn.Module, data: Images, **options: Any) -> Any:
    options = {"recipe": PLAIN, "epochs": 2, "generator": generator(), **options}
    return train(model, options.pop("params", model.state_dict()), data, **options)


def soft_labels(count: int, temperature: float = 1.0) -> torch.Tensor:
    logits = torch.randn(count, 10, generator=generator(9)) * 3
    return (logits / temperature).softmax(1)
