import numpy as np
import pytest
import torch

from fedmerge.data import Dataset, Images
from fedmerge.errors import DataError


def _images(count: int = 6, channels: int = 3) -> Images:
    pixels = torch.randint(256, (count, channels, 5, 4), generator=torch.Generator().manual_seed(0))
    return Images(
        pixels.to(torch.uint8),
        torch.arange(count) % 2,
        ("even", "odd"),
        tuple(0.1 * (channel + 1) for channel in range(channels)),
        tuple(0.2 * (channel + 1) for channel in range(channels)),
        "six",
    )


def test_selected_images_come_in_the_order_of_the_indices_and_repeat() -> None:
    images = _images()
    chosen = images.select([4, 0, 4])
    assert len(chosen) == 3
    torch.testing.assert_close(chosen.images, torch.stack([images.images[i] for i in (4, 0, 4)]))
    assert chosen.labels.tolist() == [0, 0, 0]
    assert (chosen.name, chosen.classes, chosen.mean) == ("six", ("even", "odd"), images.mean)


def test_selection_is_a_copy() -> None:
    images = _images()
    before = images.images.clone()
    images.select(np.arange(6)).images.zero_()
    torch.testing.assert_close(images.images, before)


def test_nothing_can_be_selected() -> None:
    assert len(_images().select([])) == 0


@pytest.mark.parametrize("wrong", [np.ones(6, dtype=bool), [0.5], [[0, 1]]])
def test_indices_that_are_no_list_of_integers_are_refused(wrong: object) -> None:
    with pytest.raises(DataError, match=r"six: indices are .*; expected integers \(n,\)"):
        _images().select(wrong)  # type: ignore[arg-type]


def test_normalised_pixels_equal_the_formula_one_by_one() -> None:
    images = _images()
    batch = images.images[:2]
    normal = images.normalise(batch)
    assert normal.dtype == torch.float32
    for n, c, h, w in np.ndindex(*batch.shape):
        expected = (int(batch[n, c, h, w]) / 255 - images.mean[c]) / images.std[c]
        assert float(normal[n, c, h, w]) == pytest.approx(expected, abs=1e-5)


def test_normalisation_leaves_the_bytes_alone() -> None:
    images = _images()
    before = images.images.clone()
    images.normalise(images.images)
    torch.testing.assert_close(images.images, before)


def test_counts_are_per_class() -> None:
    assert _images().select([0, 2, 1]).counts() == [2, 1]


def test_images_move_to_a_device_as_bytes() -> None:
    moved = _images().to("cpu")
    assert moved.images.dtype == torch.uint8
    assert moved.images.device == moved.labels.device == torch.device("cpu")


def test_a_data_set_tells_its_classes_and_shape() -> None:
    data = Dataset("six", _images(), None)
    assert data.classes == ("even", "odd")
    assert data.shape == (3, 5, 4)


def test_float_images_are_refused() -> None:
    with pytest.raises(DataError, match=r"images are torch.float32 \(2, 1, 4, 4\); expected uint8 \(N, C, H, W\)"):
        Images(torch.zeros(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64), ("a",), (0.5,), (0.5,), "x")


def test_labels_of_another_length_are_refused() -> None:
    images = _images()
    with pytest.raises(DataError, match=r"labels are torch.int64 \(5,\); expected int64 \(6,\)"):
        Images(images.images, images.labels[:5], images.classes, images.mean, images.std, "x")


@pytest.mark.parametrize(("mean", "std"), [((0.5,), (0.5, 0.5, 0.5)), ((0.5,) * 3, (0.5, 0.0, 0.5))])
def test_constants_that_do_not_fit_the_channels_are_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    images = _images()
    with pytest.raises(DataError, match="do not normalise 3 channels; give one mean and one positive std"):
        Images(images.images, images.labels, images.classes, mean, std, "x")


def test_the_first_images_of_a_folder_are_of_all_its_classes() -> None:
    pixels = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    by_class = Images(pixels, torch.arange(12) // 4, ("a", "b", "c"), (0,), (1,), "folder")
    assert by_class.first(6).labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert by_class.first(12).images.flatten().tolist() == list(range(12))
    assert by_class.first(20).labels.tolist() == by_class.labels.tolist()
    assert len(by_class.first(0)) == 0
    mixed = by_class.select([4, 0, 1, 2, 3, 5])
    assert mixed.first(3).images.flatten().tolist() == [4, 0, 1]
    one = by_class.select(range(4))
    assert one.first(2).images.flatten().tolist() == [0, 1]
