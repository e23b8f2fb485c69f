"""Training with channels last in memory is the same training."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn
from trained import PLAIN, fit, generator, linear, some_digits

from fedmerge.dp_sgd import DPSGD
from fedmerge.training import train


def _assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], rtol: float, atol: float) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_channels_last_in_memory_is_the_same_training_but_for_round_off(optimizer: str) -> None:
    data = some_digits(40)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    laid: list[bool] = []
    model[3].register_forward_pre_hook(
        lambda layer, given: laid.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    done = []
    for on in (False, True):
        recipe = replace(PLAIN, optimizer=optimizer, lr=0.01, augment=True, channels_last=on)
        done.append(
            train(model, model.state_dict(), data, recipe=recipe, epochs=2, generator=generator(), optimizer_state={})
        )
    assert laid == [False] * done[0].steps + [True] * done[1].steps
    _assert_same(done[1].params, done[0].params, rtol=1e-4, atol=1e-5)
    assert not all(torch.equal(done[1].params[name], value) for name, value in done[0].params.items())
    assert all(t.is_contiguous() for t in (*done[1].params.values(), *done[1].optimizer_state.values()))
    flat = [fit(linear(), data, recipe=replace(PLAIN, channels_last=on)).params for on in (False, True)]
    _assert_same(*flat, rtol=0, atol=0)  # nothing of it lies in another way


def test_private_training_with_channels_last_takes_the_same_steps() -> None:
    data, model = some_digits(24), nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 10))
    recipes = [replace(PLAIN, channels_last=on) for on in (False, True)]
    a, b = (fit(model, data, recipe=recipe, private=DPSGD(1.0)).params for recipe in recipes)
    _assert_same(a, b, rtol=1e-4, atol=1e-5)
