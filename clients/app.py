"""The Flower ``ClientApp``. It holds no state: each message carries the whole task."""

import contextlib
import time
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from clients import _masked
from fedmerge.beside import beside
from fedmerge.errors import FedmergeError
from fedmerge.secure import WORDS, Terms
from fedmerge.tasks import (
    ARRAYS,
    CLIENT,
    CONFIG,
    CORRECTION,
    EXAMPLES,
    HEAD_SUMS,
    LABEL_COUNTS,
    METRICS,
    REACH,
    ClientTask,
    device_of,
)
from fedmerge.training import evaluate


class _App(ClientApp):
    """A ClientApp that a worker finds where fedmerge is, although the user's directory comes first on its path."""

    def __reduce__(self) -> tuple[Any, ...]:
        return beside, ("clients.app:app",)


app = _App()


def partition_id(context: Context) -> int:
    """Which partition this node holds, from Flower's node config."""
    return int(context.node_config["partition-id"])


def _reply(message: Message, records: dict[str, Any]) -> Message:
    return Message(content=RecordDict(records), reply_to=message)


def _read(message: Message) -> tuple[ClientTask, dict[str, Tensor]]:
    content: Any = message.content
    return ClientTask.from_config(content[CONFIG]), content[ARRAYS].to_torch_state_dict()


@app.query()
def hello(message: Message, context: Context) -> Message:
    """Say which partition this node holds, and of how many images, so that the server knows whom it asks for what."""
    torch.set_num_threads(1)
    client = partition_id(context)
    metrics = MetricRecord({CLIENT: client})
    with contextlib.suppress(FedmergeError, IndexError):  # what is wrong with its data it says when it has to train
        config: Any = message.content[CONFIG]
        metrics[EXAMPLES] = len(ClientTask.from_config(config).split().clients[client])
    return _reply(message, {METRICS: metrics})


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the own partition; answer with the arrays and how the training went."""
    torch.set_num_threads(1)  # one core a client; also what makes results independent of their number
    client = partition_id(context)
    task, arrays = _read(message)
    task.warm_up()
    started = time.perf_counter()
    given: Any = message.content.get(CORRECTION)
    secret = bool(context.node_config.get("secret-noise", False))  # what the owner of this node asks for
    correction = None if given is None else given.to_torch_state_dict()
    result, examples = task.train(client, arrays, correction, secret_noise=secret)
    told: Any = message.content[CONFIG]
    if (terms := Terms.from_config(told)) is not None:  # nothing of its own but what is masked
        keys = _masked.begin(context, client, task, terms, arrays, result, examples)
        return _reply(message, {METRICS: MetricRecord({CLIENT: client}), CONFIG: keys})
    metrics = MetricRecord(
        {
            CLIENT: client,
            EXAMPLES: examples,
            "steps": int(result.steps),
            REACH: result.reach,
            "seconds": time.perf_counter() - started,
        }
    )
    if not task.is_private:  # how well it knows its images is no business of anyone who may only see what is blurred
        metrics["train-loss"] = float(result.losses[-1]) if len(result.losses) else 0.0
        metrics["train-accuracy"] = float(result.accuracies[-1]) if len(result.accuracies) else 0.0
    if task.label_counts:
        metrics[LABEL_COUNTS] = task.split().client(client).counts()
    return _reply(message, {ARRAYS: ArrayRecord(result.params), METRICS: metrics})


@app.query(HEAD_SUMS)
def add_up(message: Message, context: Context) -> Message:
    """Add up, over the own partition, what the last layer of the network sent can be made of."""
    torch.set_num_threads(1)
    client = partition_id(context)
    task, arrays = _read(message)
    sums = task.head_sums(client, arrays)
    metrics = MetricRecord({CLIENT: client, EXAMPLES: sums.examples})
    return _reply(message, {ARRAYS: ArrayRecord({"gram": sums.gram, "cross": sums.cross}), METRICS: metrics})


@app.query("masked_realign")
def realign(message: Message, context: Context) -> Message:
    """Align the own network to the mean of the others."""
    torch.set_num_threads(1)
    return _reply(message, {CONFIG: _masked.realign(message.content, context, partition_id(context))})


@app.query("masked_head")
def add_up_masked(message: Message, context: Context) -> Message:
    """As above, for a sum of all clients under masks."""
    torch.set_num_threads(1)
    return _reply(message, {CONFIG: _masked.head(message.content, context, partition_id(context))})


@app.query("masked_share")
def share(message: Message, context: Context) -> Message:
    """Shares of the seeds of the own masks, for each other client."""
    return _reply(message, {CONFIG: _masked.share(message.content, context)})


@app.query("masked_words")
def mask(message: Message, context: Context) -> Message:
    """The own network under masks."""
    return _reply(message, {WORDS: _masked.mask(message.content, context)})


@app.query("masked_open")
def unmask(message: Message, context: Context) -> Message:
    """The shares by which the masks of a sum are taken off."""
    return _reply(message, {CONFIG: _masked.unmask(message.content, context)})


@app.evaluate()
def evaluate_locally(message: Message, context: Context) -> Message:
    """Evaluate the global network on the own partition."""
    torch.set_num_threads(1)
    client = partition_id(context)
    task, arrays = _read(message)
    started = time.perf_counter()
    images = task.split().client(client)
    found = evaluate(
        task.network(),
        arrays,
        images,
        device=device_of(task.device),
    )
    metrics = MetricRecord(
        {
            CLIENT: client,
            EXAMPLES: len(images),
            "loss": found.loss,
            "accuracy": found.accuracy,
            "seconds": time.perf_counter() - started,
        }
    )
    return _reply(message, {METRICS: metrics})
