import pytest
import torch
from nets import SelfTied
from torch import nn

from fedmerge import average, data, merge_many, models, perm_spec, permute, repair, repairs, train
from fedmerge.errors import ParamsError, UnknownNameError


@pytest.fixture(scope="module")
def digits() -> data.Images:
    return data.load("digits").train


@pytest.fixture(scope="module")
def clients(digits: data.Images):
    """Three MLPs trained from independent initialisations on disjoint real digits."""
    found = []
    for i in range(3):
        model = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=i)
        part = digits.select(range(i, 900, 3))
        trained = train(
            model,
            model.state_dict(),
            part,
            recipe=models.recipe("mlp"),
            epochs=10,
            generator=torch.Generator().manual_seed(i),
        )
        found.append(trained.params)
    return found


def conv_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10)
    )


def test_recomputed_statistics_are_those_of_the_data(digits: data.Images) -> None:
    model, part = conv_net(0), digits.select(range(300))
    fixed = repair(model, model.state_dict(), data=part)
    out = model[0](part.normalise(part.images))
    torch.testing.assert_close(fixed["1.running_mean"], out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fixed["1.running_var"], out.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    for name, tensor in model.state_dict().items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(fixed[name], tensor, rtol=0, atol=0)
    assert fixed["1.num_batches_tracked"].dtype == torch.int64


def test_repair_brings_every_unit_to_the_mean_of_the_clients_moments(digits: data.Images, clients) -> None:
    model = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
    part = digits.select(range(900, 1300))
    spec = perm_spec(model, part.normalise(part.images[:2]))
    merged = merge_many(clients, spec=spec)
    sources = [permute(m, p, spec=spec) for m, p in zip(clients, merged.perms, strict=True)]
    fixed = repair(model, merged.params, data=part, method="repair", sources=sources)

    def moments(params):
        found, net = [], models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
        net.load_state_dict(params)
        for layer in [m for m in net.modules() if isinstance(m, nn.Linear)][:-1]:
            layer.register_forward_hook(lambda _m, _i, out: found.append((out.mean(0), out.std(0, correction=0))))
        with torch.no_grad():
            net(part.normalise(part.images))
        return found

    goals = [moments(s) for s in sources]
    before, after = moments(merged.params), moments(fixed)
    for layer, (mean, std) in enumerate(after):
        torch.testing.assert_close(mean, sum(g[layer][0] for g in goals) / 3, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(std, sum(g[layer][1] for g in goals) / 3, rtol=1e-3, atol=1e-4)
        assert float(before[layer][1].mean()) < float(std.mean())  # averaging had shrunk the variance


def test_repair_leaves_bias_free_layers_and_recomputes_batch_norm(digits: data.Images) -> None:
    part = digits.select(range(200))
    a, b = conv_net(1), conv_net(2)
    mean = average([a.state_dict(), b.state_dict()])
    fixed = repair(a, mean, data=part, method="repair", sources=[a.state_dict(), b.state_dict()])
    torch.testing.assert_close(fixed["0.weight"], mean["0.weight"], rtol=0, atol=0)  # its BatchNorm sees to it
    torch.testing.assert_close(fixed["6.weight"], mean["6.weight"], rtol=0, atol=0)  # the output layer
    assert not torch.equal(fixed["3.weight"], mean["3.weight"])
    assert not torch.equal(fixed["1.running_mean"], mean["1.running_mean"])


@pytest.mark.parametrize("method", repairs())
def test_every_repair_returns_a_copy_of_the_same_tensors(method: str, digits: data.Images) -> None:
    model, part = conv_net(3), digits.select(range(50))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fixed = repair(model, state, data=part, method=method, sources=[state])
    assert fixed.keys() == state.keys()
    for name in state:
        assert fixed[name].data_ptr() != state[name].data_ptr()
        assert fixed[name].dtype == state[name].dtype
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)


def test_repairing_a_network_towards_itself_changes_nothing_but_round_off(digits: data.Images, clients) -> None:
    model = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
    part = digits.select(range(400))
    fixed = repair(model, clients[0], data=part, method="repair", sources=[clients[0]])
    for name, tensor in clients[0].items():
        assert float((fixed[name] - tensor).norm()) < 1e-5 * float(tensor.norm())


def test_bad_requests_are_named(digits: data.Images) -> None:
    model = SelfTied()
    with pytest.raises(UnknownNameError, match=r"unknown repair 'repiar'.*did you mean 'repair'"):
        repair(model, model.state_dict(), data=digits, method="repiar")
    with pytest.raises(ParamsError, match="pass them as sources="):
        repair(model, model.state_dict(), data=digits, method="repair")


@pytest.mark.parametrize("method", ["repair", "repair-closed-form"])
def test_a_source_is_named_by_its_position_among_the_sources(digits: data.Images, method: str) -> None:
    model = SelfTied()
    good = model.state_dict()
    name = next(iter(good))
    bad = {**good, name: good[name] * torch.nan}
    with pytest.raises(ParamsError, match=f"tensor '{name}' of source 1 holds"):
        repair(model, good, data=digits, method=method, sources=[good, bad])
