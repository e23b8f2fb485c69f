"""Labelled images as tensors, and the constants that normalise them."""

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from fedmerge._arguments import checked
from fedmerge._called import Forward
from fedmerge.errors import DataError

IndexArray = npt.NDArray[np.int64]
Loss = Callable[[Any, torch.Tensor], torch.Tensor]
"""``loss(answers, labels)``: the mean over a batch, one number."""


@dataclass(frozen=True, eq=False)
class Images:
    """``N`` labelled images of one size.

    Attributes:
        images: Uint8 ``(N, C, H, W)``. It may be a view of a memory-mapped file: select rows, never write.
        labels: Int64 ``(N,)``, each in ``0 .. len(classes) - 1``, or -1 for an image without a label.
        classes: Names of the classes, by label.
        mean: Mean of each channel, pixels in [0, 1].
        std: Standard deviation of each channel, in the same units.
        name: What to call this set in messages.
        forward: How a network is called on a batch, where not as ``network(batch)``; see :func:`fedmerge.data.as_data`.
        loss: What answers cost, where not their cross-entropy; see there, too.

    Example:
        >>> images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
        >>> labels = torch.tensor([0, 1, 0, 1, 0, 1])
        >>> data = fm.data.Images(images, labels, classes=("cat", "dog"), mean=(0.5,), std=(0.25,), name="pets")
        >>> len(data), data.shape, data.normalise(data.images).max().item()
        (6, (1, 8, 8), -2.0)
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    forward: Forward | None = None
    loss: Loss | None = None

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(f"{self.name}: images are {_what(images)}; expected uint8 (N, C, H, W)")
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"{self.name}: labels are {_what(labels)}; expected int64 ({len(images)},)")
        if min(images.shape[1:]) < 1:
            raise DataError(f"{self.name}: images are {_what(images)}; expected at least one channel and one pixel")
        try:
            fits = len(self.mean) == len(self.std) == images.shape[1]
            fits &= all(map(math.isfinite, self.mean)) and all(0 < std < math.inf for std in self.std)
        except TypeError:  # no sequences, or none of numbers
            fits = False
        if not fits:
            raise DataError(
                f"{self.name}: mean {self.mean} and std {self.std} do not normalise {images.shape[1]} "
                "channels; give one mean and one positive std per channel, all finite"
            )
        if isinstance(self.classes, str) or not isinstance(self.classes, Sized):
            raise DataError(f"{self.name}: classes are {self.classes!r}; expected the name of each class, by label")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def select(self, indices: npt.ArrayLike | torch.Tensor) -> "Images":
        """The images at ``indices`` (integers, in that order, repeats allowed), copied into memory."""
        try:
            given = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices)
        except ValueError as error:  # lists of different lengths
            raise DataError(f"{self.name}: indices are no array ({error}); expected integers (n,)") from error
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise DataError(f"{self.name}: indices are {given.dtype} {given.shape}; expected integers (n,)")
        if given.size and not -len(self) <= int(given.min()) <= int(given.max()) < len(self):
            raise DataError(
                f"{self.name}: indices run from {given.min()} to {given.max()}; there are {len(self)} images, from 0"
            )
        rows = torch.from_numpy(given.astype(np.int64)).to(self.images.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def first(self, count: int) -> "Images":
        """The first ``count`` images, or all if there are fewer.

        Of images that come class by class, as from a folder, as many of each class as their share.
        """
        steps = self.labels.diff()
        if 0 < count < len(self) and bool((steps >= 0).all()) and bool((steps > 0).any()):
            return self.select(np.arange(count) * len(self) // count)
        return self.select(range(min(len(self), count)))

    def joined(self, *others: "Images") -> "Images":
        """These images, then those of ``others``, which are of the same kind."""
        every = [self, *(other.to(self.images.device) for other in others)]
        images, labels = (torch.cat([getattr(one, name) for one in every]) for name in ("images", "labels"))
        return replace(self, images=images, labels=labels)

    @checked
    def to(self, device: torch.device | str) -> "Images":
        """The same images on ``device``; still uint8, a quarter of the bytes of float32."""
        early = torch.device(device).type != "cpu"  # nothing waits for a copy to the CPU before its values are read
        return replace(
            self,
            images=self.images.to(device, non_blocking=early),
            labels=self.labels.to(device, non_blocking=early),
        )

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """``(batch / 255 - mean) / std`` per channel: uint8 ``(B, C, H, W)`` in, float32 out."""
        if (
            not isinstance(batch, torch.Tensor)
            or batch.dtype != torch.uint8
            or batch.ndim != 4
            or batch.shape[1] != len(self.mean)
        ):
            raise DataError(f"{self.name}: a batch is {_what(batch)}; expected uint8 (B, {len(self.mean)}, H, W)")
        mean = torch.tensor(self.mean, device=batch.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(-1, 1, 1)
        return batch.to(torch.float32).sub_(255 * mean).div_(255 * std)

    @property
    def labelled(self) -> "Images":
        """Those that have a label: all but the ones whose label is -1."""
        known = self.labels != -1
        return self if bool(known.all()) else self.select(known.nonzero().flatten())

    def counts(self) -> list[int]:
        """Number of images of each class, in the order of ``classes``."""
        self.check_labels()
        counted: list[int] = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return counted

    def unlabelled(self) -> torch.Tensor:
        """Which labels are no class: bool, of the labels' shape."""
        return (self.labels < 0) | (self.labels >= len(self.classes))

    def check_labels(self) -> None:
        """Refuse labels that are no class: -1 stands for none in some sets, which only what reads no label takes.

        Raises:
            DataError: Names the first image that has one.
        """
        wrong = self.unlabelled()
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise DataError(
                f"{self.name}: label {int(self.labels[first])} of image {first} is no class; expected 0 to "
                f"{len(self.classes) - 1}"
            )


def _what(given: object) -> str:
    """The kind of ``given``, with its shape where it has one."""
    if isinstance(given, torch.Tensor):
        return f"{given.dtype} {tuple(given.shape)}"
    return f"a {type(given).__name__} of {getattr(given, 'dtype', 'its own kind')}"


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as published: ``test`` is None where there is no test set, and one is cut from ``train``.

    Example:
        >>> digits = fm.data.load("digits")
        >>> digits.shape, len(digits.train), digits.test is None
        ((1, 8, 8), 1797, True)
    """

    name: str
    train: Images
    test: Images | None

    def __post_init__(self) -> None:
        if self.test is not None and self.test.shape != self.train.shape:
            raise DataError(f"{self.name}: test images are {self.test.shape}, training images {self.train.shape}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.train.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        return self.train.shape
