"""The clients as the server reaches them: waiting for them, learning who they are, watching their replies."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import RoundError
from fedmerge.flower.replies import Failure, plain, sift
from fedmerge.progress import counted
from fedmerge.tasks import CONFIG, ClientTask
from strategies import Introduction, read_introduction

_POLL = 0.05
_ASKED = {"query": "clients say who they are", "train": "clients train", "evaluate": "clients evaluate"}
_UNPACKING = (ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, MemoryError)
"""What Flower raises on bytes that are no message; what the network raises is none of these."""


class WatchedGrid(Grid):
    """A Flower grid that reports what is asked and how many replies are there, and shows only the nodes of one run.

    Attributes:
        pause: Called between two looks for replies; what it raises ends the run.
        met: Client -> Flower node id, of all that have said who they are. Around another watched grid, ``pause``
            and ``met`` are that one's, so that several runs ask each client once.
    """

    def __init__(
        self,
        grid: Grid,
        on_send: Callable[[str, list[Message]], None] = lambda kind, messages: None,
        on_reply: Callable[[Message], None] = lambda reply: None,
        *,
        pause: Callable[[], object] = lambda: time.sleep(_POLL),
    ) -> None:
        self._grid, self.on_send, self.on_reply = grid, on_send, on_reply
        inner = grid if isinstance(grid, WatchedGrid) else None
        self.pause: Callable[[], object] = inner.pause if inner else pause
        self.met: dict[int, int] = inner.met if inner else {}
        self.nodes: list[int] | None = None

    def set_run(self, run: Any) -> None:
        """As Flower's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As Flower's."""
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """As Flower's."""
        return self._grid.create_message(*args, **kwargs)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of this run's nodes, ascending; of all connected nodes before they are known."""
        return sorted(self._grid.get_node_ids()) if self.nodes is None else list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, then collect replies until all are there or ``timeout`` seconds are over.

        What has come by the end of a pause counts, however long the pause was. A reply that another node sends in a
        client's place is handed on, but its own is waited for.
        """
        messages = list(messages)
        if not messages:
            return []
        kind = messages[0].metadata.message_type.split(".")[0]
        self.on_send(kind, messages)
        waiting = {i: m for i, m in zip(self.push_messages(messages), messages, strict=False) if i}
        end = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        over = False
        with counted(_ASKED.get(kind, kind), len(messages)) as advance:
            while waiting and not over:
                over = end is not None and time.monotonic() >= end
                came = self._come(waiting)
                for reply in came:
                    self.on_reply(reply)
                    target, node = reply.metadata.reply_to_message_id, reply.metadata.src_node_id
                    # Flower reports with an id of its own what it could not deliver.
                    if target in waiting and (reply.has_error() or node == waiting[target].metadata.dst_node_id):
                        del waiting[target]
                replies += came
                advance(len(came))
                if waiting and not over:
                    self.pause()
        return replies

    def _come(self, waiting: Mapping[str, Message]) -> list[Message]:
        """The replies that are there; one that Flower cannot unpack is an error of its sender and of nobody else."""
        try:
            return list(self.pull_messages(sorted(waiting)))
        except _UNPACKING:
            pass
        found: list[Message] = []
        for name in sorted(waiting):
            try:
                found += self.pull_messages([name])
            except _UNPACKING as error:
                reason = f"the reply cannot be unpacked ({type(error).__name__}: {error})"
                found.append(Message(Error(code=0, reason=reason), reply_to=waiting[name]))
        return found


def connected(grid: Grid, *, settle: float = 3.0, timeout: float = 300.0) -> int:
    """How many nodes there are, once their number has not changed for ``settle`` seconds.

    Raises:
        RoundError: None came in time.
    """
    end, since, count = time.monotonic() + timeout, time.monotonic(), 0
    while count == 0 or time.monotonic() - since < settle:
        if (now := len(list(grid.get_node_ids()))) != count:
            count, since = now, time.monotonic()
        if count == 0 and time.monotonic() > end:
            raise RoundError(f"no client connected within {timeout:.0f} s; start SuperNodes")
        time.sleep(_POLL)
    return count


@dataclass(frozen=True)
class Meeting:
    """Who answered the question who it is.

    Attributes:
        nodes: Client (partition id) -> Flower node id.
        images: Client -> the most images that it may say it has: as many as it said, or else as its partition has.
        failures: A record of round 0 for each client that no node stands for.
    """

    nodes: dict[int, int]
    images: dict[int, int]
    failures: list[Failure] = field(default_factory=list)


def meet(
    grid: WatchedGrid, images: Sequence[int], *, task: ClientTask, fewest: int = 1, timeout: float = 300.0
) -> Meeting:
    """Wait until as many nodes are connected as there are clients and ask each which partition it holds.

    Flower's server may start before its nodes have registered; a round begun then would silently run with
    a part of them. Those that an earlier run has met are not asked again.
    Two nodes that say that they hold one partition are both left alone, for nobody knows which is right.

    Args:
        grid: The nodes.
        images: Number of images of each client's partition.
        task: What clients will be told; by it they know how many images they have.
        fewest: The run goes on without the others where at least so many clients are found.
        timeout: Seconds to wait for nodes, and then for their answers.

    Raises:
        RoundError: Too few nodes came in time, or too few hold a partition of their own.
    """
    met, clients = grid.met, len(images)
    if met.keys() >= set(range(clients)):
        return Meeting({client: met[client] for client in range(clients)}, dict(enumerate(images)))
    end = time.monotonic() + timeout
    with counted("clients connect", clients) as advance:
        there = 0
        while len(found := list(grid.get_node_ids())) < clients:
            if time.monotonic() > end:
                raise RoundError(
                    f"{len(found)} of {clients} clients connected within {timeout:.0f} s; start the others "
                    f"(flwr run: --federation-config 'num-supernodes={clients}')"
                )
            advance(len(found) - there)
            there = len(found)
            grid.pause()
    told = RecordDict({CONFIG: ConfigRecord({**task.to_config()})})
    questions = [Message(content=told, message_type="query", dst_node_id=node) for node in found]
    replies = list(grid.send_and_receive(questions, timeout=timeout))
    known = dict(enumerate(images))
    answers, broken = sift(
        replies,
        lambda node, content: (node, read_introduction(content, images=known.get)),
        server_round=0,
        asked={node: node for node in found},
        questions=questions,
    )
    holders: dict[int, list[tuple[int, Introduction]]] = {}
    for node, answer in answers:
        holders.setdefault(answer.client, []).append((node, answer))
    nodes = {c: holders[c][0][0] for c in range(clients) if len(holders.get(c, ())) == 1}
    missing = [c for c in range(clients) if c not in nodes]
    reasons = {c: f"{len(holders[c])} nodes say that they hold its partition" for c in missing if c in holders}
    first = {f.reason.removeprefix("error: "): f.client for f in reversed(broken)}  # reason -> the first such node
    other = "; ".join(f"node {node}: {reason}" for reason, node in first.items())
    other = other or "no node says that it holds its partition"
    failures = [Failure(0, c, plain(reasons.get(c, other))) for c in missing]
    if missing and len(nodes) < fewest:
        raise RoundError(
            f"no node answers for client {missing[0]} ({len(missing)} of {clients} missing): {failures[0].reason}; "
            "each node needs its own partition-id from 0"
        )
    met |= nodes
    said = {answer.client: answer.examples for _, answer in answers}
    return Meeting(nodes, {c: said[c] or images[c] for c in nodes}, failures)
