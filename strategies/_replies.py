"""What fedmerge's own clients answer, read.

What a usable reply holds, with all of its keys, whatever else it holds beside them:

* to a training message, the record ``arrays`` (the tensors that were sent, by their names) and the record ``metrics``:
  ``client``, ``num-examples``, ``train-loss``, ``train-accuracy``, ``seconds``, and ``reach`` for SCAFFOLD and FedNova;
  under differential privacy loss and accuracy are left out;
* to an evaluation message, ``metrics``: ``client``, ``num-examples``, ``loss``, ``accuracy``, ``seconds``;
* to the question who a node is, ``metrics``: ``client``, and ``num-examples`` if it knows.

Numbers of images are whole numbers from 1 up to what the client said when it was asked who it is; losses and seconds
lie in [0, 1e9], accuracies in [0, 1], and how far steps reach within a hundredth and a hundred times of what the task
comes to.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ArrayRecord, MetricRecord, RecordDict

from fedmerge.flower.arrays import UnusableError
from fedmerge.flower.replies import MOST_IMAGES, all_finite, number, record, shown
from fedmerge.flower.sanity import Expected
from fedmerge.pipeline import Params
from fedmerge.tasks import ARRAYS, CLIENT, EXAMPLES, METRICS, REACH

_LOSS, _SECONDS = 1e9, 1e9
_REACH = 100.0
"""A client's steps may reach so many times as far, or as little, as the server's task has it."""


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
    """

    client: int
    params: Params
    examples: int
    loss: float = 0.0
    accuracy: float = 0.0
    seconds: float = 0.0
    reach: float = 0.0


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
) -> ClientResult:
    """What ``client`` trained.

    Args:
        client: Who was asked.
        content: What came back.
        expected: What its network has to look like.
        most: The most images that it may say it has.
        reach: Number of images -> how far the steps of such a client reach; None where that is not asked for.
        private: Whether it trained under differential privacy; then loss and accuracy are not said, and are NaN.

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
    all_finite(metrics)
    params = expected.network(record(content, ARRAYS, ArrayRecord))
    return ClientResult(client, params, examples, loss, accuracy, seconds, gone)


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


def _metrics(content: RecordDict, client: int | None = None) -> MetricRecord:
    """The metrics of a reply, in which ``client`` names itself."""
    metrics = record(content, METRICS, MetricRecord)
    if client is not None and number(metrics, CLIENT, 0, MOST_IMAGES, whole=True) != client:
        raise UnusableError(f"the reply says that it is of client {shown(metrics[CLIENT])}")
    return metrics
