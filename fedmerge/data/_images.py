"""Labelled images as tensors, and the constants that normalise them."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.errors import DataError

IndexArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Images:
    """``N`` labelled images of one size.

    Attributes:
        images: Uint8 ``(N, C, H, W)``. It may be a view of a memory-mapped file: select rows, never write.
        labels: Int64 ``(N,)``, each in ``0 .. len(classes) - 1``.
        classes: Names of the classes, by label.
        mean: Mean of each channel, pixels in [0, 1].
        std: Standard deviation of each channel, in the same units.
        name: What to call this set in messages.
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise DataError(
                f"{self.name}: images are {images.dtype} {tuple(images.shape)}; expected uint8 (N, C, H, W)"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"{self.name}: labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(images)},)"
            )
        if not len(self.mean) == len(self.std) == images.shape[1] or min(self.std) <= 0:
            raise DataError(
                f"{self.name}: mean {self.mean} and std {self.std} do not normalise {images.shape[1]} "
                "channels; give one mean and one positive std per channel"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def select(self, indices: npt.ArrayLike | torch.Tensor) -> "Images":
        """The images at ``indices`` (integers, in that order, repeats allowed), copied into memory."""
        given = np.asarray(indices)
        if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
            raise DataError(f"{self.name}: indices are {given.dtype} {given.shape}; expected integers (n,)")
        rows = torch.from_numpy(given.astype(np.int64)).to(self.images.device)
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> "Images":
        """The same images on ``device``; still uint8, a quarter of the bytes of float32."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
        )

    def normalise(self, batch: torch.Tensor) -> torch.Tensor:
        """``(batch / 255 - mean) / std`` per channel: uint8 ``(B, C, H, W)`` in, float32 out."""
        mean = torch.tensor(self.mean, device=batch.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(-1, 1, 1)
        return batch.to(torch.float32).sub_(255 * mean).div_(255 * std)

    def counts(self) -> list[int]:
        """Number of images of each class, in the order of ``classes``."""
        counted: list[int] = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        return counted


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set as published: ``test`` is None where there is no test set, and one is cut from ``train``."""

    name: str
    train: Images
    test: Images | None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self.train.classes

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of one image."""
        return self.train.shape
