import functools
import itertools

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Residual, mlp, noise, plus
from pictures import SHAPE, network, pictures
from scipy.optimize import linear_sum_assignment, linprog
from scipy.spatial.distance import cdist
from torch import nn

from fedmerge import PermSpec, align, perm_spec, permute
from fedmerge.align import optimal_transport
from fedmerge.align.transport import Transport, _Products
from fedmerge.errors import ConfigError, DataError, ParamsError, UnknownNameError

RNG = np.random.default_rng


def transport_cost(distances: np.ndarray) -> float:
    """Exact optimal transport between uniform masses, as the linear program that defines it."""
    n = len(distances)
    rows = np.kron(np.eye(n), np.ones(n))
    columns = np.kron(np.ones(n), np.eye(n))
    solved = linprog(distances.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.full(2 * n, 1 / n), bounds=(0, None))
    return float(solved.fun)


@functools.cache
def traced(n: int) -> tuple[nn.Module, PermSpec]:
    net = mlp(4, n, 2)
    return net, perm_spec(net, torch.randn(2, 4))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 7), squared=st.booleans(), normalise=st.booleans())
def test_transport_between_uniform_masses_is_an_assignment(seed: int, n: int, squared: bool, normalise: bool) -> None:
    net, spec = traced(n)
    a, b = noise(net.state_dict(), seed), noise(net.state_dict(), seed + 1)
    found = optimal_transport(b, to=a, spec=spec, rng=np.random.default_rng(0), squared=squared, normalise=normalise)

    def units(params: dict[str, torch.Tensor]) -> np.ndarray:
        rows = np.column_stack([params["0.weight"], params["0.bias"]]).astype(np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True) if normalise else rows

    distances = np.linalg.norm(units(a)[:, None] - units(b)[None], axis=-1) ** (2 if squared else 1)
    cost = distances[np.arange(n), found.perms["0"]].mean() if spec.groups else distances.mean()
    assert cost == pytest.approx(transport_cost(distances), rel=1e-8)


def test_outgoing_weights_have_no_say() -> None:
    net = mlp(4, 6, 5, 3)
    spec = perm_spec(net, torch.randn(2, 4))
    a, b = noise(net.state_dict(), 0), noise(net.state_dict(), 1)
    other = b | {"4.weight": noise(b, 2)["4.weight"]}
    one, two = (align(m, to=a, spec=spec, method="optimal-transport") for m in (b, other))
    assert all(torch.equal(one.perms[g], two.perms[g]) for g in one.perms)


def test_normalised_units_match_by_direction() -> None:
    net = mlp(4, 6, 3)
    spec = perm_spec(net, torch.randn(2, 4))
    a = noise(net.state_dict(), 0)
    scale = torch.linspace(0.01, 100, 6)
    b = a | {"0.weight": a["0.weight"] * scale[:, None], "0.bias": a["0.bias"] * scale}
    moved = permute(b, {"0": torch.tensor([3, 1, 5, 0, 2, 4])}, spec=spec)
    found = optimal_transport(moved, to=a, spec=spec, rng=np.random.default_rng(0), normalise=True)
    assert found.perms["0"].tolist() == torch.argsort(torch.tensor([3, 1, 5, 0, 2, 4])).tolist()


def test_units_without_weights_do_not_divide_by_zero() -> None:
    net = mlp(4, 5, 3)
    spec = perm_spec(net, torch.randn(2, 4))
    a = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    found = optimal_transport(a, to=a, spec=spec, rng=np.random.default_rng(0), normalise=True)
    assert found.objective == 0


def test_planted_permutations_of_a_noisy_residual_net_are_recovered_in_most_of_20_draws() -> None:
    net = Residual()
    spec = perm_spec(net, torch.randn(2, 20))
    truth = noise(net.state_dict(), 0)
    recovered = 0
    for seed in range(20):
        planted = spec.random(torch.Generator().manual_seed(seed))
        moved = plus(permute(truth, planted, spec=spec), noise(truth, 1000 + seed))
        found = align(moved, to=truth, spec=spec, method="optimal-transport")
        recovered += all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in planted)
    assert recovered >= 18


def incoming(params: dict[str, torch.Tensor]) -> np.ndarray:
    """Incoming weights of the units of the first layer, bias included."""
    return np.column_stack([params["0.weight"], params["0.bias"]]).astype(np.float64)


def test_costs_are_the_distances_of_scipy() -> None:
    a, b = (torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (4, 6))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a.numpy(), b.numpy())]
    for options, expected in (
        ({}, cdist(a, b)),
        ({"squared": True}, cdist(a, b, "sqeuclidean")),
        ({"normalise": True}, cdist(*unit)),
        ({"normalise": True, "squared": True}, cdist(*unit, "sqeuclidean")),
        ({"metric": "cosine"}, cdist(a, b, "cosine")),
        ({"metric": "cosine", "squared": True, "normalise": True}, cdist(a, b, "cosine")),
    ):
        np.testing.assert_allclose(Transport(**options).distances(a, b).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_costs_from_batches_are_those_of_all_samples_at_once(
    metric: str, normalise: bool, squared: bool, centre: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 50, dtype=torch.float64, generator=generator) + 0.5 for n in (4, 6))
    a[1] = 0  # a unit that is silent
    transport = Transport(metric=metric, normalise=normalise, squared=squared, centre=centre)
    products = _Products(4, 6, "cpu")
    for left, right in zip(a.split(7, 1), b.split(7, 1), strict=True):
        products.add(left, right)
    if centre:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    torch.testing.assert_close(products.distances(transport), transport.distances(a, b), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("scale", "of"),
    [
        ("max", lambda d: d / d.max()),
        ("mean", lambda d: d / d.mean()),
        ("median", lambda d: d / np.median(d)),
        ("log", np.log1p),
        ("none", lambda d: d),
    ],
)
@pytest.mark.parametrize("clip", [None, (0.1, 1.5)])
def test_the_plan_is_that_of_pot_on_the_scaled_and_clipped_cost(scale: str, of, clip) -> None:
    distances = np.abs(RNG(0).normal(size=(4, 6))) + 0.1
    mu, nu = ot.unif(4), RNG(1).dirichlet(np.ones(6))
    cost = of(distances)
    if clip is not None:
        cost = np.clip(cost, 0.5 * clip[0], 0.5 * clip[1])
    for solver, expected in (
        ("exact", ot.emd(mu, nu, cost)),
        ("sinkhorn", ot.sinkhorn(mu, nu, cost, 0.5, numItermax=10_000)),
        ("unbalanced", ot.unbalanced.sinkhorn_unbalanced(mu, nu, cost, 0.5, 2.0, numItermax=10_000)),
    ):
        transport = Transport(solver, 0.5, 2.0, mass="norm", cost_scale=scale, clip=clip)
        found = transport.plan(torch.from_numpy(distances), mu, nu).numpy()
        if solver == "exact":  # clipped costs have ties, and so several plans
            assert (found * cost).sum() == pytest.approx((expected * cost).sum(), rel=1e-9)
            np.testing.assert_allclose(found.sum(1), mu)
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-8)


def test_masses_are_in_proportion_to_the_norms_of_incoming_weights() -> None:
    weights = torch.tensor([[3.0, -4.0], [1.0, 0.0]]).double()
    np.testing.assert_allclose(Transport().masses(weights), [1 / 2, 1 / 2])
    np.testing.assert_allclose(Transport(mass="norm").masses(weights), [5 / 6, 1 / 6])
    np.testing.assert_allclose(Transport(mass="norm-l1").masses(weights), [7 / 8, 1 / 8])
    np.testing.assert_allclose(Transport(mass="norm").masses(torch.zeros(4, 0)), [1 / 4] * 4)


@pytest.mark.parametrize("mass", ["uniform", "norm"])
@pytest.mark.parametrize("solver", ["exact", "sinkhorn", "unbalanced"])
def test_soft_plans_harden_to_the_permutation_that_carries_most_mass(solver: str, mass: str) -> None:
    net, spec = traced(7)
    for seed in range(5):
        a, b = noise(net.state_dict(), seed), noise(net.state_dict(), 100 + seed)
        cost = cdist(incoming(a), incoming(b))
        mu, nu = (np.linalg.norm(incoming(m), axis=1) ** (mass == "norm") for m in (a, b))
        mu, nu = mu / mu.sum(), nu / nu.sum()
        scaled = cost / cost.max()
        plan = {
            "exact": lambda mu=mu, nu=nu, cost=cost: ot.emd(mu, nu, cost),
            "sinkhorn": lambda mu=mu, nu=nu, cost=scaled: ot.sinkhorn(mu, nu, cost, 0.05, numItermax=10_000),
            "unbalanced": lambda mu=mu, nu=nu, cost=scaled: ot.unbalanced.sinkhorn_unbalanced(
                mu, nu, cost, 0.05, 3.0, numItermax=10_000
            ),
        }[solver]()
        found = optimal_transport(
            b, to=a, spec=spec, rng=RNG(0), solver=solver, mass=mass, regularisation=0.05, marginal_relaxation=3.0
        )
        assert found.perms["0"].tolist() == linear_sum_assignment(plan, maximize=True)[1].tolist()


def test_each_choice_can_change_the_permutation() -> None:
    net, spec = traced(40)
    a, b = noise(net.state_dict(), 0), noise(net.state_dict(), 1)
    choices = (
        {}, {"squared": True}, {"metric": "cosine"}, {"normalise": True}, {"cost_scale": "log"},
        {"clip": (0, 20)}, {"mass": "norm"}, {"mass": "norm-l1"}, {"solver": "sinkhorn", "regularisation": 0.5},
        {"solver": "unbalanced", "marginal_relaxation": 0.01},
    )  # fmt: skip
    found = [optimal_transport(b, to=a, spec=spec, rng=RNG(0), **each).perms["0"] for each in choices]
    for one, two in itertools.combinations(range(len(found)), 2):
        assert not torch.equal(found[one], found[two]), (choices[one], choices[two])


def test_activations_are_matched_by_their_distances_layer_by_layer_without_carrying() -> None:
    model = network("mlp")
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    a, b = (noise(model.state_dict(), seed, 0.3) for seed in (0, 1))
    data = pictures(30)
    x = data.normalise(data.images).flatten(1).double().numpy()

    def responses(params: dict[str, torch.Tensor]) -> list[np.ndarray]:
        w = {k: v.double().numpy() for k, v in params.items()}
        first = x @ w["1.0.weight"].T + w["1.0.bias"]
        return [first.T, (np.maximum(first, 0) @ w["1.2.weight"].T + w["1.2.bias"]).T]

    found = align(
        b, to=a, spec=spec, method="optimal-transport-activations", model=model, data=data, batch_size=7
    ).perms
    for group, one, two in zip(spec.groups, responses(a), responses(b), strict=True):
        assert found[group].tolist() == linear_sum_assignment(cdist(one, two))[1].tolist()


@pytest.mark.parametrize("name", ["one-layer", "mlp", "residual", "self-tied"])
@pytest.mark.parametrize("options", [{}, {"metric": "cosine"}, {"solver": "sinkhorn", "mass": "norm"}])
def test_activations_undo_planted_permutations_of_every_group(name: str, options: dict[str, str]) -> None:
    model = network(name)
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    truth = {k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in noise(model.state_dict(), 0).items()}
    for seed in range(3):
        planted = spec.random(torch.Generator().manual_seed(seed))
        found = optimal_transport(
            permute(truth, planted, spec=spec), to=truth, spec=spec, rng=RNG(0), ground="activations", model=model,
            data=pictures(), **options,
        )  # fmt: skip
        assert all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in planted)


def test_what_cannot_be_transported_is_named() -> None:
    model = network("mlp")
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    a = model.state_dict()
    given = {"to": a, "spec": spec, "rng": RNG(0)}
    for option, wrong, near in (
        ("ground", "activation", "activations"), ("solver", "exakt", "exact"), ("mass", "norm-l2", "norm-l1"),
        ("metric", "euclid", "euclidean"), ("cost_scale", "logs", "log"),
    ):  # fmt: skip
        with pytest.raises(
            UnknownNameError, match=rf"unknown {option} of optimal transport '{wrong}'.*did you mean '{near}'"
        ):
            optimal_transport(a, **given, **{option: wrong})
    with pytest.raises(ConfigError, match=r"regularisation is 0 and marginal_relaxation 1.0; both must be above 0"):
        optimal_transport(a, **given, regularisation=0)
    with pytest.raises(ConfigError, match=r"clip is \(2, 1\); expected \(low, high\) with 0 <= low < high"):
        optimal_transport(a, **given, clip=(2, 1))
    with pytest.raises(ParamsError, match="optimal transport on activations runs the networks on public images, but"):
        optimal_transport(a, **given, ground="activations")
    with pytest.raises(DataError, match="pictures holds no images"):
        optimal_transport(a, **given, ground="activations", model=model, data=pictures(0))
    huge = {k: v * 1e30 for k, v in a.items()}
    with pytest.raises(ParamsError, match="activations of group '.*' on pictures are not finite; leave that model out"):
        optimal_transport(huge, **given, ground="activations", model=model, data=pictures())
