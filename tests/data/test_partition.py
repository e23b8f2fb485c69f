from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.data import Images, partition, partition_summaries, partitions
from fedmerge.errors import PartitionError, UnknownNameError


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@st.composite
def _pools(draw: st.DrawFn) -> tuple[np.ndarray, int, float, int]:
    """Labels with every class a few times, clients, alpha, per_client: numbers that allow every partition."""
    classes = draw(st.integers(2, 6))
    sizes = draw(st.lists(st.integers(12, 40), min_size=classes, max_size=classes))
    labels = np.random.default_rng(draw(st.integers(0, 99))).permutation(np.repeat(np.arange(classes), sizes))
    per_client = draw(st.integers(1, 2))
    clients = draw(st.integers(-(-classes // per_client), 8))
    return labels, clients, draw(st.sampled_from([0.3, 1.0, 100.0])), per_client


@pytest.mark.parametrize("name", partitions())
@given(pool=_pools(), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_every_image_goes_to_exactly_one_client_and_none_stays_empty(
    name: str, pool: tuple[np.ndarray, int, float, int], seed: int
) -> None:
    labels, clients, alpha, per_client = pool
    options = {"clients": clients, "name": name, "partition_alpha": alpha, "per_client": per_client}
    parts = partition(labels, rng=_rng(seed), **options)
    assert len(parts) == clients
    assert min(map(len, parts)) > 0
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    assert all((np.diff(part) > 0).all() for part in parts)
    for part, again in zip(parts, partition(labels, rng=_rng(seed), **options), strict=True):
        np.testing.assert_array_equal(part, again)


@pytest.mark.parametrize("name", partitions())
def test_another_seed_deals_differently(name: str, digits: Images) -> None:
    one, two = (partition(digits.labels, clients=5, name=name, rng=_rng(seed)) for seed in (0, 1))
    assert any(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_iid_gives_equal_numbers(digits: Images) -> None:
    sizes = [len(part) for part in partition(digits.labels, clients=4, name="iid", rng=_rng())]
    assert sorted(sizes) == [449, 449, 449, 450]


def test_a_large_alpha_gives_every_client_nearly_the_same_share_of_each_class() -> None:
    labels = np.repeat(np.arange(5), 2000)
    for part in partition(labels, clients=4, name="dirichlet", partition_alpha=1e6, rng=_rng()):
        # Each share of a class is 1/4 with a standard deviation of about 1/sqrt(16 * 4e6), far below 1 %.
        assert abs(np.bincount(labels[part]) - 500).max() <= 20


def test_a_small_alpha_concentrates_classes() -> None:
    labels = np.repeat(np.arange(10), 500)
    largest = {
        alpha: np.mean(
            [
                np.bincount(labels[part], minlength=10).max() / len(part)
                for part in partition(labels, clients=10, name="dirichlet", partition_alpha=alpha, rng=_rng())
            ]
        )
        for alpha in (0.1, 100.0)
    }
    assert largest[0.1] > 3 * largest[100.0]


def test_dirichlet_leaves_no_client_below_ten_images_or_half_its_part() -> None:
    labels = np.repeat(np.arange(10), 100)
    for seed in range(20):
        parts = partition(labels, clients=10, name="dirichlet", partition_alpha=0.2, rng=_rng(seed))
        assert min(map(len, parts)) >= 10
        few = partition(labels[::10], clients=10, name="dirichlet", partition_alpha=0.5, rng=_rng(seed))
        assert min(map(len, few)) >= 5


def test_dirichlet_survives_an_alpha_at_which_a_class_falls_to_one_client() -> None:
    # With equal classes, a class that falls wholly to a client which has its part goes to the others.
    labels = np.repeat(np.arange(8), 50)
    for seed in range(5):
        parts = partition(labels, clients=4, name="dirichlet", partition_alpha=1e-4, rng=_rng(seed))
        np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(400))


def test_a_smaller_alpha_is_never_less_skewed() -> None:
    labels = np.repeat(np.arange(10), 60)

    def classes(alpha: float) -> float:
        parts = [partition(labels, clients=5, name="dirichlet", partition_alpha=alpha, rng=_rng(s)) for s in range(40)]
        return float(np.mean([len(np.unique(labels[rows])) for dealt in parts for rows in dealt]))

    found = [classes(alpha) for alpha in (0.03, 0.003, 1e-4, 1e-6)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == 2  # ten classes, five clients


def test_an_alpha_at_the_ends_of_its_range_is_as_skewed_or_as_even_as_can_be() -> None:
    labels = np.repeat(np.arange(10), 60)
    for alpha in (5e-324, 1e-320, 1e-200):
        parts = partition(labels, clients=10, name="dirichlet", partition_alpha=alpha, rng=_rng())
        assert all(len(np.unique(labels[part])) == 1 for part in parts)
    for alpha in (1e200, 1e308, 1.7e308):
        parts = partition(labels, clients=10, name="dirichlet", partition_alpha=alpha, rng=_rng())
        # Of the last class, a client that has its equal part by then gets nothing.
        assert all(abs(np.bincount(labels[part], minlength=10) - 6)[:9].max() <= 1 for part in parts)


def test_a_client_of_shards_sees_few_classes() -> None:
    labels = np.repeat(np.arange(10), 60)
    for part in partition(labels, clients=30, name="shards", per_client=2, rng=_rng()):
        assert len(part) == 20
        assert len(np.unique(labels[part])) <= 2  # 60 shards of 10 images: none crosses a class


@pytest.mark.parametrize("clients", [5, 7, 10, 23])
def test_each_client_holds_exactly_its_number_of_classes_and_holders_share_equally(clients: int) -> None:
    labels = np.repeat(np.arange(10), 60)
    parts = partition(labels, clients=clients, name="classes", per_client=2, rng=_rng())
    counts = np.array([np.bincount(labels[part], minlength=10) for part in parts])
    assert ((counts > 0).sum(1) == 2).all()
    for held in counts.T:
        assert np.ptp(held[held > 0]) <= 1
    assert (counts.sum(0) == 60).all()


def test_every_partition_has_a_summary() -> None:
    assert tuple(partition_summaries()) == partitions() == ("iid", "dirichlet", "shards", "classes")


def test_an_unknown_partition_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown partition 'dirichlett'.*did you mean 'dirichlet'"):
        partition([0, 1], clients=1, name="dirichlett", rng=_rng())


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {"clients": 0}, "clients is 0; a whole number of at least 1 is needed"),
        ([0, 1], {"clients": 3}, "3 clients cannot share 2 images; at most 2 can"),
        ([0, 1], {"clients": 1, "name": "dirichlet", "partition_alpha": 0.0}, "partition_alpha is 0.0; a positive"),
        ([0, 1], {"clients": 1, "name": "dirichlet", "partition_alpha": np.nan}, "partition_alpha is nan"),
        (
            [0] * 30,
            {"clients": 3, "name": "dirichlet", "partition_alpha": 1e-3},
            "partition_alpha 0.001 left one of 3 clients with at most . of 30 images in each of 1000 draws, "
            "and 5 are needed; raise partition_alpha or ask for fewer clients",
        ),
        ([0, 1, 1], {"clients": 2, "name": "shards"}, "2 clients with 2 shards each need 4 shards of 3 images"),
        ([0, 1, 1], {"clients": 2, "name": "shards", "per_client": 0}, "between 1 and 3 shards are possible"),
        ([0, 1, 1], {"clients": 1, "name": "classes", "per_client": 3}, "3 classes per client; between 1 and 2"),
        (
            [0, 1, 2, 3, 4],
            {"clients": 2, "name": "classes"},
            "2 clients with 2 classes each cannot hold all 5 classes; at least 3 clients are needed",
        ),
        (
            [0, 1, 1, 1, 1],
            {"clients": 4, "name": "classes", "per_client": 1},
            "partition 'classes' of 5 images leaves client 2 of 4 without images; ask for fewer clients",
        ),
    ],
)
def test_a_partition_that_cannot_be_made_says_what_is_possible(
    labels: list[int], options: dict[str, object], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        partition(labels, rng=_rng(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("clients", [1, 2, 3, 5])
def test_the_partition_of_the_how_to_page_deals_every_image_once(clients: int) -> None:
    page = Path(__file__).parents[2] / "docs" / "how-to" / "partitions.md"
    given: dict[str, object] = {}
    exec(page.read_text().partition("```python")[2].partition("```")[0], given)
    dealt = given["halves"](np.repeat(np.arange(10), 7), clients, np.random.default_rng(0))
    assert len(dealt) == clients
    assert sorted(np.concatenate(dealt).tolist()) == list(range(70))
