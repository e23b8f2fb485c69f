"""Layer-wise matching against all permutations, and the layers that it leaves fixed."""

import itertools

import pytest
import torch
from nets import Residual, mlp, noise

from fedmerge import merge, perm_spec, permute
from fedmerge.merge import layer_wise, stages


def objective(rows: list[torch.Tensor], perms) -> float:
    total = sum(x[list(p)] for x, p in zip(rows, perms, strict=True))
    return float((total * total).sum())


@pytest.mark.parametrize("count", [2, 3])
def test_one_hidden_layer_is_matched_as_well_as_by_trying_all_orders(count: int) -> None:
    model = mlp(6, 4, 3)
    spec = perm_spec(model, torch.randn(2, 6))
    weights = [3.0, 1.0, 2.0][:count]
    for seed in range(10):
        models = [noise(model.state_dict(), 10 * seed + i) for i in range(count)]
        found = layer_wise(models, spec=spec, weights=weights)
        rows = [
            w / sum(weights) * torch.cat([m["0.weight"], m["0.bias"][:, None], m["2.weight"].T], 1).double()
            for m, w in zip(models, weights, strict=True)
        ]
        every = list(itertools.permutations(range(4)))
        (mine,) = zip(*(p.values() for p in found.perms), strict=True)
        mine = [p.tolist() for p in mine]
        assert mine[0] == [0, 1, 2, 3]
        assert found.objective == pytest.approx(objective(rows, mine))
        assert found.converged
        assert found.history[1] >= found.history[0]
        best = max(objective(rows, ([0, 1, 2, 3], *rest)) for rest in itertools.product(every, repeat=count - 1))
        if count == 2:  # one assignment, so the best there is
            assert found.objective == pytest.approx(best)
        for i in range(1, count):  # else no model alone can do better
            assert max(objective(rows, [*mine[:i], p, *mine[i + 1 :]]) for p in every) <= found.objective * (1 + 1e-9)


def test_layers_after_the_first_are_matched_with_their_inputs_in_order() -> None:
    model = mlp(8, 12, 10, 6, 3)
    spec = perm_spec(model, torch.randn(2, 8))
    generator = torch.Generator().manual_seed(0)
    copies = [permute(model.state_dict(), spec.random(generator), spec=spec) for _ in range(4)]
    found = layer_wise(copies, spec=spec, reference=2)
    torch.testing.assert_close(found.params, copies[2], rtol=1e-5, atol=1e-6)


def test_settled_groups_stay_as_they_are() -> None:
    model = mlp(8, 12, 10, 3)
    spec = perm_spec(model, torch.randn(2, 8))
    models = [noise(model.state_dict(), i) for i in range(3)]
    first, second = spec.groups
    found = layer_wise(models, spec=spec, settled=[first])
    assert all(torch.equal(p[first], torch.arange(12)) for p in found.perms)
    assert any(not torch.equal(p[second], torch.arange(10)) for p in found.perms)


def test_parameters_are_fixed_with_their_group_and_the_classifier_last() -> None:
    model = mlp(8, 12, 10, 3)
    found = stages(perm_spec(model, torch.randn(2, 8)), model.state_dict())
    assert [sorted(names) for _, names in found] == [
        ["0.bias", "0.weight"], ["2.bias", "2.weight"], ["4.bias", "4.weight"],
    ]  # fmt: skip
    assert found[-1][0] == ""
    residual = Residual()
    spec = perm_spec(residual, torch.randn(2, 20))
    names = [names for _, names in stages(spec, residual.state_dict())]
    assert [n for stage in names for n in sorted(stage)] != []
    assert frozenset().union(*names) == spec.parameters
    assert sum(map(len, names)) == len(spec.parameters)
    assert "stem.weight" in names[0]
    assert names[-1] == {"head.weight", "head.bias"}


def test_it_is_a_merger_by_name() -> None:
    model = mlp(6, 4, 3)
    spec = perm_spec(model, torch.randn(2, 6))
    models = [noise(model.state_dict(), i) for i in range(3)]
    by_name = merge(models, spec=spec, method="layer-wise", weights=[1, 2, 3])
    torch.testing.assert_close(by_name.params, layer_wise(models, spec=spec, weights=[1, 2, 3]).params)
