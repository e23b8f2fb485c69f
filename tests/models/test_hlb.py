from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

import fedmerge.data
from fedmerge import models
from fedmerge.models._hlb import HLB


def _build(**options: float) -> HLB:
    model = models.build("hlb", classes=10, in_shape=(3, 32, 32), seed=0, **options)  # type: ignore[arg-type]
    assert isinstance(model, HLB)
    return model


def _images(count: int = 200, side: int = 12) -> fedmerge.data.Images:
    """Real pixels in three correlated channels: digits at three levels of brightness, enlarged."""
    digits = fedmerge.data.load("digits").train.select(np.arange(count))
    pixels = nn.functional.interpolate(digits.images, size=(side, side)).float()
    noise = torch.randint(60, (count, 3, side, side), generator=torch.Generator().manual_seed(0))
    coloured = (pixels * torch.tensor([0.7, 0.5, 0.3]).view(3, 1, 1) + noise).to(torch.uint8)
    return fedmerge.data.Images(
        coloured, digits.labels, digits.classes, (0.4, 0.3, 0.2), (0.3, 0.25, 0.2), "coloured digits"
    )


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 6, 9])
def test_any_kernel_keeps_the_sides(kernel_size: int) -> None:
    model = _build(width=8, kernel_size=kernel_size).eval()
    x = torch.randn(2, 4, 16, 16)
    assert model.group1.conv1(x).shape == (2, 8, 16, 16)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5, 6])
def test_the_second_convolution_of_a_group_starts_as_the_identity(kernel_size: int) -> None:
    conv = _build(width=8, kernel_size=kernel_size).group2.conv2
    x = torch.randn(2, 32, 7, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(conv(x), x)


def test_the_first_convolution_of_a_group_keeps_the_spread_of_random_weights_and_favours_its_input() -> None:
    weight = _build(width=16).group2.conv1.weight.detach()  # (64, 16, 3, 3)
    spread = 1 / np.sqrt(3 * 16 * 9)  # of torch's uniform initialisation with bound 1 / sqrt(fan in)
    assert float(weight.std()) == pytest.approx(spread, rel=0.05)
    own = weight[range(16), range(16), 1, 1].mean()
    assert float(own) > 5 * spread


def test_channels_follow_the_base_width() -> None:
    shapes = {name: tuple(value.shape) for name, value in _build(width=8).state_dict().items()}
    assert shapes["whiten.weight"] == (12, 3, 2, 2)
    assert shapes["project.weight"] == (4, 12, 1, 1)
    assert shapes["group1.conv1.weight"] == (8, 4, 3, 3)
    assert shapes["group2.conv2.weight"] == (32, 32, 3, 3)
    assert shapes["group3.conv1.weight"] == (64, 32, 3, 3)
    assert shapes["out.weight"] == (10, 64)
    assert "out.bias" not in shapes


def test_whitened_patches_are_uncorrelated_with_the_expected_variance() -> None:
    model, images = _build(width=8), _images()
    model.initialise_from(images)
    x = images.normalise(images.images).double()
    filters = model.whiten.weight.detach().double()
    patches = nn.functional.unfold(x, 2).transpose(1, 2).reshape(-1, 12)
    values = torch.linalg.eigvalsh(torch.cov(patches.T, correction=0)).flip(0)
    whitened = nn.functional.conv2d(x, filters).permute(1, 0, 2, 3).flatten(1)
    # An eigenvalue v, divided by v + 0.01: nearly 1, and less for directions that hardly vary.
    torch.testing.assert_close(torch.cov(whitened, correction=0), (values / (values + 0.01)).diag(), atol=1e-4, rtol=0)


def test_whitening_depends_on_the_images_alone() -> None:
    one, other = _build(width=8), models.build("hlb", classes=10, in_shape=(3, 32, 32), width=8, seed=1)
    for model in (one, other):
        models.initialise_from(model, _images())
    torch.testing.assert_close(one.whiten.weight, other.get_parameter("whiten.weight"), rtol=0, atol=0)


@pytest.mark.parametrize(("count", "rows"), [(100, range(0, 100, 2)), (75, [3 * i // 2 for i in range(50)])])
def test_whitening_looks_at_evenly_spaced_images_where_there_are_many(
    count: int, rows: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmerge.models._hlb._WHITENED_IMAGES", 50)
    images = _images(count)
    all_of, half = _build(width=8), _build(width=8)
    all_of.initialise_from(images)
    half.initialise_from(images.select(np.asarray(rows)))
    torch.testing.assert_close(all_of.whiten.weight, half.whiten.weight, rtol=0, atol=0)


def test_before_whitening_the_pixels_pass_through() -> None:
    x = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = _build(width=8).whiten(x)
    torch.testing.assert_close(seen.flatten(2), nn.functional.unfold(x, 2))


def test_whitening_filters_and_batchnorm_scales_are_frozen() -> None:
    frozen = {name for name, weight in _build(width=8).named_parameters() if not weight.requires_grad}
    norms = {f"group{group}.norm{norm}.weight" for group in (1, 2, 3) for norm in (1, 2)}
    assert frozen == {"whiten.weight"} | norms
