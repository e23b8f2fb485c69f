"""What lies on a GPU, or part of it there and part on the CPU: the answers of the CPU. Needs a GPU."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge as fm
from fedmerge.align import needs_images
from fedmerge.merge import takes
from fedmerge.pipeline import Pipeline, Workbench, align_merge_retrain
from fedmerge.privacy import invert_update, recover_labels
from fedmerge.teachers import teach
from strategies import ClientResult

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

Params = dict[str, torch.Tensor]
DIGITS = fm.data.load("digits").train.select(range(120))
RECIPE = fm.models.recipe("mlp")
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def network(seed: int = 0) -> nn.Module:
    return fm.models.build("mlp", classes=10, in_shape=DIGITS.shape, seed=seed, width=16)


def states(n: int = 3) -> list[Params]:
    return [dict(network(seed).state_dict()) for seed in range(n)]


def on(device: str, params: Params) -> Params:
    return {name: tensor.to(device) for name, tensor in params.items()}


def same(found: Params, expected: Params) -> None:
    assert len({tensor.device for tensor in found.values()}) == 1
    torch.testing.assert_close(on("cpu", found), on("cpu", expected), **CLOSE)


@pytest.mark.parametrize("first", ["cpu", "cuda"])
@pytest.mark.parametrize("method", list(fm.mergers()))
def test_a_merger_takes_networks_of_two_devices_and_leaves_the_result_on_that_of_the_first(
    method: str, first: str
) -> None:
    models, base, model = states(), network(5).state_dict(), network()
    given = {
        "model": model,
        "data": DIGITS,
        "base": base,
        "epochs": 1,
        **({"max_steps": 2} if "lr" in takes(method) else {}),
    }
    options = {name: value for name, value in given.items() if name in takes(method)}
    spec = fm.perm_spec(model, DIGITS.normalise(DIGITS.images[:2]))
    expected = fm.merge(models, spec=spec, method=method, rng=np.random.default_rng(0), **options).params
    other = "cuda" if first == "cpu" else "cpu"
    mixed = [on(device, m) for device, m in zip((first, other, first), models, strict=True)]
    options |= {"base": on(other, base)} if "base" in options else {}
    found = fm.merge(mixed, spec=spec, method=method, rng=np.random.default_rng(0), **options).params
    assert {tensor.device.type for tensor in found.values()} == {first}
    same(found, expected)


@pytest.mark.parametrize("method", list(fm.aligners()))
def test_an_aligner_takes_networks_on_a_gpu(method: str) -> None:
    a, b, _ = states()
    spec, model = fm.perm_spec(network(), DIGITS.normalise(DIGITS.images[:2])), network()
    options = {"model": model, "data": DIGITS} if needs_images(method) else {}
    found = fm.align(on("cuda", b), to=on("cuda", a), spec=spec, method=method, **options)
    expected = fm.align(b, to=a, spec=spec, method=method, **options)
    assert found.objective == pytest.approx(expected.objective, rel=1e-3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_rows_and_network_may_lie_apart(device: str) -> None:
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    expected = fm.evaluate(net, net.state_dict(), (x, y))
    for rows in ((x, y), (x.to("cuda"), y.to("cuda"))):
        for model in (net, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).to("cuda")):
            found = fm.evaluate(model, net.state_dict(), rows, device=device)
            assert (found.accuracy, found.loss) == pytest.approx((expected.accuracy, expected.loss), rel=1e-3)


def test_images_come_back_whole_and_are_joined_across_devices() -> None:
    there = DIGITS.to("cuda")
    back = there.to("cpu")
    assert torch.equal(back.images, DIGITS.images)
    assert torch.equal(back.labels, DIGITS.labels)
    assert torch.equal(there.joined(DIGITS).images.cpu(), torch.cat([DIGITS.images, DIGITS.images]))


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_head_and_a_teacher_are_those_of_the_cpu(where: str) -> None:
    model, (a, b, _) = network(), states()
    sums = fm.head_sums(model, a, DIGITS)
    same(fm.best_head(model, on(where, a), sums, DIGITS.to("cuda")).params, fm.best_head(model, a, sums, DIGITS).params)
    public = dataclasses.replace(DIGITS, labels=torch.where(torch.arange(120) < 80, DIGITS.labels, -1))
    expected = teach("stacked", model, [a, b], public)
    found = teach("stacked", model, [on(where, a), on(where, b)], public.to("cuda"), device="cuda")
    torch.testing.assert_close(found.on_public.cpu(), expected.on_public, **CLOSE)


def test_a_pipeline_on_a_gpu_ends_in_the_network_of_the_cpu() -> None:
    model, found = network(), []
    spec = fm.perm_spec(model, DIGITS.normalise(DIGITS.images[:2]))
    for device in ("cpu", "cuda"):
        data = DIGITS.to(device)
        bench = Workbench(
            model=model, spec=spec, public=data, val=data, recipe=RECIPE, retrain_epochs=1, seed=0, device=device
        )
        results = [ClientResult(i, params, 10 + i) for i, params in enumerate(states())]
        found.append(align_merge_retrain(results, bench=bench, pipeline=Pipeline()).params)
    same(found[1], found[0])


def test_networks_are_compared_and_attacked_across_devices() -> None:
    model, (a, b, c) = network(), states()
    assert fm.distance(on("cuda", a), b).l2 == pytest.approx(fm.distance(a, b).l2)
    planes = [fm.plane(model, one, b, c, DIGITS, points=2).losses for one in (a, on("cuda", a))]
    np.testing.assert_allclose(planes[1], planes[0], rtol=1e-3)
    recipe, images = fm.models.Recipe(momentum=0.0), DIGITS.select([1, 2, 3])
    after = fm.train(model, a, images, recipe=recipe, epochs=1, generator=torch.Generator()).params
    given = {"recipe": recipe, "count": 3}
    assert torch.equal(recover_labels(model, on("cuda", a), after, **given), recover_labels(model, a, after, **given))
    options = {**given, "iterations": 2, "generator": torch.Generator().manual_seed(0), "device": "cuda"}
    assert len(invert_update(model, on("cuda", a), after, images, **options).labels) == 3


def test_points_of_a_curve_lie_where_its_ends_do() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    a = on("cuda", dict(model.state_dict()))
    b = {name: t + 0.1 if t.is_floating_point() else t for name, t in a.items()}
    found = fm.curve(model, a, b, DIGITS, recipe=RECIPE, epochs=1, generator=torch.Generator().manual_seed(0))
    for point in found.points:
        assert {tensor.device.type for tensor in point.values()} == {"cuda"}
