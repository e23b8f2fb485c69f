"""The ClientApp."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

from standard_app.task import Net, load_data, measure, train

app = ClientApp()


def received(message: Message, context: Context) -> tuple[Net, tuple[DataLoader, DataLoader]]:
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net, load_data(context.node_config["partition-id"], context.run_config["batch-size"])


@app.train()
def on_train(message: Message, context: Context) -> Message:
    net, (loader, _) = received(message, context)
    loss = train(net, loader, context.run_config["local-epochs"], message.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def on_evaluate(message: Message, context: Context) -> Message:
    net, (_, loader) = received(message, context)
    loss, accuracy = measure(net, loader)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
