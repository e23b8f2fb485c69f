"""Small networks that take images, and images for them, for aligners that look at activations."""

import torch
from nets import Residual, SelfTied, mlp
from torch import nn

from fedmerge.data import Images

SHAPE = (3, 4, 4)


def pictures(n: int = 40, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Images:
    """Random labelled images."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, *shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(4, (n,), generator=generator)
    mean, std = (0.5,) * shape[0], (0.3,) * shape[0]
    return Images(images, labels, ("a", "b", "c", "d"), mean, std, "pictures")


def network(name: str, seed: int = 0) -> nn.Module:
    """A network by name: ``one-layer``, ``mlp``, ``residual`` or ``self-tied``."""
    torch.manual_seed(seed)
    inner = {
        "one-layer": lambda: mlp(48, 9, 4),
        "mlp": lambda: mlp(48, 7, 6, 4),
        "residual": lambda: Residual(48, 6, 7),
        "self-tied": lambda: SelfTied(5),
    }[name]()
    return inner if name == "self-tied" else nn.Sequential(nn.Flatten(), inner)
