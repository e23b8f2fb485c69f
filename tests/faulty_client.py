"""A ClientApp that fails as its task asks, and notes what it trains.

With seed 7 client 1 raises, client 3 ends its process and client 5 sends NaN; at learning rate 0.5 every client ends
its process.
"""

import os
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from clients.app import app as fedmerge_app
from fedmerge.tasks import ARRAYS


class Faulty(ClientApp):
    """``log`` gets a line for each training: seed, round and client."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log = log

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return fedmerge_app(message, context)
        client, task = context.node_config["partition-id"], message.content["config"]
        with self.log.open("a") as file:
            file.write(f"{task['seed']} {task['server-round']} {client}\n")
        wrong = client if task["seed"] == 7 else None
        if wrong == 1:
            raise RuntimeError("the disk of client 1 is full")
        if wrong == 3 or task["lr"] == 0.5:
            os._exit(1)
        reply = fedmerge_app(message, context)
        if wrong == 5:
            arrays = reply.content[ARRAYS].to_torch_state_dict()
            reply.content[ARRAYS] = ArrayRecord({k: v * float("nan") for k, v in arrays.items()})
        return reply
