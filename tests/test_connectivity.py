import numpy as np
import pytest

from fedmerge import barrier, data, evaluate, interpolate, models, repair
from fedmerge.connectivity import Curve
from fedmerge.errors import ParamsError


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


@pytest.mark.parametrize(
    "alphas", [[1, 0.5, 0], [0.5, 0, 1], [0, 5, 10], [0.25, 0.5, 0.75], [-1, 0.5, 1], [0, np.nan, 1]]
)
def test_a_barrier_is_between_ends_that_are_known(alphas: list[float]) -> None:
    curve = Curve(np.array(alphas, dtype=float), np.array([1.0, 2.5, 2.0]), np.array([0.9, 0.5, 0.8]))
    with pytest.raises(ParamsError, match=f"alphas go from {alphas[0]:g} to {alphas[-1]:g}.*in order, from 0 to 1"):
        barrier(curve)
