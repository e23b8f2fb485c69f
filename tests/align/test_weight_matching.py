import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Residual, SelfTied, mlp, noise, plus
from torch import Tensor, nn

from fedmerge import PermSpec, align, aligners, perm_spec, permute
from fedmerge.align import weight_matching
from fedmerge.errors import ParamsError, UnknownNameError


def inner(a: dict[str, Tensor], b: dict[str, Tensor], names: frozenset[str]) -> float:
    """Sum over parameters of <a, b> in float64: an independent value of the objective."""
    return sum(float((a[k].double() * b[k].double()).sum()) for k in names)


def every_perms(spec):
    """All combinations of permutations of all groups."""
    sizes = spec.sizes()
    for chosen in itertools.product(*(itertools.permutations(range(n)) for n in sizes.values())):
        yield {g: torch.tensor(p) for g, p in zip(sizes, chosen, strict=True)}


def test_one_hidden_layer_reaches_the_best_of_all_permutations() -> None:
    for seed in range(5):
        net = mlp(3, 6, 2)
        spec = perm_spec(net, torch.randn(2, 3))
        a, b = noise(net.state_dict(), seed), noise(net.state_dict(), 100 + seed)
        found = align(b, to=a, spec=spec)
        best = max(inner(a, permute(b, p, spec=spec), spec.parameters) for p in every_perms(spec))
        assert found.objective == pytest.approx(best, rel=1e-12)
        assert found.converged


def test_one_hidden_layer_undoes_a_planted_permutation() -> None:
    net = mlp(5, 40, 3)
    spec = perm_spec(net, torch.randn(2, 5))
    planted = spec.random(torch.Generator().manual_seed(3))
    moved = permute(net.state_dict(), planted, spec=spec)
    found = align(moved, to=net.state_dict(), spec=spec)
    assert torch.equal(found.perms["0"], torch.argsort(planted["0"]))
    torch.testing.assert_close(permute(moved, found.perms, spec=spec), dict(net.state_dict()), rtol=0, atol=0)


def test_planted_permutations_of_a_noisy_residual_net_are_recovered_in_most_of_40_draws() -> None:
    net = Residual()
    spec = perm_spec(net, torch.randn(2, 20))
    truth = noise(net.state_dict(), 0)
    recovered = 0
    for seed in range(40):
        planted = spec.random(torch.Generator().manual_seed(seed))
        moved = plus(permute(truth, planted, spec=spec), noise(truth, 1000 + seed))
        found = align(moved, to=truth, spec=spec, rng=np.random.default_rng(seed))
        recovered += all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in planted)
    assert recovered >= 36  # one start of the plain climb recovers 12 to 31


@functools.cache
def traced(net: str) -> tuple[nn.Module, PermSpec]:
    model, x = {
        "mlp": (mlp(4, 7, 6, 3), torch.randn(2, 4)),
        "residual": (Residual(4, 6, 7), torch.randn(2, 4)),
        "self-tied": (SelfTied(5), torch.randn(2, 3, 4, 4)),
    }[net]
    return model, perm_spec(model, x)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    net=st.sampled_from(["mlp", "residual", "self-tied"]),
    start=st.sampled_from(["forward-greedy", "identity"]),
)
def test_the_objective_never_falls_and_equals_its_definition(seed: int, net: str, start: str) -> None:
    model, spec = traced(net)
    a, b = noise(model.state_dict(), seed), noise(model.state_dict(), seed + 1)
    found = weight_matching(b, to=a, spec=spec, rng=np.random.default_rng(seed), start=start)
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in itertools.pairwise(found.history))
    assert found.objective == pytest.approx(inner(a, permute(b, found.perms, spec=spec), spec.parameters), rel=1e-9)


def test_no_single_group_can_do_better_with_the_others_held() -> None:
    model = Residual(4, 5, 5)
    spec = perm_spec(model, torch.randn(2, 4))
    for seed in range(5):
        a, b = noise(model.state_dict(), seed), noise(model.state_dict(), seed + 50)
        found = align(b, to=a, spec=spec, rng=np.random.default_rng(seed))
        assert found.converged
        for group, n in spec.sizes().items():
            for p in itertools.permutations(range(n)):
                other = permute(b, {**found.perms, group: torch.tensor(p)}, spec=spec)
                assert inner(a, other, spec.parameters) <= found.objective + 1e-9


def test_a_self_tied_group_climbs_as_high_as_brute_force_in_most_draws() -> None:
    model = SelfTied(5)
    spec = perm_spec(model, torch.randn(2, 3, 4, 4))
    hits = 0
    for seed in range(10):
        a, b = noise(model.state_dict(), seed), noise(model.state_dict(), seed + 500)
        found = align(b, to=a, spec=spec, restarts=10, rng=np.random.default_rng(seed))
        best = max(inner(a, permute(b, p, spec=spec), spec.parameters) for p in every_perms(spec))
        assert found.objective <= best + 1e-9
        hits += found.objective > best - 1e-9
    assert hits > 7


def test_one_dimensional_parameters_vote() -> None:
    net = mlp(3, 4, 2)
    spec = perm_spec(net, torch.randn(2, 3))
    same = {k: torch.zeros_like(v) for k, v in net.state_dict().items()}
    a = {**same, "0.bias": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    b = {**same, "0.bias": torch.tensor([4.0, 1.0, 3.0, 2.0])}
    assert align(b, to=a, spec=spec).perms["0"].tolist() == [1, 3, 2, 0]


def test_buffers_move_without_voting() -> None:
    model = SelfTied(4)
    spec = perm_spec(model, torch.randn(2, 3, 4, 4))
    a = noise(model.state_dict(), 0)
    b = {k: v.clone() for k, v in a.items()}
    b["norm.running_mean"] = a["norm.running_mean"].flip(0) * 1e6
    found = align(b, to=a, spec=spec)
    assert all(torch.equal(p, torch.arange(len(p))) for p in found.perms.values())


def test_restarts_never_lower_the_objective() -> None:
    model = Residual(4, 8, 8)
    spec = perm_spec(model, torch.randn(2, 4))
    a, b = noise(model.state_dict(), 1), noise(model.state_dict(), 2)
    values = [align(b, to=a, spec=spec, restarts=n).objective for n in (1, 5)]
    assert values[1] >= values[0]


def test_permutations_may_be_given_to_begin_from() -> None:
    model = mlp(3, 6, 6, 2)
    spec = perm_spec(model, torch.randn(2, 3))
    a, b = noise(model.state_dict(), 1), noise(model.state_dict(), 2)
    first = align(b, to=a, spec=spec)
    again = weight_matching(b, to=a, spec=spec, rng=np.random.default_rng(5), start=first.perms)
    assert again.sweeps == 1
    assert again.perms.keys() == first.perms.keys()
    assert again.history[0] == pytest.approx(first.objective)
    with pytest.raises(UnknownNameError, match="unknown start of weight matching 'nowhere': known are forward-greedy"):
        weight_matching(b, to=a, spec=spec, rng=np.random.default_rng(5), start="nowhere")


def test_the_same_generator_gives_the_same_permutations() -> None:
    model = Residual(4, 8, 8)
    spec = perm_spec(model, torch.randn(2, 4))
    a, b = noise(model.state_dict(), 1), noise(model.state_dict(), 2)
    one, two = (align(b, to=a, spec=spec, rng=np.random.default_rng(7), restarts=3) for _ in range(2))
    assert all(torch.equal(one.perms[g], two.perms[g]) for g in one.perms)


def test_nothing_passed_in_is_modified() -> None:
    model = SelfTied(4)
    spec = perm_spec(model, torch.randn(2, 3, 4, 4))
    a, b = noise(model.state_dict(), 1), noise(model.state_dict(), 2)
    copies = [{k: v.clone() for k, v in m.items()} for m in (a, b)]
    align(b, to=a, spec=spec, restarts=2)
    for before, after in zip(copies, (a, b), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_flattened_and_concatenated_axes_are_matched() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(1, 3, 3)
            self.c = torch.nn.Linear(7 * 4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1).flatten(1))

    net = Net()
    spec = perm_spec(net, torch.randn(2, 1, 4, 4))
    assert spec.sizes() == {"a": 4, "b": 3}
    planted = spec.random(torch.Generator().manual_seed(1))
    moved = permute(net.state_dict(), planted, spec=spec)
    found = align(moved, to=net.state_dict(), spec=spec)
    torch.testing.assert_close(permute(moved, found.perms, spec=spec), dict(net.state_dict()), rtol=0, atol=0)


def test_unknown_aligners_and_broken_networks_are_named() -> None:
    net = mlp(3, 4, 2)
    spec, state = perm_spec(net, torch.randn(2, 3)), net.state_dict()
    with pytest.raises(UnknownNameError, match=r"unknown aligner 'weight-macthing'.*did you mean 'weight-matching'"):
        align(state, to=state, spec=spec, method="weight-macthing")
    broken = {k: v.clone() for k, v in state.items()}
    broken["0.weight"][0, 0] = float("nan")
    with pytest.raises(ParamsError, match="tensor '0.weight' of model 1 holds 1 values that are NaN or infinite"):
        align(broken, to=state, spec=spec)
    with pytest.raises(ParamsError, match=r"tensor '0.weight' of model 1 has shape \(5, 3\), expected \(4, 3\)"):
        align(mlp(3, 5, 2).state_dict(), to=state, spec=spec)
    with pytest.raises(ParamsError, match="model 1 lacks tensor '0.bias'"):
        align({k: v for k, v in state.items() if k != "0.bias"}, to=state, spec=spec)
    with pytest.raises(ParamsError, match="model 1 has an extra tensor 'x'"):
        align({**state, "x": torch.zeros(1)}, to=state, spec=spec)
    with pytest.raises(ParamsError, match=r"tensor '0.bias' of model 1 is torch.int64, expected torch.float32"):
        align({**state, "0.bias": torch.zeros(4, dtype=torch.int64)}, to=state, spec=spec)
    whole = {k: v.to(torch.int64) for k, v in state.items()}
    with pytest.raises(ParamsError, match="alignment needs floating-point weights"):
        align(whole, to=whole, spec=spec)
    assert next(iter(aligners())) == "weight-matching"
