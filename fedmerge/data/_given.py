"""Data sets as a user's own code gives them."""

from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import TensorDataset

from fedmerge.data._images import Dataset, Images
from fedmerge.errors import DataError


def as_dataset(name: str, given: Any) -> Dataset:
    """What a user's factory returned: a data set, or ``(train, test)``, where test may be None.

    Each of the two is :class:`Images`, or a pair of uint8 images ``(N, C, H, W)`` and integer labels ``(N,)``, which
    are normalised by the mean and deviation of the training images.

    Raises:
        DataError: It is none of these; says what it is.
    """
    if isinstance(given, Dataset):
        return given
    if not isinstance(given, tuple) or len(given) != 2:
        raise DataError(
            f"data set {name!r} returned a {type(given).__name__}; expected a fedmerge.data.Dataset, or (train, test), "
            "each Images or (images, labels)"
        )
    parts = dict(zip((f"{name} (train)", f"{name} (test)"), given, strict=True))
    pairs = {part: _pair(part, one) for part, one in parts.items() if not isinstance(one, Images | None)}
    classes = tuple(map(str, range(1 + max((int(y.max()) for _, y in pairs.values() if len(y)), default=0))))
    train, test = (
        Images(*pairs[part], classes, *_statistics(part, pairs[part][0]), part) if part in pairs else one
        for part, one in parts.items()
    )
    if train is None:
        raise DataError(f"data set {name!r} returned no training images; only those for testing may be None")
    return Dataset(name, train, test if test is None else replace(test, mean=train.mean, std=train.std))


def _pair(what: str, given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels as tensors."""
    if isinstance(given, TensorDataset):
        given = given.tensors
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise DataError(f"{what} is a {type(given).__name__}; expected Images, or (images, labels)")
    images, labels = map(torch.as_tensor, given)
    return images, labels if labels.is_floating_point() else labels.to(torch.int64)


def _statistics(what: str, images: torch.Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, pixels in [0, 1]."""
    if images.ndim != 4 or not images.numel():
        raise DataError(f"{what}: images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, C, H, W)")
    pixels = images.to(torch.float32).div_(255).transpose(0, 1).flatten(1)
    return tuple(pixels.mean(1).tolist()), tuple(pixels.std(1, correction=0).clamp_min(1e-3).tolist())
