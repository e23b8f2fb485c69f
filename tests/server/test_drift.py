"""Strategies over the in-process grid against their formulas in plain PyTorch: SCAFFOLD, FedNova, Krum."""

import json
from pathlib import Path

import numpy as np
import plain
import pytest
import torch
from flwr.app import ArrayRecord, Message
from local_grid import LocalGrid
from short_run import run

from fedmerge import average
from fedmerge.errors import ConfigError
from fedmerge.tasks import ARRAYS, CORRECTION
from server import RunConfig, read_model

SHARED = {"init": "shared", "partition": "dirichlet", "controls": "none"}
NETWORKS = {
    "mlp": {},  # momentum and a cosine
    "cnn": {
        "width": 1,
        "kernel_size": 2,
        "batch_size": 20,
        "lr": 0.02,
        "client_images": 60,
    },  # momentum, weight decay, one rate
    "resnet20": {"width": 0.25, "local_epochs": 1, "lr": 0.002},  # Nesterov's momentum, decay, BatchNorm, warm-up
}
every_network = pytest.mark.parametrize("model", list(NETWORKS))


def reach(rates: list[float], momentum: float, nesterov: bool) -> float:
    """Over all pairs of a gradient j and a later step k: what the step makes of that gradient."""
    total = 0.0
    for k, rate in enumerate(rates):
        for j in range(k + 1):
            left = momentum ** (k - j)
            total += rate * (momentum * left + (j == k) if nesterov else left)
    return total


def written(path: Path) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    return RunConfig.read(path / "config.toml"), read_model(path / "model.safetensors")


@every_network
def test_scaffold_corrects_by_control_variates_that_clients_could_have_kept(model: str, tmp_path: Path) -> None:
    run(tmp_path / "a", strategy="scaffold", rounds=3, model=model, **SHARED, **NETWORKS[model])
    config, found = written(tmp_path / "a")
    recipe = config.recipe()
    names = dict(config.setup().network().named_parameters())
    sizes = [len(c) for c in config.setup().split().clients]
    c = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in names.items()}
    own = [dict(c) for _ in sizes]

    def add(r: int, i: int) -> plain.Params:
        return {k: (c[k] - own[i][k]).float() for k in names}

    def server(r: int, sent: plain.Params, clients: list[plain.Local], mean: plain.Params) -> plain.Params:
        for i, client in enumerate(clients):
            h = reach(client.rates, recipe.momentum, recipe.nesterov)
            own[i] = {k: own[i][k] - c[k] + (sent[k].double() - client.params[k]) / h for k in names}
        shares = [n / sum(sizes) for n in sizes]
        for k in names:
            c[k] = sum(share * variate[k] for share, variate in zip(shares, own, strict=True))
            mean[k] = sum(
                share * client.params[k].double() for share, client in zip(shares, clients, strict=True)
            ).float()
        return mean

    expected = plain.federate(config, server, add)
    torch.testing.assert_close(found, {k: expected[k] for k in found}, rtol=1e-3, atol=1e-4)
    fedavg = plain.federate(config)
    apart = sum((fedavg[k] - expected[k]).norm() ** 2 for k in names) ** 0.5
    off = sum((found[k] - expected[k]).norm() ** 2 for k in names) ** 0.5
    assert off < apart / 1000  # what is left is round-off that three rounds of training make larger


@every_network
def test_fednova_takes_the_step_of_its_formula(model: str, tmp_path: Path) -> None:
    run(tmp_path / "a", strategy="fednova", rounds=2, model=model, **SHARED, **NETWORKS[model])
    config, found = written(tmp_path / "a")
    recipe = config.recipe()
    names = dict(config.setup().network().named_parameters())

    def server(r: int, sent: plain.Params, clients: list[plain.Local], mean: plain.Params) -> plain.Params:
        if model == "cnn":  # one rate: the closed form of the paper, section 4.1
            rho, taus = recipe.momentum, [len(c.rates) for c in clients]
            assert len(set(taus)) > 1
            h = [0.02 * (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho) for tau in taus]
        else:
            h = [reach(c.rates, recipe.momentum, recipe.nesterov) for c in clients]
        p = np.array([c.examples for c in clients]) / sum(c.examples for c in clients)
        moved = {
            k: sent[k]
            - float(p @ h) * sum(w * (sent[k] - c.params[k]) / g for w, c, g in zip(p, clients, h, strict=True))
            for k in names
        }
        return {**mean, **{k: v.float() for k, v in moved.items()}}

    expected = plain.federate(config, server)
    torch.testing.assert_close(found, {k: expected[k] for k in found}, rtol=1e-3, atol=1e-4)


def test_fednova_of_clients_with_equally_many_steps_is_fedavg(tmp_path: Path) -> None:
    settings = {**SHARED, "partition": "iid", "rounds": 2}
    for strategy in ("fednova", "fedavg"):
        run(tmp_path / strategy, strategy=strategy, **settings)
    torch.testing.assert_close(written(tmp_path / "fednova")[1], written(tmp_path / "fedavg")[1], rtol=1e-4, atol=1e-5)


def test_scaffold_begins_as_fedavg_and_with_half_a_server_step_half_way_to_it(tmp_path: Path) -> None:
    for strategy, options in (("fedavg", ""), ("scaffold", ""), ("scaffold", "server_lr=0.5")):
        run(tmp_path / f"{strategy}{options}", strategy=strategy, strategy_options=options, rounds=1, **SHARED)
    config, fedavg = written(tmp_path / "fedavg")
    start = config.setup().network().state_dict()
    torch.testing.assert_close(written(tmp_path / "scaffold")[1], fedavg, rtol=1e-5, atol=1e-6)
    half = {k: (start[k] + v) / 2 for k, v in fedavg.items()}
    torch.testing.assert_close(written(tmp_path / "scaffoldserver_lr=0.5")[1], half, rtol=1e-5, atol=1e-6)


def test_corrections_are_sent_from_round_two_on_and_cancel_where_all_answered(tmp_path: Path) -> None:
    sent: dict[int, list[dict[str, torch.Tensor]]] = {}

    class Listening(LocalGrid):
        def push_messages(self, messages):
            messages = list(messages)
            for m in messages:
                if m.metadata.message_type.startswith("train"):
                    r, client = m.content["config"]["server-round"], self.partition[m.metadata.dst_node_id]
                    record = m.content.get(CORRECTION)
                    sent.setdefault(r, []).append((client, record and record.to_torch_state_dict()))
            return super().push_messages(messages)

    def spoil(client: int, reply: Message) -> Message:
        if client == 2 and ARRAYS in reply.content:
            del reply.content[ARRAYS]
        return reply

    run(tmp_path / "a", Listening(4), strategy="scaffold", rounds=2, **SHARED)
    config, network = written(tmp_path / "a")
    assert [correction for _, correction in sent[1]] == [None] * 4
    size = 4 * sum(
        tensor.numel() for tensor in network.values()
    )  # float32: networks to train and to evaluate, and corrections
    down = json.loads((tmp_path / "a" / "summary.json").read_text())["sizes"]["bytes_down"]
    assert down == (2 + 2 + 1) * 4 * size
    sizes = [len(c) for c in config.setup().split().clients]
    for name in sent[2][0][1]:
        total = sum(n / sum(sizes) * dict(sent[2])[i][name] for i, n in enumerate(sizes))
        largest = max(float(correction[name].abs().max()) for _, correction in sent[2])
        assert float(total.abs().max()) < 1e-5 * largest
    sent.clear()
    run(tmp_path / "b", Listening(4, spoil=spoil), strategy="scaffold", rounds=2, **SHARED)
    broken = dict(sent[2])  # of four clients one has no variate: c is three quarters of the others' mean
    weights = {i: sizes[i] / sum(sizes[j] for j in (0, 1, 3)) for i in (0, 1, 3)}
    for name, c in broken[2].items():
        mean = sum(w * (c - broken[i][name]) for i, w in weights.items())
        torch.testing.assert_close(c, 0.75 * mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("strategy", ["scaffold", "fednova"])
def test_what_has_no_reach_is_refused_before_the_first_round(strategy: str) -> None:
    with pytest.raises(ConfigError, match=f"{strategy} divides .* adam's are no sum of gradients; use --optimizer sgd"):
        RunConfig.parse({"strategy": strategy, "init": "shared", "optimizer": "adam"})
    with pytest.raises(ConfigError, match=f"{strategy} divides .*use --optimizer sgd"):
        RunConfig.parse({"strategy": strategy, "init": "shared", "model": "lenet5"})
    with pytest.raises(ConfigError, match=f"{strategy} measures .* init = 'independent'.*use --init shared"):
        RunConfig.parse({"strategy": strategy})


def test_a_server_rate_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scaffold: server_lr is 0; expected a positive number"):
        run(tmp_path / "a", strategy="scaffold", strategy_options="server_lr=0", **SHARED)


@pytest.mark.parametrize("strategy", ["krum", "multikrum"])
def test_clients_that_lie_near_each_other_are_told_apart(strategy: str, tmp_path: Path) -> None:
    """Distances of a 1e-6th of the weights, by hand in float64: round-off in float32, in which a strayed client won."""
    settings = {"clients": 5, "strategy": strategy, "strategy_options": "num_malicious_nodes=1", **SHARED}
    start = RunConfig(clients=5, width=16, dataset="digits", model="mlp").client_task().network().state_dict()
    sizes = (1.0, 1.3, 0.9, 1.1, 6.0)
    generators = [torch.Generator().manual_seed(client) for client in range(5)]
    near = [
        {name: value + 2e-6 * size * torch.randn(value.shape, generator=one) for name, value in start.items()}
        for size, one in zip(sizes, generators, strict=True)
    ]

    def moved(client: int, reply: Message) -> Message:
        if ARRAYS in reply.content:
            reply.content[ARRAYS] = ArrayRecord(near[client])
        return reply

    run(tmp_path / "a", LocalGrid(5, spoil=moved), head="none", **settings)
    flat = torch.stack([torch.cat([value.double().flatten() for value in one.values()]) for one in near])
    apart = (flat[:, None] - flat[None]).square().sum(2)
    scores = torch.stack([row.sort()[0][1:3].sum() for row in apart])  # of the n - f - 2 = 2 nearest others
    chosen = scores.argsort()[: 1 if strategy == "krum" else 2]
    assert 4 not in chosen
    config, found = written(tmp_path / "a")
    held = [len(rows) for rows in config.setup().split().clients]
    expected = average([near[i] for i in chosen], [held[i] for i in chosen])
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-8)
