"""What every aligner promises; a new entry of the registry is tested by being listed there."""

import functools
import inspect
import itertools

import numpy as np
import pytest
import torch
from nets import SelfTied, mlp, noise
from pictures import SHAPE, network, pictures
from torch import Tensor, nn

from fedmerge import PermSpec, align, aligners, merge_many, perm_spec, permute
from fedmerge.align import ALIGNERS, Alignment, needs_images
from fedmerge.errors import DataError, ParamsError

NETWORKS = ["one-layer", "mlp", "residual", "self-tied"]
LEARNING = ("ste", "sinkhorn-rebasin", "sinkhorn-rebasin-midpoint")
every_aligner = pytest.mark.parametrize("method", list(aligners()))


def takes(method: str, option: str) -> bool:
    return option in inspect.signature(ALIGNERS[method].make).parameters


def options(method: str, model: nn.Module) -> dict[str, object]:
    """The images and network that a method needs, if it needs them; few steps, where they are a bound."""
    few = {"steps": 10, "lr": 0.5} if takes(method, "steps") else {}
    return {"model": model, "data": pictures(), **few} if needs_images(method) else few


@functools.cache
def spec_of(name: str) -> PermSpec:
    return perm_spec(network(name), torch.randn(2, *SHAPE))


def pair(name: str):
    """A network, its symmetries, and two state dicts of it."""
    return network(name), spec_of(name), network(name, 1).state_dict(), network(name, 2).state_dict()


@functools.cache
def aligned(method: str, name: str) -> Alignment:
    """The alignment of the pair ``name``, without more options than the method needs."""
    model, spec, a, b = pair(name)
    return align(b, to=a, spec=spec, method=method, **options(method, model))


@every_aligner
@pytest.mark.parametrize("name", NETWORKS)
def test_the_aligned_network_computes_the_same_function(method: str, name: str) -> None:
    model, spec, _, b = pair(name)
    found = aligned(method, name)
    x = torch.randn(5, 3, 4, 4)
    model.eval().load_state_dict(b)
    before = model(x)
    model.load_state_dict(permute(b, found.perms, spec=spec))
    torch.testing.assert_close(model(x), before)
    assert found.perms.keys() == spec.sizes().keys()
    assert all(p.dtype == torch.int64 for p in found.perms.values())


@every_aligner
@pytest.mark.parametrize("name", NETWORKS)
def test_the_objective_is_that_of_weight_matching(method: str, name: str) -> None:
    _, spec, a, b = pair(name)
    found = aligned(method, name)
    moved = permute(b, found.perms, spec=spec)
    expected = sum(float((a[k].double() * moved[k].double()).sum()) for k in spec.parameters)
    assert found.objective == pytest.approx(expected, rel=1e-9)
    assert found.history[-1] == found.objective


@every_aligner
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_passed_in_is_modified(method: str, name: str) -> None:
    model, spec, a, b = pair(name)
    model.train()
    given = options(method, model)
    copies = [{k: v.clone() for k, v in m.items()} for m in (a, b, model.state_dict())]
    align(b, to=a, spec=spec, method=method, restarts=2, **given)
    for before, after in zip(copies, (a, b, model.state_dict()), strict=True):
        torch.testing.assert_close(dict(after), before, rtol=0, atol=0)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    if "data" in given:
        assert torch.equal(given["data"].images, pictures().images)


@every_aligner
@pytest.mark.parametrize("name", NETWORKS)
def test_the_same_generator_gives_the_same_permutations(method: str, name: str) -> None:
    model, spec, a, b = pair(name)
    one, two = (
        align(b, to=a, spec=spec, method=method, rng=np.random.default_rng(7), restarts=2, **options(method, model))
        for _ in range(2)
    )
    assert all(torch.equal(one.perms[g], two.perms[g]) for g in one.perms)
    assert one.history == two.history


@every_aligner
def test_one_hidden_layer_undoes_a_planted_permutation(method: str) -> None:
    if method == "sinkhorn-rebasin-midpoint":
        pytest.skip("of a network that is not trained, another order has a lower loss at the midpoint")
    model, spec, a, _ = pair("one-layer")
    (group,) = spec.groups
    for seed in range(3):
        planted = spec.random(torch.Generator().manual_seed(seed))
        moved = permute(a, planted, spec=spec)
        found = align(moved, to=a, spec=spec, method=method, **options(method, model))
        assert torch.equal(found.perms[group], torch.argsort(planted[group]))
        torch.testing.assert_close(permute(moved, found.perms, spec=spec), dict(a), rtol=0, atol=0)


@pytest.mark.parametrize("method", [m for m in aligners() if takes(m, "polish")])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_polish_ends_where_no_group_can_do_better_and_never_lower(method: str, name: str) -> None:
    model, spec, a, b = pair(name)
    plain = aligned(method, name)
    polished = align(b, to=a, spec=spec, method=method, polish=True, **options(method, model))
    assert polished.objective >= plain.objective - 1e-9 * abs(plain.objective)
    again = align(b, to=a, spec=spec, start=polished.perms)
    assert again.objective == pytest.approx(polished.objective, rel=1e-9)
    assert polished.sweeps > plain.sweeps


def reassigned(perms: dict[str, Tensor], group: str, whole: bool):
    """All permutations that differ in one group: in any way, or by one swap of two units."""
    perm = perms[group]
    orders = itertools.permutations(range(len(perm))) if whole else itertools.combinations(range(len(perm)), 2)
    for order in orders:
        other = perm.clone()
        other[sorted(order)] = perm[list(order if whole else order[::-1])]
        yield {**perms, group: other}


@functools.cache
def of_few_units() -> list[tuple[nn.Module, PermSpec]]:
    """Networks of which all orders of a group, or all swaps in it, can be tried."""
    networks = nn.Sequential(nn.Flatten(), mlp(48, 4, 3, 4)), SelfTied(4)
    return [(net, perm_spec(net, torch.randn(2, *SHAPE))) for net in networks]


@pytest.mark.parametrize("polish", [False, True])
@every_aligner
def test_what_converged_by_weights_cannot_be_raised_in_one_group(method: str, polish: bool) -> None:
    if polish and not takes(method, "polish"):
        pytest.skip("it is the polish itself")
    for seed, (net, spec) in itertools.product(range(2), of_few_units()):
        a, b = noise(net.state_dict(), seed), noise(net.state_dict(), 100 + seed)
        b |= {k: v.abs() for k, v in b.items() if k.endswith("running_var")}
        a |= {k: v.abs() for k, v in a.items() if k.endswith("running_var")}
        found = align(b, to=a, spec=spec, method=method, **options(method, net), **({"polish": True} if polish else {}))
        promises = polish or method == "weight-matching"
        assert found.converged or not promises
        assert not found.converged or method not in LEARNING or polish
        if not promises:
            continue
        for group in spec.groups:
            for perms in reassigned(found.perms, group, whole=not isinstance(net, SelfTied)):
                moved = permute(b, perms, spec=spec)
                value = sum(float((a[k].double() * moved[k].double()).sum()) for k in spec.parameters)
                assert value <= found.objective + 1e-9


# Those that learn on images keep the lowest loss instead.
@pytest.mark.parametrize("method", [m for m in aligners() if m not in ("ste", "sinkhorn-rebasin-midpoint")])
@pytest.mark.parametrize("name", ["residual", "self-tied"])
def test_restarts_never_lower_the_objective(method: str, name: str) -> None:
    model, spec, a, b = pair(name)
    one, five = (align(b, to=a, spec=spec, method=method, restarts=n, **options(method, model)) for n in (1, 5))
    assert five.objective >= one.objective


@every_aligner
def test_a_network_without_hidden_units_has_nothing_to_align(method: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    spec = perm_spec(model, torch.randn(2, 3, 4, 4))
    state: dict[str, Tensor] = model.state_dict()
    found = align(state, to=state, spec=spec, method=method, **options(method, model))
    assert found.perms == {}
    assert found.objective == pytest.approx(sum(float(t.double().square().sum()) for t in state.values()))


@every_aligner
def test_state_dicts_that_do_not_fit_are_named(method: str) -> None:
    model, spec, a, b = pair("mlp")
    given = options(method, model)
    broken = {k: v.clone() for k, v in b.items()}
    broken["1.0.weight"][0, 0] = float("nan")
    with pytest.raises(ParamsError, match=r"tensor '1.0.weight' of model 1 holds 1 values that are NaN or infinite"):
        align(broken, to=a, spec=spec, method=method, **given)
    with pytest.raises(ParamsError, match=r"model 1 lacks tensor '1.0.bias'"):
        align({k: v for k, v in b.items() if k != "1.0.bias"}, to=a, spec=spec, method=method, **given)
    wide = pair("one-layer")[2]
    with pytest.raises(ParamsError, match=r"model \d has an extra|model \d lacks|has shape"):
        align(wide, to=a, spec=spec, method=method, **given)


@every_aligner
def test_merging_aligns_to_the_anchor_by_name(method: str) -> None:
    _, spec, a, b = pair("residual")
    if needs_images(method):
        with pytest.raises(ParamsError, match=r"but model= and data= was not given"):
            merge_many([a, b], spec=spec, aligner=method)
    else:
        given = options(method, network("residual"))
        assert merge_many([a, b], spec=spec, aligner=method, aligner_options=given, restarts=2).converged


@pytest.mark.parametrize("method", [m for m in aligners() if needs_images(m)])
def test_a_method_that_looks_at_images_says_what_it_lacks(method: str) -> None:
    model, spec, a, b = pair("mlp")
    with pytest.raises(ParamsError, match=r"but model= and data= was not given; pass the network as model="):
        align(b, to=a, spec=spec, method=method)
    with pytest.raises(ParamsError, match=r"but data= was not given; .* or choose a method that needs weights only"):
        align(b, to=a, spec=spec, method=method, model=model)
    with pytest.raises(DataError, match=r"pictures holds no images; .* needs at least one"):
        align(b, to=a, spec=spec, method=method, model=model, data=pictures(0))
    with pytest.raises(ParamsError, match="these parameters are not a state dict of Sequential"):
        align(b, to=a, spec=spec, method=method, model=network("one-layer"), data=pictures())
