"""A small network on drawn images: each of ten classes is a colour, under noise."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader


class Net(nn.Module):
    """Two convolutions without normalisation, and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 5, stride=2), nn.Conv2d(6, 12, 5, stride=2)
        self.hidden, self.head = nn.Linear(12 * 5 * 5, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        return self.head(F.relu(self.hidden(x.flatten(1))))


def drawn(rows: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """``rows`` images with their labels, one dict each."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (rows,), generator=draws)
    colours = torch.rand(10, 3, generator=torch.Generator().manual_seed(0))
    noise = 0.3 * torch.randn(rows, 3, 32, 32, generator=draws)
    images = 4 * (colours[labels][:, :, None, None] - 0.5) + noise
    return [{"img": image, "label": label} for image, label in zip(images, labels, strict=True)]


def load_data(partition: int, batch_size: int) -> tuple[DataLoader, DataLoader]:
    """What a client trains and evaluates on."""
    return DataLoader(drawn(160, 10 + partition), batch_size), DataLoader(drawn(40, 100 + partition), batch_size)


def load_centralized_dataset() -> DataLoader:
    """What the server holds."""
    return DataLoader(drawn(200, 1), 128)


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    """SGD with momentum; returns the loss of the last batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
    for batch in [batch for _ in range(epochs) for batch in loader]:
        loss = F.cross_entropy(net(batch["img"]), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss)


@torch.no_grad()
def measure(net: nn.Module, loader: DataLoader) -> tuple[float, float]:
    """Mean loss and accuracy."""
    found = [(net(batch["img"]), batch["label"]) for batch in loader]
    logits, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())
