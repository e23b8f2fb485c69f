import numpy as np
import pytest
import torch

from fedmerge.data import Images, augment


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _candidates(image: np.ndarray, pad: int) -> set[bytes]:
    """Every image that a flip and a crop out of the reflected border can give, by brute force."""
    _, height, width = image.shape
    found = set()
    for flipped in (image, image[:, :, ::-1]):
        padded = np.pad(flipped, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                found.add(np.ascontiguousarray(padded[:, top : top + height, left : left + width]).tobytes())
    return found


@pytest.mark.parametrize(("side", "pad"), [(8, 1), (16, 2), (32, 4)])
def test_every_augmented_image_is_a_flip_and_a_crop_of_its_own(side: int, pad: int) -> None:
    batch = torch.randint(256, (30, 3, side, side), generator=_generator()).to(torch.uint8)
    seen = augment(batch, _generator(1))
    assert seen.dtype == torch.uint8
    for image, result in zip(batch.numpy(), seen.numpy(), strict=True):
        assert result.tobytes() in _candidates(image, pad)


def test_flips_and_all_shifts_come_equally_often() -> None:
    image = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8)
    seen, times = np.unique(
        augment(image.expand(18_000, -1, -1, -1), _generator()).flatten(1).numpy(), axis=0, return_counts=True
    )
    # 2 flips x 3 x 3 shifts of an image whose pixels all differ: 18 results, 1,000 times each.
    # The standard deviation of each count is below 31; five of them are allowed.
    assert len(seen) == 18
    assert abs(times - 1000).max() < 155


def test_the_same_generator_gives_the_same_bytes(digits: Images) -> None:
    batch = digits.images[:100]
    torch.testing.assert_close(augment(batch, _generator(3)), augment(batch, _generator(3)), rtol=0, atol=0)
    assert not torch.equal(augment(batch, _generator(3)), augment(batch, _generator(4)))


def test_the_batch_and_the_global_generator_are_left_alone(digits: Images) -> None:
    batch = digits.images[:10].clone()
    state = torch.get_rng_state()
    augment(batch, _generator())
    torch.testing.assert_close(batch, digits.images[:10])
    assert torch.equal(state, torch.get_rng_state())


def test_images_of_one_pixel_stay() -> None:
    batch = torch.tensor([[[[7]]]], dtype=torch.uint8)
    assert augment(batch, _generator()).item() == 7
