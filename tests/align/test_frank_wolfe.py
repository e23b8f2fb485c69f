import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Residual, SelfTied, mlp, noise
from torch import Tensor, nn

from fedmerge import PermSpec, align, perm_spec, permute
from fedmerge.align import frank_wolfe
from fedmerge.align._frank_wolfe import _Relaxed
from fedmerge.align.climb import Climb
from fedmerge.align.maps import mix
from fedmerge.errors import UnknownNameError
from fedmerge.spec.axes import Factor

NETS = {
    "mlp": (lambda: mlp(4, 7, 6, 3), (2, 4)),
    "residual": (lambda: Residual(4, 6, 7), (2, 4)),
    "self-tied": (lambda: SelfTied(5), (2, 3, 4, 4)),
}


@functools.cache
def traced(net: str) -> tuple[nn.Module, PermSpec]:
    build, shape = NETS[net]
    model = build()
    return model, perm_spec(model, torch.randn(shape))


def pair(net: str, seed: int):
    model, spec = traced(net)
    return spec, noise(model.state_dict(), seed), noise(model.state_dict(), seed + 500)


def inner(a: dict[str, Tensor], b: dict[str, Tensor], names: frozenset[str]) -> float:
    return sum(float((a[k].double() * b[k].double()).sum()) for k in names)


def best_of_all(spec: PermSpec, a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The highest objective, by brute force over one group."""
    ((group, n),) = spec.sizes().items()
    every = ({group: torch.tensor(p)} for p in itertools.permutations(range(n)))
    return max(inner(a, permute(b, perms, spec=spec), spec.parameters) for perms in every)


def test_at_permutation_matrices_a_mixture_is_a_reordering() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 3, 3)
            self.c = nn.Linear(7 * 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1).flatten(1))

    net = Net()
    flattened = perm_spec(net, torch.randn(2, 1, 4, 4)), net.state_dict()
    heads = ((Factor("h", 2), Factor("d", 3), Factor(None, 2)),)
    product = PermSpec({"w": (heads, heads)}, {"w": (12, 12)}, frozenset({"w"})), {"w": torch.randn(12, 12)}
    for spec, params in (flattened, product):
        perms = spec.random(torch.Generator().manual_seed(1))
        x = {g: torch.eye(len(p), dtype=torch.float64)[p] for g, p in perms.items()}
        moved = permute(params, perms, spec=spec)
        for name in spec.parameters:
            mixed = mix(params[name].double(), spec.axes[name], x)
            torch.testing.assert_close(mixed, moved[name].double(), rtol=0, atol=0)


def test_one_group_on_one_axis_each_is_solved_exactly_in_one_step() -> None:
    for seed in range(5):
        model = mlp(3, 6, 2)
        spec = perm_spec(model, torch.randn(2, 3))
        a, b = noise(model.state_dict(), seed), noise(model.state_dict(), 100 + seed)
        found = align(b, to=a, spec=spec, method="frank-wolfe")
        assert found.objective == pytest.approx(best_of_all(spec, a, b), rel=1e-12)
        assert (found.sweeps, found.converged) == (1, True)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    net=st.sampled_from(list(NETS)),
    start=st.sampled_from(["barycentre", "identity", "forward-greedy"]),
)
def test_the_relaxed_objective_never_falls(seed: int, net: str, start: str) -> None:
    spec, a, b = pair(net, seed)
    found = frank_wolfe(b, to=a, spec=spec, rng=np.random.default_rng(seed), start=start)
    relaxed = found.history[:-1]
    assert len(relaxed) == found.sweeps + 1
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(relaxed))


def test_mixtures_stay_doubly_stochastic() -> None:
    spec, a, b = pair("self-tied", 0)
    relaxed = _Relaxed(Climb(b, a, spec))
    x, _, _ = relaxed.climb(relaxed.begin("random", np.random.default_rng(0)), 30, 0.0)
    for matrix in x.values():
        assert float(matrix.min()) >= 0
        ones = torch.ones(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(matrix.sum(0), ones)
        torch.testing.assert_close(matrix.sum(1), ones)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_the_step_is_the_best_of_the_whole_segment(degree: int) -> None:
    axis = ((Factor("g", 4),),)
    spec = PermSpec({"w": (axis,) * degree}, {"w": (4,) * degree}, frozenset({"w"}))
    generator = torch.Generator().manual_seed(degree)
    for _ in range(20):
        a, b = ({"w": torch.randn((4,) * degree, generator=generator)} for _ in range(2))
        relaxed = _Relaxed(Climb(b, a, spec))
        x = relaxed.begin("barycentre", np.random.default_rng(0))
        value, gradient = relaxed._slope(x)
        towards = {"g": torch.eye(4, dtype=torch.float64)[torch.randperm(4, generator=generator)] - x["g"]}
        gap = float((gradient["g"] * towards["g"]).sum())
        if gap <= 0:
            continue
        step = relaxed._best_step(x, towards, value, gap)
        reached = relaxed._value({"g": x["g"] + step * towards["g"]})
        grid = [relaxed._value({"g": x["g"] + t * towards["g"]}) for t in np.linspace(0, 1, 101)]
        assert reached >= max(grid) - 1e-9


def test_a_self_tied_group_reaches_brute_force_in_most_draws() -> None:
    hits = 0
    for seed in range(6):
        spec, a, b = pair("self-tied", seed)
        best = best_of_all(spec, a, b)
        found = align(b, to=a, spec=spec, method="frank-wolfe", restarts=10, rng=np.random.default_rng(seed))
        assert found.objective <= best + 1e-9
        hits += found.objective > best - 1e-9
    assert hits > 3


def test_a_bound_on_the_steps_is_told() -> None:
    spec, a, b = pair("residual", 0)
    found = frank_wolfe(b, to=a, spec=spec, rng=np.random.default_rng(0), max_steps=1)
    assert (found.sweeps, found.converged) == (1, False)


def test_unknown_starts_are_named() -> None:
    spec, a, b = pair("mlp", 0)
    with pytest.raises(UnknownNameError, match="unknown start of Frank-Wolfe 'barycenter'.*did you mean 'barycentre'"):
        frank_wolfe(b, to=a, spec=spec, rng=np.random.default_rng(0), start="barycenter")
