"""Networks without residual connections: a perceptron, LeNet-5, NIID-Bench's CNN, a reduced VGG, VGG11."""

import torch
from torch import nn

from fedmerge.errors import ConfigError
from fedmerge.models._layers import scaled


class MLP(nn.Module):
    """Two hidden layers of ``width`` rectified units on the flattened image."""

    def __init__(self, classes: int, in_shape: tuple[int, int, int], *, width: float) -> None:
        super().__init__()
        channels, height, rows = in_shape
        hidden = round(width)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(channels * height * rows, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.out = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)``."""
        x = self.fc1(self.flatten(x)).relu()
        logits: torch.Tensor = self.out(self.fc2(x).relu())
        return logits


class LeNet5(nn.Module):
    """LeNet-5: two 5x5 convolutions of 6 and 16 maps, each averaged by 2x2, linear layers of 120, 84 and the classes.

    LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition", Proc. IEEE 86(11), 1998,
    section II.B, in today's form, which has the 62 thousand parameters that experiments on MNIST report (61,706):
    the second convolution reads all six maps, averages have no weights of their own, and the last layer is
    linear. Units are hyperbolic tangents, as there, without its scale of 1.7159. The first convolution is padded by 2,
    as the paper pads its 28x28 digits to 32x32.
    """

    def __init__(self, classes: int, in_shape: tuple[int, int, int], *, width: float) -> None:
        super().__init__()
        channels, *sides = in_shape
        left = [(side // 2 - 4) // 2 for side in sides]
        if min(left) < 1:
            raise ConfigError(
                f"lenet5 halves its images twice around a 5x5 kernel and needs at least 12x12; these are "
                f"{sides[0]}x{sides[1]}; use mlp or reduced-vgg"
            )
        first, second, third, fourth = (scaled(units, width) for units in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(channels, first, 5, padding=2)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.pool = nn.AvgPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * left[0] * left[1], third)
        self.fc2 = nn.Linear(third, fourth)
        self.out = nn.Linear(fourth, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)``."""
        x = self.pool(self.conv1(x).tanh())
        x = self.pool(self.conv2(x).tanh())
        x = self.fc1(self.flatten(x)).tanh()
        logits: torch.Tensor = self.out(self.fc2(x).tanh())
        return logits


class CNN(nn.Module):
    """The simple CNN of NIID-Bench: two 5x5 convolutions of 6 and 16 channels, linear layers of 120 and 84.

    Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", ICDE 2022, arXiv:2102.02079.
    """

    def __init__(self, classes: int, in_shape: tuple[int, int, int], *, width: float, kernel_size: int) -> None:
        super().__init__()
        channels, *sides = in_shape
        left = [((side - kernel_size + 1) // 2 - kernel_size + 1) // 2 for side in sides]
        if min(left) < 1:
            smallest = 2 * (kernel_size + 1) + kernel_size - 1
            raise ConfigError(
                f"cnn with kernel_size {kernel_size} needs images of at least {smallest}x{smallest}; "
                f"these are {sides[0]}x{sides[1]}; use mlp or a smaller kernel_size"
            )
        first, second, third, fourth = (scaled(units, width) for units in (6, 16, 120, 84))
        self.conv1 = nn.Conv2d(channels, first, kernel_size)
        self.conv2 = nn.Conv2d(first, second, kernel_size)
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * left[0] * left[1], third)
        self.fc2 = nn.Linear(third, fourth)
        self.out = nn.Linear(fourth, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)``."""
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        x = self.fc1(self.flatten(x)).relu()
        logits: torch.Tensor = self.out(self.fc2(x).relu())
        return logits


class ReducedVGG(nn.Module):
    """A VGG of four layers: 3x3 convolutions of 64 and 128 channels, each pooled by 2x2, and two linear layers.

    Shapira, "Linear Mode Connectivity", 2023, reduces VGG16 (Simonyan and Zisserman, ICLR 2015,
    arXiv:1409.1556) to 855,000 parameters on CIFAR-10 and prints no widths. Here the convolutions are the first
    of VGG16's first two stages, which leaves 95 hidden units to come to that number (854,943). Half of the
    hidden units drop out in training, VGG16's rate. The text drops outputs of the last layer as well, which
    would erase the scores of classes; VGG16 does not, and neither does this.
    """

    def __init__(self, classes: int, in_shape: tuple[int, int, int], *, width: float) -> None:
        super().__init__()
        channels, height, columns = in_shape
        if min(height, columns) < 4:
            raise ConfigError(
                f"reduced-vgg halves its images twice and needs at least 4x4; these are {height}x{columns}; use mlp"
            )
        first, second, hidden = (scaled(units, width) for units in (64, 128, 95))
        self.conv1 = nn.Conv2d(channels, first, 3, padding=1)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(second * (height // 4) * (columns // 4), hidden)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(hidden, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)``."""
        x = self.pool(self.conv1(x).relu())
        x = self.pool(self.conv2(x).relu())
        x = self.fc1(self.flatten(x)).relu()
        logits: torch.Tensor = self.out(self.dropout(x))
        return logits


class VGG11(nn.Module):
    """VGG11 for small images: eight 3x3 convolutions, five poolings, one linear layer, no normalisation.

    Configuration A of Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", ICLR 2015, arXiv:1409.1556, table 1, with the single classifier layer usual on CIFAR. With
    ``bias=False`` no layer has a bias, as in the tables of Singh and Jaggi, "Model Fusion via Optimal
    Transport", NeurIPS 2020, arXiv:1910.05653.
    """

    _CHANNELS = (64, 128, 256, 256, 512, 512, 512, 512)
    _POOLED = (True, True, False, True, False, True, False, True)

    def __init__(self, classes: int, in_shape: tuple[int, int, int], *, width: float, bias: bool) -> None:
        super().__init__()
        channels, height, columns = in_shape
        if min(height, columns) < 32:
            raise ConfigError(
                f"vgg11 halves its images five times and needs at least 32x32; these are {height}x{columns}; "
                "use cnn or mlp"
            )
        layers: list[nn.Module] = []
        for wanted, pooled in zip(self._CHANNELS, self._POOLED, strict=True):
            out = scaled(wanted, width)
            conv = nn.Conv2d(channels, out, 3, padding=1, bias=bias)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            layers += [conv, nn.ReLU(), *([nn.MaxPool2d(2)] if pooled else [])]
            channels = out
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.out = nn.Linear(channels * (height // 32) * (columns // 32), classes, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)``."""
        logits: torch.Tensor = self.out(self.flatten(self.features(x)))
        return logits
