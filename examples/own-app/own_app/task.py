"""The app's own network and data: scikit-learn's handwritten digits, which need no network to load."""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

PUBLIC, TEST = 300, 300
"""The first rows are the server's own, the next its test set; clients share the rest."""


class Net(nn.Module):
    """A convolution with BatchNorm and two linear layers, for digits of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc1, self.fc2 = nn.Linear(8 * 4 * 4, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of the ten digits."""
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def digits() -> TensorDataset:
    """All 1797 digits: float32 (N, 1, 8, 8) in [0, 1], and their labels."""
    found = load_digits()
    return TensorDataset(torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target))


def public_loader() -> DataLoader:
    """What the server may see."""
    return DataLoader(Subset(digits(), range(PUBLIC)), batch_size=64)


def test_loader() -> DataLoader:
    """What the server tests on."""
    return DataLoader(Subset(digits(), range(PUBLIC, PUBLIC + TEST)), batch_size=64)


def client_loaders(partition: int, partitions: int) -> tuple[DataLoader, DataLoader]:
    """Every ``partitions``-th of the clients' digits, four fifths for training and one for evaluation."""
    data = digits()
    rows = list(range(PUBLIC + TEST + partition, len(data), partitions))
    cut = 4 * len(rows) // 5
    return DataLoader(Subset(data, rows[:cut]), batch_size=32, shuffle=True), DataLoader(Subset(data, rows[cut:]), 32)


def train(net: nn.Module, loader: DataLoader, epochs: int, lr: float) -> float:
    """Plain SGD; returns the mean loss of a batch."""
    optimizer, total = torch.optim.SGD(net.parameters(), lr, momentum=0.9), 0.0
    net.train()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def accuracy(net: nn.Module, loader: DataLoader) -> float:
    """Share of right answers."""
    net.eval()
    with torch.no_grad():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)
