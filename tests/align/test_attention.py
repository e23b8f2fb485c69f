"""Groups that wait for each other: every method recovers a planted order of them, or names what it left."""

import functools
import itertools

import pytest
import torch
from attention import NETWORKS, InAWeight, planted
from pictures import pictures

from fedmerge import PermSpec, align, aligners, merge, perm_spec, permute
from fedmerge.align import check_observable, needs_images
from fedmerge.align.turns import turns
from fedmerge.spec.axes import Factor

case = functools.cache(planted)
METRICS = ["inner-product", "l2", "correlation", "mutual-information"]
DATA = pictures(24)
# It goes by the loss of a network that is not trained, and another order has a lower one halfway.
LEARNED = ["ste", "sinkhorn-rebasin"]
QUICK = [m for m in aligners() if m not in (*LEARNED, "sinkhorn-rebasin-midpoint")]


@pytest.mark.parametrize(("method", "name"), [*itertools.product(QUICK, NETWORKS), *((m, "layer") for m in LEARNED)])
def test_an_aligner_recovers_a_planted_order_of_heads_and_of_units_within(method: str, name: str) -> None:
    model, spec, a, order = case(name)
    given = {"model": model, "data": DATA} if needs_images(method) else {}
    found = align(permute(a, order, spec=spec), to=a, spec=spec, method=method, **given)
    assert found.left == ()
    assert all(torch.equal(found.perms[g], torch.argsort(order[g])) for g in order)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["ot-fusion", "ot-fusion-activations", "layer-wise", "hierarchical"])
def test_a_merger_recovers_a_planted_order_of_heads_and_of_units_within(method: str, name: str) -> None:
    model, spec, a, order = case(name)
    given = {"model": model, "data": DATA} if method == "ot-fusion-activations" else {}
    found = merge([a, permute(a, order, spec=spec)], spec=spec, method=method, **given)
    assert found.left == ()
    torch.testing.assert_close(found.params, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"mass": "norm"}, {"solver": "sinkhorn"}, {"mass": "norm-l1", "metric": "cosine"}])
def test_heads_are_transported_by_any_mass_and_solver(options) -> None:
    _, spec, a, order = case("layer")
    found = align(permute(a, order, spec=spec), to=a, spec=spec, method="optimal-transport", **options)
    assert all(torch.equal(found.perms[g], torch.argsort(order[g])) for g in order)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", ["functional", "squeezed"])
def test_every_metric_of_activations_sees_inside_a_functional_call(name: str, metric: str) -> None:
    model, spec, a, order = case(name)
    found = align(
        permute(a, order, spec=spec), to=a, spec=spec, method="activation-matching", model=model, data=DATA,
        metric=metric,
    )  # fmt: skip
    assert all(torch.equal(found.perms[g], torch.argsort(order[g])) for g in order)


@pytest.mark.parametrize("method", ["activation-matching", "optimal-transport-activations"])
def test_the_size_of_the_batches_changes_nothing_of_heads(method: str) -> None:
    model, spec, a, _ = case("functional")
    b = planted("functional", 5)[2]
    found = [
        align(b, to=a, spec=spec, method=method, model=model, data=pictures(23), batch_size=n).perms
        for n in (23, 11, 22)
    ]
    assert all(torch.equal(found[0][g], other[g]) for other in found[1:] for g in spec.groups)


def test_units_that_show_in_no_activation_are_named_before_and_after() -> None:
    model = InAWeight().eval()
    spec, a = perm_spec(model, torch.randn(2, 3, 4, 4)), model.state_dict()
    hidden, seen = sorted(spec.groups, key=lambda g: spec.sizes()[g])
    order = spec.random(torch.Generator().manual_seed(1))
    b = permute(a, order, spec=spec)
    for method in ("activation-matching", "optimal-transport-activations"):
        given = {"model": model, "data": DATA}
        found = align(b, to=a, spec=spec, method=method, **given)
        assert found.left == (hidden,) == check_observable(method, model, spec, DATA)
        assert found.perms[hidden].tolist() == list(range(5))
        assert torch.equal(found.perms[seen], torch.argsort(order[seen]))
        polished = align(b, to=a, spec=spec, method=method, polish=True, **given)
        assert polished.left == ()
        assert torch.equal(polished.perms[hidden], torch.argsort(order[hidden]))
    assert merge([a, b], spec=spec, method="ot-fusion-activations", model=model, data=DATA).left == (hidden,)
    assert check_observable("weight-matching", model, spec, DATA) == ()
    assert align(b, to=a, spec=spec, method="optimal-transport").left == ()


def test_units_on_two_axes_of_their_only_weight_are_named() -> None:
    axis = ((Factor("g", 4),),)
    spec = PermSpec({"w": (axis, axis), "v": (((Factor("h", 3),),),)}, {"w": (4, 4), "v": (3,)}, frozenset({"w", "v"}))
    a = {"w": torch.randn(4, 4), "v": torch.randn(3)}
    for method in ("forward-greedy", "optimal-transport"):
        assert align(a, to=a, spec=spec, method=method).left == ("g",)
    for method in ("layer-wise", "ot-fusion"):
        assert merge([a, a], spec=spec, method=method).left == ("g",)


def test_groups_come_in_graph_order_and_those_that_wait_for_each_other_together() -> None:
    _, spec, _, _ = case("layer")
    heads = "layer.self_attn.in_proj_weight"
    found = {turn.group: turn for turn in turns(spec, incoming=True)}
    assert next(iter(found)) == "patches"
    assert list(found)[2:] == [heads, f"{heads}#1", f"{heads}#2"]
    assert all(found[heads].open(spec, place) for place in found[heads].places)
    assert not any(found[f"{heads}#2"].open(spec, place) for place in found[f"{heads}#2"].places)
    assert {(p.name, p.segment) for p in found[f"{heads}#2"].places} == {
        (heads, 2),
        (heads.replace("weight", "bias"), 2),
    }
