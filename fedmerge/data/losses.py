"""What answers to labelled rows cost, and how many of them are right."""

import torch
from torch import Tensor, nn

from fedmerge.data._images import Images
from fedmerge.errors import DataError

IGNORED = -100
"""Stands for a position whose answer does not count, as in torch's cross-entropy."""


def loss_of(
    data: Images,
    answers: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    reduction: str = "mean",
    apart: bool = False,
) -> Tensor:
    """What ``answers`` to rows of ``data`` cost, whose labels are ``labels``: one number, their mean or sum over rows.

    Of labels by position the mean is over all positions that count, so that rows of many weigh more; with ``apart``
    it is the mean of the rows' own means, so that what a row adds depends on no other row.

    Raises:
        DataError: A loss of the data's own fails, or returns something else than one number.
    """
    if data.loss is None:
        by_position = labels.dim() > 1
        found = nn.functional.cross_entropy(
            answers.flatten(0, -2), labels.flatten(), label_smoothing=smoothing,
            reduction="none" if by_position else reduction,
        )  # fmt: skip
        if not by_position or reduction == "sum":
            return found.sum() if by_position else found
        each, counted = found.view_as(labels).flatten(1), (labels != IGNORED).flatten(1)
        if apart:
            return (each.sum(1) / counted.sum(1).clamp_min(1)).mean()
        return each.sum() / counted.sum().clamp_min(1)
    if apart and len(labels) > 1:
        rows = zip(torch.split(answers, 1), torch.split(labels, 1), strict=True)
        return torch.stack([loss_of(data, *row, reduction=reduction) for row in rows]).mean()
    try:
        found = data.loss(answers, labels)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a user's function does
        raise DataError(
            f"the loss of {data.name} does not take answers {_kind(answers)} and labels {_kind(labels)}: "
            f"{' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    if not isinstance(found, Tensor) or found.dim() or not found.is_floating_point():
        raise DataError(
            f"the loss of {data.name} returned {_kind(found)}; expected one number, the mean over the batch"
        )
    return found * len(labels) if reduction == "sum" else found


def right(data: Images, answers: Tensor, labels: Tensor, *, partly: bool = False) -> tuple[Tensor, int] | None:
    """How many of ``answers`` are as labelled, and of how many; None where no answer is right or wrong.

    ``partly`` says that some rows have no label (-1), which do not count.
    """
    if labels.is_floating_point() or (data.loss is not None and not (labels.dim() == 1 and answers.dim() == 2)):
        return None
    counted = labels != (IGNORED if labels.dim() > 1 else -1)
    asked = int(counted.sum()) if partly or labels.dim() > 1 else len(labels)  # a sum waits for a GPU
    return (answers.argmax(-1) == labels).sum(), asked


def _kind(given: object) -> str:
    return f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
