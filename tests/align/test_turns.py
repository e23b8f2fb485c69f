"""Costs of units that are numbered by several groups, against every order of those that are not known."""

import itertools

import pytest
import torch
from torch import nn

import fedmerge as fm
from fedmerge.align.turns import Compared, least

ORDERS = list(itertools.permutations(range(3)))


def costs(*sizes: int) -> torch.Tensor:
    return torch.rand(*sizes, *sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_factor_that_is_not_known_takes_its_best_order_for_each_pair() -> None:
    c = costs(4, 3)
    expected = [
        [min(sum(float(c[i, k, j, p[k]]) for k in range(3)) / 3 for p in ORDERS) for j in range(4)] for i in range(4)
    ]
    torch.testing.assert_close(least(c.reshape(12, 12), [4, 3], [4, 3], [None]), torch.tensor(expected).double())


def test_a_factor_within_a_factor_is_ordered_from_the_inside_out() -> None:
    c = costs(2, 3, 3)
    inner = torch.tensor(
        [
            [
                [
                    [min(sum(float(c[i, a, k, j, b, p[k]]) for k in range(3)) / 3 for p in ORDERS) for b in range(3)]
                    for a in range(3)
                ]
                for j in range(2)
            ]
            for i in range(2)
        ]
    ).double()
    expected = [
        [min(sum(float(inner[i, j, a, p[a]]) for a in range(3)) / 3 for p in ORDERS) for j in range(2)]
        for i in range(2)
    ]
    found = least(c.reshape(18, 18), [2, 3, 3], [2, 3, 3], [None, None])
    torch.testing.assert_close(found, torch.tensor(expected).double())


def test_a_factor_that_is_known_is_averaged_over_its_plan() -> None:
    c = costs(2, 3)
    plan = torch.tensor([[0.0, 0.3, 0.0], [0.1, 0.0, 0.0], [0.0, 0.0, 0.6]], dtype=torch.float64)
    found = least(c.reshape(6, 6), [2, 3], [2, 3], [plan])
    torch.testing.assert_close(found, torch.einsum("iajb,ab->ij", c, plan))
    both = least(costs(2, 3, 2).reshape(12, 12), [2, 3, 2], [2, 3, 2], [plan, None])
    inner = least(costs(2, 3, 2).reshape(12, 12), [6, 2], [6, 2], [None]).reshape(2, 3, 2, 3)
    assert bool((both >= torch.einsum("iajb,ab->ij", inner, plan) - 1e-12).all())  # one order for all pairs of the plan


@pytest.mark.parametrize("position", [0, 1])
def test_a_group_is_compared_at_any_place_of_a_product_and_alone_if_it_shows_alone(position: int) -> None:
    c = costs(2, 3).reshape(6, 6)
    key = ("h", "d")
    sizes = {"h": 2, "d": 3}
    seen = Compared({key: c}, (sizes, sizes))
    plan = {"d": torch.eye(3, dtype=torch.float64)} if position == 0 else {"h": torch.eye(2, dtype=torch.float64)}
    letters = "iaja->ij" if position == 0 else "aiaj->ij"
    n = 3 - position
    expected = torch.einsum(letters, c.reshape(2, 3, 2, 3)) / (3 if position == 0 else 2)
    torch.testing.assert_close(seen.of(key[position], plan), expected)
    assert seen.of(key[position], {}).shape == (5 - n, 5 - n)
    assert seen.order(["d", "x", "h"]) == ["d", "h"]
    alone = Compared({key: c, ("h",): torch.zeros(2, 2).double()}, (sizes, sizes))
    assert float(alone.of("h", {}).sum()) == 0
    assert alone.order(["d", "h"]) == ["h", "d"]


class Backwards(nn.Module):
    """Layers that are registered in the reverse of the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.norm = nn.Linear(32, 10), nn.BatchNorm1d(32)
        self.second, self.first = nn.Linear(32, 32, bias=False), nn.Linear(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.second(self.first(x).relu())).relu())


class Pooled(nn.Module):
    """Attention with one query of its own: its projections wait for the stream, whose layer comes after them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.attention = nn.Parameter(torch.randn(1, 1, 16)), nn.MultiheadAttention(16, 2, batch_first=True)
        self.embed, self.out = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        found, _ = self.attention(self.query.expand(len(x), -1, -1), x, x, need_weights=False)
        return self.out(found[:, 0].relu())


@pytest.mark.parametrize("method", ["optimal-transport", "forward-greedy"])
@pytest.mark.parametrize(("make", "shape"), [(Backwards, (2, 8)), (Pooled, (2, 5, 8))])
def test_a_planted_order_is_found_whatever_the_layers_were_registered_as(method: str, make, shape) -> None:
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():  # no two units are alike, but their biases and norms alone do not tell them apart
        for parameter in net.parameters():
            parameter.copy_(parameter.round(decimals=1) if parameter.dim() == 1 else torch.randn_like(parameter))
    spec = fm.perm_spec(net, torch.randn(shape))
    planted = spec.random(torch.Generator().manual_seed(1))
    moved = fm.permute(net.state_dict(), planted, spec=spec)
    found = fm.align(moved, to=net.state_dict(), spec=spec, method=method)
    for group, order in planted.items():
        assert torch.equal(order[found.perms[group]], torch.arange(len(order))), group
