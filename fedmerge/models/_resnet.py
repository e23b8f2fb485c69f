"""Residual networks for small images: He et al., CVPR 2016, arXiv:1512.03385."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from fedmerge.models._layers import ChannelLayerNorm, scaled

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "layer": ChannelLayerNorm,
    "none": lambda channels: nn.Identity(),
}


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; a 1x1 convolution where the shape changes.

    Section 4.2 of the paper pads the shortcut with zeros there (option A), which ties the channels of one
    stage to those of the next. The projection (option B) keeps each stage's channels free to be permuted, and
    is what Ainsworth et al., "Git Re-Basin", ICLR 2023, arXiv:2209.04836, align.
    """

    def __init__(self, channels_in: int, channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = norm(channels)
        self.shortcut = (
            nn.Identity()
            if stride == 1 and channels_in == channels
            else nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), norm(channels))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, C_in, H, W)`` to ``(N, C, H / stride, W / stride)``."""
        inner = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        outer: torch.Tensor = (inner + self.shortcut(x)).relu()
        return outer


class ResNet(nn.Module):
    """A 3x3 stem, stages of :class:`Block` (all but the first halve the image), mean over pixels, linear."""

    def __init__(
        self,
        classes: int,
        in_shape: tuple[int, int, int],
        *,
        width: float,
        channels: Sequence[int],
        blocks: int,
        norm: str,
    ) -> None:
        super().__init__()
        make_norm = NORMS[norm]
        before = scaled(channels[0], width)
        self.conv = nn.Conv2d(in_shape[0], before, 3, padding=1, bias=False)
        self.norm = make_norm(before)
        stages = []
        for stage, wanted in enumerate(channels):
            for block in range(blocks):
                after = scaled(wanted, width)
                stages.append(Block(before, after, 2 if stage and not block else 1, make_norm))
                before = after
        self.blocks = nn.Sequential(*stages)
        self.out = nn.Linear(before, classes, bias=norm != "none")
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and norm != "none":  # sums of 8 blocks, unnormalised, would explode
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)``."""
        x = self.blocks(self.norm(self.conv(x)).relu())
        logits: torch.Tensor = self.out(x.mean(dim=(2, 3)))
        return logits
