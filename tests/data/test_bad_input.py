"""What the functions of this package do not take ends in an error of ours, with what was given."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from fedmerge.data import Dataset, Images, augment, label_counts, partition, split
from fedmerge.errors import ConfigError, DataError, FedmergeError, PartitionError, UnknownNameError

PIXELS, LABELS = torch.zeros(12, 1, 4, 4, dtype=torch.uint8), torch.arange(12) % 3
NAMES, RNG = ("a", "b", "c"), np.random.default_rng(0)


def made(**changes: object) -> Images:
    whole = {"images": PIXELS, "labels": LABELS, "classes": NAMES, "mean": (0.5,), "std": (0.2,), "name": "x"}
    return Images(**{**whole, **changes})  # type: ignore[arg-type]


def divided(data: Images | None = None, **changes: object) -> object:
    options = {"clients": 2, "rng": np.random.default_rng(0), "public_fraction": 0.2, "val_fraction": 0.2}
    return split(Dataset("x", made() if data is None else data, None), **{**options, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": PIXELS.numpy()}, r"images are a ndarray of uint8; expected uint8 \(N, C, H, W\)"),
        ({"images": PIXELS.float()}, r"images are torch.float32 \(12, 1, 4, 4\); expected uint8"),
        ({"images": PIXELS[:, 0]}, r"images are torch.uint8 \(12, 4, 4\); expected uint8"),
        ({"images": [[1]]}, "images are a list of its own kind; expected uint8"),
        ({"images": None}, "images are a NoneType of its own kind; expected uint8"),
        (
            {"images": PIXELS[:, :, :0]},
            r"images are torch.uint8 \(12, 1, 0, 4\); expected at least one channel and one",
        ),
        ({"labels": LABELS.numpy()}, r"labels are a ndarray of int64; expected int64 \(12,\)"),
        ({"labels": LABELS.float()}, r"labels are torch.float32 \(12,\); expected int64 \(12,\)"),
        ({"labels": LABELS[:, None]}, r"labels are torch.int64 \(12, 1\); expected int64 \(12,\)"),
        ({"labels": LABELS.tolist()}, "labels are a list of its own kind; expected int64"),
        (
            {"mean": (math.nan,)},
            ".* do not normalise 1 channels; give one mean and one positive std per channel, all fin",
        ),
        ({"std": (math.nan,)}, ".* do not normalise 1 channels"),
        ({"std": (math.inf,)}, ".* do not normalise 1 channels"),
        ({"mean": 0.5}, ".* do not normalise 1 channels"),
        ({"mean": ("a",)}, ".* do not normalise 1 channels"),
        ({"std": None}, ".* do not normalise 1 channels"),
        ({"classes": "abc"}, "classes are 'abc'; expected the name of each class, by label"),
        ({"classes": 3}, "classes are 3; expected the name of each class, by label"),
    ],
)
def test_images_that_are_none_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=f"x: {message}"):
        made(**changes)


def test_images_without_labels_may_be_kept_but_not_counted_or_split() -> None:
    for wrong in (-1, 3, 10**12):
        data = made(labels=torch.where(torch.arange(12) == 7, wrong, LABELS))
        for use in (data.counts, lambda data=data: divided(data)):
            with pytest.raises(DataError, match=rf"x: label {wrong} of image 7 is no class; expected 0 to 2"):
                use()


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([12], "indices run from 12 to 12; there are 12 images, from 0"),
        ([0, -13], "indices run from -13 to 0; there are 12 images"),
        (np.array([2**64 - 1], np.uint64), "indices run from 18446744073709551615"),
        ([[0], [1, 2]], "indices are no array"),
        (["a"], "indices are <U1"),
        (None, "indices are object"),
        (3, r"indices are int64 \(\); expected integers \(n,\)"),
        (torch.tensor([0.5]), "indices are float32"),
    ],
)
def test_images_that_are_not_there_cannot_be_selected(indices: object, message: str) -> None:
    with pytest.raises(DataError, match=f"x: {message}"):
        made().select(indices)  # type: ignore[arg-type]


def test_indices_from_the_end_are_taken_as_everywhere() -> None:
    torch.testing.assert_close(made().select([-1, 0]).labels, LABELS[[-1, 0]])


@pytest.mark.parametrize("batch", [PIXELS.float(), PIXELS[0], PIXELS.expand(-1, 3, -1, -1), PIXELS.to(torch.int64)])
def test_only_batches_of_bytes_are_normalised(batch: torch.Tensor) -> None:
    before = batch.clone()
    with pytest.raises(DataError, match=r"x: a batch is torch\..*; expected uint8 \(B, 1, H, W\)"):
        made().normalise(batch)
    torch.testing.assert_close(batch, before)


@pytest.mark.parametrize("batch", [PIXELS[0], PIXELS[:, :, :0], PIXELS[:, 0]])
def test_only_batches_are_augmented(batch: torch.Tensor) -> None:
    with pytest.raises(DataError, match=r"a batch to augment has shape .*; expected \(N, C, H, W\), none of them 0"):
        augment(batch, torch.Generator())


NONSENSE = [-1, 2.5, math.nan, True, "2", None, 10**18]


@pytest.mark.parametrize("clients", [*NONSENSE, 0])
@pytest.mark.parametrize("use", [divided, lambda clients: partition(LABELS, clients=clients, rng=RNG)])
def test_a_number_of_clients_is_a_whole_one(use: Callable[..., object], clients: object) -> None:
    with pytest.raises(
        PartitionError, match=r"clients.*(a whole number of at least 1 is needed|images)|for .* clients"
    ):
        use(clients=clients)


@pytest.mark.parametrize("name", ["shards", "classes"])
@pytest.mark.parametrize("per_client", NONSENSE)
def test_shards_and_classes_of_a_client_are_a_whole_number(name: str, per_client: object) -> None:
    with pytest.raises(PartitionError, match="per_client is|shards each need|classes per client"):
        partition(LABELS, clients=2, rng=RNG, name=name, per_client=per_client)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha", [0, -1, math.nan, math.inf, "1", None])
def test_a_concentration_is_a_positive_number(alpha: object) -> None:
    with pytest.raises(PartitionError, match=f"partition_alpha is {alpha}; a positive, finite number is needed"):
        partition(LABELS, clients=2, rng=RNG, name="dirichlet", partition_alpha=alpha)  # type: ignore[arg-type]


@pytest.mark.parametrize("labels", [LABELS.float() + 0.5, LABELS[:, None], ["a", "b"], [[0], [1, 2]], None, 3])
def test_labels_to_divide_are_integers(labels: object) -> None:
    with pytest.raises(PartitionError, match=r"labels are .*expected integers \(n,\)"):
        partition(labels, clients=1, rng=RNG)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "classes"])
def test_no_images_cannot_be_divided(name: str) -> None:
    with pytest.raises(PartitionError, match="1 clients cannot share 0 images"):
        partition([], clients=1, rng=RNG, name=name)


@pytest.mark.parametrize("key", ["public_fraction", "val_fraction", "test_fraction"])
@pytest.mark.parametrize("fraction", [-0.1, 1, 2, math.nan, math.inf, "0.1", None])
def test_a_fraction_is_a_number_below_one(key: str, fraction: object) -> None:
    with pytest.raises(PartitionError, match=f"{key} is {fraction}; a number from 0 up to but not including 1"):
        divided(**{key: fraction})


@pytest.mark.parametrize("changes", [{"client_images": -1}, {"client_images": 2.5}, {"client_images": 10**18}])
def test_images_of_a_client_are_a_whole_number_that_there_are(changes: dict[str, object]) -> None:
    with pytest.raises(PartitionError, match="client_images is"):
        divided(**changes)


@pytest.mark.parametrize("rng", [0, None, torch.Generator(), np.random])
def test_draws_come_from_a_generator_of_numpy(rng: object) -> None:
    for use in (divided, partial(partition, LABELS, clients=2)):
        with pytest.raises(
            ConfigError, match=r"rng is .*; expected a generator, as np.random.default_rng\(seed\) makes it"
        ):
            use(rng=rng)  # type: ignore[operator]


def test_only_data_sets_are_split_and_only_splits_counted() -> None:
    with pytest.raises(ConfigError, match="dataset is a Images; expected a Dataset"):
        split(made(), clients=2, rng=RNG)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="split is None; expected a Split"):
        label_counts(None)  # type: ignore[arg-type]


def test_an_empty_set_and_an_unknown_partition_are_refused() -> None:
    for use in (lambda: divided(made().select([])), lambda: divided(partition="x")):
        with pytest.raises((FedmergeError, UnknownNameError)):
            use()
    with pytest.raises(PartitionError, match="client 2 asked for; there are clients 0 to 1"):
        divided().client(2)  # type: ignore[attr-defined]


def test_parts_of_two_sizes_are_no_data_set() -> None:
    with pytest.raises(DataError, match=r"d: test images are \(1, 4, 3\), training images \(1, 4, 4\)"):
        Dataset("d", made(), made(images=PIXELS[..., :3]))


def test_labels_are_counted_for_every_holder() -> None:
    counts = label_counts(divided())  # type: ignore[arg-type]
    assert np.sum(list(counts.values()), axis=0).tolist() == [4, 4, 4]
