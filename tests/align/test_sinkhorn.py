"""Sinkhorn re-basin: the layer against POT and finite differences, the costs against their definitions."""

import numpy as np
import ot
import pytest
import torch
from nets import Residual, SelfTied, mlp, noise, plus
from pictures import SHAPE, network, pictures

from fedmerge import align, average, data, evaluate, models, perm_spec, permute, train
from fedmerge.align._sinkhorn import _distance, _unlikeness, sinkhorn, sinkhorn_rebasin
from fedmerge.align.climb import Climb
from fedmerge.align.maps import mix
from fedmerge.errors import ConfigError, DataError, ParamsError, UnknownNameError

RNG = np.random.default_rng


def scores(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def trained(digits: data.Images):
    """An MLP, two state dicts of it trained on disjoint real digits, and public digits."""
    model, found = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0), []
    for i in range(2):
        start = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=i).state_dict()
        part, generator = digits.select(range(i, 800, 2)), torch.Generator().manual_seed(i)
        found.append(train(model, start, part, recipe=models.recipe("mlp"), epochs=10, generator=generator).params)
    return model, *found, digits.select(range(800, 1100))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 10.0])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_the_layer_is_the_plan_of_entropic_transport(n: int, temperature: float) -> None:
    z = scores(n)
    ones = np.ones(n)
    expected = ot.sinkhorn(
        ones, ones, -z.numpy(), temperature, method="sinkhorn_log", numItermax=100_000, stopThr=1e-12
    )
    found = sinkhorn(z / temperature, iterations=10_000)
    torch.testing.assert_close(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(1), torch.ones(n).double())
    torch.testing.assert_close(found.sum(0), torch.ones(n).double(), rtol=1e-5, atol=0)


def test_a_low_temperature_hardens_to_the_best_assignment() -> None:
    z = scores(6)
    hard = torch.from_numpy(ot.emd(np.ones(6), np.ones(6), -z.numpy()))
    gaps = [float((sinkhorn(z / t, 10_000) - hard).abs().max()) for t in (1.0, 0.1, 0.01)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_a_single_iteration_still_gives_rows_that_add_up() -> None:
    torch.testing.assert_close(sinkhorn(10 * scores(5), 1).sum(1), torch.ones(5).double())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_implicit_gradient_is_that_of_finite_differences(n: int) -> None:
    weights = scores(n, 1)
    z = scores(n).requires_grad_()
    # Tighter than the layer's own stop, so that what is differentiated numerically is the fixed point.
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 10_000) * weights, z, eps=1e-3, atol=1e-3, rtol=1e-3)


def test_the_gradient_of_a_nearly_hard_matrix_is_finite_and_small() -> None:
    z = (1000 * torch.eye(5, dtype=torch.float64)).requires_grad_()
    (slope,) = torch.autograd.grad((sinkhorn(z) * scores(5)).sum(), z)
    assert float(slope.abs().max()) < 1e-9


@pytest.mark.parametrize("net", [mlp(4, 6, 5, 3), SelfTied(4)], ids=["mlp", "self-tied"])
def test_the_slope_of_the_distance_is_that_of_finite_differences(net: torch.nn.Module) -> None:
    spec = perm_spec(net, torch.randn(2, 4) if isinstance(net, torch.nn.Sequential) else torch.randn(2, *SHAPE))
    climb = Climb(noise(net.state_dict(), 1), noise(net.state_dict(), 0), spec)

    def distance(z: dict[str, torch.Tensor]) -> torch.Tensor:
        return _distance(climb.a, climb.b, spec, {g: sinkhorn(x, 10_000) for g, x in z.items()})

    z = {g: scores(n).requires_grad_() for g, n in climb.sizes.items()}
    slopes = torch.autograd.grad(distance(z), list(z.values()))
    for (group, x), slope in zip(z.items(), slopes, strict=True):
        towards, step = scores(len(x), 2), 1e-3
        ends = []
        for sign in (-1, 1):
            moved = {g: (y + sign * step * towards if g == group else y).detach() for g, y in z.items()}
            ends.append(float(distance(moved)))
        assert float((slope * towards).sum()) == pytest.approx((ends[1] - ends[0]) / (2 * step), rel=1e-3, abs=1e-3)


def test_the_distance_at_a_permutation_is_a_constant_less_twice_the_objective() -> None:
    net = mlp(4, 6, 5, 3)
    spec = perm_spec(net, torch.randn(2, 4))
    a, b = noise(net.state_dict(), 0), noise(net.state_dict(), 1)
    climb = Climb(b, a, spec)
    constants = []
    for seed in range(3):
        perms = spec.random(torch.Generator().manual_seed(seed))
        maps = {g: torch.eye(len(p), dtype=torch.float64)[p] for g, p in perms.items()}
        moved = permute(b, perms, spec=spec)
        torch.testing.assert_close(mix(climb.b["2.weight"], spec.axes["2.weight"], maps), moved["2.weight"].double())
        constants.append(float(_distance(climb.a, climb.b, spec, maps)) + 2 * climb.objective(perms))
    assert constants == pytest.approx([constants[0]] * 3, rel=1e-12)


def test_a_planted_permutation_of_a_small_network_is_kept_from_the_forward_greedy_start() -> None:
    net = mlp(8, 10, 9, 3)
    spec = perm_spec(net, torch.randn(2, 8))
    truth = noise(net.state_dict(), 0)
    for seed in range(3):
        planted = spec.random(torch.Generator().manual_seed(seed))
        moved = plus(permute(truth, planted, spec=spec), noise(truth, 100 + seed, 0.1))
        found = sinkhorn_rebasin(moved, to=truth, spec=spec, rng=RNG(0), start="forward-greedy", steps=10)
        assert all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in planted)


@pytest.mark.parametrize("cost", ["inner-product", "l2"])
@pytest.mark.parametrize("start", ["barycentre", "identity"])
def test_descent_finds_planted_permutations_and_not_the_start(start: str, cost: str) -> None:
    net = mlp(8, 10, 9, 3)
    spec = perm_spec(net, torch.randn(2, 8))
    truth = noise(net.state_dict(), 0)
    for seed in range(3):
        planted = spec.random(torch.Generator().manual_seed(seed))
        moved = plus(permute(truth, planted, spec=spec), noise(truth, 100 + seed, 0.1))
        found = align(moved, to=truth, spec=spec, method="sinkhorn-rebasin", start=start, cost=cost, steps=40, lr=0.3)
        assert all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in planted)
        assert found.best is not None
        assert found.best > 0
        assert found.history[0] < 0.5 * found.objective == 0.5 * found.history[found.best]


def test_networks_that_share_nothing_are_aligned_better_than_forward_greedy() -> None:
    net = Residual(6, 8, 7)
    spec = perm_spec(net, torch.randn(2, 6))
    greedy, learnt = 0.0, 0.0
    for seed in (0, 2):
        a, b = noise(net.state_dict(), seed), noise(net.state_dict(), 100 + seed)
        greedy += align(b, to=a, spec=spec, method="forward-greedy").objective
        found = align(b, to=a, spec=spec, method="sinkhorn-rebasin", steps=60, lr=0.3)
        assert found.objective == max(found.history) == found.history[found.best] > found.history[0]
        learnt += found.objective
    assert learnt > 1.02 * greedy


@pytest.mark.parametrize("cost", ["midpoint", "random"])
def test_the_midpoint_of_trained_networks_has_a_lower_loss_than_that_of_the_start(trained, cost: str) -> None:
    model, a, b, public = trained
    spec = perm_spec(model, public.normalise(public.images[:2]))
    losses = []
    for method, more in (
        ("forward-greedy", {}),
        ("sinkhorn-rebasin", {"cost": cost, "steps": 60, "model": model, "data": public}),
    ):
        found = align(b, to=a, spec=spec, method=method, **more)
        losses.append(evaluate(model, average([a, permute(b, found.perms, spec=spec)]), public).loss)
    assert losses[1] < 0.8 * losses[0]


def test_the_name_with_midpoint_is_that_cost(trained) -> None:
    model, a, b, public = trained
    spec = perm_spec(model, public.normalise(public.images[:2]))
    one, two = (
        align(b, to=a, spec=spec, method=method, model=model, data=public, steps=4, **more)
        for method, more in (("sinkhorn-rebasin-midpoint", {}), ("sinkhorn-rebasin", {"cost": "midpoint"}))
    )
    assert one.history == two.history
    assert all(torch.equal(one.perms[g], two.perms[g]) for g in one.perms)


def test_halfway_to_a_permuted_copy_the_loss_is_no_higher_than_at_the_network(trained) -> None:
    # It may be lower: the cost is the loss on these images, and another order may serve them better.
    model, a, _, public = trained
    spec = perm_spec(model, public.normalise(public.images[:2]))
    moved = permute(a, spec.random(torch.Generator().manual_seed(0)), spec=spec)
    found = align(moved, to=a, spec=spec, method="sinkhorn-rebasin-midpoint", model=model, data=public, steps=60)
    middle = average([a, permute(moved, found.perms, spec=spec)])
    assert evaluate(model, middle, public).loss <= evaluate(model, a, public).loss
    assert found.best is not None
    assert found.best > 0
    assert found.history[found.best] == found.objective


def test_batch_norm_of_the_line_takes_the_statistics_of_the_batch() -> None:
    model = SelfTied(5)
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    a, b = model.state_dict(), SelfTied(5).state_dict()
    stale = b | {"norm.running_mean": torch.full((5,), 1e3), "norm.running_var": torch.full((5,), 1e-3)}
    one, two = (
        align(m, to=a, spec=spec, method="sinkhorn-rebasin", cost="random", model=model, data=pictures(), steps=5)
        for m in (b, stale)
    )
    assert one.history == two.history


def test_without_a_step_it_is_the_start() -> None:
    net = mlp(4, 6, 5, 3)
    spec = perm_spec(net, torch.randn(2, 4))
    a, b = noise(net.state_dict(), 0), noise(net.state_dict(), 1)
    greedy = align(b, to=a, spec=spec, method="forward-greedy").perms
    for start, expected in (("barycentre", spec.identity()), ("forward-greedy", greedy)):
        found = sinkhorn_rebasin(b, to=a, spec=spec, rng=RNG(0), start=start, steps=0)
        assert all(torch.equal(found.perms[g], expected[g]) for g in expected)
        assert (found.sweeps, found.best, found.converged) == (0, 0, False)


def test_the_inner_product_at_a_permutation_is_the_objective() -> None:
    net = SelfTied(4)
    spec = perm_spec(net, torch.randn(2, *SHAPE))
    a, b = noise(net.state_dict(), 0), noise(net.state_dict(), 1)
    climb, perms = Climb(b, a, spec), spec.random(torch.Generator().manual_seed(0))
    maps = {g: torch.eye(len(p), dtype=torch.float64)[p] for g, p in perms.items()}
    assert -float(_unlikeness(climb.a, climb.b, spec, maps)) == pytest.approx(climb.objective(perms), rel=1e-12)


def test_what_does_not_fit_is_named() -> None:
    model = network("mlp")
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    a = model.state_dict()
    given = {"to": a, "spec": spec, "rng": RNG(0)}
    for options in ({"steps": -1}, {"iterations": 0}, {"lr": 0.0}, {"temperature": 0.0}):
        with pytest.raises(ConfigError, match="expected at least 0, at least 1, at least 1, above 0 and above 0"):
            sinkhorn_rebasin(a, **given, **options)
    with pytest.raises(UnknownNameError, match=r"unknown cost of Sinkhorn re-basin 'midpiont'.*mean 'midpoint'"):
        sinkhorn_rebasin(a, **given, cost="midpiont")
    with pytest.raises(UnknownNameError, match=r"unknown start of Sinkhorn re-basin 'forward'"):
        sinkhorn_rebasin(a, **given, start="forward")
    for cost in ("midpoint", "random"):
        with pytest.raises(
            ParamsError, match="Sinkhorn re-basin on images runs the networks on public images, but data"
        ):
            sinkhorn_rebasin(a, **given, cost=cost, model=model)
    with pytest.raises(DataError, match="pictures holds no images; Sinkhorn re-basin on images needs at least one"):
        sinkhorn_rebasin(a, **given, cost="midpoint", model=model, data=pictures(0))
