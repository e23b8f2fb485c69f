"""Learned coefficients: no step is the plain merge, no step is for the worse, and gradients are those of the mixture."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pictures import SHAPE, network, pictures
from torch import Tensor, nn
from torch.func import functional_call

import fedmerge as fm
from fedmerge.merge import ensemble
from fedmerge.merge._coefficients import _Mixture

DATA = pictures(60)
NAMES = ("mlp", "self-tied")


class Tied(nn.Module):
    """One layer under two names, called at both places."""

    def __init__(self) -> None:
        super().__init__()
        self.i, self.o = nn.Linear(48, 6), nn.Linear(6, 4)
        self.b = self.c = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.c(self.b(self.i(x.flatten(1)).relu()).relu()).relu())


def pair(name: str):
    model = network(name)
    models = [network(name, seed).state_dict() for seed in (1, 2)]
    return model, fm.perm_spec(model, torch.zeros(2, *SHAPE)), models


def merged(name: str, **options: object) -> dict[str, Tensor]:
    model, spec, models = pair(name)
    given = {"model": model, "data": DATA, "weights": [1, 3], **options}
    return fm.merge(models, spec=spec, method="learned-coefficients", **given).params


def divergence(model: nn.Module, params: dict[str, Tensor], target: Tensor) -> float:
    """Of the network's answers from the target; BatchNorm with the statistics of all images."""
    network = model.train()
    network.load_state_dict(params)
    with torch.no_grad():
        answers = network(DATA.normalise(DATA.images))
    return float((target * (target.log() - answers.log_softmax(1))).sum(1).mean())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ["merge-many", "average"])
def test_no_step_is_the_plain_merge_and_many_are_never_for_the_worse(name: str, order: str) -> None:
    model, spec, models = pair(name)
    target = ensemble(model, models, DATA)
    plain = fm.merge(models, spec=spec, method=order, weights=[1, 3]).params
    for options in ({"max_steps": 0}, {"lr": 0.0}):
        torch.testing.assert_close(merged(name, order=order, **options), plain, rtol=0, atol=0)
    before = divergence(model, plain, target)
    assert divergence(model, merged(name, order=order, lr=50.0, max_steps=5), target) <= before + 1e-6
    found = merged(name, order=order, max_steps=20)
    assert divergence(model, found, target) < 0.95 * before
    buffers = {k: v for k, v in found.items() if k not in dict(model.named_parameters())}
    torch.testing.assert_close(buffers, {k: plain[k] for k in buffers}, rtol=0, atol=0)


def test_the_coefficients_of_a_mixture_are_found_from_its_answers() -> None:
    model, _, models = pair("mlp")
    shares = {name: 0.2 * (k + 1) for k, name in enumerate(models[0])}
    mixture = {k: shares[k] * models[0][k] + (1.2 - shares[k]) * models[1][k] for k in models[0]}
    target = fm.predict(model, mixture, DATA).softmax(1)
    found = merged("mlp", order="average", target=target, max_steps=400)
    plain = merged("mlp", order="average", max_steps=0)
    assert divergence(model, found, target) < 1e-3 * divergence(model, plain, target)


@pytest.mark.parametrize("kind", [Tied, lambda: network("mlp")])
@pytest.mark.parametrize("batch_size", [7, 500])
def test_the_gradient_is_that_of_the_whole_loss_through_the_mixture(kind, batch_size: int) -> None:
    torch.manual_seed(0)
    model, models = kind(), [kind().state_dict() for _ in range(3)]
    mixture = _Mixture(model, models[0], models, "cpu")
    target = ensemble(model, models, DATA)
    coefficients = torch.rand(3, len(mixture.sources))
    loss, slope = mixture.loss(coefficients, DATA, target, batch_size)

    def whole(c: Tensor) -> Tensor:
        params = {name: torch.stack([m[name] for m in models]) for name in mixture.sources}
        mixed = {name: torch.einsum("m,m...->...", c[:, k], params[name]) for k, name in enumerate(params)}
        every = {name: mixed[mixture.first[name]] for name in mixture.first}
        answers = functional_call(model, every, (DATA.normalise(DATA.images),), tie_weights=False)
        return F.kl_div(answers.log_softmax(1), target, reduction="batchmean")

    torch.testing.assert_close(loss, float(whole(coefficients)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope, torch.func.grad(whole)(coefficients), rtol=1e-4, atol=1e-5)
    assert len(mixture.sources) == len(list(model.parameters()))  # a tensor of two names has one coefficient a model


def test_no_label_is_read() -> None:
    without = replace(DATA, labels=torch.full_like(DATA.labels, -1))
    torch.testing.assert_close(merged("mlp", data=without), merged("mlp"), rtol=0, atol=0)
