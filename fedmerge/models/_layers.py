"""Layers that several networks share."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from fedmerge.errors import ConfigError


class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of every pixel: ``(N, C, H, W)`` in and out.

    Each pixel is normalised on its own and each channel has its own scale and shift, so channels may be
    permuted as with BatchNorm, and there are no statistics to go stale when networks are merged.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over dimension 1."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SameConv2d(nn.Conv2d):
    """A convolution without bias that keeps height and width, for odd and even kernels alike.

    An even kernel has no middle: it is padded by one more pixel on the right and at the bottom.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int) -> None:
        odd = kernel_size % 2 == 1
        padding = kernel_size // 2 if odd else 0
        super().__init__(channels_in, channels_out, kernel_size, padding=padding, bias=False)
        before, after = (kernel_size - 1) // 2, kernel_size // 2
        self._around = None if odd else (before, after, before, after)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, C_in, H, W)`` to ``(N, C_out, H, W)``."""
        return super().forward(x if self._around is None else F.pad(x, self._around))


def scaled(channels: int, width: float) -> int:
    """``channels`` times ``width``, rounded.

    Raises:
        ConfigError: Fewer than 2 units would be left: the layer would hardly carry anything.
    """
    units = round(channels * width)
    if units < 2:
        enough = math.ceil(1500 / channels) / 1000
        raise ConfigError(f"leaves {units} units in a layer, 2 are the least; give at least {enough}")
    return units
