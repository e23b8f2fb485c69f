"""`fedmerge.flower.MergeMany` under Flower's own ServerApp steps, with clients that know nothing of fedmerge."""

import random

import pytest
import torch
from flower_round import Net, Plain, Round, State, client_app, net, reordered, rows, spec, trained
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp.strategy import FedAvg
from local_grid import LocalGrid
from reply_kinds import Kind
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fedmerge as fm
from fedmerge.align import Aligner
from fedmerge.errors import ConfigError
from fedmerge.flower import MergeMany
from fedmerge.retraining import Retraining
from fedmerge.teachers import teach
from fedmerge.training import Training

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


def test_choices_are_made_on_val_where_public_has_no_labels() -> None:
    x, y = rows()
    networks = [net(seed=1).state_dict(), trained(), net(seed=2).state_dict()]
    for how in ({"public": x}, {"example": x[:1]}):
        strategy = MergeMany(model=net(), val=(x, y), reference="best", retrain="none", **how)
        Round(strategy, networks).train()
    soup = MergeMany(model=net(), public=x, val=(x, y), merger="greedy-soup", retrain="none", repair="none")
    merged, _ = Round(soup, [net(seed=3).state_dict(), trained(), net(seed=2).state_dict()]).train()
    right = fm.evaluate(net(), merged, (x, y)).accuracy
    assert right >= fm.evaluate(net(), trained(), (x, y)).accuracy  # it begins at the best, and never goes below


def test_a_metric_that_is_not_finite_and_a_function_that_makes_none_leave_the_merge_as_it_is() -> None:
    def undefined(reply: Message) -> Message:
        reply.content["metrics"]["loss"] = float("nan")
        return reply

    networks = [reordered(seed) for seed in range(4)]
    merged, metrics = Round(MergeMany(model=net(), example=rows()[0]), networks, {2: Kind(undefined)}).train()
    assert metrics["loss"] == pytest.approx((20 * 0 + 21 * 1 + 23 * 3) / 64)
    none = MergeMany(model=net(), example=rows()[0], train_metrics_aggr_fn=lambda contents, weight: None)
    same, alone = Round(none, networks).train()
    assert set(alone) == {"merge-objective", "merge-sweeps"}
    assert all(torch.equal(same[name], value) for name, value in merged.items())


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


def test_a_stacked_teacher_says_what_the_library_makes_of_the_same_networks() -> None:
    seen: list[Tensor] = []

    def kept(model, params, public, *, target, **_):
        seen.append(target)
        return Training(dict(params), (), (), 0, 0.0)

    how = Retraining("kept", kept, "keeps what it is taught", needs=frozenset({"teachers", "target"}))
    networks = [net(seed=seed).state_dict() for seed in (1, 2, 3)]
    for teacher in ("stacked", "mean"):
        Round(MergeMany(model=net(), public=rows(), retrain=how, teacher=teacher), networks).train()
        expected = teach(teacher, net(), networks, fm.data.as_data(rows(), net(), "rows")).on_public
        torch.testing.assert_close(seen[-1], expected)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


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
