"""What the networks of the last round answer on the test split: which classes they confuse, and how sure they are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from fedmerge.data import Images
from fedmerge.training import Answers
from server.records import Bin, Calibration, ClientClasses, Confusion

BINS = 15
"""Bins of equal width; the number of Guo et al., "On Calibration of Modern Neural Networks", ICML 2017."""

MOST_CLASSES = 200
"""Of more classes no confusion matrix is kept: a thousand would make a million counts a network."""


class Said(TypedDict):
    """The parts of a summary that are said here."""

    per_class: tuple[Confusion, ...]
    calibration: tuple[Calibration, ...]
    client_classes: tuple[ClientClasses, ...]


@dataclass(frozen=True)
class _Answered:
    """The answers of one network, counted."""

    confusion: NDArray[np.int64]
    shares: tuple[float | None, ...]
    ece: float
    bins: tuple[Bin, ...]


class Predictions:
    """The answers to the images ``test``, counted for each stage (by its name) and client (by its number)."""

    def __init__(self, test: Images) -> None:
        self._labels, self._classes = test.labels.cpu().numpy(), len(test.classes)
        self._of: dict[str | int, _Answered] = {}

    def add(self, whose: str | int, answers: Answers | None) -> None:
        """Count the answers of one network, if they were asked for; those counted before under its name go."""
        if answers is None:
            return
        predicted, sure = answers.predicted.numpy(), answers.confidence.numpy()
        matrix = confusion(self._labels, predicted, self._classes)
        held = matrix.sum(1).tolist()
        shares = tuple(right / n if n else None for right, n in zip(matrix.diagonal().tolist(), held, strict=True))
        matrix = matrix if self._classes <= MOST_CLASSES else matrix[:0]
        self._of[whose] = _Answered(matrix, shares, *calibration(predicted == self._labels, sure))

    def summed(self, stages: Sequence[str]) -> Said:
        """What a summary says of those of ``stages`` that answered, and of all clients."""
        found = [(stage, self._of[stage]) for stage in stages if stage in self._of]
        clients = sorted(whose for whose in self._of if isinstance(whose, int))
        return Said(
            per_class=tuple(
                Confusion(stage, "test", tuple(map(tuple, a.confusion.tolist())))
                for stage, a in found
                if len(a.confusion)
            ),
            calibration=tuple(Calibration(stage, "test", a.ece, a.bins) for stage, a in found),
            client_classes=tuple(ClientClasses(client, self._of[client].shares) for client in clients),
        )


def confusion(labels: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """``(classes, classes)``: how many images of the row's class were taken for the column's."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def calibration(right: NDArray[np.bool_], sure: NDArray[np.float64]) -> tuple[float, tuple[Bin, ...]]:
    """The expected calibration error, and the bins with images in them, in rising order.

    A bin holds the confidences above its lower edge and up to its upper one (Guo et al., eq. 3). The error is the
    mean of ``|accuracy - confidence|`` over bins, weighted by their images, in ``[0, 1]``.
    """
    at = np.searchsorted(np.linspace(0, 1, BINS + 1)[1:-1], sure)
    number = np.bincount(at, minlength=BINS)
    hits, total = np.bincount(at, right, minlength=BINS), np.bincount(at, sure, minlength=BINS)
    bins = tuple(Bin(float(total[b] / n), float(hits[b] / n), int(n)) for b, n in enumerate(number) if n)
    return float(np.abs(hits - total).sum() / len(sure)), bins
