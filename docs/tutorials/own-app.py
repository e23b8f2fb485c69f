# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---
# %% [markdown]
# # Your own Flower app
#
# You have a [Flower](https://flower.ai) app: a network, data, a ClientApp, a ServerApp with `FedAvg`. This tutorial writes a
# small one, on a table and not on images, and changes two lines, so that the server aligns, merges, repairs and retrains.

# %%
import logging

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_breast_cancer
from torch import nn
from torch.nn import functional as F

logging.getLogger("flwr").setLevel(logging.ERROR)

# %% [markdown]
# ## Network and data
#
# 569 rows of 30 numbers, two classes. The server has 60 rows of its own and a test set; six clients share the rest, and
# some have more of one class than others.


# %%
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(30, affine=False)
        self.hidden, self.out = nn.Linear(30, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.out(F.relu(self.hidden(self.norm(x))))


table = load_breast_cancer()
x = torch.tensor(table.data, dtype=torch.float32)
y = torch.tensor(table.target)
order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
x, y = x[order], y[order]
public, test = (x[:60], y[:60]), (x[60:200], y[60:200])

CLIENTS = 6
private = torch.arange(200, len(x))
leaning = torch.rand(len(private), generator=torch.Generator().manual_seed(1))
by_class = (y[private] + 2 * leaning).argsort()
shares = [private[part] for part in by_class.chunk(CLIENTS)]
print(
    "share of class 1 at each client:",
    [f"{y[s].float().mean():.2f}" for s in shares],
)

# %% [markdown]
# ## The ClientApp
#
# Nothing in it knows of fedmerge: it is sent a state dict, trains, and answers with a state dict and `num-examples`.

# %%
client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    net = Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    rows = shares[context.node_config["partition-id"]]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net.train()
    for _ in range(10):
        loss = F.cross_entropy(net(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    metrics = MetricRecord(
        {"train-loss": loss.item(), "num-examples": len(rows)}
    )
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}
    return Message(RecordDict(content), reply_to=message)


# %% [markdown]
# ## The ServerApp
#
# Flower's own, with a strategy that is given from outside, so that both can be run.


# %%
def accuracy(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    net = Net()
    net.load_state_dict(arrays.to_torch_state_dict())
    with torch.no_grad():
        right = net.eval()(test[0]).argmax(1) == test[1]
    return MetricRecord({"accuracy": float(right.float().mean())})


def server_app(strategy) -> ServerApp:
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.manual_seed(0)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(Net().state_dict()),
            num_rounds=3,
            evaluate_fn=accuracy,
        )
        for r, found in sorted(result.evaluate_metrics_serverapp.items()):
            print(f"round {r}: test accuracy {found['accuracy']:.3f}")
        for r, found in sorted(result.train_metrics_clientapp.items()):
            known = {k: v for k, v in found.items() if k.startswith("public")}
            if known:
                print(f"round {r}:", {k: round(v, 3) for k, v in known.items()})

    return app


# %% [markdown]
# ## Run it
#
# `flwr run` starts clients as processes. Here they take turns in this one, on a grid of the same interface, which is enough
# for a table.

# %%
from experiments.benchmarks.in_process import InProcess


def run(strategy) -> None:
    context = Context(
        run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}
    )
    server_app(strategy)(InProcess(CLIENTS, client_app), context)


run(FedAvg(fraction_evaluate=0.0))

# %% [markdown]
# ## Two lines
#
# The import, and the strategy: it is told the network and what the server may see.

# %%
from fedmerge.flower import MergeMany

run(MergeMany(model=Net(), public=public, fraction_evaluate=0.0))

# %% [markdown]
# `public-accuracy-average` is what the plain mean of the clients gets on the server's own rows: `FedAvg` would have
# returned that. The next three say what alignment with merging, repair, and retraining made of it; the last is measured on
# what it was trained on, so the test accuracy above is the one to report.
#
# Merging moves nothing here: clients that begin a round at one network stay in one order, and there is nothing to align.
# What the server gains in the first round it gains by measuring BatchNorm anew and by retraining; later it is as good as
# `FedAvg`. That is what these metrics are for: they say which step is worth its time in your app.
#
# ## What else it takes
#
# All options of `FedAvg` hold. Methods are names of `fedmerge list`, or functions of your own. Without data, compare weights
# alone with `example=`. Data with another loss, or batches that are dicts: [your own data](../how-to/data.md).

# %%
import fedmerge as fm

margin = fm.data.as_data(public, Net(), loss=nn.MultiMarginLoss())
run(MergeMany(model=Net(), public=margin, fraction_evaluate=0.0))

# %% [markdown]
# ## As an app in a folder
#
# The same in files is `examples/own-app` in the repository, with `client_app.py`,
# `server_app.py` and `task.py`; `server_app.py` alone knows of fedmerge. With
# `export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1`, so that Flower takes this environment and makes none of its own,
# `flwr run examples/own-app --stream` runs it.
