"""The ServerApp, with Flower's FedAvg."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from standard_app.task import Net, load_centralized_dataset, measure

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    global_model, fraction_evaluate = Net(), context.run_config["fraction-evaluate"]
    strategy = FedAvg(fraction_evaluate=fraction_evaluate)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(global_model.state_dict()),
        train_config=ConfigRecord({"lr": context.run_config["learning-rate"]}),
        num_rounds=context.run_config["num-server-rounds"],
        evaluate_fn=on_the_server,
    )
    torch.save(result.arrays.to_torch_state_dict(), "final_model.pt")


def on_the_server(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = measure(net, load_centralized_dataset())
    return MetricRecord({"accuracy": accuracy, "loss": loss})
