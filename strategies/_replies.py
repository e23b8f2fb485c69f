"""From a reply to a result: one step for each reply, which ends in a record or in a named failure, whatever came.

What a usable reply holds, with all of its keys, whatever else it holds beside them:

* to a training message, the record ``arrays`` (the tensors that were sent, by their names) and the record ``metrics``:
  ``client``, ``num-examples``, ``train-loss``, ``train-accuracy``, ``seconds``, and ``reach`` for SCAFFOLD and FedNova;
* to an evaluation message, ``metrics``: ``client``, ``num-examples``, ``loss``, ``accuracy``, ``seconds``;
* to the question who a node is, ``metrics``: ``client``, and ``num-examples`` if it knows.

Numbers of images are whole numbers from 1 up to what the client said when it was asked who it is; losses and seconds
lie in [0, 1e9], accuracies in [0, 1], and how far steps reach within a hundredth and a hundred times of what the task
comes to. Arrays are read by :mod:`strategies._arrays` and bounded by :mod:`strategies._sanity`.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from fedmerge.tasks import ARRAYS, CLIENT, EXAMPLES, METRICS, REACH
from strategies._arrays import UnusableError
from strategies._sanity import Expected

Params = dict[str, Tensor]
T = TypeVar("T")

MOST_IMAGES = 2**53
"""What a client may say of its images where nobody knows better: as far as float64 counts."""
_LOSS, _SECONDS = 1e9, 1e9
_REACH = 100.0
"""A client's steps may reach so many times as far, or as little, as the server's task has it."""
_REASON = 300


@dataclass(frozen=True)
class Failure:
    """One client's reply that could not be used; round 0 is the question who it is, no client a whole round."""

    server_round: int
    client: int | None
    reason: str


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
) -> ClientResult:
    """What ``client`` trained.

    Args:
        client: Who was asked.
        content: What came back.
        expected: What its network has to look like.
        most: The most images that it may say it has.
        reach: Number of images -> how far the steps of such a client reach; None where that is not asked for.

    Raises:
        UnusableError: Says what is wrong.
    """
    metrics = _metrics(content, client)
    examples = int(_number(metrics, EXAMPLES, 1, most, whole=True))
    loss = _number(metrics, "train-loss", 0, _LOSS)
    accuracy = _number(metrics, "train-accuracy", 0, 1)
    seconds = _number(metrics, "seconds", 0, _SECONDS)
    gone = 0.0
    if reach is not None:
        usual = reach(examples)
        gone = _number(metrics, REACH, usual / _REACH, usual * _REACH)
    _all_finite(metrics)
    params = expected.network(_record(content, ARRAYS, ArrayRecord))
    return ClientResult(client, params, examples, loss, accuracy, seconds, gone)


def read_evaluation(client: int, content: RecordDict, *, most: int = MOST_IMAGES) -> LocalEvaluation:
    """How the global network did on the images of ``client``.

    Raises:
        UnusableError: Says what is wrong.
    """
    metrics = _metrics(content, client)
    found = LocalEvaluation(
        client,
        int(_number(metrics, EXAMPLES, 1, most, whole=True)),
        _number(metrics, "loss", 0, _LOSS),
        _number(metrics, "accuracy", 0, 1),
        _number(metrics, "seconds", 0, _SECONDS),
    )
    _all_finite(metrics)
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
    client = int(_number(metrics, CLIENT, 0, MOST_IMAGES, whole=True))
    most = images(client)
    examples = None
    if EXAMPLES in metrics and most is not None:
        examples = int(_number(metrics, EXAMPLES, 1, most, whole=True))
    _all_finite(metrics)
    return Introduction(client, examples)


def sift(
    replies: Iterable[Message],
    read: Callable[[int, RecordDict], T],
    *,
    server_round: int,
    asked: Mapping[int, int],
    questions: Iterable[Message] = (),
) -> tuple[list[T], list[Failure]]:
    """Read every reply once; results of the good ones, a failure for each client without one.

    A reply belongs to the client whose node was sent the message that it answers, whatever else it says. Two different
    replies to one message are none; a copy of a reply is ignored, as is what comes from nodes that were not asked.

    Args:
        replies: What came back.
        read: Makes a result of a client and the content of its reply; what it raises is that client's failure.
        server_round: For the failures' records.
        asked: Flower node id -> client (its partition id), for everyone who was asked.
        questions: The messages that were sent, to whose ids replies must refer; without them nodes alone count.

    Returns:
        Results in the order of their clients (so order of arrival changes nothing), and the failures.
    """
    sent = {m.metadata.message_id: m.metadata.dst_node_id for m in questions if m.metadata.message_id}
    came: dict[int, list[Message]] = {}
    reasons: dict[int, str] = {}
    for reply in replies:
        client, stray = _sender(reply, asked, sent)
        if client is not None and stray is None:
            came.setdefault(client, []).append(reply)
        elif client is not None:
            reasons[client] = min(str(stray), reasons.get(client, str(stray)))
    good: dict[int, T] = {}
    for client in asked.values():
        if client not in came:
            reasons.setdefault(client, "no reply in time")
            continue
        try:
            good[client] = read(client, _content(came[client]))
        except UnusableError as error:
            reasons[client] = str(error)
        except Exception as error:  # a reply may hold anything, and costs nobody but its sender
            reasons[client] = f"the reply cannot be read ({type(error).__name__}: {error})"
    failed = sorted(reasons.keys() - good.keys())
    return [good[client] for client in sorted(good)], [Failure(server_round, i, plain(reasons[i])) for i in failed]


def plain(text: str) -> str:
    """``text`` as a line that can be printed and written anywhere."""
    return "".join(c if c.isprintable() else " " for c in text[:_REASON])


def _sender(reply: Message, asked: Mapping[int, int], sent: Mapping[str, int]) -> tuple[int | None, str | None]:
    """Whose reply this is, None if of nobody who was asked; and why it is not taken for one, if it is not."""
    node, target = reply.metadata.src_node_id, reply.metadata.reply_to_message_id
    if not sent:
        return asked.get(node), None
    if target not in sent:
        return asked.get(node), "the reply is to a message of another time"
    if sent[target] != node and not reply.has_error():  # errors are also sent by Flower itself
        return asked.get(sent[target]), f"the reply to its message comes from another node, {node}"
    return asked.get(sent[target]), None


def _content(replies: list[Message]) -> RecordDict:
    """The one content of replies to one message."""
    first = replies[0]
    for other in replies[1:]:
        if first.has_error() or other.has_error() or first.content != other.content:
            raise UnusableError(f"{len(replies)} different replies to one message")
    if first.has_error():
        raise UnusableError(f"error: {_last_line(first.error.reason)}")
    if not first.has_content() or not isinstance(first.content, RecordDict):
        raise UnusableError("the reply has no content")
    return first.content


def _record(content: RecordDict, key: str, kind: type[T]) -> T:
    """The record ``key``, which must be the only one of its kind."""
    record = content.get(key)
    if not isinstance(record, kind):
        raise UnusableError(f"the reply lacks the record {key!r}")
    others = sorted(name for name, other in content.items() if isinstance(other, kind) and name != key)
    if others:
        raise UnusableError(f"the reply holds a second {kind.__name__}, {others[0]!r}, beside {key!r}")
    return record


def _metrics(content: RecordDict, client: int | None = None) -> MetricRecord:
    """The metrics of a reply, in which ``client`` names itself."""
    metrics = _record(content, METRICS, MetricRecord)
    if client is not None and _number(metrics, CLIENT, 0, MOST_IMAGES, whole=True) != client:
        raise UnusableError(f"the reply says that it is of client {_shown(metrics[CLIENT])}")
    return metrics


def _number(metrics: MetricRecord, key: str, low: float, high: float, *, whole: bool = False) -> float:
    """The number ``key``, in [low, high]."""
    if key not in metrics:
        raise UnusableError(f"the reply lacks the metric {key!r}")
    value: Any = metrics[key]
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        bounds = f"from {low:g}" if high >= MOST_IMAGES else f"in [{low:g}, {high:.12g}]"
        raise UnusableError(f"metric {key!r} is {_shown(value)}, expected {what} {bounds}")
    return value if whole else float(value)


def _all_finite(metrics: MetricRecord) -> None:
    """Refuse NaN and infinity also where nobody asked: something went wrong."""
    for key, value in metrics.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not isfinite(number):
                raise UnusableError(f"metric {_shown(key)} is not finite")


def _shown(value: Any) -> str:
    """A short form of anything."""
    try:
        return reprlib.repr(value)
    except Exception:  # Python writes no number of thousands of digits
        return f"of type {type(value).__name__} and cannot be written"


def _last_line(text: Any) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in str(text or "unknown").splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("File ", "^", "~"))]
    return (useful or lines or ["unknown"])[-1]
