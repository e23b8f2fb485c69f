"""The clients as the server reaches them: waiting for them, learning who they are, watching their replies."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedmerge.errors import RoundError
from fedmerge.tasks import CLIENT, METRICS

_POLL = 0.05


@dataclass(frozen=True)
class Terms:
    """On what terms a run uses the clients; as they stand, those of a run that has them to itself.

    Attributes:
        pause: Called between two looks for replies.
        runs: How many runs keep the clients busy at once: a round may take as many times as long.
        nodes: Client -> Flower node id, as far as earlier runs have met them.
    """

    pause: Callable[[], object] = lambda: time.sleep(_POLL)
    runs: int = 1
    nodes: dict[int, int] = field(default_factory=dict)


class WatchedGrid(Grid):
    """A Flower grid that reports what is asked and each reply as it comes, and shows only the nodes of one run.

    Around another one it keeps that one's terms.
    """

    def __init__(
        self,
        grid: Grid,
        on_send: Callable[[str, list[Message]], None] = lambda kind, messages: None,
        on_reply: Callable[[Message], None] = lambda reply: None,
        *,
        terms: Terms | None = None,
    ) -> None:
        self._grid, self.on_send, self.on_reply = grid, on_send, on_reply
        self.terms: Terms = terms or (grid.terms if isinstance(grid, WatchedGrid) else Terms())
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

        What has come by the end of a pause counts, however long the pause was.
        """
        messages = list(messages)
        if messages:
            self.on_send(messages[0].metadata.message_type.split(".")[0], messages)
        waiting = {i for i in self.push_messages(messages) if i}
        end = None if timeout is None else time.monotonic() + timeout * self.terms.runs
        replies: list[Message] = []
        over = False
        while waiting and not over:
            over = end is not None and time.monotonic() >= end
            for reply in self.pull_messages(sorted(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                replies.append(reply)
                self.on_reply(reply)
            if waiting and not over:
                self.terms.pause()
        return replies


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


def meet(grid: WatchedGrid, clients: int, *, timeout: float = 300.0) -> dict[int, int]:
    """Wait until ``clients`` nodes are connected and ask each which partition it holds.

    Flower's server may start before its nodes have registered; a round begun then would silently run with
    a part of them. Those that an earlier run has met are not asked again: their answer would wait behind training.

    Returns:
        Client (partition id, below ``clients``) -> Flower node id.

    Raises:
        RoundError: Too few nodes came in time, or they hold other partitions.
    """
    met = grid.terms.nodes
    if met.keys() >= set(range(clients)):
        return {client: met[client] for client in range(clients)}
    end = time.monotonic() + timeout
    while len(found := list(grid.get_node_ids())) < clients:
        if time.monotonic() > end:
            raise RoundError(
                f"{len(found)} of {clients} clients connected within {timeout:.0f} s; start the others "
                f"(flwr run: --federation-config 'num-supernodes={clients}')"
            )
        time.sleep(_POLL)
    questions = [Message(content=RecordDict(), message_type="query", dst_node_id=node) for node in found]
    replies = list(grid.send_and_receive(questions, timeout=timeout))
    nodes: dict[int, int] = {}
    reasons: list[str] = []
    for reply in sorted(replies, key=lambda r: r.metadata.src_node_id):
        if reply.has_error():
            reasons.append((reply.error.reason or "no reason").strip().splitlines()[-1])
        else:
            nodes.setdefault(int(reply.content[METRICS][CLIENT]), reply.metadata.src_node_id)  # type: ignore[arg-type]
    missing = sorted(set(range(clients)) - set(nodes))
    if missing:
        why = f": {reasons[0]}" if reasons else ""
        raise RoundError(
            f"no node answers for client {missing[0]} ({len(missing)} of {clients} missing){why}; "
            "each node needs its own partition-id from 0"
        )
    met |= nodes
    return {client: nodes[client] for client in range(clients)}
