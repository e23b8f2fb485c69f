from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.data import Dataset, Split, label_counts, load, partitions, split
from fedmerge.errors import PartitionError, UnknownNameError

_DIGITS = load("digits")
# The same images as a set with a test part of its own.
_WITH_TEST = Dataset(
    "digits-with-test", _DIGITS.train.select(np.arange(1300)), _DIGITS.train.select(np.arange(1300, 1797))
)


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _all(found: Split) -> list[np.ndarray]:
    return [found.public, found.val, found.test, *found.clients]


@pytest.mark.parametrize("dataset", [_DIGITS, _WITH_TEST], ids=["test cut out", "test given"])
@given(
    clients=st.integers(5, 12),
    partition=st.sampled_from(partitions()),
    public=st.sampled_from([0.0, 0.04, 0.3]),
    val=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40, deadline=None)
def test_every_image_of_the_pool_has_exactly_one_purpose(
    dataset: Dataset, clients: int, partition: str, public: float, val: float, seed: int
) -> None:
    found = split(
        dataset,
        clients=clients,
        partition=partition,
        public_fraction=public,
        val_fraction=val,
        rng=_rng(seed),
    )
    np.testing.assert_array_equal(np.sort(np.concatenate(_all(found))), np.arange(1797))
    pool = 1797 - len(found.test)
    assert (len(found.public), len(found.val)) == (round(public * pool), round(val * pool))


def test_the_given_test_part_is_the_test_split() -> None:
    found = split(_WITH_TEST, clients=3, rng=_rng())
    np.testing.assert_array_equal(found.test, np.arange(1300, 1797))
    assert _WITH_TEST.test is not None
    torch.testing.assert_close(found.test_images.images, _WITH_TEST.test.images)


@pytest.mark.parametrize("purpose", ["public", "val", "test"])
def test_server_splits_are_stratified_to_within_one_image_per_class(purpose: str) -> None:
    found = split(_DIGITS, clients=3, public_fraction=0.13, val_fraction=0.07, rng=_rng())
    pools = {
        "test": np.arange(1797),
        "public": np.setdiff1d(np.arange(1797), found.test),
        "val": np.setdiff1d(np.arange(1797), np.concatenate([found.test, found.public])),
    }
    labels = _DIGITS.train.labels.numpy()
    drawn = getattr(found, purpose)
    share = len(drawn) / len(pools[purpose])
    exact = np.bincount(labels[pools[purpose]]) * share
    assert abs(np.bincount(labels[drawn], minlength=10) - exact).max() < 1


def test_the_servers_splits_do_not_depend_on_the_partition_or_the_clients() -> None:
    one = split(_DIGITS, clients=5, partition="iid", rng=_rng(7))
    other = split(_DIGITS, clients=9, partition="dirichlet", partition_alpha=1.0, rng=_rng(7))
    for purpose in ("public", "val", "test"):
        np.testing.assert_array_equal(getattr(one, purpose), getattr(other, purpose))


def test_the_same_generator_gives_the_same_split_and_another_one_does_not() -> None:
    one, same, other = (split(_DIGITS, clients=4, partition="shards", rng=_rng(seed)) for seed in (1, 1, 2))
    for a, b in zip(_all(one), _all(same), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(one.test, other.test)


def test_images_of_each_purpose_are_those_of_its_indices() -> None:
    found = split(_DIGITS, clients=4, rng=_rng())
    for images, indices, name in (
        (found.public_images, found.public, "digits (public)"),
        (found.val_images, found.val, "digits (val)"),
        (found.test_images, found.test, "digits (test)"),
        (found.client(2), found.clients[2], "digits (client 2)"),
    ):
        torch.testing.assert_close(images.images, _DIGITS.train.images[indices])
        torch.testing.assert_close(images.labels, _DIGITS.train.labels[indices])
        assert images.name == name


@pytest.mark.parametrize("dataset", [_DIGITS, _WITH_TEST], ids=["test cut out", "test given"])
def test_label_counts_agree_with_the_images_of_each_holder(dataset: Dataset) -> None:
    found = split(dataset, clients=3, partition="dirichlet", rng=_rng())
    counts = label_counts(found)
    assert list(counts) == ["public", "val", "test", "client 0", "client 1", "client 2"]
    assert counts["public"] == found.public_images.counts()
    assert counts["test"] == found.test_images.counts()
    assert counts["client 1"] == found.client(1).counts()
    assert sum(map(sum, counts.values())) == 1797


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_clients_may_hold_few_images_so_that_their_number_leaves_each_as_much(partition: str) -> None:
    whole = split(_DIGITS, clients=3, partition=partition, rng=_rng())
    few = split(_DIGITS, clients=3, partition=partition, client_images=100, rng=_rng())
    more = split(_DIGITS, clients=6, partition=partition, client_images=100, rng=_rng())
    assert [sum(map(len, found.clients)) for found in (few, more)] == [300, 600]
    if partition == "iid":
        assert {len(held) for held in (*few.clients, *more.clients)} == {100}
    for name in ("public", "val", "test"):
        np.testing.assert_array_equal(getattr(few, name), getattr(whole, name))
    held = np.concatenate(few.clients)
    assert len(np.unique(held)) == 300
    assert set(held) <= set(np.concatenate(whole.clients))
    # As many of each class as the pool has of it, up to rounding.
    share = 300 / sum(map(len, whole.clients))
    in_pool = np.bincount(_DIGITS.train.labels.numpy()[np.concatenate(whole.clients)])
    np.testing.assert_allclose(np.bincount(_DIGITS.train.labels.numpy()[held]), share * in_pool, atol=1)


def test_a_client_that_is_not_there_is_named() -> None:
    with pytest.raises(PartitionError, match="client 4 asked for; there are clients 0 to 3"):
        split(_DIGITS, clients=4, rng=_rng()).client(4)


def test_an_unknown_partition_is_named() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown partition 'idd'.*did you mean 'iid'"):
        split(_DIGITS, clients=4, partition="idd", rng=_rng())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"public_fraction": 1.0}, "public_fraction is 1.0; a number from 0 up to but not including 1"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"test_fraction": 0.0}, "test_fraction is 0 and digits has no test set; give a fraction above 0"),
        ({"public_fraction": 1e-5}, r"public_fraction 1e-05 of 1438 images is none; give 0 or at least 0.0007"),
        (
            {"public_fraction": 0.6, "val_fraction": 0.5},
            "public_fraction 0.6 and val_fraction 0.5 leave 0 of 1438 images for 4 clients; lower them",
        ),
        ({"clients": 2000}, "leave 1222 of 1438 images for 2000 clients; lower them or ask for fewer clients"),
        ({"clients": 0}, "clients is 0; a whole number of at least 1 is needed"),
        (
            {"client_images": 400},
            "client_images is 400: 4 clients would hold 1600 images, and there are 1222 for them; give at most 305",
        ),
    ],
)
def test_a_split_that_cannot_be_made_says_why(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        split(_DIGITS, **{"clients": 4, "rng": _rng(), **options})


def test_public_images_that_keep_labels_are_as_many_as_said_of_all_classes_and_the_same_for_every_partition() -> None:
    kept = []
    for partition, clients in (("iid", 3), ("dirichlet", 5)):
        found = split(_DIGITS, clients=clients, partition=partition, public_fraction=0.2, public_labels=40, rng=_rng())
        whole = split(_DIGITS, clients=clients, partition=partition, public_fraction=0.2, rng=_rng())
        for with_labels, without in zip(_all(found), _all(whole), strict=True):
            assert np.array_equal(with_labels, without)  # nothing else depends on it
        labels, images = found.public_images.labels, found.public_images.labelled
        assert (len(images), int((labels == -1).sum())) == (40, len(found.public) - 40)
        assert set(images.counts()) == {4}
        assert torch.equal(labels[labels >= 0], whole.public_images.labels[labels >= 0])
        kept.append(found.unlabelled)
    assert np.array_equal(*kept)
    with pytest.raises(PartitionError, match="public_labels is 9999, and there are 288 public images"):
        split(_DIGITS, clients=3, public_fraction=0.2, public_labels=9999, rng=_rng())
