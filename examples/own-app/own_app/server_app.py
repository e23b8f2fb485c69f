"""The ServerApp: Flower's own, with fedmerge's strategy in place of FedAvg."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedmerge.flower import MergeMany
from own_app.task import Net, accuracy, public_loader, test_loader

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    torch.manual_seed(0)
    net = Net()
    strategy = MergeMany(
        model=net, public=public_loader(), retrain_epochs=2, fraction_evaluate=context.run_config["fraction-evaluate"]
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net.state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=test_accuracy,
    )
    for server_round, metrics in sorted(result.evaluate_metrics_serverapp.items()):
        print(f"round {server_round}: accuracy {metrics['accuracy']:.3f}")


def test_accuracy(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """The global network on the server's test set."""
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": accuracy(net, test_loader())})
