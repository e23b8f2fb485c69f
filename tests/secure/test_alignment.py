"""Alignment from sums alone: what it finds, and what it is given."""

import numpy as np
import pytest
import torch
from nets import Residual
from torch import Tensor, nn

import fedmerge as fm
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.secure import Total, merge_by_sums, to_others
from fedmerge.streams import torch_stream


def planted(n: int, seed: int, noise: float):
    """One random network; a public anchor that is it with so much ``noise``; ``n`` clients that are it with noise of its
    own size, each in an order of its own; and the objective of the true orders.
    """
    rng = torch_stream(seed, "planted", n)
    net = Residual()
    spec = fm.perm_spec(net, torch.randn(2, 20))
    truth = {name: torch.randn(t.shape, generator=rng) for name, t in net.state_dict().items()}

    def noisy(size: float) -> dict[str, Tensor]:
        return {name: t + size * torch.randn(t.shape, generator=rng) for name, t in truth.items()}

    anchor, ordered = noisy(noise), [noisy(1.0) for _ in range(n)]
    clients = [fm.permute(m, spec.random(rng), spec=spec) for m in ordered]
    return spec, anchor, clients, sum(float(t.double().square().sum()) for t in fm.average(ordered).values())


def test_twelve_planted_networks_reach_the_oracle_after_two_sums_though_the_anchor_is_worse_than_they_are() -> None:
    spec, anchor, clients, oracle = planted(12, seed=0, noise=1.4)
    found = merge_by_sums(clients, anchor=anchor, spec=spec, restarts=3)
    first, second = found.history
    assert first < 0.95 * oracle
    assert second >= 0.99 * oracle
    assert found.objective == second
    ordered = [fm.permute(m, perms, spec=spec) for m, perms in zip(clients, found.perms, strict=True)]
    for name, tensor in fm.average(ordered).items():
        torch.testing.assert_close(found.params[name], tensor, rtol=0, atol=1e-6)


def test_a_sum_that_is_no_better_does_not_replace_the_one_before() -> None:
    spec, anchor, clients, _ = planted(2, seed=1, noise=3.0)  # each of two moves to where the other was
    found = merge_by_sums(clients, anchor=anchor, spec=spec, restarts=1, sums=4)
    assert found.objective == max(found.history)
    ordered = [fm.permute(m, perms, spec=spec) for m, perms in zip(clients, found.perms, strict=True)]
    mean = fm.average(ordered)
    assert found.objective == pytest.approx(sum(float(t.double().square().sum()) for t in mean.values()), rel=1e-6)


def test_the_sum_less_its_own_is_the_mean_of_the_others() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    spec, own = fm.perm_spec(net, torch.zeros(2, 4)), net.state_dict()
    other = {name: t + 1 if t.is_floating_point() else t for name, t in own.items()}
    moved = fm.permute(other, spec.random(torch.Generator().manual_seed(3)), spec=spec)
    weights = [3, 7]
    total = Total(fm.average([own, moved], weights), 10)
    step = to_others(own, total, 3, spec=spec, rng=np.random.default_rng(0))
    expected = fm.align(own, moved, spec=spec)
    assert {g: p.tolist() for g, p in step.items()} == {g: p.tolist() for g, p in expected.perms.items()}


def test_networks_that_do_not_fit_the_anchor_or_a_sum_of_one_are_refused() -> None:
    spec, anchor, clients, _ = planted(2, seed=0, noise=1.0)
    with pytest.raises(ParamsError, match=r"model 1 lacks tensor 'stem.bias'"):
        merge_by_sums([clients[1], {k: v for k, v in clients[0].items() if k != "stem.bias"}], anchor=anchor, spec=spec)
    with pytest.raises(ConfigError, match="a masked sum of 1 clients"):
        merge_by_sums(clients[:1], anchor=anchor, spec=spec)


def test_one_sum_is_the_mean_of_what_is_aligned_to_the_anchor() -> None:
    spec, anchor, clients, _ = planted(3, seed=0, noise=1.0)
    found = merge_by_sums(clients, anchor=anchor, spec=spec, restarts=1, sums=1)
    assert (len(found.history), found.sweeps, found.converged) == (1, 1, False)
    assert found.objective == merge_by_sums(clients, anchor=anchor, spec=spec, restarts=1, sums=2).history[0]


def test_weights_that_are_no_whole_numbers_and_less_than_one_sum_are_refused() -> None:
    spec, anchor, clients, _ = planted(2, seed=0, noise=1.0)
    for weights in ([1, 2, 3], [1.5, 2], [0, 1], [-1, 2]):
        with pytest.raises(ParamsError, match=r"weights \[.*\] of 2 terms of a masked sum; give whole numbers from 1"):
            merge_by_sums(clients, anchor=anchor, spec=spec, weights=weights)
    with pytest.raises(ConfigError, match="sums is 0; expected a number of 1 or above"):
        merge_by_sums(clients, anchor=anchor, spec=spec, sums=0)
