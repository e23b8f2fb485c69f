"""Groups that index several axes of one tensor: what a swap of two units changes, and that none is left that pays."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import SelfTied, noise
from torch import Tensor

from fedmerge import PermSpec, align, perm_spec, permute
from fedmerge.align import _swaps, weight_matching
from fedmerge.align.climb import Climb
from fedmerge.spec.axes import Factor


def own(*axes: tuple[tuple[Factor, ...], ...], **others: tuple[tuple[tuple[Factor, ...], ...], ...]) -> PermSpec:
    """A spec of a tensor ``w`` with these axes, and of ``others``."""
    tensors = {"w": axes, **others}
    shapes = {}
    for name, given_axes in tensors.items():
        lengths = [sum(int(np.prod([f.size for f in segment])) for segment in axis) for axis in given_axes]
        shapes[name] = tuple(lengths)
    return PermSpec(tensors, shapes, frozenset(tensors))


G, H, REST = Factor("g", 5), Factor("h", 3), Factor(None, 2)
SPECS = {
    "self-tied": perm_spec(SelfTied(5), torch.randn(2, 3, 4, 4)),
    "square": own(((G,),), ((G,),), v=(((G,),),)),
    "three axes": own(((G,),), ((G,),), ((G,),)),
    "gates": own(((G,), (G,), (G,)), ((G,),), v=(((G,), (G,), (G,)), ((REST,),))),
    "concatenated both ways": own(((G,), (G, REST)), ((H,), (G,)), u=(((H,),), ((H,),))),
    "products": own(((G, REST, H),), ((H, G),)),
    "outer product": own(((G, G),), ((H, REST),)),
}


def drawn(spec: PermSpec, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    shapes = {name: torch.zeros(shape) for name, shape in spec.shapes.items()}
    return noise(shapes, seed), noise(shapes, seed + 10_000)


def defined(spec: PermSpec, a: dict[str, Tensor], b: dict[str, Tensor], perms: dict[str, Tensor]) -> float:
    """J by its definition."""
    moved = permute(b, perms, spec=spec)
    return sum(float((a[k].double() * moved[k].double()).sum()) for k in spec.parameters)


def swaps(perms: dict[str, Tensor]):
    """All permutations that differ from ``perms`` by one swap of two units in one group."""
    for group, perm in perms.items():
        for i, j in itertools.combinations(range(len(perm)), 2):
            other = perm.clone()
            other[[i, j]] = perm[[j, i]]
            yield group, i, j, {**perms, group: other}


@pytest.mark.parametrize("name", SPECS)
def test_the_rise_of_every_swap_is_that_of_the_objective(name: str) -> None:
    spec = SPECS[name]
    a, b = drawn(spec, 0)
    climb, perms = Climb(b, a, spec), spec.random(torch.Generator().manual_seed(1))
    value = defined(spec, a, b, perms)
    for group, i, j, other in swaps(perms):
        gain = climb._gain(perms, group, climb.places[group])[:, perms[group].numpy()]
        rise = gain[i, j] + gain[j, i] - gain[i, i] - gain[j, j]
        rise += climb.beyond(perms, group, torch.tensor([i]))[0, j]
        assert rise == pytest.approx(defined(spec, a, b, other) - value, abs=1e-9)


@pytest.mark.parametrize("name", SPECS)
def test_rows_taken_a_few_at_a_time_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS[name]
    a, b = drawn(spec, 0)
    climb, perms = Climb(b, a, spec), spec.random(torch.Generator().manual_seed(1))
    group = next(g for g in spec.groups if climb.tied[g])
    whole = climb.beyond(perms, group, torch.arange(len(perms[group])))
    monkeypatch.setattr(_swaps, "SLICE", 1)
    slices = climb.beyond(perms, group, torch.arange(len(perms[group])))
    np.testing.assert_allclose(slices, whole, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole, whole.T, rtol=1e-12, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 5_000), name=st.sampled_from(list(SPECS)), random_start=st.booleans())
def test_what_converged_admits_no_swap_that_raises_the_objective(seed: int, name: str, random_start: bool) -> None:
    spec = SPECS[name]
    a, b = drawn(spec, seed)
    start = spec.random(torch.Generator().manual_seed(seed)) if random_start else "forward-greedy"
    found = weight_matching(b, to=a, spec=spec, rng=np.random.default_rng(seed), start=start)
    assert found.converged
    assert found.objective == pytest.approx(defined(spec, a, b, found.perms), rel=1e-12)
    assert all(later >= earlier - 1e-9 for earlier, later in itertools.pairwise(found.history))
    assert max(defined(spec, a, b, other) for *_, other in swaps(found.perms)) <= found.objective + 1e-9


def test_a_linearisation_that_promises_nothing_is_left_by_a_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPECS["square"]
    stuck = 0
    for seed in range(40):
        a, b = drawn(spec, seed)
        with monkeypatch.context() as without:
            without.setattr(Climb, "_swap", lambda *_: 0.0)
            plain = weight_matching(b, to=a, spec=spec, rng=np.random.default_rng(seed))
        found = weight_matching(b, to=a, spec=spec, rng=np.random.default_rng(seed), start=plain.perms)
        better = max(defined(spec, a, b, other) for *_, other in swaps(plain.perms)) > plain.objective + 1e-9
        assert (found.objective > plain.objective + 1e-9) == better
        stuck += better
    assert stuck >= 5


def test_the_same_generator_gives_the_same_permutations_after_swaps() -> None:
    spec = SPECS["three axes"]
    a, b = drawn(spec, 3)
    one, two = (align(b, to=a, spec=spec, rng=np.random.default_rng(7), restarts=3) for _ in range(2))
    assert one.history == two.history
    assert all(torch.equal(one.perms[g], two.perms[g]) for g in one.perms)
