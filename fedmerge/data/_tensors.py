"""Public data as people have it, as what the library takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fedmerge.data._images import Images
from fedmerge.errors import DataError

_EXPECTED = "expected Images, (x, y), a TensorDataset, a Dataset, or a DataLoader of such batches"
_NONE = -1
"""Stands for a label that nobody knows."""


@dataclass(frozen=True, eq=False)
class Tensors(Images):
    """What a network takes as it is, row by row, with labels: ``images`` is any tensor ``(N, ...)``."""

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if y.dtype != torch.int64 or y.shape != x.shape[:1]:
            raise DataError(
                f"{self.name}: labels are {y.dtype} {tuple(y.shape)} for {len(x)} rows; expected int64 ({len(x)},), "
                "the number of each row's class"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of one row."""
        return tuple(self.images.shape[1:])

    def normalise(self, batch: Tensor) -> Tensor:
        """The batch as it is."""
        return batch.to(self.images.dtype)


def as_data(given: Any, model: nn.Module, name: str = "data") -> Images:
    """``given`` as the library's data.

    Args:
        given: ``Images``; tensors ``(x, y)`` or ``x`` alone; a data set or a loader of such rows or batches, which may
            also be dicts of ``x`` and ``y`` under any names. Rows without labels are taken for unlabelled.
        model: The network that takes them, whose answer says how many classes there are.
        name: What to call it in messages.

    Raises:
        DataError: None of these, no rows, or labels that are no classes.

    Example:
        >>> table, classes = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> data = fm.data.as_data((table, classes), torch.nn.Linear(4, 3))
        >>> len(data), data.shape, fm.evaluate(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).state_dict(), data).examples
        (6, (4,), 6)
    """
    if isinstance(given, Images):
        return given
    x, y = _tensors(given, name)
    if not x.dim() or not len(x):
        raise DataError(f"{name} holds no rows; {_EXPECTED}")
    y = torch.full((len(x),), _NONE) if y is None else y if y.dtype.is_floating_point else y.long()
    return Tensors(x, y, tuple(map(str, range(_outputs(model, x[:2], name)))), (), (), name)


def labelled(data: Images) -> bool:
    """Whether every row has a label.

    Example:
        >>> fm.data.labelled(fm.data.as_data(torch.randn(6, 4), torch.nn.Linear(4, 3)))
        False
    """
    return bool((data.labels >= 0).all())


def _tensors(given: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """All rows of ``given``, and their labels if they have any."""
    if isinstance(given, TensorDataset):
        given = given.tensors
    elif isinstance(given, Dataset):
        given = DataLoader(given, batch_size=256)
    if not isinstance(given, DataLoader):
        return _batch(given, name)
    try:
        len(given)
    except TypeError:
        raise DataError(f"{name} is a loader that does not know its length; give one of a data set that does") from None
    parts = [_batch(batch, name) for batch in given]
    if not parts:
        raise DataError(f"{name} is a loader without batches; {_EXPECTED}")
    try:
        x = torch.cat([rows for rows, _ in parts])
    except RuntimeError as error:
        raise DataError(f"{name}: the batches do not fit together: {error}; expected rows of one shape") from error
    labels = [y for _, y in parts if y is not None]
    return x, torch.cat(labels) if len(labels) == len(parts) else None


def _batch(given: Any, name: str) -> tuple[Tensor, Tensor | None]:
    """Rows and labels of one batch. In a dict the labels are what has one whole number a row."""
    values: Sequence[Any] = [given] if isinstance(given, Tensor) else ()
    if isinstance(given, Mapping):
        values = sorted(given.values(), key=lambda v: isinstance(v, Tensor) and v.dim() == 1)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        values = given
    if not 1 <= len(values) <= 2 or not all(isinstance(value, Tensor) for value in values):
        shown = f"{type(given).__name__} of {', '.join(type(v).__name__ for v in values)}" if values else repr(given)
        raise DataError(f"{name} gives a {shown[:80]}; {_EXPECTED}")
    return values[0].detach().cpu(), values[1].detach().cpu() if len(values) == 2 else None


def _outputs(model: nn.Module, rows: Tensor, name: str) -> int:
    """How many numbers ``model`` answers with for a row; 0 where it answers in another form."""
    was = model.training
    try:
        with torch.no_grad():
            found = model.eval()(rows)
    except Exception as error:  # whatever a user's network does
        hint = "; give bytes as float, or as fm.data.Images" if rows.dtype == torch.uint8 else ""
        raise DataError(
            f"{type(model).__name__} does not take the rows of {name}, {rows.dtype} {tuple(rows.shape[1:])} each: "
            f"{' '.join(str(error).split())}{hint}"
        ) from error
    finally:
        model.train(was)
    return int(found.shape[1]) if isinstance(found, Tensor) and found.dim() == 2 else 0
