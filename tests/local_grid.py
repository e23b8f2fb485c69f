"""A Flower grid whose nodes live in this process: real apps, real messages, no Ray; replies come back shuffled."""

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from clients.app import app as fedmerge_app
from experiments.benchmarks.in_process import InProcess

Spoil = Callable[[int, Message], Any]


class LocalGrid(InProcess):
    """``n`` nodes with partition ids from 0, under ids that do not follow their order; ``spoil`` changes replies, to several in a list too."""

    def __init__(self, n: int, *, app: ClientApp = fedmerge_app, spoil: Spoil | None = None) -> None:
        super().__init__(n, app)
        ids = random.Random(7).sample(range(10**6), n)
        self.partition = dict(zip(ids, range(n), strict=True))
        self.spoil, self.order = spoil, random.Random(11)
        self.asked: list[tuple[str, int]] = []

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        wanted = [i for i in message_ids if i in self.waiting]
        self.order.shuffle(wanted)
        replies = [self._spoilt(self.waiting.pop(i)) for i in wanted]
        return [
            r for several in replies for r in (several if isinstance(several, list) else [several]) if r is not None
        ]

    def _spoilt(self, message: Message) -> Any:
        client = self.partition[message.metadata.dst_node_id]
        self.asked.append((message.metadata.message_type, client))
        threads = torch.get_num_threads()  # a client sets those of its process, which is this one here
        reply = self._answer(message)
        torch.set_num_threads(threads)
        return reply if self.spoil is None else self.spoil(client, reply)
