"""From a reply to a result: one step for each reply, which ends in a result or in a named failure, whatever came.

:func:`sift` does that for all replies to the messages of a round. What a reply must hold is up to who reads it, with
:func:`record` and :func:`number`. Arrays are read by :mod:`fedmerge.flower.arrays` and bounded by
:mod:`fedmerge.flower.sanity`.
"""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, TypeVar

from flwr.app import Message, MetricRecord, RecordDict

from fedmerge.flower.arrays import UnusableError

T = TypeVar("T")

MOST_IMAGES = 2**53
"""What a client may say of its images where nobody knows better: as far as float64 counts."""
_REASON = 300


@dataclass(frozen=True)
class Failure:
    """One client's reply that could not be used; round 0 is the question who it is, no client a whole round."""

    server_round: int
    client: int | None
    reason: str


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


def record(content: RecordDict, key: str, kind: type[T]) -> T:
    """The record ``key``, which must be the only one of its kind."""
    record = content.get(key)
    if not isinstance(record, kind):
        raise UnusableError(f"the reply lacks the record {key!r}")
    others = sorted(name for name, other in content.items() if isinstance(other, kind) and name != key)
    if others:
        raise UnusableError(f"the reply holds a second {kind.__name__}, {others[0]!r}, beside {key!r}")
    return record


def only(content: RecordDict, kind: type[T]) -> T:
    """The only record of its kind, whatever it is called: how Flower's own strategies read replies."""
    found = [one for one in content.values() if isinstance(one, kind)]
    if len(found) != 1:
        raise UnusableError(f"the reply holds {len(found)} of {kind.__name__}, expected one")
    return found[0]


def number(metrics: MetricRecord, key: str, low: float, high: float, *, whole: bool = False) -> float:
    """The number ``key``, in [low, high]."""
    if key not in metrics:
        raise UnusableError(f"the reply lacks the metric {key!r}")
    value: Any = metrics[key]
    kinds = int if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool) or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        bounds = f"from {low:g}" if high >= MOST_IMAGES else f"in [{low:g}, {high:.12g}]"
        raise UnusableError(f"metric {key!r} is {shown(value)}, expected {what} {bounds}")
    return value if whole else float(value)


def all_finite(metrics: MetricRecord) -> None:
    """Refuse NaN and infinity also where nobody asked: something went wrong."""
    for key, value in metrics.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not isfinite(number):
                raise UnusableError(f"metric {shown(key)} is not finite")


def shown(value: Any) -> str:
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
