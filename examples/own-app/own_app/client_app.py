"""The ClientApp: nothing in it knows of fedmerge."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from own_app.task import Net, accuracy, client_loaders
from own_app.task import train as train_locally

app = ClientApp()


def _begin(message: Message, context: Context) -> tuple[Net, tuple]:
    """The network that was sent, and this node's data."""
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net, client_loaders(context.node_config["partition-id"], context.node_config["num-partitions"])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this node's digits."""
    torch.manual_seed(context.node_config["partition-id"])
    net, (loader, _) = _begin(message, context)
    loss = train_locally(net, loader, context.run_config["local-epochs"], message.content["config"]["lr"])
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Accuracy on this node's held-out digits."""
    net, (_, loader) = _begin(message, context)
    metrics = MetricRecord({"accuracy": accuracy(net, loader), "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
