"""Small networks that the tests of alignment and merging share."""

import itertools

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two residual blocks on one stream, as in the planted federations."""

    def __init__(self, inputs: int = 20, stream: int = 32, hidden: int = 48) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, stream)
        self.up = nn.ModuleList([nn.Linear(stream, hidden) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(hidden, stream) for _ in range(2)])
        self.head = nn.Linear(stream, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return self.head(x)


class SelfTied(nn.Module):
    """A convolution from a residual stream to itself: one group on two axes of one tensor (as in hlb)."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.loop = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = x + torch.relu(self.loop(x))
        return self.head(x.amax((2, 3)))


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def noise(like: dict[str, Tensor], seed: int, scale: float = 1.0) -> dict[str, Tensor]:
    """Gaussian noise of the shapes of a state dict; integers are copied."""
    generator = torch.Generator().manual_seed(seed)
    return {
        k: scale * torch.randn(v.shape, generator=generator) if v.is_floating_point() else v.clone()
        for k, v in like.items()
    }


def plus(a: dict[str, Tensor], b: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sum of two state dicts; integers stay."""
    return {k: v + b[k] if v.is_floating_point() else v for k, v in a.items()}
