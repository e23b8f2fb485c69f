"""FS-Merge: no step is the plain merge, features that fit into one network are rebuilt, other layers are refused."""

import numpy as np
import pytest
import torch
from pictures import SHAPE, network, pictures
from torch import Tensor, nn

import fedmerge as fm
import strategies
from fedmerge.errors import SpecError
from fedmerge.merge import ensemble
from fedmerge.merge._fs_merge import _SuperNet
from fedmerge.models import Recipe
from fedmerge.pipeline import Pipeline, Workbench

DATA = pictures(100)


def convolved() -> nn.Module:
    """Convolutions, a pool and a flattening, so that a unit is a channel at several places of the classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return convolved() if name == "convolved" else network(name, seed)


def setting(name: str, n: int = 3):
    model = made(name, 0)
    return model, fm.perm_spec(model, torch.zeros(2, *SHAPE)), [made(name, i + 1).state_dict() for i in range(n)]


@pytest.mark.parametrize("order", ["merge-many", "average"])
@pytest.mark.parametrize("name", ["mlp", "convolved", "residual"])
def test_the_matrices_begin_at_the_plain_merge(name: str, order: str) -> None:
    model, spec, models = setting(name)
    start = fm.merge(models, spec=spec, method=order, weights=[1, 2, 3])
    net = _SuperNet(model, models, start, [1 / 6, 1 / 3, 1 / 2], spec, "cpu")
    torch.testing.assert_close({k: v.detach() for k, v in net.params().items()}, start.params, rtol=1e-4, atol=1e-6)
    if name != "residual":  # whose answers are of more classes than the pictures
        options = {"order": order, "weights": [1, 2, 3], "model": model, "data": DATA}
        for still in ({"max_steps": 0}, {"lr": 0.0, "max_steps": 2}, {"lr": 100.0, "max_steps": 2}):
            found = fm.merge(models, spec=spec, method="fs-merge", **options, **still)
            torch.testing.assert_close(found.params, start.params, rtol=0, atol=0)


def test_matrices_fold_a_network_of_both_halves_of_the_units() -> None:
    """Of the hidden units, A reads the first half and B the second: one network holds both, and no permutation finds it."""
    model, spec, (a, b) = setting("mlp", 2)
    for params, keep in ((a, slice(0, 3)), (b, slice(3, 6))):
        for name in ("1.2.weight", "1.4.weight"):  # what the other units make, nobody reads
            read = torch.zeros_like(params[name])
            read[:, keep] = 2
            params[name] *= read
    target = ensemble(model, [a, b], DATA)

    def divergence(params: dict[str, Tensor]) -> float:
        said = fm.predict(model, params, DATA).log_softmax(1)
        return float((target * (target.log() - said)).sum(1).mean())

    plain = fm.merge([a, b], spec=spec, method="merge-many").params
    options = {"model": model, "data": DATA, "rng": np.random.default_rng(0), "lr": 0.01}
    found = fm.merge([a, b], spec=spec, method="fs-merge", max_steps=100, **options).params
    assert divergence(found) < 0.3 * divergence(plain)


def test_the_loss_is_that_of_the_formula() -> None:
    model, spec, models = setting("convolved", 2)
    shares = [0.25, 0.75]
    start = fm.merge(models, spec=spec, method="average", weights=shares)
    net = _SuperNet(model, models, start, shares, spec, "cpu")
    generator = torch.Generator().manual_seed(0)
    for group, maps in (*net.make.items(), *net.read.items()):
        assert maps.shape[0] == 2, group
        maps.data += 0.3 * torch.randn(maps.shape, generator=generator)
    target, x = ensemble(model, models, DATA), DATA.normalise(DATA.images)

    def features(params: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        model.load_state_dict(params)
        first = model[:2](x)
        second = model[2:6](first)
        return first, second, model[6](second).log_softmax(1)

    one, two = spec.axes["0.weight"][0][0][0].group, spec.axes["2.weight"][0][0][0].group
    folded = {k: sum(_by_hand(k, m, one, two, net, i, shares) for i, m in enumerate(models)) for k in models[0]}
    torch.testing.assert_close({k: v.detach() for k, v in net.params().items()}, folded, rtol=1e-4, atol=1e-5)
    first, second, said = features(folded)
    expected = (target * (target.log() - said)).sum(1).mean()
    for i, params in enumerate(models):
        own_first, own_second, _ = features(params)
        rebuilt = torch.einsum("jk,bkhw->bjhw", net.read[one][i], first)
        expected = expected + shares[i] * (rebuilt - own_first).square().mean() / own_first.square().mean()
        rebuilt = torch.einsum("jk,bkp->bjp", net.read[two][i], second.view(len(x), 4, 4)).flatten(1)
        expected = expected + shares[i] * (rebuilt - own_second).square().mean() / own_second.square().mean()
    torch.testing.assert_close(net.loss(DATA, torch.arange(len(x)), target), expected.detach(), rtol=1e-4, atol=1e-5)


def _by_hand(
    name: str, params: dict[str, Tensor], one: str, two: str, net: _SuperNet, i: int, shares: list[float]
) -> Tensor:
    """What model i adds to a tensor, in the words of the formula: M W U and M b."""
    make, read, tensor = (net.make[one][i], net.make[two][i]), (net.read[one][i], net.read[two][i]), params[name]
    return {
        "0.weight": lambda: torch.einsum("aj,jchw->achw", make[0], tensor),
        "0.bias": lambda: make[0] @ tensor,
        "2.weight": lambda: torch.einsum("aj,jkhw,kb->abhw", make[1], tensor, read[0]),
        "2.bias": lambda: make[1] @ tensor,
        "6.weight": lambda: shares[i] * torch.einsum("ckp,kb->cbp", tensor.view(4, 4, 4), read[1]).flatten(1),
        "6.bias": lambda: shares[i] * tensor,
    }[name]().detach()


def test_other_layers_are_refused_in_a_line() -> None:
    model, spec, models = setting("self-tied", 2)
    with pytest.raises(
        SpecError, match="folds linear layers and convolutions.*'norm.weight' of SelfTied belongs to"
    ) as caught:
        fm.merge(models, spec=spec, method="fs-merge", model=model, data=DATA)
    assert "\n" not in str(caught.value)
    bench = Workbench(model, spec, DATA, DATA, Recipe(), retrain_epochs=1, seed=0)
    with pytest.raises(SpecError, match="'norm.weight' of SelfTied belongs to"):  # before anything is trained
        strategies.build("merge-many", bench=bench, pipeline=Pipeline(aligner="weight-matching", merger="fs-merge"))
