"""Whose risk rises by merging, where the answer is planted, and what a client that took part tells of the others."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import norm
from trained import fit, some_digits

import fedmerge as fm
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.models import Recipe
from fedmerge.privacy import RiskChange, Seen, confidence, loss_threshold, others, rates, risk, risk_change

LEARNS = Recipe(lr=0.003, optimizer="adam", batch_size=20)


def networks(rng: np.random.Generator, effect: np.ndarray, count: int = 60) -> Seen:
    """Each image has a mean of its own, and the networks that saw it are surer of it by ``effect`` deviations."""
    members = rng.random((count, len(effect))) < 0.5
    values = 3 * rng.normal(size=len(effect)) + rng.normal(size=members.shape) + effect * members
    return Seen(values, members, np.zeros((count, 1)))


def test_the_risk_of_an_image_is_how_far_its_two_means_are_apart() -> None:
    seen = networks(np.random.default_rng(0), np.full(5, 2.0), count=9)
    squares, free, expected = 0.0, 0, []
    for sure, inside in zip(seen.confidence.T, seen.members.T, strict=True):
        for part in (sure[inside], sure[~inside]):
            squares, free = squares + ((part - part.mean()) ** 2).sum(), free + len(part) - 1
        expected.append((sure[inside].mean() - sure[~inside].mean(), 1 / inside.sum() + 1 / (~inside).sum()))
    found, error = risk(seen)
    np.testing.assert_allclose(found, np.array([apart for apart, _ in expected]) / np.sqrt(squares / free))
    np.testing.assert_allclose(error, np.sqrt([variance for _, variance in expected]))


def test_what_a_class_tells_is_no_risk_of_an_image_and_what_began_elsewhere_does_not_count() -> None:
    """Networks that saw more of a class are surer of all of it; training on an image adds 1."""
    rng = np.random.default_rng(9)
    labels, shares = rng.integers(0, 4, 200), rng.random((400, 4))
    members = rng.random((400, 200)) < shares[:, labels]
    values = rng.normal(size=200) + 6 * shares[:, labels] + members + 0.5 * rng.normal(size=members.shape)
    seen = Seen(values, members, np.zeros((400, 1)))
    (naive, _), (found, error) = risk(seen), risk(seen, labels)
    assert naive.mean() > 1.6
    assert found.mean() == pytest.approx(1 / 0.5, abs=0.05)
    assert found.std() == pytest.approx(error.mean(), rel=0.2)
    elsewhere = ~members & (rng.random(members.shape) < 0.4)
    outside = ~members & ~elsewhere
    spoilt = [risk(Seen(np.where(elsewhere, x, values), members, seen.population, outside), labels) for x in (0, 1e9)]
    np.testing.assert_array_equal(*spoilt)
    assert spoilt[0][0].mean() == pytest.approx(1 / 0.5, abs=0.2)  # of fewer outsiders a network's offset is known less
    with pytest.raises(ConfigError, match=r"labels is \(5,\); expected the class of each of 200 images"):
        risk(seen, labels[:5])


def test_outsiders_are_no_members() -> None:
    single = networks(np.random.default_rng(3), np.ones(6))
    assert (single.take([0, 1]).outside == ~single.members[:2]).all()
    with pytest.raises(ParamsError, match="of the outsiders are members"):
        dataclasses.replace(single, outsiders=np.ones_like(single.members))
    with pytest.raises(ParamsError, match=r"outsiders are bool \(60, 2\); expected bool \(60, 6\)"):
        dataclasses.replace(single, outsiders=~single.members[:, :2])


def test_networks_that_agree_to_the_last_digit_have_a_risk() -> None:
    members = np.array([[True, False], [True, False], [False, True], [False, True]])
    copies = Seen(np.where(members, 2.0, 1.0), members, np.zeros((4, 1)))
    found, _ = risk(copies)
    assert (found > 1e5).all()
    assert risk_change(copies, copies).rises().value == 0


def test_the_images_whose_risk_rises_are_found_and_no_others() -> None:
    rng = np.random.default_rng(1)
    before, after = np.full(400, 1.5), np.full(400, 0.3)
    after[:40] = 4.0
    single = networks(rng, before)
    found = risk_change(single, networks(rng, after))
    up = found.surely()
    assert up.low < 0.1 < up.high
    assert (up.hits, up.of) == (pytest.approx(40, abs=4), 400)
    assert found.surely(falls=True).value > 0.3
    assert found.rises().high < 0.3
    # Step 1 of Benjamini and Hochberg, by hand: the last rank whose p-value lies below its share of 5 %.
    chances = np.sort(norm.sf(found.z))
    below = np.flatnonzero(chances < 0.05 * np.arange(1, 401) / 400)
    assert up.hits == below[-1] + 1


def test_where_merging_changes_nothing_half_seem_to_rise_and_none_surely() -> None:
    rng = np.random.default_rng(2)
    same = [risk_change(networks(rng, np.full(300, 1.0)), networks(rng, np.full(300, 1.0))) for _ in range(4)]
    found = RiskChange.stack(same)
    half = found.rises()
    assert (half.low < 0.5 < half.high, half.of) == (True, 1200)
    assert found.surely().value + found.surely(falls=True).value < 0.01
    assert found.z.std() == pytest.approx(1, abs=0.1)


def test_only_the_images_that_are_asked_for_and_known_count() -> None:
    single = networks(np.random.default_rng(3), np.full(6, 1.0))
    everywhere = np.column_stack([np.ones(60, bool), single.members[:, 1:]])
    known = dataclasses.replace(single, members=everywhere)
    found = risk_change(known, single, np.array([True, True, True, False, False, False]))
    assert len(found.before) == 2
    assert found.rises().of == 2
    with pytest.raises(ConfigError, match="no image has networks with it and without it"):
        risk_change(known, single, np.arange(6) == 0)
    with pytest.raises(ConfigError, match="6 and 5 images"):
        risk_change(single, networks(np.random.default_rng(3), np.ones(5)))
    with pytest.raises(ConfigError, match=r"images is \(5,\); expected a flag for each of 6"):
        risk_change(single, single, np.ones(5, bool))
    of_bools, of_numbers = (risk_change(single, single, np.array([1, 1, 0, 0, 0, 0], kind)) for kind in (bool, int))
    assert len(of_numbers.before) == len(of_bools.before) == 2


def test_flags_that_are_numbers_are_refused() -> None:
    single = networks(np.random.default_rng(3), np.ones(6))
    with pytest.raises(ParamsError, match=r"members are int64; expected bool: give members.astype\(bool\)"):
        dataclasses.replace(single, members=single.members.astype(np.int64))


def test_a_client_finds_the_others_members_in_a_merge_whatever_the_order_of_its_units() -> None:
    """Labels are random, so that a network knows its own images by heart and says nothing of others."""
    rng = np.random.default_rng(4)
    drawn = some_digits(300)
    images = dataclasses.replace(drawn, labels=torch.from_numpy(rng.integers(0, 10, 300)))
    model = fm.models.build("mlp", classes=10, in_shape=images.shape, seed=0, width=64)
    spec = fm.perm_spec(model, images.normalise(images.images[:2]))
    held = [images.select(np.arange(i * 100, (i + 1) * 100)) for i in range(2)]
    own, their = (
        fit(fm.models.build("mlp", classes=10, in_shape=images.shape, seed=i, width=64), part, recipe=LEARNS, epochs=60)
        for i, part in enumerate(held)
    )
    merged = fm.merge_many([own.params, their.params], spec=spec, rng=np.random.default_rng(0)).params
    perms = {g: torch.from_numpy(rng.permutation(n)) for g, n in spec.sizes(merged).items()}
    asked, members = images.select(np.arange(100, 300)), np.arange(100, 300) < 200  # the other's images, and nobody's

    def area(params: dict[str, torch.Tensor]) -> float:
        sure = confidence(fm.predict(model, params, asked), asked.labels)
        return rates(loss_threshold(sure, np.zeros(0), None), members).auc.value

    def attack(of: dict[str, torch.Tensor], *, aligned: bool = True) -> float:
        return area(others(of, own.params, share=0.5, spec=spec, rng=np.random.default_rng(0), aligned=aligned))

    moved = fm.permute(merged, perms, spec=spec)
    assert attack(merged) > 0.95
    assert attack(moved) == pytest.approx(attack(merged), abs=0.01)
    assert area(moved) == pytest.approx(area(merged), abs=0.001)
    assert area(merged) < attack(merged) - 0.1
    assert attack(moved, aligned=False) < area(moved)  # its own network in another order only spoils the merge
