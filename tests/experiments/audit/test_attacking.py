"""Pooled scores, and the risk of single images, where the answer is known."""

import numpy as np
import pytest

from experiments.audit.attacking import Scores, in_turn, rows
from experiments.audit.risk import change, guessing
from experiments.records.runs import natural
from fedmerge.errors import ConfigError
from fedmerge.privacy import Seen, rates

ONE = np.zeros(400, np.int64)
"""All images of one class."""


def networks(rng: np.random.Generator, effect: np.ndarray, count: int = 60) -> Seen:
    """Each image has a mean of its own, and the networks that saw it are surer of it by ``effect``."""
    members = rng.random((count, len(effect))) < 0.5
    values = rng.normal(size=len(effect)) * 3 + rng.normal(size=members.shape) + effect * members
    return Seen(values, members, rng.normal(size=(count, 20)))


def test_the_area_of_each_network_is_that_of_its_scores_alone():
    rng = np.random.default_rng(0)
    values, members = rng.integers(0, 9, (5, 60)).astype(float), rng.random((5, 60)) < 0.3
    members[4] = False  # a network without a member among the audited images has no area
    outside, labels = ~members & (rng.random((5, 60)) < 0.8), np.tile(rng.integers(0, 2, 60), (5, 1))
    areas = Scores(values, members, outside, labels).areas()
    assert len(areas) == 4
    for v, m, o, c, area in zip(values[:4], members[:4], outside[:4], labels[:4], areas, strict=True):
        of_class = [rates(v[some], m[some]).auc for some in ((m | o) & (c == 0), (m | o) & (c == 1))]
        shares = [(m & (c == 0)).sum() / m.sum(), (m & (c == 1)).sum() / m.sum()]
        # Of one class in each network the area is that of the class; of several a member meets those of all classes.
        assert min(a.value for a in of_class) - 0.1 < area < max(a.value for a in of_class) + 0.1
        below = [
            sum(share * np.mean((v[m][:, None] > v[o & (c == k)]) + 0.5 * (v[m][:, None] == v[o & (c == k)]), axis=1)
                for k, share in enumerate(shares))
        ]  # fmt: skip
        assert area == pytest.approx(np.mean(below))


def test_what_a_class_tells_is_no_membership():
    """Clients of few classes: how often a client has an image's class tells most members, and nothing of any image."""
    rng = np.random.default_rng(7)
    labels, shares = rng.integers(0, 10, 600), rng.dirichlet(np.full(10, 0.2), 8)
    members = rng.random((8, 600)) < 0.9 * shares[:, labels] / shares.max(1, keepdims=True)
    by_class = np.stack([np.bincount(labels[m], minlength=10)[labels] for m in members]).astype(float)
    assert rates(by_class.ravel(), members.ravel()).auc.value > 0.8
    found = Scores(by_class, members, ~members, np.broadcast_to(labels, members.shape)).rates()
    assert found.auc.value == pytest.approx(0.5, abs=1e-12)
    assert found.auc.low < 0.5 < found.auc.high
    assert found.effective < found.outsiders


def test_each_federation_is_attacked_with_all_others():
    rng = np.random.default_rng(1)
    every = networks(rng, np.full(40, 4.0), count=12)
    parts = [every.take(slice(k, k + 2)) for k in range(0, 12, 2)]
    trials = in_turn(parts, ONE[:40])
    assert [len(trial.shadows) for trial in trials] == [10] * 6
    for i, trial in enumerate(trials):
        assert not (trial.shadows.confidence[:, 0, None] == parts[i].confidence[:, 0]).any()
    found, curves = rows({"some": trials}, {}, {"some": 0.5})
    lira = next(row for row in found if row.attack == "lira")
    assert (lira.targets, lira.shadows, lira.members + lira.outsiders) == (12, 10, 12 * 40)
    assert lira.auc > 0.9
    assert all(a <= b for curve in curves for a, b in zip(curve.true, curve.true[1:], strict=False))
    with pytest.raises(ConfigError, match="2 shadows of some are too few"):
        rows({"some": in_turn(parts[:2], ONE[:40])}, {}, {})


def test_images_whose_risk_rises_are_told_from_those_that_seem_to():
    rng, images = np.random.default_rng(2), 400
    before, after = np.full(images, 1.0), np.full(images, 0.4)
    after[:40] = 4.0  # a tenth rises much, the others fall
    single = networks(rng, before)
    found = change(single, networks(rng, after), ONE)
    assert found.effect == pytest.approx(after.mean(), abs=0.1)
    assert found.rises_surely == pytest.approx(0.1, abs=0.01)
    assert found.falls_surely > 0.1
    nothing = change(single, networks(rng, before), ONE)
    assert nothing.rises == pytest.approx(0.5, abs=0.1)
    assert nothing.rises_surely + nothing.falls_surely < 0.01
    everywhere = Seen(single.confidence, np.ones_like(single.members), single.population)
    assert np.isnan(change(single, everywhere, ONE).rises)


def test_guessing_names_the_largest_client_of_each_federation():
    assert guessing([np.array([0, 0, 0, 1]), np.array([0, 1, 1, 1])]) == 0.75  # as numbers of one it would be a half


def test_stages_stand_in_the_order_of_their_numbers():
    assert sorted(["n=12 a", "n=2 b", "n=2 a", "repaired"], key=natural) == ["n=2 a", "n=2 b", "n=12 a", "repaired"]
