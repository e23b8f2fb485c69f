"""Public data as people have it, as what the library takes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fedmerge._arguments import reader
from fedmerge._called import Forward, by_name, called, lies
from fedmerge.data._images import Images, Loss
from fedmerge.data.losses import IGNORED, loss_of
from fedmerge.errors import DataError

_EXPECTED = "expected Images, (x, y), a TensorDataset, a Dataset, or a DataLoader of such batches"
_NONE = -1
"""Stands for a label that nobody knows."""
_LABELS = ("labels", "label", "targets", "target", "y")
"""What the entry of a dict that holds the labels is called; the first of these that is there."""


@dataclass(frozen=True, eq=False)
class Tensors(Images):
    """What a network takes as it is, row by row, with labels: ``images`` is any tensor ``(N, ...)``.

    Attributes:
        columns: What the network takes if that is several tensors: a dict or tuple of them, each ``(N, ...)``. Then
            ``images`` holds the numbers of the rows.
    """

    columns: Any = None

    def __post_init__(self) -> None:
        x, y = self.images, self.labels
        if y.shape[:1] != x.shape[:1] or (self.loss is None and y.dtype != torch.int64):
            raise DataError(
                f"{self.name}: labels are {y.dtype} {tuple(y.shape)} for {len(x)} rows; expected int64 ({len(x)},), "
                "the number of each row's class; give other targets with their loss, as in fm.data.as_data(data, "
                "model, loss=torch.nn.functional.mse_loss)"
            )

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Of one row."""
        return tuple(self.images.shape[1:])

    def normalise(self, batch: Tensor) -> Any:
        """The batch as it is; of several columns, those at the rows ``batch``."""
        if self.columns is None:
            return batch.to(self.images.dtype)
        rows = batch.long()
        return pytree.tree_map(lambda column: column[rows.to(column.device)].to(batch.device), self.columns)

    @property
    def labelled(self) -> Images:
        """As of images; where labels are no numbers of classes, one a row, -1 is a value like others: all rows."""
        return self if self.labels.is_floating_point() or self.labels.dim() > 1 else super().labelled

    def unlabelled(self) -> Tensor:
        """As of images; a loss of their own takes any labels, and positions may be left out by -100."""
        if self.loss is not None:
            return torch.zeros_like(self.labels, dtype=torch.bool)
        return super().unlabelled() & ~((self.labels == IGNORED) & (self.labels.dim() > 1))

    def check_labels(self) -> None:
        """As of images; and a row must have one class.

        Raises:
            DataError: Labels of another kind.
        """
        if self.labels.dim() != 1 or self.labels.dtype != torch.int64:
            raise DataError(
                f"{self.name}: labels are {self.labels.dtype} {tuple(self.labels.shape)}; this needs one class a row, "
                f"int64 ({len(self)},)"
            )
        super().check_labels()


@reader("Images")
def as_data(
    given: Any, model: nn.Module, name: str = "data", *, forward: Forward | None = None, loss: Loss | None = None
) -> Images:
    """``given`` as the library's data, with how the network is called on it and what its answers cost.

    Args:
        given: ``Images``; tensors ``(x, y)`` or ``x`` alone; a data set or a loader of such rows or batches, which may
            also be dicts. In a dict the labels are under ``labels``, ``label``, ``targets``, ``target`` or ``y``, or
            they are the one of two tensors that has a number a row. Rows without labels are taken for unlabelled.
        model: The network that takes them, whose answer says how many classes there are.
        name: What to call it in messages.
        forward: ``forward(network, batch)`` returns the answers to a batch: a tensor, or a dict where several tensors
            were given (with ``forward``, also where one was), or a tuple of those before the labels. By default the
            network itself is called, with a dict's entries by their names, and ``logits`` are taken from its answer.
        loss: ``loss(answers, labels)`` returns the mean over a batch, one number. By default the cross-entropy of int64
            labels: one a row ``(N,)``, or one a position ``(N, T)`` of answers ``(N, T, classes)``, where -100 leaves a
            position out. With a loss labels may be any tensor ``(N, ...)``; there is an accuracy only of ``(N,)``
            classes, and no steps that need probabilities of classes.

    Raises:
        DataError: None of these, no rows, or labels that are no classes; a network that does not take them, or a loss
            that does not take its answers.

    Example:
        >>> table, classes = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        >>> data = fm.data.as_data((table, classes), torch.nn.Linear(4, 3))
        >>> len(data), data.shape, fm.evaluate(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).state_dict(), data).examples
        (6, (4,), 6)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
        >>> prices = fm.data.as_data((table, torch.randn(6, 1)), net, loss=torch.nn.functional.mse_loss)
        >>> fm.evaluate(net, net.state_dict(), prices).accuracy  # no answer is right or wrong
        nan
    """
    if isinstance(given, Images):
        if forward is None and loss is None:
            return given
        data = replace(given, forward=forward or given.forward, loss=loss or given.loss)
        _classes(model, data)
        return data
    x, y = gathered(given, name, tuple if forward is None else dict)
    rows = _rows(x, name)
    if y is None and loss is not None:
        raise DataError(f"{name} has no labels, and a loss compares answers with labels; give (x, y) or a dict of both")
    y = torch.full((rows,), _NONE) if y is None else y if y.dtype.is_floating_point else y.long()
    single = isinstance(x, Tensor)
    data = Tensors(
        x if single else torch.arange(rows), y, (), (), (), name, forward or (None if single else by_name), loss,
        columns=None if single else x,
    )  # fmt: skip
    return replace(data, classes=_classes(model, data))


def labelled(data: Images) -> bool:
    """Whether every row has a label.

    Example:
        >>> fm.data.labelled(fm.data.as_data(torch.randn(6, 4), torch.nn.Linear(4, 3)))
        False
    """
    return data.loss is not None or not bool(((data.labels < 0) & data.unlabelled()).any())


def gathered(given: Any, name: str, kept: type = tuple) -> tuple[Any, Tensor | None]:
    """All rows of ``given``, and their labels if they have any, as :func:`as_data` takes them.

    Rows of several tensors stay in a dict or tuple, those of one tensor if that is a ``kept``.

    Raises:
        DataError: Nothing of the kind, or no rows.
    """
    if isinstance(given, TensorDataset):
        given = given.tensors
    elif isinstance(given, Dataset):
        given = DataLoader(given, batch_size=256)
    if not isinstance(given, DataLoader):
        x, y = _batch(given, name, kept)
        _rows(x, name)
        return x, y
    try:
        len(given)
    except TypeError:
        raise DataError(f"{name} is a loader that does not know its length; give one of a data set that does") from None
    with torch.random.fork_rng([]):  # a loader draws a seed, whatever it then does with it
        parts = list(_batches(given, name, kept))
    if not parts:
        raise DataError(f"{name} is a loader without batches; {_EXPECTED}")
    whole = sum(y is not None for _, y in parts) == len(parts)
    try:
        x, y = pytree.tree_map(lambda *each: torch.cat(each), *(part if whole else (part[0], None) for part in parts))
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{name}: the batches do not fit together: {error}; expected rows of one shape") from error
    _rows(x, name)
    return x, y


def _batches(loader: Any, name: str, kept: type) -> Iterator[tuple[Any, Tensor | None]]:
    """What :func:`_batch` makes of each batch of a user's loader, which may fail in any way."""
    batches = iter(loader)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except Exception as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"{name} cannot be read: {type(error).__name__}: {reason}; give rows of tensors of one shape, of "
                "pictures by a transform (ToTensor)"
            ) from error
        yield _batch(batch, name, kept)


def _batch(given: Any, name: str, kept: type) -> tuple[Any, Tensor | None]:
    """What the network takes, and the labels, of one batch."""
    tensors: Mapping[Any, Any] = {}
    if isinstance(given, Mapping):
        tensors = dict(given)
    elif isinstance(given, Sequence) and not isinstance(given, str):
        tensors = dict(enumerate(given))
    elif isinstance(given, Tensor):
        tensors = {0: given}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        shown = f"{type(given).__name__} of {', '.join(type(v).__name__ for v in tensors.values())}"
        raise DataError(f"{name} gives a {(shown if tensors else repr(given))[:80]}; {_EXPECTED}")
    tensors = {key: value.detach().cpu() for key, value in tensors.items()}
    y = None
    if isinstance(given, Mapping):
        flat = [key for key, value in tensors.items() if value.dim() == 1]
        only = flat[0] if len(tensors) == 2 and len(flat) == 1 else None
        label = next((key for key in _LABELS if key in tensors), only)
        y = None if label is None else tensors.pop(label)
        x: Any = tensors
    else:
        *several, last = tensors.values()
        x, y = (tuple(several), last) if several else ((last,), None)
    if len(x) == 1 and not (isinstance(x, dict) and kept is dict):
        (x,) = x.values() if isinstance(x, dict) else x
    return x, y


def _rows(x: Any, name: str) -> int:
    """How many rows the tensors in ``x`` have."""
    columns = pytree.tree_leaves(x)
    if not columns or any(not column.dim() or not len(column) for column in columns):
        raise DataError(f"{name} holds no rows; {_EXPECTED}")
    if len({len(column) for column in columns}) > 1:
        raise DataError(f"{name} holds tensors of {[len(column) for column in columns]} rows; expected as many in each")
    return len(columns[0])


def _classes(model: nn.Module, data: Images) -> tuple[str, ...]:
    """A name for each number that ``model`` answers with for a row, or for a position; none for other answers."""
    network, was = called(model, data.forward), [(module, module.training) for module in model.modules()]
    where = lies(model)
    batch = pytree.tree_map(lambda column: column.to(where), data.normalise(data.images[:2]))
    try:
        with torch.no_grad():
            found = network.eval()(batch)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a user's network does
        hint = "; give bytes as float, or as fm.data.Images" if data.images.dtype == torch.uint8 else ""
        shown = [f"{t.dtype} {tuple(t.shape[1:])}" for t in pytree.tree_leaves(batch)]
        raise DataError(
            f"{type(model).__name__} does not take the rows of {data.name}, {', '.join(shown)} each: "
            f"{' '.join(str(error).split()) or type(error).__name__}{hint}"
        ) from error
    finally:
        for module, training in was:
            module.training = training
    if data.loss is not None:
        loss_of(data, found, data.labels[:2].to(where))
    several = isinstance(found, Tensor) and found.dim() == 1 + data.labels.dim() and found.dim() > 1
    return tuple(map(str, range(found.shape[-1]))) if several and not data.labels.is_floating_point() else ()
