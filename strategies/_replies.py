"""What fedmerge's own clients answer, read.

What a usable reply holds, with all of its keys, whatever else it holds beside them:

* to a training message, the record ``arrays`` (the tensors that were sent, by their names) and the record ``metrics``:
  ``client``, ``num-examples``, ``train-loss``, ``train-accuracy``, ``seconds``, and ``reach`` for SCAFFOLD and FedNova;
  under differential privacy loss and accuracy are left out;
* where label counts were asked for, ``metrics`` also holds ``label-counts``, a whole number for each class, which add
  up to ``num-examples``;
* to the query for sums of the last layer, the record ``arrays`` (``gram`` and ``cross``, float64, which fit each other
  as sums over images do) and ``metrics``: ``client``, ``num-examples``;
* to an evaluation message, ``metrics``: ``client``, ``num-examples``, ``loss``, ``accuracy``, ``seconds``;
* to the question who a node is, ``metrics``: ``client``, and ``num-examples`` if it knows.

Numbers of images are whole numbers from 1 up to what the client said when it was asked who it is; losses and seconds
lie in [0, 1e9], accuracies in [0, 1], and how far steps reach within a hundredth and a hundred times of what the task
comes to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedmerge.flower.arrays import UnusableError, read_array
from fedmerge.flower.replies import MOST_IMAGES, all_finite, number, record, shown
from fedmerge.flower.sanity import Expected
from fedmerge.heads import HeadSums
from fedmerge.pipeline import Params
from fedmerge.tasks import ARRAYS, CLIENT, EXAMPLES, LABEL_COUNTS, METRICS, REACH

_LOSS, _SECONDS = 1e9, 1e9
_REACH = 100.0
"""A client's steps may reach so many times as far, or as little, as the server's task has it."""
_SQUARE = 1e4
"""A feature's mean square may be so many times the largest on the public images."""


@dataclass(frozen=True)
class ClientResult:
    """One usable answer to a training message.

    Attributes:
        client: Who was asked: its partition id.
        params: Its network.
        examples: Number of images that it trained on.
        loss: Mean loss over its last epoch.
        accuracy: Share of right answers in its last epoch.
        seconds: How long it took.
        reach: How far its steps reach: the sum of the weights with which gradients moved the network. 0 where the
            strategy has no use for it.
        label_counts: How many of its images are of each class, if it was asked.
    """

    client: int
    params: Params
    examples: int
    loss: float = 0.0
    accuracy: float = 0.0
    seconds: float = 0.0
    reach: float = 0.0
    label_counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class LocalEvaluation:
    """One usable answer to an evaluation message: the global network on the client's own images."""

    client: int
    examples: int
    loss: float
    accuracy: float
    seconds: float


@dataclass(frozen=True)
class Introduction:
    """One usable answer to the question who a node is: its partition, and of how many images if it said so."""

    client: int
    examples: int | None


def read_training(
    client: int,
    content: RecordDict,
    *,
    expected: Expected,
    most: int = MOST_IMAGES,
    reach: Callable[[int], float] | None = None,
    private: bool = False,
    classes: int = 0,
) -> ClientResult:
    """What ``client`` trained.

    Args:
        client: Who was asked.
        content: What came back.
        expected: What its network has to look like.
        most: The most images that it may say it has.
        reach: Number of images -> how far the steps of such a client reach; None where that is not asked for.
        private: Whether it trained under differential privacy; then loss and accuracy are not said, and are NaN.
        classes: How many label counts it must say; 0 where they are not asked for.

    Raises:
        UnusableError: Says what is wrong.
    """
    metrics = _metrics(content, client)
    examples = int(number(metrics, EXAMPLES, 1, most, whole=True))
    loss = accuracy = math.nan
    if not private:
        loss = number(metrics, "train-loss", 0, _LOSS)
        accuracy = number(metrics, "train-accuracy", 0, 1)
    seconds = number(metrics, "seconds", 0, _SECONDS)
    gone = 0.0
    if reach is not None:
        usual = reach(examples)
        gone = number(metrics, REACH, usual / _REACH, usual * _REACH)
    counts = _label_counts(metrics, classes, examples) if classes else ()
    all_finite(metrics)
    params = expected.network(record(content, ARRAYS, ArrayRecord))
    return ClientResult(client, params, examples, loss, accuracy, seconds, gone, counts)


def read_head_sums(client: int, content: RecordDict, *, like: HeadSums, most: int = MOST_IMAGES) -> HeadSums:
    """What ``client`` added up.

    Sums over images are symmetric, no combination of features has a negative square, the constant feature counts the
    images of each class, and adding the columns of ``cross`` up gives that feature's row of ``gram``.

    Args:
        client: Who was asked.
        content: What came back.
        like: The same sums over the public images: their shapes, and the size of features.
        most: The most images that it may say it has.

    Raises:
        UnusableError: Says what is wrong.
    """
    metrics = _metrics(content, client)
    examples = int(number(metrics, EXAMPLES, 1, most, whole=True))
    all_finite(metrics)
    arrays = record(content, ARRAYS, ArrayRecord)
    if set(arrays) != {"gram", "cross"}:
        raise UnusableError(f"the sums are {shown(sorted(arrays))}, expected gram and cross")
    gram, cross = (
        read_array(name, arrays[name], shape=tuple(getattr(like, name).shape), dtype=np.dtype(np.float64))
        for name in ("gram", "cross")
    )
    sums = HeadSums(gram, cross, examples)
    check_sums(sums, like)
    return sums


def check_sums(sums: HeadSums, like: HeadSums) -> None:
    """Refuse sums that no images can have; ``like`` are those over the public images.

    Raises:
        UnusableError: Says what is wrong.
    """
    gram, cross, examples = sums.gram, sums.cross, sums.examples
    counts, round_off = cross[-1], 1e-9 * float(gram.diagonal().abs().max())
    if float(gram[-1, -1]) != examples or bool((counts < 0).any()) or float(counts.sum()) != examples:
        raise UnusableError(f"the sums are not of its {examples} images")
    if float((gram - gram.T).abs().max()) > round_off or float(torch.linalg.eigvalsh(gram)[0]) < -round_off * len(gram):
        raise UnusableError("the sums of products of features are not symmetric, or a square is negative")
    if float((cross.sum(1) - gram[-1]).abs().max()) > max(round_off, 1e-9 * examples):
        raise UnusableError("the sums of features by class and over all classes differ")
    if float(gram.diagonal().max()) / examples > _SQUARE * float(like.gram.diagonal().max()) / like.examples:
        raise UnusableError(f"a feature's mean square is more than {_SQUARE:g} times the largest on the public images")


def read_evaluation(client: int, content: RecordDict, *, most: int = MOST_IMAGES) -> LocalEvaluation:
    """How the global network did on the images of ``client``.

    Raises:
        UnusableError: Says what is wrong.
    """
    metrics = _metrics(content, client)
    found = LocalEvaluation(
        client,
        int(number(metrics, EXAMPLES, 1, most, whole=True)),
        number(metrics, "loss", 0, _LOSS),
        number(metrics, "accuracy", 0, 1),
        number(metrics, "seconds", 0, _SECONDS),
    )
    all_finite(metrics)
    return found


def read_introduction(content: RecordDict, *, images: Callable[[int], int | None]) -> Introduction:
    """Who a node says it is.

    Args:
        content: What came back.
        images: Partition -> its number of images as the server has it, None where there is no such partition.

    Raises:
        UnusableError: Says what is wrong.
    """
    metrics = _metrics(content)
    client = int(number(metrics, CLIENT, 0, MOST_IMAGES, whole=True))
    most = images(client)
    examples = None
    if EXAMPLES in metrics and most is not None:
        examples = int(number(metrics, EXAMPLES, 1, most, whole=True))
    all_finite(metrics)
    return Introduction(client, examples)


def _label_counts(metrics: MetricRecord, classes: int, examples: int) -> tuple[int, ...]:
    """How many of the images of a client are of each class."""
    given: Any = metrics.get(LABEL_COUNTS)
    if not isinstance(given, list) or len(given) != classes or not all(isinstance(n, int) and n >= 0 for n in given):
        raise UnusableError(f"metric {LABEL_COUNTS!r} is {shown(given)}, expected {classes} whole numbers from 0")
    if sum(given) != examples:
        raise UnusableError(f"metric {LABEL_COUNTS!r} adds up to {shown(sum(given))}, expected its {examples} images")
    return tuple(given)


def _metrics(content: RecordDict, client: int | None = None) -> MetricRecord:
    """The metrics of a reply, in which ``client`` names itself."""
    metrics = record(content, METRICS, MetricRecord)
    if client is not None and number(metrics, CLIENT, 0, MOST_IMAGES, whole=True) != client:
        raise UnusableError(f"the reply says that it is of client {shown(metrics[CLIENT])}")
    return metrics
