"""A ClientApp of which three clients fail in round 1: client 1 raises, client 3 ends its process, client 5 sends NaN."""

import os

from flwr.app import ArrayRecord, Context, Message
from flwr.clientapp import ClientApp

from clients.app import app as fedmerge_app
from fedmerge.tasks import ARRAYS

app = ClientApp()


@app.query()
def query(message: Message, context: Context) -> Message:
    return fedmerge_app(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return fedmerge_app(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    client = context.node_config["partition-id"]
    if client == 1:
        raise RuntimeError("the disk of client 1 is full")
    if client == 3:
        os._exit(1)
    reply = fedmerge_app(message, context)
    if client == 5:
        arrays = reply.content[ARRAYS].to_torch_state_dict()
        reply.content[ARRAYS] = ArrayRecord({k: v * float("nan") for k, v in arrays.items()})
    return reply
