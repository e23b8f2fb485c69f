"""Random flips and shifts of a batch of images, the usual augmentation of CIFAR."""

import torch

from fedmerge.errors import DataError

_SHIFT = 8  # the largest shift is one eighth of the side: 4 pixels of CIFAR's 32


def augment(batch: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip each image left to right with probability 1/2 and shift it by up to an eighth of its side.

    The shift is a random crop out of the image padded by reflection (He et al., "Deep Residual Learning for
    Image Recognition", CVPR 2016, arXiv:1512.03385, section 4.2, pad with zeros; reflection leaves no black
    border). All draws come from ``generator``, on its own device, so the result does not depend on the
    device of ``batch``.

    Args:
        batch: Uint8 ``(N, C, H, W)``; not modified.
        generator: The source of all draws.

    Returns:
        uint8 ``(N, C, H, W)``: pixels are moved, never changed.

    Raises:
        DataError: A batch of another shape.

    Example:
        >>> batch = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)
        >>> fm.data.augment(batch, torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 32, 32])
    """
    if batch.ndim != 4 or not batch.numel():
        raise DataError(f"a batch to augment has shape {tuple(batch.shape)}; expected (N, C, H, W), none of them 0")
    count, channels, height, width = batch.shape
    rows = _shifted(count, height, generator)
    columns = _shifted(count, width, generator)
    flip = torch.rand(count, 1, generator=generator, device=generator.device) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    pixel = (rows[:, :, None] * width + columns[:, None, :]).to(batch.device).view(count, 1, height * width)
    moved = batch.flatten(2).gather(2, pixel.expand(-1, channels, -1))
    return moved.view(count, channels, height, width)


def _shifted(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """int64 ``(count, side)``: for each image the source position of every target position on one axis."""
    pad = min(side // _SHIFT, side - 1)
    shift = torch.randint(-pad, pad + 1, (count, 1), generator=generator, device=generator.device)
    position = (torch.arange(side, device=generator.device) + shift).abs()  # reflects below 0 ...
    return side - 1 - (side - 1 - position).abs()  # ... and beyond the last pixel
