"""Which replies of clients can be used, and what is wrong with the others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from flwr.app import ArrayRecord, Message, MetricRecord

from fedmerge.tasks import ARRAYS, EXAMPLES, METRICS


@dataclass(frozen=True)
class Failure:
    """One client's reply that could not be used."""

    server_round: int
    client: int
    reason: str


def sift(
    replies: Iterable[Message],
    *,
    server_round: int,
    asked: Mapping[int, int],
    like: ArrayRecord | None,
) -> tuple[list[Message], list[Failure]]:
    """Separate good replies from broken ones.

    A reply is broken when it carries an error, lacks a record, names, shapes or kinds of arrays differ from
    ``like``, a value is NaN or infinite, or there is none at all.

    Args:
        replies: What came back.
        server_round: For the failures' records.
        asked: Flower node id -> client (its partition id), for everyone who was asked.
        like: The arrays that were sent; None when only metrics are expected.

    Returns:
        Good replies in the order of their clients (so order of arrival changes nothing), and the failures.
    """
    good: dict[int, Message] = {}
    failures: dict[int, str] = {}
    for reply in replies:
        client = asked.get(reply.metadata.src_node_id)
        if client is None:
            continue
        reason = _fault(reply, like)
        if reason is None:
            good[client] = reply
        else:
            failures[client] = reason
    for client in asked.values():
        if client not in good and client not in failures:
            failures[client] = "no reply in time"
    found = [Failure(server_round, client, failures[client]) for client in sorted(failures)]
    return [good[client] for client in sorted(good)], found


def _fault(reply: Message, like: ArrayRecord | None) -> str | None:
    if reply.has_error():
        return f"error: {_last_line(reply.error.reason)}"
    metrics = reply.content.get(METRICS)
    if not isinstance(metrics, MetricRecord) or not isinstance(metrics.get(EXAMPLES), int):
        return f"the reply lacks the metric {EXAMPLES!r}"
    bad = sorted(k for k, v in metrics.items() if not np.isfinite(v).all())
    if bad:
        return f"metric {bad[0]!r} is not finite"
    if like is None:
        return None
    arrays = reply.content.get(ARRAYS)
    if not isinstance(arrays, ArrayRecord):
        return f"the reply lacks the record {ARRAYS!r}"
    missing, extra = sorted(set(like) - set(arrays)), sorted(set(arrays) - set(like))
    if missing or extra:
        return f"tensor {missing[0]!r} is missing" if missing else f"tensor {extra[0]!r} is not known"
    for name, sent in like.items():
        given = arrays[name].numpy()
        if given.shape != tuple(sent.shape):
            return f"tensor {name!r} has shape {given.shape}, expected {tuple(sent.shape)}"
        if given.dtype.kind != np.dtype(sent.dtype).kind:
            return f"tensor {name!r} is {given.dtype}, expected {sent.dtype}"
        if given.dtype.kind == "f" and not np.isfinite(given).all():
            return f"tensor {name!r} holds NaN or infinite values"
    return None


def _last_line(text: str | None) -> str:
    """The line of a traceback that says what happened."""
    lines = [line.strip() for line in (text or "unknown").splitlines() if line.strip()]
    useful = [line for line in lines if not line.startswith(("File ", "^", "~"))]
    return (useful or lines or ["unknown"])[-1][:300]
