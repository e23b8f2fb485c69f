import math
from typing import Any

import numpy as np
import pytest
import torch
from nets import SelfTied, mlp
from pictures import SHAPE, network, pictures
from torch import nn

from fedmerge import align, average, data, evaluate, models, perm_spec, permute, train
from fedmerge.align import straight_through
from fedmerge.align._straight_through import Midpoint
from fedmerge.errors import ConfigError


@pytest.fixture(scope="module")
def trained(digits: data.Images):
    """An MLP, two state dicts of it trained on disjoint real digits, and public digits."""
    model = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
    found = []
    for i in range(2):
        start = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=i).state_dict()
        part, generator = digits.select(range(i, 800, 2)), torch.Generator().manual_seed(i)
        found.append(train(model, start, part, recipe=models.recipe("mlp"), epochs=10, generator=generator).params)
    return model, *found, digits.select(range(800, 1100))


def test_the_midpoint_has_a_lower_loss_than_that_of_weight_matching(trained) -> None:
    model, a, b, public = trained
    spec = perm_spec(model, public.normalise(public.images[:2]))
    losses = []
    for method, options in (("weight-matching", {}), ("ste", {"model": model, "data": public})):
        found = align(b, to=a, spec=spec, method=method, **options)
        losses.append(evaluate(model, average([a, permute(b, found.perms, spec=spec)]), public).loss)
    assert losses[1] < 0.95 * losses[0]


def test_without_an_epoch_it_is_weight_matching(trained) -> None:
    model, a, b, public = trained
    spec = perm_spec(model, public.normalise(public.images[:2]))
    expected = align(b, to=a, spec=spec)
    found = align(b, to=a, spec=spec, method="ste", model=model, data=public, epochs=0)
    assert all(torch.equal(found.perms[g], expected.perms[g]) for g in expected.perms)
    assert (found.best, found.converged) == (0, False)


def test_best_is_the_epoch_whose_permutations_are_returned(trained) -> None:
    model, a, b, public = trained
    spec = perm_spec(model, public.normalise(public.images[:2]))
    found = align(b, to=a, spec=spec, method="ste", model=model, data=public, epochs=2)
    assert len(found.history) == 4  # the start, two epochs, what is returned
    assert found.best is not None
    assert found.history[found.best] == found.objective


def test_batch_norm_of_the_midpoint_takes_the_statistics_of_the_batch() -> None:
    model = SelfTied(5)
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    a, b = model.state_dict(), SelfTied(5).state_dict()
    stale = b | {"norm.running_mean": torch.full((5,), 1e3), "norm.running_var": torch.full((5,), 1e-3)}
    one, two = (align(m, to=a, spec=spec, method="ste", model=model, data=pictures()) for m in (b, stale))
    assert all(torch.equal(one.perms[g], two.perms[g]) for g in one.perms)


@pytest.mark.parametrize(
    "passes", [{"method": "ste", "epochs": 2}, {"method": "sinkhorn-rebasin-midpoint", "steps": 2}]
)
@pytest.mark.parametrize("n", [1, 7])
def test_a_batch_of_one_image_has_no_statistics_of_its_own(passes: dict[str, Any], n: int) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SHAPE), 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4))
    a, spec = model.state_dict(), perm_spec(model, torch.randn(2, *SHAPE))
    b = permute(a, spec.random(torch.Generator().manual_seed(0)), spec=spec)
    found = align(b, to=a, spec=spec, model=model, data=pictures(n), batch_size=3, **passes)
    assert found.perms.keys() == set(spec.groups)
    assert all(map(math.isfinite, found.history))


def test_settings_that_cannot_train_are_named(trained) -> None:
    model, a, b, public = trained
    spec = perm_spec(model, public.normalise(public.images[:2]))
    for options in ({"epochs": -1}, {"lr": 0.0}):
        with pytest.raises(ConfigError, match="expected at least 0, at least 1, and above 0"):
            straight_through(b, to=a, spec=spec, rng=np.random.default_rng(0), model=model, data=public, **options)


@pytest.mark.parametrize("method", ["ste", "sinkhorn-rebasin-midpoint"])
def test_permutations_whose_loss_is_nan_are_never_the_best(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = network("one-layer"), pictures()
    a, b = (network("one-layer", seed).state_dict() for seed in (1, 2))
    true_loss, measured = Midpoint._loss, []

    def diverged(self, state, rows):
        """As it is for the start, and NaN for all that is learned."""
        loss = true_loss(self, state, rows)
        if torch.is_grad_enabled():  # a step, not a measurement
            return loss
        measured.append(rows)
        return loss if len(measured) == 1 else loss * torch.nan

    monkeypatch.setattr(Midpoint, "_loss", diverged)
    options = {"ste": {"epochs": 2}, "sinkhorn-rebasin-midpoint": {"steps": 2}}[method]
    spec = perm_spec(model, torch.zeros(2, *SHAPE))
    found = align(b, to=a, spec=spec, method=method, model=model, data=data, lr=10.0, restarts=2, **options)
    assert len(measured) == 6  # of two trainings the start and two more
    assert found.best == 0
    assert found.objective == found.history[0]
    assert len({*found.history}) > 1  # there was something else to choose


def test_a_midpoint_that_overflows_has_an_infinite_loss() -> None:
    model = nn.Sequential(nn.Flatten(), mlp(48, 2, 4))
    a = {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}
    a["1.0.bias"] += torch.tensor([1e25, 1e10])
    a["1.2.weight"] += torch.tensor([1e10, 1e25])  # matched, units pass on 1e35; mixed, each would 2e49
    midpoint = Midpoint(model, a, a, perm_spec(model, torch.zeros(2, *SHAPE)), pictures(3), 3)
    assert midpoint.loss({"1.0": torch.tensor([0, 1])}) < 1e36
    assert midpoint.loss({"1.0": torch.tensor([1, 0])}) == float("inf")


def test_a_learning_rate_that_no_step_can_have_is_refused() -> None:
    model, data = network("one-layer"), pictures(6)
    a, b = (network("one-layer", seed).state_dict() for seed in (1, 2))
    spec = perm_spec(model, torch.zeros(2, *SHAPE))
    for lr in (0.0, -1.0, 1e38, 1e200):
        with pytest.raises(ConfigError, match=r"lr .*; expected at least 0, at least 1, and above 0 \(below 1e30\)"):
            align(b, to=a, spec=spec, method="ste", model=model, data=data, lr=lr)
