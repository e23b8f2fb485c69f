"""Learned curves against Bernstein polynomials, straight pieces, and the line that they begin at."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BPoly

import fedmerge as fm
from fedmerge.curves import _Path, mixture
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError

SHAPE = {"classes": 10, "in_shape": (1, 8, 8), "width": 16}


@pytest.fixture(scope="module")
def pair(digits: Images):
    """Two networks of 16 units a layer, trained apart, and the images."""
    part, found = digits.select(range(400)), []
    for seed in (0, 1):
        model = fm.models.build("mlp", seed=seed, **SHAPE)
        generator = torch.Generator().manual_seed(seed)
        recipe = fm.models.recipe("mlp")
        found.append(fm.train(model, model.state_dict(), part, recipe=recipe, epochs=15, generator=generator).params)
    return model, *found, part


@pytest.mark.parametrize("points", [2, 3, 5])
def test_the_shares_of_control_points_are_those_of_the_textbooks(points: int) -> None:
    for t in np.linspace(0, 1, 7):
        values = np.arange(points) ** 2.0
        expected = BPoly(values[:, None], [0, 1])(t)
        assert np.dot(mixture("bezier", points, t), values) == pytest.approx(float(expected))
        expected = np.interp(t, np.linspace(0, 1, points), values)
        assert np.dot(mixture("chain", points, t), values) == pytest.approx(float(expected))


@pytest.mark.parametrize("kind", ["bezier", "chain"])
def test_a_trained_curve_stays_below_the_line_that_it_began_at(kind: str, pair) -> None:
    model, a, b, part = pair
    line = fm.interpolate(model, a, b, part, points=9)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    found = fm.curve(
        model,
        a,
        b,
        part,
        recipe=fm.models.recipe("mlp"),
        epochs=20,
        generator=torch.Generator().manual_seed(0),
        kind=kind,
    )
    along = fm.interpolate(model, a, b, part, points=9, along=found.at)
    assert fm.barrier(line).loss > 0.5
    assert fm.barrier(along).loss < 0.2 * fm.barrier(line).loss
    assert along.losses.max() < line.losses.max()
    assert all(torch.equal(found.at(t)[n], p[n]) for t, p in ((0.0, a), (1.0, b)) for n in a)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())


def test_no_epochs_leave_the_straight_line_and_a_seed_its_bytes(pair) -> None:
    model, a, b, part = pair

    def learned(epochs: int, bends: int = 2) -> fm.LearnedCurve:
        generator = torch.Generator().manual_seed(3)
        return fm.curve(
            model, a, b, part, recipe=fm.models.recipe("mlp"), epochs=epochs, generator=generator, bends=bends
        )

    straight = learned(0)
    for t in (0.2, 0.5, 0.9):
        torch.testing.assert_close(straight.at(t), fm.average([a, b], [1 - t, t]), rtol=1e-5, atol=1e-6)
    network = fm.models.build("mlp", seed=5, **SHAPE)
    own = fm.curve(
        model, network.state_dict(), b, part, recipe=fm.models.recipe("mlp"), epochs=0, generator=torch.Generator()
    )
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.load_state_dict(b)
    torch.testing.assert_close(own.at(0.0), before, rtol=0, atol=0)
    once, twice = learned(1).at(0.4), learned(1).at(0.4)
    assert all(torch.equal(once[n], twice[n]) for n in once)


def test_what_makes_no_curve_is_refused(pair) -> None:
    model, a, b, part = pair
    given = {"recipe": fm.models.recipe("mlp"), "epochs": 0, "generator": torch.Generator()}
    with pytest.raises(ConfigError, match="kind 'spline' with 1 bends; expected 'bezier' or 'chain'"):
        fm.curve(model, a, b, part, kind="spline", **given)
    with pytest.raises(ConfigError, match="with 0 bends"):
        fm.curve(model, a, b, part, bends=0, **given)
    with pytest.raises(ConfigError, match=r"t is 1.5; expected a number in \[0, 1\]"):
        fm.LearnedCurve("chain", (a, b)).at(1.5)


def test_a_trained_simplex_is_low_all_over_and_leaves_what_it_began_at_alone(pair) -> None:
    model, a, b, part = pair
    starts, before = [a, b, fm.average([a, b])], {name: t.clone() for name, t in a.items()}
    line = fm.interpolate(model, a, b, part, points=9)
    found = fm.subspace(
        model, starts, part, recipe=fm.models.recipe("mlp"), epochs=25, generator=torch.Generator().manual_seed(0)
    )
    rng = np.random.default_rng(1)
    inside = [found.at(list(rng.dirichlet(np.ones(3)))) for _ in range(6)]
    assert max(fm.evaluate(model, params, part).loss for params in [*inside, found.at()]) < 0.3 * line.losses.max()
    assert found.losses[-1] < 0.3 * found.losses[0]
    torch.testing.assert_close(found.at([0, 1, 0]), dict(found.vertices[1]), rtol=0, atol=0)
    assert all(torch.equal(a[name], t) for name, t in before.items())
    with pytest.raises(ConfigError, match="begins at 2 networks or more; 1 were given"):
        fm.subspace(model, [a], part, recipe=fm.models.recipe("mlp"), epochs=1, generator=torch.Generator())


def test_a_curve_trained_on_attacked_images_withstands_the_attack_at_its_bend(pair) -> None:
    model, a, b, part = pair
    attack = fm.PGD(epsilon=24, steps=5)
    robust = []
    for trained_by in (None, attack):
        generator = torch.Generator().manual_seed(0)
        found = fm.curve(
            model, a, b, part, recipe=fm.models.recipe("mlp"), epochs=20, generator=generator, attack=trained_by
        )
        robust.append(fm.interpolate(model, a, b, part, points=9, along=found.at, attack=attack))
    clean, hard = robust
    middle = slice(3, 6)
    assert (hard.accuracies[middle] >= clean.accuracies[middle]).all()
    assert hard.accuracies[4] > clean.accuracies[4] + 0.05
    ends = [0, -1]  # which are not trained
    assert hard.accuracies[ends].tolist() == clean.accuracies[ends].tolist()
    plain = fm.interpolate(model, a, b, part, points=9, along=found.at)
    assert (plain.losses < hard.losses).all()


def test_a_batch_is_attacked_at_the_point_of_the_curve_that_it_is_used_at(pair) -> None:
    model, a, b, _ = pair
    path = _Path(model, (a, fm.average([a, b]), b), "bezier", seed=0, passes=3)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    said = [path(x) for _ in range(6)]
    assert torch.equal(said[0], said[2])
    assert torch.equal(said[3], said[5])
    assert not torch.equal(said[2], said[3])


def test_ends_of_other_floats_are_mixed_as_the_network_computes_and_answered_as_they_came(pair) -> None:
    model, a, b, part = pair
    given = {"recipe": fm.models.recipe("mlp"), "epochs": 1, "generator": torch.Generator()}
    double = {name: tensor.double() for name, tensor in b.items()}
    for start in (a, double):
        found = fm.curve(model, start, double, part, **given)
        assert [point["out.bias"].dtype for point in found.points[1:]] == [start["out.bias"].dtype, torch.float64]
        vertices = fm.subspace(model, [start, double], part, **given).vertices
        assert [point["out.bias"].dtype for point in vertices] == [start["out.bias"].dtype, torch.float64]


def test_images_that_do_not_fit_are_held_against_the_network_by_its_name(pair) -> None:
    model, a, b, part = pair
    large = fm.data.Images(
        torch.zeros(4, 1, 9, 9, dtype=torch.uint8), part.labels[:4], part.classes, (0,), (1,), "large"
    )
    with pytest.raises(DataError, match=r"^MLP does not take the images of large, \(1, 9, 9\) each"):
        fm.curve(model, a, b, large, recipe=fm.models.recipe("mlp"), epochs=1, generator=torch.Generator())


@pytest.mark.parametrize(
    ("kind", "points", "said"),
    [
        ("bezier", 5, "the points 5"),
        ("chain", "ab", "the points 'ab'"),
        ("chain", ({},), "1 points"),
        ("arc", ({}, {}), ""),
    ],
)
def test_a_curve_that_is_none_is_named(kind: str, points, said: str) -> None:
    with pytest.raises(ConfigError, match=f"a curve of kind '{kind}' with {said}.*expected 'bezier' or 'chain'"):
        fm.LearnedCurve(kind, points)
