import numpy as np
import pytest
import torch
from torch import nn

from fedmerge import barrier, data, evaluate, interpolate, models, perm_spec, permute, repair
from fedmerge.connectivity import Curve
from fedmerge.errors import ParamsError


class Counterexample(nn.Module):
    """The two-layer network of Git Re-Basin, Sec. 5: no permutation connects its two solutions."""

    def __init__(self, a: bool) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1, bias=False)
        state = {
            "one.weight": [[-1.0, 0], [0, -1]] if a else [[1.0, 0], [0, 1]],
            "one.bias": [1.0, 0] if a else [0.0, 1],
            "two.weight": [[-1.0, 0], [0, 1]] if a else [[1.0, 0], [0, -1]],
            "two.bias": [1.0, 0] if a else [0.0, 1],
            "out.weight": [[-1.0, -1]],
        }
        self.load_state_dict({k: torch.tensor(v) for k, v in state.items()})

    def forward(self, x):
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))))


def test_the_counterexample_has_no_permutation_with_a_good_midpoint() -> None:
    a, b = Counterexample(True), Counterexample(False)
    spec = perm_spec(a, torch.randn(4, 2))
    assert sorted(spec.sizes().values()) == [2, 2]
    x = torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = (x[:, 0] < 0) & (x[:, 1] > 0)

    def accuracy(state) -> float:
        with torch.no_grad():
            return float(((torch.func.functional_call(a, state, (x,))[:, 0] >= 0) == y).float().mean())

    assert accuracy(a.state_dict()) == pytest.approx(1.0, abs=1e-3)
    assert accuracy(b.state_dict()) == pytest.approx(1.0, abs=1e-3)
    for first in ([0, 1], [1, 0]):
        for second in ([0, 1], [1, 0]):
            perms = dict(zip(spec.groups, map(torch.tensor, (first, second)), strict=True))
            moved = permute(b.state_dict(), perms, spec=spec)
            middle = {k: (v + moved[k]) / 2 for k, v in a.state_dict().items()}
            assert 0.74 < accuracy(middle) < 0.76


@pytest.fixture(scope="module")
def net():
    return models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)


def test_the_ends_of_the_line_are_the_two_networks(net, digits: data.Images) -> None:
    part = digits.select(range(200))
    other = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=1)
    curve = interpolate(net, net.state_dict(), other.state_dict(), part, points=3)
    for i, params in ((0, net.state_dict()), (2, other.state_dict())):
        found = evaluate(net, params, part)
        assert curve.losses[i] == pytest.approx(found.loss)
        assert curve.accuracies[i] == found.accuracy
    assert curve.alphas.tolist() == [0.0, 0.5, 1.0]


def test_interior_points_may_be_corrected(net, digits: data.Images) -> None:
    part = digits.select(range(100))
    seen = []

    def correct(params):
        seen.append(params)
        return repair(net, params, data=part, method="none")

    interpolate(net, net.state_dict(), net.state_dict(), part, points=4, correct=correct)
    assert len(seen) == 2


def test_both_chords_of_a_barrier() -> None:
    curve = Curve(np.array([0.0, 0.5, 1.0]), np.array([1.0, 4.0, 3.0]), np.array([0.9, 0.5, 0.7]))
    found = barrier(curve)
    assert found.loss == pytest.approx(2.0)
    assert found.loss_above_mean == pytest.approx(2.0)
    assert found.error == pytest.approx(0.3)
    slanted = Curve(np.array([0.0, 0.5, 1.0]), np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 1.0]))
    assert barrier(slanted).loss == pytest.approx(0.0)
    assert barrier(slanted).loss_above_mean == pytest.approx(1.0)


def test_a_line_needs_two_points(net, digits: data.Images) -> None:
    with pytest.raises(ParamsError, match="points=1 makes no line; give at least 2"):
        interpolate(net, net.state_dict(), net.state_dict(), digits, points=1)
