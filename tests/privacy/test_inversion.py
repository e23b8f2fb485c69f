"""Reconstructions against images that are known, and the parts of the attack against what they claim to compute."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trained import DIGITS, generator, normed
from unfit import NO_STATE_DICTS, ODD, ends_well

import fedmerge as fm
from fedmerge.data import Images
from fedmerge.errors import ParamsError
from fedmerge.models import Recipe
from fedmerge.privacy import invert_model, invert_update, quality, recover_labels
from fedmerge.privacy._inversion import _Kept, _trained

STEP = Recipe(lr=0.1, momentum=0.0, batch_size=32)


def smooth(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10, bias=bias))


def of_labels(*labels: int) -> Images:
    """Different images with these labels, in this order."""
    taken: dict[int, int] = {}
    rows = []
    for label in labels:
        rows.append(int((DIGITS.labels == label).nonzero()[taken.get(label, 0)]))
        taken[label] = taken.get(label, 0) + 1
    return DIGITS.select(rows)


def sent(model: nn.Module, images: Images, recipe: Recipe = STEP, epochs: int = 1) -> dict[str, Tensor]:
    return fm.train(model, model.state_dict(), images, recipe=recipe, epochs=epochs, generator=generator()).params


def noise(like: Images) -> Tensor:
    return torch.rand(like.images.shape, generator=generator(5))


@pytest.mark.parametrize("objective", ["cosine", "l2"])
def test_one_image_that_was_sent_by_one_step_comes_back(objective: str) -> None:
    """The oracle: under a first linear layer with bias a row of its gradient over that of the bias is the image itself
    (Geiping et al. 2020, proposition 3.1)."""
    model, images = smooth(), of_labels(3)
    before, after = model.state_dict(), sent(model, images)
    found = invert_update(
        model,
        before,
        after,
        images.select([]),
        recipe=STEP,
        objective=objective,
        total_variation=0.0,
        generator=generator(),
    )
    assert found.labels.tolist() == [3]
    assert quality(found.images, images).psnr[0] > 50
    assert quality(noise(images), images).psnr[0] < 10
    moved = {name: before[name] - after[name] for name in ("1.weight", "1.bias")}
    unit = moved["1.bias"].abs().argmax()
    image = (moved["1.weight"][unit] / moved["1.bias"][unit]).view(1, 1, 8, 8)
    torch.testing.assert_close(255 * found.images, 255 * (image * images.std[0] + images.mean[0]), atol=1.0, rtol=0)


def test_the_objective_is_that_of_the_images_found() -> None:
    model, images = smooth(), of_labels(3)
    before, after = model.state_dict(), sent(model, images)
    found = invert_update(
        model, before, after, images.select([]), recipe=STEP, total_variation=0.0, iterations=5, generator=generator()
    )
    x = ((found.images - images.mean[0]) / images.std[0]).requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(x), found.labels)
    made = torch.cat([g.flatten() for g in torch.autograd.grad(loss, model.parameters())])
    moved = torch.cat([(before[name] - after[name]).flatten() for name, _ in model.named_parameters()])
    apart = 1 - torch.nn.functional.cosine_similarity(made, moved, dim=0)
    assert found.objective == pytest.approx(float(apart), rel=1e-4)


def test_images_of_several_steps_come_back_and_are_matched_in_any_order() -> None:
    model, images = smooth(), of_labels(8, 1, 4)
    recipe = Recipe(lr=0.1, momentum=0.9, weight_decay=1e-3, batch_size=8)
    found = invert_update(
        model, model.state_dict(), sent(model, images, recipe, epochs=3), DIGITS, recipe=recipe, count=3, epochs=3,
        total_variation=0.0, iterations=120, generator=generator(),
    )  # fmt: skip
    assert found.labels.tolist() == [1, 4, 8]
    near = quality(found.images, images)
    assert near.found.tolist() == [2, 0, 1]
    assert near.psnr.min() > 50
    assert quality(noise(images), images).psnr.max() < 10


RECIPES = {
    "plain": STEP,
    "momentum": replace(STEP, momentum=0.9, weight_decay=0.01),
    "nesterov": replace(STEP, momentum=0.8, nesterov=True, schedule="cosine", warmup=0.3),
    "smoothing": replace(STEP, label_smoothing=0.1, schedule="one-cycle"),
}


@pytest.mark.parametrize("model", [smooth, normed])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_simulated_training_is_that_of_a_client(recipe: Recipe, model: Callable[[], nn.Module]) -> None:
    network, images = model(), of_labels(2, 2, 5, 9)
    after = sent(network, images, recipe, epochs=4)
    weights = dict(network.named_parameters())
    made = _trained(
        network.eval(), weights, images.normalise(images.images), images.labels, recipe, epochs=4, batches=1
    )
    for (name, weight), change in zip(weights.items(), made, strict=True):
        torch.testing.assert_close(change, weight - after[name], atol=1e-6, rtol=1e-4)


def test_the_mean_of_single_steps_is_the_step_of_one_client_that_has_all_images() -> None:
    model = smooth()
    parts = [of_labels(0, 1), of_labels(2, 3), of_labels(4, 4)]
    together = Images(
        torch.cat([p.images for p in parts]),
        torch.cat([p.labels for p in parts]),
        DIGITS.classes,
        DIGITS.mean,
        DIGITS.std,
        "all",
    )
    mean = fm.average([sent(model, part) for part in parts])
    torch.testing.assert_close(mean, sent(model, together), atol=1e-7, rtol=1e-5)
    for recipe in (STEP, replace(STEP, batch_size=2)):  # clients of two images each make one step either way
        found = recover_labels(model, model.state_dict(), mean, recipe=recipe, count=6, clients=3)
        assert found.tolist() == [0, 1, 2, 3, 4, 4]
    alike = of_labels(*[3] * 8)
    parts = [alike.select(range(k, k + 2)) for k in range(0, 8, 2)]
    mean = fm.average([sent(model, part) for part in parts])
    small = {"recipe": replace(STEP, batch_size=2), "count": 8, "clients": 4}
    assert recover_labels(model, model.state_dict(), mean, **small).tolist() == [3] * 8
    one = {"recipe": STEP, "count": 8}
    drawn = [
        invert_update(
            model, model.state_dict(), mean, alike, iterations=5, labels=alike.labels, generator=generator(), **how
        ).images
        for how in (small, one)
    ]  # fmt: skip
    torch.testing.assert_close(*drawn)  # the attack simulates one step of all


@pytest.mark.parametrize("bias", [True, False])
def test_labels_are_read_off_the_last_layer(bias: bool) -> None:
    model = smooth(bias)
    for labels in (*([label] for label in range(10)), [3, 7], [5, 5], [0, 2, 2, 9], [6, 6, 6, 8]):
        images = of_labels(*labels)
        found = recover_labels(model, model.state_dict(), sent(model, images), recipe=STEP, count=len(labels))
        assert found.tolist() == labels
    images = of_labels(1, 1, 4, 8, 9, 9)
    recipe = replace(STEP, batch_size=2, momentum=0.5, lr=0.01)
    found = recover_labels(model, model.state_dict(), sent(model, images, recipe, 5), recipe=recipe, count=6, epochs=5)
    assert found.tolist() == images.labels.tolist()


@pytest.mark.parametrize("bias", [True, False])
def test_labels_that_were_smoothed_are_read_off_all_the_same(bias: bool) -> None:
    model, recipe = smooth(bias), replace(STEP, label_smoothing=0.3)
    for labels in ([4] * 8, [1, 1, 1, 1, 1, 7, 7, 7]):
        after = sent(model, of_labels(*labels), recipe)
        found = recover_labels(model, model.state_dict(), after, recipe=recipe, count=8)
        assert found.tolist() == labels


def test_rows_that_all_fall_tell_no_labels() -> None:
    model = smooth(bias=False)
    before = model.state_dict()
    with pytest.raises(ParamsError, match="fell for every class, which no labels do; give labels="):
        recover_labels(model, before, {name: t + 1 for name, t in before.items()}, recipe=STEP, count=2)


def test_what_a_trained_network_takes_for_a_class_does_not_depend_on_the_order_of_its_units() -> None:
    model, images = smooth(), DIGITS.select(range(200))
    params = fm.train(
        model, model.state_dict(), images, recipe=Recipe(lr=0.5, batch_size=32), epochs=10, generator=generator()
    ).params
    spec = fm.perm_spec(model, images.normalise(images.images[:2]))
    moved = fm.permute(params, spec.random(generator(1), params), spec=spec)
    found, same = (
        invert_model(model, p, DIGITS, labels=torch.arange(10), iterations=60, generator=generator())
        for p in (params, moved)
    )
    shown = replace(images, images=(255 * found.images).round().to(torch.uint8), labels=found.labels)
    assert fm.evaluate(model, params, shown).loss < 0.05
    assert fm.evaluate(model, params, replace(shown, images=(255 * noise(shown)).to(torch.uint8))).loss > 1
    assert quality(same.images, shown).psnr.min() > 30


def test_the_statistics_that_a_client_sends_are_followed_through_all_its_steps() -> None:
    """Training on the true images leaves the very statistics, so nothing of the term is left; on others it is not so."""
    model, images = normed(), of_labels(2, 2, 5, 9)
    model[2].running_mean.uniform_(-1, 1)
    after = sent(model, images, epochs=3)
    network = model.eval()
    kept, weights = _Kept(network, after), dict(network.named_parameters())

    def left(of: Images) -> float:
        kept.begin()
        x = of.normalise(of.images).requires_grad_()
        _trained(network, weights, x, images.labels, STEP, epochs=3, batches=1)
        (slope,) = torch.autograd.grad(kept.apart(), [x])
        assert slope.isfinite().all()
        return float(kept.apart().detach())

    assert left(images) < 1e-4
    assert left(of_labels(0, 1, 3, 4)) > 0.05


def test_statistics_that_are_read_bring_those_of_the_drawing_nearer() -> None:
    model, images = normed(), of_labels(2, 5, 7, 9)
    after = sent(model, images)
    units = nn.Sequential(*list(model)[:2])

    def off(norms: float) -> float:
        drawn = invert_update(
            model, model.state_dict(), after, images, recipe=STEP, count=4, norms=norms, iterations=80,
            generator=generator(),
        ).images  # fmt: skip
        pixels = (drawn * 255).round().to(torch.uint8)
        seen, true = (units(images.normalise(x)).detach() for x in (pixels, images.images))
        return float((seen.mean(0) - true.mean(0)).norm() + (seen.var(0) - true.var(0)).norm())

    assert off(norms=1.0) < off(norms=0.0) / 2


def test_a_network_without_batchnorm_has_no_statistics_to_read() -> None:
    model, images = smooth(), of_labels(3)
    drawn = [
        invert_update(
            model, model.state_dict(), sent(model, images), images, recipe=STEP, norms=norms, iterations=5,
            generator=generator(),
        ).images
        for norms in (0.0, 1.0)
    ]  # fmt: skip
    torch.testing.assert_close(*drawn)


def test_batchnorm_gives_its_statistics_away() -> None:
    model = normed()
    params = fm.train(
        model,
        model.state_dict(),
        DIGITS.select(range(200)),
        recipe=Recipe(lr=0.1, batch_size=32),
        epochs=4,
        generator=generator(),
    ).params
    first = nn.Sequential(*list(model.children())[:2])
    mean, variance = params["2.running_mean"], params["2.running_var"]

    def off(norms: float) -> float:
        found = invert_model(
            model, params, DIGITS, labels=torch.arange(10), norms=norms, iterations=100, generator=generator()
        ).images
        model.load_state_dict(params)
        with torch.no_grad():
            seen = first((found - DIGITS.mean[0]) / DIGITS.std[0])
        return float((seen.mean(0) - mean).norm() + (seen.var(0, correction=0) - variance).norm())

    assert off(norms=1.0) < off(norms=0.0) / 4


def test_quality_is_the_ratio_of_peak_to_error_of_the_best_matching_pairs() -> None:
    images = of_labels(0, 1, 2, 3)
    pixels = images.images.double() / 255
    found = (pixels + 0.1 * torch.randn(pixels.shape, generator=generator(), dtype=torch.float64)).clamp(0, 1)[
        [2, 0, 3]
    ]
    near = quality(found, images)
    assert (near.true.tolist(), near.found.tolist()) == ([0, 2, 3], [1, 0, 2])
    errors = (found[[1, 0, 2]] - pixels[[0, 2, 3]]).square().flatten(1).mean(1)
    np.testing.assert_allclose(near.psnr, -10 * errors.log10(), rtol=1e-5)
    assert (near.ssim > 0.5).all()
    assert (near.ssim < 1).all()
    same = quality(pixels, images)
    assert np.isinf(same.psnr).all()
    np.testing.assert_allclose(same.ssim, 1, atol=1e-6)


MODEL, ONE = smooth(), of_labels(3)
BEFORE, AFTER = dict(MODEL.state_dict()), sent(MODEL, ONE)
STILL = smooth().requires_grad_(False)
OTHER = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 10))
CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "invert_update": (
        invert_update,
        {"model": MODEL, "before": BEFORE, "after": AFTER, "data": ONE, "recipe": STEP, "iterations": 1, "generator": generator()},
    ),
    "invert_model": (
        invert_model,
        {"model": MODEL, "params": BEFORE, "data": ONE, "labels": torch.arange(3), "iterations": 1, "generator": generator()},
    ),
    "recover_labels": (recover_labels, {"model": MODEL, "before": BEFORE, "after": AFTER, "recipe": STEP}),
    "quality": (quality, {"found": torch.zeros(1, 1, 8, 8), "true": ONE}),
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "change", "said"),
    [
        ("invert_update", {"after": OTHER.state_dict()}, "^after: "),
        ("invert_update", {"before": OTHER.state_dict(), "after": OTHER.state_dict()}, "^before: "),
        ("invert_update", {"after": BEFORE}, "before and after are equal"),
        ("invert_update", {"model": STILL}, "no parameter of Sequential has a gradient"),
        ("invert_update", {"count": 0}, "count is 0"),
        ("invert_update", {"labels": torch.tensor([10])}, "label 10 names none of the 10 classes"),
        ("invert_update", {"labels": torch.tensor([1, 2])}, r"labels are torch.int64 \(2,\); expected int64 \(1,\)"),
        ("invert_update", {"objective": "l1"}, "unknown objective 'l1'"),
        ("invert_update", {"recipe": Recipe(optimizer="adam")}, "the recipe trains by adam"),
        ("invert_update", {"data": (torch.zeros(2, 64), torch.zeros(2).long())}, "no labelled images of uint8 pixels"),
        ("invert_update", {"recipe": replace(STEP, lr=1e38), "epochs": 9}, "not a finite number"),
        ("invert_model", {"labels": torch.arange(0)}, "a class an image"),
        ("invert_model", {"params": OTHER.state_dict()}, "not a state dict of Sequential"),
        ("recover_labels", {"after": BEFORE}, "'3.bias' did not move"),
        ("recover_labels", {"model": nn.Conv2d(1, 2, 3), **dict.fromkeys(("before", "after"), nn.Conv2d(1, 2, 3).state_dict())},
         "no linear layer"),
        ("quality", {"true": DIGITS.select([])}, "holds 0 images"),
        ("quality", {"found": torch.zeros(1, 1, 9, 9)}, "of one size"),
        ("quality", {"found": torch.full((1, 1, 8, 8), -0.1)}, r"outside \[0, 1\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_inverted_is_one_clear_line(call: str, change: dict[str, Any], said: str) -> None:
    function, good = CALLS[call]
    with pytest.raises(fm.FedmergeError, match=said) as error:
        function(**{**good, **change})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CALLS)
def test_no_argument_ends_in_a_raw_exception(name: str) -> None:
    call, good = CALLS[name]
    call(**good)
    changes = {f"{key}={value!r:.40}": {key: value} for key in good for value in ODD}
    for key in {"before", "after", "params"} & good.keys():
        changes |= {f"{key}: {kind}": {key: bad(AFTER)} for kind, bad in NO_STATE_DICTS.items()}
    wrong = {
        what: said for what, change in changes.items() if (said := ends_well(lambda c=change: call(**{**good, **c})))
    }
    assert not wrong
