"""Data sets as a user's own code gives them."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as Rows

from fedmerge._called import by_name
from fedmerge.data._images import Dataset, Images
from fedmerge.data._tensors import Tensors, gathered
from fedmerge.errors import DataError


def as_dataset(name: str, given: Any) -> Dataset:
    """What a user's factory returned: a data set, or ``(train, test)``, where test may be None.

    Each of the two is :class:`Images`, or what :func:`fedmerge.data.as_data` takes, NumPy arrays included: rows of any
    kind with integer labels ``(N,)``. Uint8 images ``(N, C, H, W)`` are normalised by the mean and deviation of the
    training images; other rows are what the network takes.

    Raises:
        DataError: It is none of these; says what it is.
    """
    names = f"{name} (train)", f"{name} (test)"
    if isinstance(given, Dataset):
        _check_classes(names, given)
        return given
    if not isinstance(given, tuple) or len(given) != 2:
        raise DataError(
            f"data set {name!r} returned a {type(given).__name__}; expected a fedmerge.data.Dataset, or (train, test), "
            "each Images, (x, y), or a data set or loader of rows with labels"
        )
    parts = {what: _labelled(what, one) for what, one in zip(names, given, strict=True) if _rows(one)}
    highest = max((int(y.max()) for _, y in parts.values()), default=0)
    classes = tuple(map(str, range(1 + highest)))
    train, test = (
        _data(what, *parts[what], classes) if what in parts else one for what, one in zip(names, given, strict=True)
    )
    if train is None:
        raise DataError(f"data set {name!r} returned no training images; only those for testing may be None")
    found = Dataset(name, train, test if test is None else replace(test, mean=train.mean, std=train.std))
    _check_classes(names, found)
    return found


def _rows(given: Any) -> bool:
    return not isinstance(given, Images | None)


def _labelled(what: str, given: Any) -> tuple[Any, torch.Tensor]:
    """Rows and labels as tensors."""
    if isinstance(given, tuple | list):
        given = [torch.as_tensor(one) if isinstance(one, np.ndarray | list) else one for one in given]
    elif isinstance(given, np.ndarray) or not isinstance(given, dict | Rows | torch.utils.data.DataLoader):
        raise DataError(f"{what} is a {type(given).__name__}; expected Images, (x, y), or a data set or loader of rows")
    x, y = gathered(given, what)
    if y is None:
        raise DataError(f"{what} has no labels; expected (x, y), or a data set or loader of rows with labels")
    y = y if y.is_floating_point() else y.to(torch.int64)
    _check(what, y)
    return x, y


def _check(what: str, labels: torch.Tensor) -> None:
    """Refuse labels by which a run can neither deal rows to clients nor count right answers."""
    if labels.dim() != 1 or labels.dtype != torch.int64:
        raise DataError(
            f"{what}: labels are {labels.dtype} {tuple(labels.shape)}; expected int64 ({len(labels)},): a run deals "
            "rows to clients by their class, and counts right answers of each class"
        )


def _check_classes(names: tuple[str, str], dataset: Dataset) -> None:
    """The same of both parts, and refuse labels beyond the classes, which a loss of the data's own lets pass."""
    for what, data in zip(names, (dataset.train, dataset.test), strict=True):
        if data is None:
            continue
        _check(what, data.labels)
        highest, known = int(data.labels.max()) if len(data) else -1, len(dataset.classes)
        if highest >= known:
            raise DataError(
                f"{what}: label {highest} is beyond the {known} classes that are named; name every class, by label, or "
                "mend the labels"
            )


def _data(what: str, x: Any, y: torch.Tensor, classes: tuple[str, ...]) -> Images:
    """Images where they look like some, else rows as the network takes them."""
    if isinstance(x, torch.Tensor) and x.dtype == torch.uint8 and x.ndim == 4:
        pixels = x.to(torch.float32).div_(255).transpose(0, 1).flatten(1)
        mean, std = pixels.mean(1).tolist(), pixels.std(1, correction=0).clamp_min(1e-3).tolist()
        return Images(x, y, classes, tuple(mean), tuple(std), what)
    if isinstance(x, torch.Tensor):
        return Tensors(x.float() if x.is_floating_point() else x, y, classes, (), (), what)
    return Tensors(torch.arange(len(y)), y, classes, (), (), what, by_name, columns=x)
