"""Cycle-consistent and hierarchical merging."""

import itertools

import numpy as np
import pytest
import torch
from nets import Residual, mlp, noise, plus

from fedmerge import average, merge, perm_spec, permute


def squared(params, spec) -> float:
    return sum(float(params[name].double().square().sum()) for name in spec.parameters)


def tiny(n: int, units: int = 4, seed: int = 0):
    net = mlp(3, units, 2)
    spec = perm_spec(net, torch.randn(2, 3))
    return spec, [noise(net.state_dict(), 10 * seed + i) for i in range(n)]


def planted(n: int, seed: int):
    net = Residual()
    spec = perm_spec(net, torch.randn(2, 20))
    truth = noise(net.state_dict(), seed)
    generator = torch.Generator().manual_seed(seed)
    aligned = [plus(truth, noise(truth, 100 * seed + i + 1)) for i in range(n)]
    return spec, [permute(m, spec.random(generator), spec=spec) for m in aligned], squared(average(aligned), spec)


def best_by_brute_force(models, spec) -> float:
    (group,) = spec.groups
    orders = [torch.tensor(p) for p in itertools.permutations(range(spec.sizes()[group]))]
    moved = [[permute(m, {group: p}, spec=spec) for p in orders] for m in models[1:]]
    return max(squared(average([models[0], *choice]), spec) for choice in itertools.product(*moved))


def test_three_tiny_models_come_within_a_hundredth_of_brute_force_in_most_draws() -> None:
    shares = []
    for seed in range(5):
        spec, models = tiny(3, seed=seed)
        found = merge(models, spec=spec, method="cycle-consistent")
        shares.append(found.objective / best_by_brute_force(models, spec))
    assert max(shares) <= 1 + 1e-6
    assert sum(share > 0.99 for share in shares) >= 4


def test_the_mixtures_objective_never_falls() -> None:
    spec, models = tiny(4, units=6)
    found = merge(models, spec=spec, method="cycle-consistent", polish=False, weights=[1, 2, 3, 4])
    climbed = found.history[:-1]
    assert len(climbed) > 2
    assert all(b >= a - 1e-9 * abs(a) for a, b in itertools.pairwise(climbed))


@pytest.mark.parametrize("reference", [0, 2])
@pytest.mark.parametrize("polish", [True, False])
def test_the_universe_is_the_order_of_the_reference(reference: int, polish: bool) -> None:
    spec, models = tiny(4, units=6)
    found = merge(models, spec=spec, method="cycle-consistent", reference=reference, polish=polish)
    assert all(torch.equal(perm, torch.arange(len(perm))) for perm in found.perms[reference].values())
    moved = [permute(model, perms, spec=spec) for model, perms in zip(models, found.perms, strict=True)]
    torch.testing.assert_close(average(moved), found.params)
    assert squared(found.params, spec) == pytest.approx(found.objective)


def test_going_around_three_models_ends_where_it_began() -> None:
    spec, models, _ = planted(3, 0)
    perms = merge(models, spec=spec, method="cycle-consistent").perms

    def from_to(i: int, j: int, group: str) -> torch.Tensor:
        return perms[i][group][torch.argsort(perms[j][group])]  # unit of i that stands where each unit of j stands

    for group in spec.groups:
        around = from_to(0, 1, group)[from_to(1, 2, group)][from_to(2, 0, group)]
        assert torch.equal(around, torch.arange(len(around)))


@pytest.mark.parametrize("n", [3, 12])
@pytest.mark.parametrize("method", ["cycle-consistent", "hierarchical"])
def test_a_planted_federation_is_found(method: str, n: int) -> None:
    shares = []
    for seed in range(2):
        spec, models, oracle = planted(n, seed)
        shares.append(merge(models, spec=spec, method=method, rng=np.random.default_rng(seed)).objective / oracle)
    assert min(shares) >= 0.99


@pytest.mark.parametrize("method", ["cycle-consistent", "hierarchical"])
def test_the_params_are_the_weighted_mean_of_the_reordered_models(method: str) -> None:
    spec, models, _ = planted(5, 3)
    weights = [1.0, 2, 3, 4, 0]
    found = merge(models, spec=spec, method=method, weights=weights)
    moved = [permute(m, p, spec=spec) for m, p in zip(models, found.perms, strict=True)]
    torch.testing.assert_close(found.params, average(moved, weights), rtol=1e-5, atol=1e-6)
    assert found.objective == pytest.approx(squared(found.params, spec), rel=1e-5)


def test_a_polish_never_lowers_the_squared_norm_of_the_mean() -> None:
    spec, models, _ = planted(4, 1)
    plain, polished = (merge(models, spec=spec, method="cycle-consistent", polish=p) for p in (False, True))
    assert polished.objective >= plain.objective * (1 - 1e-9)


def test_the_tree_has_as_many_levels_as_it_needs() -> None:
    spec, models = tiny(5)
    assert merge(models, spec=spec, method="hierarchical").sweeps == 3  # 5, 3, 2, 1 networks
