"""Nets, clients and one round, step by step, for tests of `fedmerge.flower.MergeMany`; the clients know nothing of fedmerge."""

from functools import cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid
from reply_kinds import Kind
from torch import Tensor, nn
from torch.nn import functional as F

import fedmerge as fm

State = dict[str, Tensor]


class Net(nn.Module):
    """A hidden layer, a BatchNorm with its counter, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.norm(self.fc1(x))))


class Plain(nn.Sequential):
    """Two layers without any buffer."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def net(kind: type[nn.Module] = Net, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return kind()


@cache
def rows(n: int = 40) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(5)
    return torch.randn(n, 16, generator=draws), torch.randint(3, (n,), generator=draws)


def client_app(kind: type[nn.Module], arrays: str = "arrays", config: str = "config", weight: str = "num-examples"):
    """An app as Flower's users write it: one step of SGD on data of its own."""
    app = ClientApp()

    def begin(message: Message, context: Context) -> tuple[nn.Module, Tensor, Tensor, int]:
        model, client = kind(), context.node_config["partition-id"]
        model.load_state_dict(message.content[arrays].to_torch_state_dict())
        draws = torch.Generator().manual_seed(client)
        return model, torch.randn(20, 16, generator=draws), torch.randint(3, (20,), generator=draws), client

    @app.train()
    def train(message: Message, context: Context) -> Message:
        model, x, y, client = begin(message, context)
        loss = F.cross_entropy(model.train()(x), y)
        loss.backward()
        for p in model.parameters():
            p.data -= message.content[config]["lr"] * p.grad
        metrics = MetricRecord({"loss": loss.item(), "by-class": [1.0, float(client)], weight: 10 + client})
        return Message(RecordDict({"net": ArrayRecord(model.state_dict()), "how": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model, x, y, client = begin(message, context)
        with torch.no_grad():
            loss = F.cross_entropy(model.eval()(x), y).item()
        return Message(RecordDict({"how": MetricRecord({"loss": loss, weight: 10 + client})}), reply_to=message)

    return app


@cache
def trained() -> State:
    """A network whose units differ, with statistics of its own."""
    model, (x, y) = net(seed=9), rows()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
    return model.state_dict()


@cache
def spec() -> fm.PermSpec:
    return fm.perm_spec(net(), torch.zeros(2, 16))


def reordered(seed: int) -> State:
    """The trained network with its units in another order."""
    draws = torch.Generator().manual_seed(seed)
    perms = {group: torch.randperm(n, generator=draws) for group, n in spec().sizes().items()}
    return fm.permute(trained(), perms, spec=spec())


class Round:
    """One round, step by step: client i of LocalGrid(n) answers with ``networks[i]``, or as ``kinds`` change that."""

    def __init__(self, strategy: FedAvg, networks: list[State], kinds: dict[int, Kind] | None = None) -> None:
        self.strategy, self.networks, self.kinds = strategy, networks, kinds or {}
        self.grid = LocalGrid(len(networks))

    def answered(self, what: str = "train") -> list[Message]:
        sent = ArrayRecord(net().state_dict())
        ask = self.strategy.configure_train if what == "train" else self.strategy.configure_evaluate
        questions = sorted(
            ask(1, sent, ConfigRecord(), self.grid), key=lambda m: self.grid.partition[m.metadata.dst_node_id]
        )
        self.grid.push_messages(questions)
        replies: list[Message] = []
        for client, (question, params) in enumerate(zip(questions, self.networks, strict=True)):
            metrics = {
                "num-examples": 20 + client % 4,
                "client": client,
                "seconds": 0.5,
                "train-loss": 1.0,
                "train-accuracy": 0.5,
            }
            content = {"metrics": MetricRecord(metrics | {"loss": float(client), "accuracy": 0.5})}
            if what == "train":
                content["arrays"] = ArrayRecord(params)
            reply = Message(RecordDict(content), reply_to=question)
            changed = self.kinds[client].change(reply) if client in self.kinds else reply
            replies += changed if isinstance(changed, list) else [changed]
        return replies

    def train(self) -> tuple[State, MetricRecord]:
        arrays, metrics = self.strategy.aggregate_train(1, self.answered())
        return arrays.to_torch_state_dict(), metrics
