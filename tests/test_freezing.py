"""Frozen weights stay where they are, to the bit, whatever moves the others; the others move as if they were free."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from trained import PLAIN, fit, generator, linear, normed, some_digits

from fedmerge import DPSGD, models
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.freezing import frozen_weights
from fedmerge.models import Recipe
from fedmerge.tasks import ClientTask

RECIPES = {
    "sgd": Recipe(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, batch_size=16),
    "adam": Recipe(optimizer="adam", lr=0.01, weight_decay=0.1, batch_size=16),
}
EXTRAS: dict[str, Any] = {
    "nothing more": {},
    "a pull": {"proximal_mu": 1.0},
    "a correction": {"correction": {"1.weight": torch.ones(10, 64)}},
    "noise": {"private": DPSGD(1.0, 1.0)},
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("extra", EXTRAS)
def test_no_frozen_weight_moves_and_every_other_does(recipe: str, extra: str) -> None:
    model = linear()
    frozen = frozen_weights(model, 0.4, generator=generator())
    start = {name: tensor.clone() + 0.1 for name, tensor in model.state_dict().items()}
    done = fit(model, some_digits(40), params=start, recipe=RECIPES[recipe], frozen=frozen, epochs=3, **EXTRAS[extra])
    where = frozen["1.weight"]
    assert torch.equal(done.params["1.weight"][where], start["1.weight"][where])
    moved = done.params["1.weight"] != start["1.weight"]
    assert bool(moved[~where].all())  # decay alone moves those that see only black pixels
    assert bool((done.params["1.bias"] != start["1.bias"]).all())


def test_the_others_move_as_under_a_masked_gradient() -> None:
    model, data = normed(), some_digits(16)
    frozen = frozen_weights(model, 0.5, generator=generator())
    recipe = Recipe(lr=0.05, momentum=0.9, nesterov=True, batch_size=16)
    done = fit(model, data, recipe=recipe, epochs=4, frozen=frozen)
    oracle = copy.deepcopy(model).train()
    steps = torch.optim.SGD(oracle.parameters(), 0.05, 0.9, nesterov=True)
    for _ in range(4):  # one batch holds all images, so their order does not matter
        steps.zero_grad()
        nn.functional.cross_entropy(oracle(data.normalise(data.images)), data.labels).backward()
        for name, weight in oracle.named_parameters():
            weight.grad.mul_(~frozen.get(name, torch.tensor(False)))
        steps.step()
    torch.testing.assert_close(dict(done.params), dict(oracle.state_dict()), rtol=1e-4, atol=1e-5)


def test_weights_of_layers_are_drawn_at_their_share_and_nothing_else() -> None:
    model = models.build("hlb", classes=10, in_shape=(3, 32, 32), width=8, seed=0)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    drawn = frozen_weights(model, 0.3, generator=generator())
    assert drawn.keys() == {name for name, weight in trained.items() if weight.dim() > 1} < trained.keys()
    every = torch.cat([where.flatten() for where in drawn.values()]).double()
    assert abs(float(every.mean()) - 0.3) < 4 * (0.3 * 0.7 / len(every)) ** 0.5
    assert not any(where.any() for where in frozen_weights(model, 0.0, generator=generator()).values())
    for share in (-0.1, 1.1):
        with pytest.raises(ConfigError, match=rf"share is {share}; expected a number in \[0, 1\]"):
            frozen_weights(model, share, generator=generator())


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (
            {"weight": torch.ones(10, 64, dtype=torch.bool)},
            r"frozen of 'weight' is torch.bool \(10, 64\); expected no par",
        ),
        (
            {"1.weight": torch.ones(64, 10, dtype=torch.bool)},
            r"is torch.bool \(64, 10\); expected torch.bool \(10, 64\)",
        ),
        ({"1.weight": torch.ones(10, 64)}, r"is torch.float32 \(10, 64\); expected torch.bool \(10, 64\)"),
        ({"1.weight": 0.4}, r"'1.weight' is a float; expected torch.bool \(10, 64\)|frozen is a dict"),
    ],
)
def test_masks_that_do_not_fit_are_named(frozen: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        fit(linear(), some_digits(16), recipe=PLAIN, frozen=frozen)


def test_clients_leave_the_same_weights_alone_in_every_round_and_another_seed_leaves_others() -> None:
    task = ClientTask(model="mlp", width=16, init="shared", clients=3, local_epochs=1, frozen_share=0.4)
    start = task.network().state_dict()

    def stayed(task: ClientTask, client: int) -> torch.Tensor:
        done, _ = task.train(client, start)
        return torch.cat([(done.params[k] == start[k]).flatten() for k in start if k.endswith("weight")])

    (one, two, later), other = (
        [stayed(replace(task, server_round=r), client) for r, client in ((1, 0), (1, 2), (2, 1))],
        stayed(replace(task, seed=1), 0),
    )
    same = one & two & later  # weights of pixels that are black in all images stay too
    free, _ = replace(task, frozen_share=0.0).train(0, start)
    dead = torch.cat([(free.params[k] == start[k]).flatten() for k in start if k.endswith("weight")])
    assert torch.equal(one & ~dead, same & ~dead)
    assert 0.3 < float((same & ~dead).double().mean()) < 0.5
    assert not torch.equal(one, other)
    assert ClientTask.from_config(task.to_config()).frozen_share == 0.4
