"""One contract for every network by name, and the promises of each."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge.data
from fedmerge import models
from fedmerge.errors import ConfigError, ResourceError, UnknownNameError
from fedmerge.training import train

COLOUR, GREY, DIGIT = (3, 32, 32), (1, 28, 28), (1, 8, 8)
TOO_SMALL = {("vgg11", GREY), ("vgg11", DIGIT), ("cnn", DIGIT), ("hlb", DIGIT), ("lenet5", DIGIT)}
FITS = [(name, shape) for name in models.names() for shape in (COLOUR, GREY, DIGIT) if (name, shape) not in TOO_SMALL]


def _narrow(name: str) -> float:
    """A width at which the test is quick."""
    return {"mlp": 16, "hlb": 8, "cnn": 1, "lenet5": 1}.get(name, 0.125)


def _build(name: str, shape: tuple[int, int, int], seed: int = 0) -> nn.Module:
    return models.build(name, classes=7, in_shape=shape, width=_narrow(name), seed=seed)


@pytest.mark.parametrize(("name", "shape"), FITS)
def test_a_network_gives_finite_logits_and_exports_to_the_same_function(name: str, shape: tuple[int, int, int]) -> None:
    model = _build(name, shape).eval()
    images = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (3, 7)
    assert logits.isfinite().all()
    exported = torch.export.export(model, (images,), strict=False)
    torch.testing.assert_close(exported.module()(images), logits)


@pytest.mark.parametrize("name", models.names())
def test_the_weights_depend_on_the_seed_alone_and_the_global_generator_stays(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = _build(name, COLOUR, seed=5).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    again, other = _build(name, COLOUR, seed=5).state_dict(), _build(name, COLOUR, seed=6).state_dict()
    for key, value in first.items():
        torch.testing.assert_close(again[key], value, rtol=0, atol=0)
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("name", models.names())
def test_the_recipe_lowers_the_loss_on_real_images(name: str) -> None:
    digits = fedmerge.data.load("digits").train.select(np.arange(200))
    side = 32 if name in ("vgg11", "cnn", "hlb", "lenet5") else 8
    enlarged = nn.functional.interpolate(digits.images, size=(side, side))
    data = fedmerge.data.Images(enlarged, digits.labels, digits.classes, digits.mean, digits.std, "digits")
    width = 0.5 if name.startswith(("resnet20", "reduced-vgg")) else _narrow(name)
    model = models.build(name, classes=10, in_shape=data.shape, width=width, seed=0)
    models.initialise_from(model, data)
    done = train(
        model,
        model.state_dict(),
        data,
        recipe=replace(models.recipe(name), batch_size=20, augment=False),
        epochs=8,
        generator=torch.Generator().manual_seed(0),
    )
    assert done.losses[-1] < 0.8 * done.losses[0]


@pytest.mark.parametrize("name", models.names())
def test_the_summary_states_the_unit_of_the_width_and_the_default_is_what_it_says(name: str) -> None:
    said = models.summaries()[name].split("; width ")[1]
    default = float(said.split()[-3].strip(","))
    given = models.build(name, classes=2, in_shape=COLOUR, width=default, seed=0).state_dict()
    for key, value in models.build(name, classes=2, in_shape=COLOUR, seed=0).state_dict().items():
        torch.testing.assert_close(given[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", models.names())
def test_the_smallest_width_named_in_a_refusal_can_be_built_and_nothing_has_one_unit(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"width of model '{name}' is 0.01") as raised:
        models.build(name, classes=2, in_shape=COLOUR, width=0.01, seed=0)
    smallest = float(str(raised.value).split("at least ")[1].split(",")[0])
    model = models.build(name, classes=2, in_shape=COLOUR, width=smallest, seed=0).eval()
    assert model(torch.zeros(1, *COLOUR)).shape == (1, 2)
    assert all(weight.shape[0] >= 2 for weight in model.state_dict().values() if weight.ndim)
    with pytest.raises(ConfigError, match="at least"):
        models.build(name, classes=2, in_shape=COLOUR, width=smallest * 0.6, seed=0)


@pytest.mark.parametrize("name", [*models.names(), "resnet50"])
@pytest.mark.parametrize("width", [-1, -0.5, math.nan, math.inf, -math.inf, 1e9, 1e300, True, "8"])
def test_no_network_is_built_of_a_width_that_makes_no_sense(name: str, width: object) -> None:
    with pytest.raises((ConfigError, ResourceError), match=rf"'{name}'.*(expected|give a smaller width|no option)"):
        models.build(name, classes=2, in_shape=COLOUR, width=width, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "width"), [("mlp", 0.3), ("mlp", 1), ("mlp", 12.5), ("hlb", 0.5), ("hlb", 8.5)])
def test_a_width_that_counts_units_is_no_factor(name: str, width: float) -> None:
    with pytest.raises(ConfigError, match=rf"width of model '{name}' is {width} \(width counts .*whole number of at"):
        models.build(name, classes=2, in_shape=COLOUR, width=width, seed=0)


@pytest.mark.parametrize("kernel_size", [-1, 2.5, math.nan, 33, 10**6, "3", True])
@pytest.mark.parametrize("name", ["hlb", "cnn"])
def test_kernels_that_make_no_sense_are_refused(name: str, kernel_size: object) -> None:
    with pytest.raises(ConfigError, match="kernel_size"):
        models.build(name, classes=2, in_shape=COLOUR, kernel_size=kernel_size, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"classes": 2.5},
        {"classes": 10**15},
        {"in_shape": (3, 8.5, 8)},
        {"in_shape": (3, 10**9, 10**9)},
        {"in_shape": ()},
    ],
)
def test_sizes_that_make_no_sense_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((ConfigError, ResourceError), match="model 'mlp'"):
        models.build("mlp", **{"classes": 2, "in_shape": DIGIT, "seed": 0, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cnn", "lenet5", "reduced-vgg", "vgg11", "resnet20", "resnet18", "hlb", "mlp"])
def test_doubling_the_width_doubles_the_widest_layer(name: str) -> None:
    widest = []
    for width in (_narrow(name), 2 * _narrow(name)):
        model = models.build(name, classes=2, in_shape=COLOUR, width=width, seed=0)
        widest.append(
            max(module.weight.shape[0] for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear))
        )
    assert widest[1] == 2 * widest[0]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        # 64 * 128 + 128, 128 * 128 + 128, 128 * 10 + 10
        ("mlp", DIGIT, 26_122),
        # 3 * 25 * 6 + 6, 6 * 25 * 16 + 16, 400 * 120 + 120, 120 * 84 + 84, 84 * 10 + 10
        ("cnn", COLOUR, 62_006),
        # 25 * 6 + 6, 6 * 25 * 16 + 16, 400 * 120 + 120, 120 * 84 + 84, 84 * 10 + 10: the 62K of MNIST
        ("lenet5", GREY, 61_706),
        # 9 * 3 * 64 + 64, 9 * 64 * 128 + 128, 128 * 64 * 95 + 95, 95 * 10 + 10: nearest to the published 855,000
        ("reduced-vgg", COLOUR, 854_943),
        # 9 * (3*64 + 64*128 + 128*256 + 256*256 + 256*512 + 3 * 512*512) + 2752 biases, 512 * 10 + 10
        ("vgg11", COLOUR, 9_225_610),
        # He et al., 2016, table 6: 0.27 million; the projections of two shortcuts add 2,752 to 269,722
        ("resnet20", COLOUR, 272_474),
        ("resnet20-layernorm", COLOUR, 272_474),
        # 11.17 million with the small stem
        ("resnet18", COLOUR, 11_173_962),
        # 12*12 + 12*32 + 9 * (32*64 + 64*64 + 64*256 + 256*256 + 256*512 + 512*512) + 4 * 832 + 512 * 10
        ("hlb", COLOUR, 4_340_496),
    ],
)
def test_default_networks_have_their_known_numbers_of_parameters(
    name: str, shape: tuple[int, int, int], expected: int
) -> None:
    model = models.build(name, classes=10, in_shape=shape, seed=0)
    assert sum(weight.numel() for weight in model.parameters()) == expected


def test_vgg11_without_biases_has_none() -> None:
    model = models.build("vgg11", classes=10, in_shape=COLOUR, width=0.125, seed=0, bias=False)
    assert all(name.endswith("weight") for name in model.state_dict())


def test_layer_normalisation_is_per_pixel_over_channels() -> None:
    model = models.build("resnet20-layernorm", classes=2, in_shape=COLOUR, seed=0)
    assert not any("running" in name for name in model.state_dict())
    norm = model.get_submodule("norm")
    x = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    normal = norm(x)
    torch.testing.assert_close(normal.mean(1), torch.zeros(2, 3, 5), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal.var(1, unbiased=False), torch.ones(2, 3, 5), atol=1e-3, rtol=0)


def test_initialising_from_images_leaves_other_networks_alone() -> None:
    model = models.build("mlp", classes=10, in_shape=DIGIT, seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    models.initialise_from(model, fedmerge.data.load("digits").train)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "googlenet"])
def test_torchvision_models_come_by_their_own_name(name: str) -> None:
    model = models.build(name, classes=4, in_shape=(3, 64, 64), seed=0)
    assert model.training
    assert model.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    assert models.recipe(name).optimizer == "sgd"


def test_a_vision_transformer_takes_the_size_of_the_images() -> None:
    model = models.build("vit_b_32", classes=3, in_shape=COLOUR, seed=0)
    assert model.eval()(torch.zeros(1, *COLOUR)).shape == (1, 3)


def test_a_torchvision_model_that_cannot_take_the_images_says_so() -> None:
    with pytest.raises(ConfigError, match=r"torchvision's squeezenet1_1 cannot take images of shape \(1, 8, 8\)"):
        models.build("squeezenet1_1", classes=4, in_shape=DIGIT, seed=0)


@pytest.mark.parametrize(("name", "shape"), sorted(TOO_SMALL))
def test_images_too_small_for_a_network_are_refused_with_the_smallest_size(
    name: str, shape: tuple[int, int, int]
) -> None:
    with pytest.raises(
        ConfigError, match=rf"{name} .*needs .*at least (\d+)x\1; these are {shape[1]}x{shape[2]}"
    ) as raised:
        _build(name, shape)
    smallest = int(str(raised.value).split("at least ")[1].split("x")[0])
    assert _build(name, (3, smallest, smallest)).eval()(torch.zeros(1, 3, smallest, smallest)).shape == (1, 7)
    with pytest.raises(ConfigError, match="at least"):
        _build(name, (3, smallest - 1, smallest))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"kernel_size": 3}, r"model 'mlp' has no option kernel_size \(given 3\); it takes width"),
        ("hlb", {"bias": False}, r"model 'hlb' has no option bias \(given False\); it takes width, kernel_size"),
        ("resnet50", {"width": 2}, "model 'resnet50' has no option width .*it takes no options"),
        (
            "mlp",
            {"width": -1},
            "width of model 'mlp' is -1 .*; expected a whole number of at least 2, or 0 for the default",
        ),
        ("mlp", {"classes": 0}, "model 'mlp' for 0 classes"),
        ("mlp", {"in_shape": (3, 0, 3)}, r"images of shape \(3, 0, 3\); expected"),
    ],
)
def test_options_that_a_network_does_not_have_are_refused(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        models.build(name, **{"classes": 10, "in_shape": COLOUR, "seed": 0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("resnet21", "resnet20"), ("mobilenet_v3_smal", "mobilenet_v3_small"), ("hlbb", "hlb")]
)
def test_an_unknown_network_names_the_nearest_of_ours_or_torchvisions(wrong: str, nearest: str) -> None:
    for ask in (lambda: models.build(wrong, classes=2, in_shape=COLOUR, seed=0), lambda: models.recipe(wrong)):
        with pytest.raises(UnknownNameError, match=rf"unknown model '{wrong}'.*cnn, .*did you mean '{nearest}'"):
            ask()


def test_every_name_has_a_summary() -> None:
    assert set(models.names()) | {"<torchvision>"} == set(models.summaries())
    assert {"mlp", "lenet5", "cnn", "reduced-vgg", "vgg11", "resnet20", "resnet20-layernorm", "resnet18", "hlb"} <= set(
        models.names()
    )


def test_one_more_or_one_less_hidden_unit_takes_reduced_vgg_away_from_its_published_size() -> None:
    model = models.build("reduced-vgg", classes=10, in_shape=COLOUR, seed=0)
    size = sum(weight.numel() for weight in model.parameters())
    per_unit = 128 * 8 * 8 + 1 + 10
    assert abs(size - 855_000) < min(abs(size + per_unit - 855_000), abs(size - per_unit - 855_000))
    assert model.get_submodule("fc1").out_features == 95


@pytest.mark.parametrize(("name", "images", "steps"), [("lenet5", 60_000, 580), ("reduced-vgg", 50_000, 11_310)])
def test_recipes_take_the_published_number_of_steps(name: str, images: int, steps: int) -> None:
    found = models.recipe(name)
    assert found.optimizer == "adam"
    assert images // found.batch_size * found.epochs == steps


def test_niid_benchs_recipe_is_kept() -> None:
    found = models.recipe("cnn")
    assert (found.lr, found.momentum, found.weight_decay, found.batch_size) == (0.01, 0.9, 1e-5, 64)
    assert not math.isclose(found.rate(0.99), 0)
