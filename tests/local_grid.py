"""A Flower grid whose nodes live in this process: real apps, real messages, no Ray; replies come back shuffled."""

import random
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from clients.app import app as fedmerge_app

TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1  # as Flower's runtimes set them
Spoil = Callable[[int, Message], Any]


class LocalGrid(Grid):
    """``n`` nodes with partition ids from 0, under ids that do not follow their order."""

    def __init__(
        self, n: int, *, app: ClientApp = fedmerge_app, spoil: Callable[[int, Message], Any] | None = None
    ) -> None:
        ids = random.Random(7).sample(range(10**6), n)
        self.partition = dict(zip(ids, range(n), strict=True))
        self.app, self.spoil, self.waiting = app, spoil, {}
        self.order = random.Random(11)
        self.asked: list[tuple[str, int]] = []

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return None

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.partition)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            name = str(uuid.uuid4())
            message.metadata.__dict__["_message_id"] = name
            self.waiting[name] = message
            ids.append(name)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [i for i in message_ids if i in self.waiting]
        self.order.shuffle(wanted)
        replies = [self._answer(self.waiting.pop(i)) for i in wanted]
        return [r for r in replies if r is not None]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        client = self.partition[node]
        self.asked.append((message.metadata.message_type, client))
        config = {"partition-id": client, "num-partitions": len(self.partition)}
        context = Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})
        try:
            reply = self.app(message, context)
        except Exception as error:
            reply = Message(Error(code=0, reason=f"Traceback\n{type(error).__name__}: {error}"), reply_to=message)
        if self.spoil is not None:
            return self.spoil(client, reply)
        return reply
