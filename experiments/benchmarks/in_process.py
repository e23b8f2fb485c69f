"""A Flower grid in this process: the real apps and messages, one client after the other, neither Ray nor sockets.

For measurements in which a client's work is small beside the start of a process, or which share one GPU.
"""

import uuid
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app as fedmerge_client_app


class InProcess(Grid):
    """``clients`` nodes with the ids 1, 2 ...; node i holds partition i - 1.

    Attributes:
        partition: Node id -> partition id.
        run_config: What the app's configuration is, for an app that reads one.
        node_config: What nodes are started with beside their partition.
    """

    def __init__(self, clients: int, app: ClientApp = fedmerge_client_app) -> None:
        self.run_config: dict[str, Any] = {}
        self.node_config: dict[str, Any] = {}
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # as Flower's runtimes set them
        self.partition = {client + 1: client for client in range(clients)}
        self.app = app
        self.waiting: dict[str, Message] = {}
        self.states: dict[int, RecordDict] = {}  # what a client has written into its context stays with its node

    def set_run(self, run: Any) -> None:
        """There is one run."""

    @property
    def run(self) -> Any:
        """None: Flower's record of a run is not needed here."""
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        """Not used by strategies of Flower's message API."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Of all nodes."""
        return list(self.partition)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages until they are asked for."""
        ids = []
        for message in messages:
            name = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = name
            self.waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The next answer that is asked for, made now."""
        for name in message_ids:
            if name in self.waiting:
                yield self._answer(self.waiting.pop(name))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send, and answer all."""
        return list(self.pull_messages(list(self.push_messages(messages))))

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        config: dict[str, Any] = {"partition-id": self.partition[node], "num-partitions": len(self.partition)}
        config |= self.node_config
        state = self.states.setdefault(node, RecordDict())
        context = Context(run_id=1, node_id=node, node_config=config, state=state, run_config=self.run_config)
        try:
            return self.app(message, context)
        except Exception as error:
            return Message(Error(code=0, reason=f"{type(error).__name__}: {error}"), reply_to=message)
