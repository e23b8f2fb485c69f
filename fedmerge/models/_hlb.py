"""The hlb-CIFAR10 ResNet (github.com/tysam-code/hlb-CIFAR10) in any width and with any kernel."""

import torch
import torch.nn.functional as F
from torch import nn

from fedmerge.data import Images
from fedmerge.errors import ConfigError
from fedmerge.models._layers import SameConv2d

_PATCH = 2  # side of the whitened patches
_EPS = 1e-2  # added to the eigenvalues before their inverse root, as in the source
_MOMENTUM = 0.4  # of the running statistics, as in the source
_WHITENED_IMAGES = 5000  # enough for a 12 x 12 covariance of some million patches
_CHUNK = 500


class ConvGroup(nn.Module):
    """Convolve, halve, normalise; then a residual convolution of the same width."""

    def __init__(self, channels_in: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv1 = SameConv2d(channels_in, channels, kernel_size)
        self.pool = nn.MaxPool2d(2)
        self.norm1 = _batch_norm(channels)
        self.conv2 = SameConv2d(channels, channels, kernel_size)
        self.norm2 = _batch_norm(channels)
        self._initialise()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, C_in, H, W)`` to ``(N, C, H // 2, W // 2)``."""
        x = F.gelu(self.norm1(self.pool(self.conv1(x))))
        return x + F.gelu(self.norm2(self.conv2(x)))

    @torch.no_grad()
    def _initialise(self) -> None:
        """Let both convolutions pass their input on: the first beside its random weights, the second only.

        The first keeps the mean and the spread of its random weights.
        """
        weight = self.conv1.weight
        std, mean = torch.std_mean(weight)
        weight.add_(_dirac(weight))
        new_std, new_mean = torch.std_mean(weight)
        weight.sub_(new_mean).mul_(std / new_std).add_(mean)
        self.conv2.weight.copy_(_dirac(self.conv2.weight))


class HLB(nn.Module):
    """Whitened 2x2 patches, a 1x1 projection, three :class:`ConvGroup`, maximum over pixels, linear layer.

    With base width b the channels are b/2, b, 4b, 8b. The filters that whiten are frozen; until
    :meth:`initialise_from` has seen images they pass the pixels of a patch through. The last layer has no
    bias, and its logits are divided by 9. Differences from the source, for the sake of plain training code: no
    prediction averaged over the mirrored image, no half precision, one rate for weights and biases, and
    BatchNorm's usual epsilon of 1e-5 in place of 1e-12.
    """

    def __init__(self, classes: int, in_shape: tuple[int, int, int], *, width: float, kernel_size: int) -> None:
        super().__init__()
        channels, height, columns = in_shape
        if min(height, columns) < 9:
            raise ConfigError(
                f"hlb halves its images three times and needs at least 9x9; these are {height}x{columns}; use mlp"
            )
        if kernel_size > min(height, columns):
            raise ConfigError(
                f"hlb with kernel_size {kernel_size} needs images of at least {kernel_size}x{kernel_size}; "
                f"these are {height}x{columns}; use a smaller kernel_size"
            )
        patch = channels * _PATCH**2
        base, first = round(width), max(2, round(width / 2))
        self.whiten = nn.Conv2d(channels, patch, _PATCH, bias=False)
        self.whiten.weight = nn.Parameter(torch.eye(patch).view(patch, channels, _PATCH, _PATCH), requires_grad=False)
        self.project = SameConv2d(patch, first, 1)
        self.group1 = ConvGroup(first, base, kernel_size)
        self.group2 = ConvGroup(base, 4 * base, kernel_size)
        self.group3 = ConvGroup(4 * base, 8 * base, kernel_size)
        self.out = nn.Linear(8 * base, classes, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)``."""
        x = F.gelu(self.project(self.whiten(x)))
        x = self.group3(self.group2(self.group1(x)))
        logits: torch.Tensor = self.out(x.amax(dim=(2, 3))) / 9
        return logits

    @torch.no_grad()
    def initialise_from(self, images: Images) -> None:
        r"""Set the frozen filters to those that whiten the 2x2 patches of ``images``.

        With the covariance :math:`V \Lambda V^T` of the normalised patches, the filters are the rows of
        :math:`(\Lambda + 0.01)^{-1/2} V^T`, largest eigenvalue first. Their signs are fixed (the largest
        entry is positive), so that the same images give the same filters on every machine. Looks at 5,000
        evenly spaced images where there are more.
        """
        count = min(len(images), _WHITENED_IMAGES)
        chosen = images.images[torch.arange(count) * len(images) // max(1, count)]
        size = self.whiten.weight[0].numel()
        total, product, count = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size).double(), 0
        for chunk in torch.split(chosen, _CHUNK):
            patches = F.unfold(images.normalise(chunk), _PATCH).transpose(1, 2).reshape(-1, size).cpu().double()
            total += patches.sum(0)
            product += patches.T @ patches
            count += len(patches)
        mean = total / count
        values, vectors = torch.linalg.eigh(product / count - mean.outer(mean))
        filters = (vectors / (values + _EPS).sqrt()).T.flip(0)
        largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
        self.whiten.weight.copy_((filters * largest.sign()).view_as(self.whiten.weight))


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm that learns a shift but no scale."""
    norm = nn.BatchNorm2d(channels, momentum=_MOMENTUM)
    norm.weight.requires_grad_(False)
    return norm


def _dirac(weight: torch.Tensor) -> torch.Tensor:
    """The kernel that copies channel i to channel i, with even kernels as well as with odd ones."""
    kernel = torch.zeros_like(weight)
    both = torch.arange(min(weight.shape[:2]))
    centre = (weight.shape[2] - 1) // 2
    kernel[both, both, centre, centre] = 1.0
    return kernel
