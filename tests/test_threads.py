"""Small networks train in one thread, whatever the machine has; large ones in all."""

from collections.abc import Iterator
from typing import ClassVar

import pytest
import torch
from torch import nn

import fedmerge as fm
from fedmerge.data import Images
from fedmerge.models import Recipe
from fedmerge.threads import FEW, helpful_threads, operations

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """As on a machine with two cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


class Watching(nn.Module):
    """Two layers that note in how many threads they run."""

    seen: ClassVar[list[int]] = []

    def __init__(self, units: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, units), nn.Linear(units, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scores of images."""
        self.seen.append(torch.get_num_threads())
        scores: torch.Tensor = self.layers(images)
        return scores


@pytest.mark.parametrize(("units", "threads"), [(16, 1), (20_000, 2)])
def test_a_small_network_has_one_thread_and_a_large_one_all(units: int, threads: int) -> None:
    images = torch.randint(0, 256, (96, 1, 8, 8), dtype=torch.uint8)
    data = Images(images, torch.arange(96) % 10, tuple(map(str, range(10))), (0.5,), (0.25,), "noise")
    model = Watching(units)
    Watching.seen.clear()
    recipe = Recipe(lr=0.001, batch_size=32)
    fm.train(model, model.state_dict(), data, recipe=recipe, epochs=1, generator=torch.Generator().manual_seed(0))
    assert Watching.seen == [1, threads, threads]
    Watching.seen.clear()
    fm.evaluate(model, model.state_dict(), data, batch_size=32)
    assert Watching.seen == [1, threads, threads]
    assert torch.get_num_threads() == 2


def test_threads_come_back_after_an_error() -> None:
    def fails() -> None:
        with helpful_threads(nn.Linear(2, 2), CPU) as batch, batch(3):
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert torch.get_num_threads() == 2


def test_one_thread_stays_one() -> None:
    torch.set_num_threads(1)
    with helpful_threads(nn.Linear(8000, 8000), CPU) as batch, batch(1):
        assert torch.get_num_threads() == 1


def test_operations_are_those_of_the_products() -> None:
    assert operations(nn.Conv2d(3, 5, 3, bias=False), torch.zeros(2, 3, 8, 8)) == 2 * 2 * 36 * 5 * 27
    recurrent = nn.LSTM(4, 8)
    weights = sum(weight.numel() for weight in recurrent.parameters())
    assert operations(recurrent, torch.zeros(6, 3, 4)) >= 2 * 6 * weights
    assert operations(nn.Linear(5000, 5000), torch.zeros(2, 5000)) > FEW
