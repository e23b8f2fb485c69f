import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Residual, mlp, noise, plus
from scipy.optimize import linprog
from torch import nn

from fedmerge import PermSpec, align, perm_spec, permute
from fedmerge.align import optimal_transport


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
