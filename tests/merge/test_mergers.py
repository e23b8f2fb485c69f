"""What every merger promises; a new entry of the registry is tested by being listed there."""

import functools

import numpy as np
import pytest
import torch
from nets import noise, plus
from pictures import SHAPE, network, pictures

from fedmerge import PermSpec, merge, mergers, perm_spec, permute
from fedmerge.errors import DataError, ParamsError, UnknownNameError
from fedmerge.merge import ordered, takes

every_merger = pytest.mark.parametrize("method", list(mergers()))
looks = [m for m in mergers() if "data" in takes(m)]


@functools.cache
def spec_of(name: str) -> PermSpec:
    return perm_spec(network(name), torch.randn(2, *SHAPE))


def federation(name: str, n: int = 3):
    """A network, its symmetries, ``n`` state dicts near one base, and the base."""
    base = network(name, 0).state_dict()
    models = [plus(base, noise(base, i + 1, 0.05)) for i in range(n)]
    models = [{k: v.abs() + 0.5 if k.endswith("running_var") else v for k, v in m.items()} for m in models]
    return network(name), spec_of(name), models, base


def options(method: str, model, base) -> dict[str, object]:
    """What a merger cannot do without, and few steps of one that learns."""
    given = {
        "model": model,
        "data": pictures(),
        "base": base,
        "epochs": 1,
        **({"max_steps": 5} if "lr" in takes(method) else {}),
    }
    return {k: v for k, v in given.items() if k in takes(method)}


@every_merger
@pytest.mark.parametrize("name", ["mlp", "self-tied"])
def test_a_merger_is_repeatable_and_leaves_its_input_alone(method: str, name: str) -> None:
    if (method, name) == ("fs-merge", "self-tied"):
        pytest.skip("it refuses networks with BatchNorm")
    model, spec, models, base = federation(name)
    copies = [{k: v.clone() for k, v in m.items()} for m in (*models, base, model.state_dict())]
    one, two = (
        merge(
            models, spec=spec, method=method, weights=[1, 2, 3], rng=np.random.default_rng(4),
            **options(method, model, base),
        )
        for _ in range(2)
    )  # fmt: skip
    torch.testing.assert_close(one.params, two.params, rtol=0, atol=0)
    for before, after in zip(copies, (*models, base, model.state_dict()), strict=True):
        torch.testing.assert_close(dict(after), before, rtol=0, atol=0)
    assert one.params.keys() == models[0].keys()
    assert all(t.shape == models[0][k].shape and t.dtype == models[0][k].dtype for k, t in one.params.items())
    assert all(bool(t.isfinite().all()) for t in one.params.values())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    moved = ordered(models, one, spec=spec)
    assert len(moved) == 3
    model.eval()
    x = torch.randn(4, *SHAPE)
    for before, after in zip(models, moved, strict=True):
        model.load_state_dict(before)
        expected = model(x)
        model.load_state_dict(after)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


@every_merger
def test_copies_of_one_network_merge_to_that_network(method: str) -> None:
    if method == "ensemble-distillation":
        pytest.skip("it trains on, towards what it already predicts, with a step that round-off does not vanish in")
    model, spec, models, _ = federation("mlp")
    found = merge([models[0]] * 3, spec=spec, method=method, **options(method, model, models[0]))
    torch.testing.assert_close(found.params, models[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "method", [m for m in mergers() if "order" in takes(m) or m.startswith(("merge-many", "ot-", "layer"))]
)
def test_permuted_copies_of_one_network_merge_to_that_network(method: str) -> None:
    if method in ("average", "ensemble-distillation"):
        pytest.skip("it does not align, or it trains on")
    model, spec, models, base = federation("mlp")
    generator = torch.Generator().manual_seed(0)
    copies = [models[0]] + [permute(models[0], spec.random(generator), spec=spec) for _ in range(2)]
    found = merge(copies, spec=spec, method=method, **options(method, model, base))
    torch.testing.assert_close(found.params, models[0], rtol=1e-4, atol=1e-5)


@every_merger
def test_models_that_do_not_fit_are_named(method: str) -> None:
    model, spec, models, base = federation("mlp", 2)
    given = options(method, model, base)
    name = next(iter(models[0]))
    broken = {k: v.clone() for k, v in models[1].items()}
    broken[name].view(-1)[0] = float("inf")
    with pytest.raises(ParamsError, match=rf"tensor '{name}' of model \d holds 1 values that are NaN or infinite"):
        merge([models[0], broken], spec=spec, method=method, **given)
    with pytest.raises(ParamsError, match=rf"model \d lacks tensor '{name}'"):
        merge([models[0], {k: v for k, v in models[1].items() if k != name}], spec=spec, method=method, **given)
    with pytest.raises(ParamsError, match=r"weights \[1.0\] do not fit 2 models"):
        merge(models, spec=spec, method=method, weights=[1.0], **given)


@pytest.mark.parametrize("method", looks)
def test_a_merger_that_looks_at_images_says_what_it_lacks(method: str) -> None:
    model, spec, models, _ = federation("mlp", 2)
    with pytest.raises(
        ParamsError, match=rf"{method} runs the networks on public images, but model= and data= was not"
    ):
        merge(models, spec=spec, method=method)
    with pytest.raises(DataError, match="holds no images"):
        merge(models, spec=spec, method=method, model=model, data=pictures(0))
    if "order" in takes(method):
        with pytest.raises(UnknownNameError, match=r"unknown order 'merge-may'.*did you mean 'merge-many'"):
            merge(models, spec=spec, method=method, model=model, data=pictures(), order="merge-may")


@pytest.mark.parametrize("method", [m for m in mergers() if "base" in takes(m)])
def test_a_merger_of_steps_says_that_it_lacks_the_base(method: str) -> None:
    _, spec, models, _ = federation("mlp", 2)
    with pytest.raises(ParamsError, match=rf"{method} needs the network that all models were trained from; pass it as"):
        merge(models, spec=spec, method=method)


@every_merger
def test_an_option_that_nobody_has_is_named(method: str) -> None:
    model, spec, models, base = federation("mlp")
    with pytest.raises(UnknownNameError, match=rf"unknown option of merger {method} 'referense'.*mean 'reference'"):
        merge(models, spec=spec, method=method, referense=1, **options(method, model, base))
