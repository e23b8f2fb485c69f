"""`fedmerge.flower.MergeMany` under Flower's own ServerApp steps, with clients that know nothing of fedmerge."""

import importlib
import random
import re
import sys
from functools import cache

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid
from reply_kinds import EVALUATION, TRAINING, Kind
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fedmerge as fm
from fedmerge.align import Aligner
from fedmerge.errors import ConfigError, DataError, ParamsError, SpecError, UnknownNameError
from fedmerge.flower import MergeMany
from fedmerge.training import Training

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


MEAN = {"merger": "average", "aligner": "weight-matching", "repair": "none", "retrain": "none"}


def test_with_the_mean_for_merger_it_is_flowers_fedavg_with_all_its_options() -> None:
    options = {
        "fraction_train": 0.5, "fraction_evaluate": 0.75, "min_train_nodes": 1, "min_available_nodes": 4, "weighted_by_key": "n",
        "arrayrecord_key": "weights", "configrecord_key": "settings",
        "evaluate_metrics_aggr_fn": lambda contents, key: MetricRecord({"largest": max(c["how"]["loss"] for c in contents)}),
    }  # fmt: skip
    app = client_app(Plain, "weights", "settings", "n")
    found = []
    for strategy in (FedAvg(**options), MergeMany(model=net(Plain), example=torch.zeros(1, 16), **MEAN, **options)):
        random.seed(3)  # which Flower draws the round's clients from
        found.append(
            strategy.start(
                grid=LocalGrid(6, app=app), initial_arrays=ArrayRecord(net(Plain).state_dict()), num_rounds=3,
                train_config=ConfigRecord({"lr": 0.3}), evaluate_fn=lambda r, arrays: MetricRecord({"round": r, "size": len(arrays)}),
            )
        )  # fmt: skip
    theirs, ours = found
    torch.testing.assert_close(
        ours.arrays.to_torch_state_dict(), theirs.arrays.to_torch_state_dict(), rtol=1e-5, atol=1e-6
    )
    for which in ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp"):
        one, other = getattr(ours, which), getattr(theirs, which)
        assert list(one) == list(other) != []
        for r in one:
            assert dict(one[r]) == {key: pytest.approx(value, rel=1e-5) for key, value in other[r].items()}


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


@pytest.mark.parametrize("public", [None, rows()[0]], ids=["weights alone", "activations"])
def test_clients_that_hold_one_network_in_other_orders_give_that_network_back(public: Tensor | None) -> None:
    strategy = MergeMany(model=net(), example=rows()[0], public=public, repair="none", retrain="none")
    merged, metrics = Round(strategy, [reordered(seed) for seed in range(4)]).train()
    x = rows()[0]
    expected = fm.predict(net(), trained(), data(x))
    torch.testing.assert_close(fm.predict(net(), merged, data(x)), expected, rtol=1e-4, atol=1e-5)
    averaged = {k: sum(reordered(s)[k] for s in range(4)) / 4 for k in merged}
    assert (fm.predict(net(), averaged, data(x)) - expected).abs().max() > 0.1  # what FedAvg makes of them
    # The squared norm of the mean is that of the one network, where the orders are found.
    assert metrics["merge-objective"] == pytest.approx(
        sum(float(trained()[k].square().sum()) for k in spec().parameters)
    )
    assert metrics["loss"] == pytest.approx((20 * 0 + 21 * 1 + 22 * 2 + 23 * 3) / 86)


def data(x: Tensor):
    from fedmerge.data import as_data

    return as_data((x, rows()[1]), net())


def test_what_the_metrics_say_of_the_public_data_is_what_the_networks_do_there() -> None:
    x, y = rows()
    strategy = MergeMany(model=net(), public=(x, y), retrain="both", retrain_epochs=3)
    networks = [reordered(seed) for seed in range(3)]
    merged, metrics = Round(strategy, networks).train()
    weights = [20 / 63, 21 / 63, 22 / 63]
    mean = {k: sum(w * n[k] for w, n in zip(weights, networks, strict=True)) for k in merged}

    def right(params: State) -> float:
        model = net()
        model.load_state_dict(params)
        return float((model.eval()(x).argmax(1) == y).float().mean())

    assert metrics["public-accuracy-average"] == pytest.approx(right(mean))
    assert metrics["public-accuracy-retrained"] == pytest.approx(right(merged))
    assert metrics["public-accuracy-merged"] == pytest.approx(right(trained()))
    assert {k: (t.dtype, t.shape) for k, t in merged.items()} == {k: (t.dtype, t.shape) for k, t in trained().items()}


class Records(Dataset):
    """Rows as Flower's data sets give them: dicts, the label first."""

    def __len__(self) -> int:
        return len(rows()[0])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"label": rows()[1][i], "img": rows()[0][i]}


def test_public_data_in_every_form_give_the_same_bytes() -> None:
    pairs = TensorDataset(*rows())
    forms = [
        rows(),
        pairs,
        list(rows()),
        Records(),
        DataLoader(pairs, batch_size=7),
        DataLoader(Records(), batch_size=16),
    ]
    networks = [net(seed=1).state_dict(), net(seed=2).state_dict()]
    made = [
        Round(MergeMany(model=net(), public=form, retrain="labels", retrain_epochs=1), networks).train()[0]
        for form in forms
    ]
    for other in made[1:]:
        assert {k: t.numpy().tobytes() for k, t in other.items()} == {
            k: t.numpy().tobytes() for k, t in made[0].items()
        }


class Named(Net):
    """Takes its rows in two halves, by name."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return super().forward(torch.cat([left, right], 1))


def test_a_network_of_several_inputs_with_a_loss_of_its_own_takes_part() -> None:
    x, y = rows()
    columns = {"left": x[:, :8], "right": x[:, 8:], "targets": F.one_hot(y, 3).float()}
    public = fm.data.as_data(columns, net(Named), loss=F.mse_loss)
    strategy = MergeMany(model=net(Named), public=public, retrain_epochs=30)
    assert strategy.pipeline.retrain == "labels"
    merged, metrics = Round(strategy, [net(seed=1).state_dict(), net(seed=2).state_dict()]).train()
    model = net()
    model.load_state_dict(merged)
    with torch.no_grad():
        expected = float(F.mse_loss(model.eval()(x), columns["targets"]))
    assert metrics["public-loss-retrained"] == pytest.approx(expected)
    assert metrics["public-loss-retrained"] < metrics["public-loss-merged"]
    with pytest.raises(ConfigError, match="the answers to public are no classes; take retrain='labels' or 'none'"):
        MergeMany(model=net(Named), public=public, retrain="both")


def test_methods_are_given_as_functions_and_entries() -> None:
    seen: list[str] = []

    def backwards(params: State, *, to: State, spec, rng, model, data, restarts=1, device="cpu"):
        seen.append(f"aligner sees {len(data)} rows")
        return fm.Alignment({g: torch.arange(n).flip(0) for g, n in spec.sizes(params).items()}, 0.0, (0.0,), 1, True)

    def second(models, *, spec, weights, rng, aligner, aligner_options, **_):
        perms = fm.align(models[1], models[0], spec=spec, method=aligner, **aligner_options).perms
        return fm.Merge(fm.permute(models[1], perms, spec=spec), (perms, perms), 0.0, (), 0, True)

    def of_repair(factor: int):
        return lambda model, params, **_: {name: factor * tensor for name, tensor in params.items()}

    def lifted(model, params, public, **_):
        return Training({name: tensor + 1 for name, tensor in params.items()}, (), (), 1, 0.0)

    how = {
        "aligner": Aligner("backwards", backwards, "in reverse", needs=frozenset({"model", "data"})),
        "merger": second, "retrain": lifted,
    }  # fmt: skip
    networks = [net(seed=seed).state_dict() for seed in (1, 2)]
    flipped = fm.permute(networks[1], {g: torch.arange(n).flip(0) for g, n in spec().sizes().items()}, spec=spec())
    pair = [MergeMany(model=net(), public=rows(), repair=of_repair(f), **how) for f in (2, 3)]
    for strategy, factor in zip(pair, (2, 3), strict=True):  # two functions of one name stay two
        made, _ = Round(strategy, networks).train()
        torch.testing.assert_close(made, {name: factor * tensor + 1 for name, tensor in flipped.items()})
    assert seen == ["aligner sees 40 rows"] * 2
    assert pair[0].pipeline.merger == pair[1].pipeline.merger == "second"
    assert not {"second", "backwards", "lifted"} & {*fm.mergers(), *fm.aligners()}
    with pytest.raises(ConfigError, match=r"merger 'lifted' cannot be used: it is called with \(models, spec="):
        MergeMany(model=net(), public=rows(), merger=lifted)


OTHERS = ("client", "seconds", "train-", "reach", "loss", "accuracy", "an unknown metric")
OTHERS += ("num-examples a fraction", "num-examples a whole float", "num-examples one too many")


def bad(table: dict[str, Kind]) -> dict[str, Kind]:
    """Kinds that any client can send: without those of metrics that fedmerge's own clients have."""
    return {name: kind for name, kind in table.items() if not name.startswith(OTHERS)}


def log_of(caplog: pytest.LogCaptureFixture, step: str) -> list[str]:
    return [line for line in caplog.messages if re.match(f"{step}: the answer of node .* is left out: ", line)]


@pytest.fixture
def flowers_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr("flwr.common.logger.FLOWER_LOGGER.propagate", True)
    caplog.set_level("INFO", logger="flwr")
    return caplog


def test_bad_replies_of_every_kind_cost_their_clients_the_round_and_nobody_else(
    flowers_log: pytest.LogCaptureFixture,
) -> None:
    kinds = dict(enumerate(bad(TRAINING).values(), 4))
    assert len(kinds) > 90
    networks = [reordered(seed) for seed in range(4)] * (1 + len(kinds) // 4 + 1)
    networks = networks[: 4 + len(kinds)]
    silent = dict.fromkeys(kinds, TRAINING["silence"])
    made = []
    for changes in (kinds, silent):
        flowers_log.clear()
        strategy = MergeMany(model=net(), public=rows(), retrain="none", restarts=1)
        merged, metrics = Round(strategy, networks, changes).train()
        assert len(log_of(flowers_log, "aggregate_train")) == len(kinds)
        made.append(({k: t.numpy().tobytes() for k, t in merged.items()}, dict(metrics)))
    assert made[0] == made[1]


def test_bad_evaluations_of_every_kind_cost_nothing(flowers_log: pytest.LogCaptureFixture) -> None:
    kinds = dict(enumerate(bad(EVALUATION).values(), 4))
    strategy = MergeMany(model=net(), example=rows()[0])
    found = strategy.aggregate_evaluate(1, Round(strategy, [{}] * (4 + len(kinds)), kinds).answered("evaluate"))
    assert found["loss"] == pytest.approx((20 * 0 + 21 * 1 + 22 * 2 + 23 * 3) / 86)
    assert len(log_of(flowers_log, "aggregate_evaluate")) == len(kinds)
    nobody = Round(strategy, [{}] * 3, dict.fromkeys(range(3), EVALUATION["an error"]))
    assert strategy.aggregate_evaluate(1, nobody.answered("evaluate")) is None


def test_a_round_without_any_usable_answer_keeps_the_network_and_one_of_odd_metrics_keeps_the_others() -> None:
    strategy = MergeMany(model=net(), example=rows()[0])
    nobody = Round(strategy, [trained()] * 3, dict.fromkeys(range(3), TRAINING["an error"]))
    assert strategy.aggregate_train(1, nobody.answered()) == (None, None)

    def renamed(reply: Message) -> Message:
        reply.content["metrics"] = MetricRecord({"num-examples": 1000, "mood": 1.0})
        return reply

    merged, metrics = Round(strategy, [trained(), trained(), net().state_dict()], {2: Kind(renamed)}).train()
    assert metrics["loss"] == pytest.approx(21 / 41)
    assert "mood" not in metrics
    start = net().state_dict()["fc2.bias"]  # a layer whose order is fixed: the third network counts, and most
    torch.testing.assert_close(merged["fc2.bias"], (41 * trained()["fc2.bias"] + 1000 * start) / 1041)


class Tied(nn.Module):
    """One matrix under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
        self.b.weight = self.a.weight
        self.norm, self.out = nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.b(torch.relu(self.a(x))))))


def test_counters_stay_whole_and_tied_tensors_one_through_two_rounds_of_merging_and_retraining() -> None:
    strategy = MergeMany(model=net(Tied), public=rows(), retrain_epochs=1)
    result = strategy.start(
        grid=LocalGrid(3, app=client_app(Tied)), initial_arrays=ArrayRecord(net(Tied).state_dict()), num_rounds=2,
        train_config=ConfigRecord({"lr": 0.1}),
    )  # fmt: skip
    made = result.arrays.to_torch_state_dict()
    assert made["norm.num_batches_tracked"].dtype == torch.int64
    torch.testing.assert_close(made["a.weight"], made["b.weight"], rtol=0, atol=0)
    assert not torch.equal(made["a.weight"], net(Tied).state_dict()["a.weight"])
    assert result.train_metrics_clientapp[2]["public-accuracy-retrained"] >= 0


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield rows()[0][0], rows()[1][0]


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, ConfigError, "neither example nor public; give example=x"),
        ({"example": rows()[0], "alinger": "ste"}, UnknownNameError, "option of MergeMany 'alinger'.*aligner"),
        ({"example": rows()[0], "merger": "meen"}, UnknownNameError, "merger 'meen'"),
        ({"example": rows()[0], "aligner": "activation-matching"}, ConfigError, "aligner 'activation-matching' looks at public data, and there are none; give public=data"),
        ({"example": rows()[0], "retrain": "labels"}, ConfigError, "retrain 'labels' looks at public data"),
        ({"public": rows()[0], "retrain": "both"}, ConfigError, "reads labels, and not all rows of public have one"),
        ({"public": (rows()[0], rows()[1].float())}, DataError, r"labels are torch.float32 \(40,\) for 40 rows; expected int64"),
        ({"public": (rows()[0], rows()[1][:3])}, DataError, r"labels are torch.int64 \(3,\) for 40 rows"),
        ({"public": torch.zeros(4, 5)}, DataError, r"Net does not take the rows of public, torch.float32 \(5,\) each"),
        ({"public": DataLoader(Endless(), batch_size=2)}, DataError, "a loader that does not know its length"),
        ({"public": DataLoader([]), }, DataError, "a loader without batches"),
        ({"public": "cifar10"}, DataError, "public gives a 'cifar10'; expected Images"),
        ({"example": torch.zeros(1, 5)}, (SpecError, DataError), "Net"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line_before_anybody_trains(given: dict, error: type, said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        MergeMany(model=net(), **given)
    assert "\n" not in str(caught.value)


def test_arrays_that_are_not_of_the_network_are_refused_before_anybody_trains() -> None:
    strategy = MergeMany(model=net(), example=rows()[0])
    with pytest.raises(
        ParamsError, match=r"tensor '0.bias' is \(8,\) in the arrays to begin from and missing in Net; start with"
    ):
        strategy.start(grid=LocalGrid(2), initial_arrays=ArrayRecord(net(Plain).state_dict()), num_rounds=1)


def test_without_flower_installed_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("fedmerge.flower", "flwr"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flwr", None)
    with pytest.raises(
        ImportError, match=r"^fedmerge.flower needs Flower, which is not installed: pip install 'flwr>=1.41"
    ):
        importlib.import_module("fedmerge.flower")
