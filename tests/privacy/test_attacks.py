"""Attacks against what they must give where the answer is known."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import binomtest, norm
from trained import DIGITS, fit, linear, some_digits

import fedmerge as fm
from fedmerge.data import Images
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.models import Recipe
from fedmerge.privacy import (
    ATTACKS,
    Seen,
    by_class,
    clopper_pearson,
    confidence,
    lira,
    loss_threshold,
    others,
    rates,
    rmia,
    source,
    source_rate,
)

LEARNS = Recipe(lr=0.002, optimizer="adam", batch_size=32)


def gaussian(rng: np.random.Generator, networks: int, images: int, effect: float) -> Seen:
    """Networks whose confidence is normal: each image with a mean and deviation of its own, ``effect`` higher if in."""
    members = rng.random((networks, images)) < 0.5
    own, spread = 3 * rng.normal(size=images), 1.0
    values = own + spread * rng.normal(size=(networks, images)) + effect * members
    return Seen(values, members, rng.normal(size=(networks, 50)))


def digits(rows: slice) -> Images:
    return DIGITS.select(np.arange(len(DIGITS))[rows])


def mlp(seed: int = 0) -> torch.nn.Module:
    return fm.models.build("mlp", classes=10, in_shape=DIGITS.shape, seed=seed, width=64)


def seen_by(model, params, images: Images) -> np.ndarray:
    return confidence(fm.predict(model, params, images), images.labels)


def test_a_network_that_learned_random_labels_gives_its_members_away():
    shuffled = torch.from_numpy(np.random.default_rng(0).integers(0, 10, 200))
    images = dataclasses.replace(some_digits(200), labels=shuffled)
    members, outside = images.select(range(100)), images.select(range(100, 200))
    model = mlp()
    params = fit(model, members, recipe=LEARNS, epochs=60).params
    scores = np.concatenate([seen_by(model, params, members), seen_by(model, params, outside)])
    found = rates(scores, np.arange(200) < 100)
    assert found.auc.value > 0.9
    assert found.auc.low > 0.85


@pytest.mark.parametrize("attack", ATTACKS)
def test_members_against_members_are_told_apart_by_chance(attack):
    """Both halves were trained on; which is called "member" is drawn anew for each network, as are its shadows."""
    rng = np.random.default_rng(5)
    networks = gaussian(rng, 24, 1500, effect=0.0)
    scores, truth = [], []
    for target in range(8):
        shadows = networks.take([k for k in range(24) if k != target])
        scores.append(ATTACKS[attack].make(networks.confidence[target], networks.population[target], shadows))
        truth.append(networks.members[target])
    found = rates(np.concatenate(scores), np.concatenate(truth))
    assert found.auc.low <= 0.5 <= found.auc.high
    assert found.tpr[0.01].low <= 0.01 + 0.0025  # the threshold is drawn too: sd of the rate of 6,000 others is .0013
    assert found.tpr[0.01].high >= 0.01 - 0.0025
    assert found.auc.high - found.auc.low < 0.03


def test_lira_is_the_likelihood_ratio_of_the_gaussians_that_its_shadows_have():
    """Two shadows at mean - s and mean + s have exactly the mean and, with n - 1, the variance 2 s^2."""
    inside, outside, s = np.array([4.0, 1.0, -2.0]), np.array([0.0, 0.5, -2.5]), 0.7
    values = np.stack([inside - s, inside + s, outside - s, outside + s])
    members = np.array([[True], [True], [False], [False]]).repeat(3, 1)
    shadows = Seen(values, members, np.zeros((4, 1)))
    target = np.array([3.0, 1.2, -4.0])
    sigma = np.sqrt(2) * s
    expected = norm.logpdf(target, inside, sigma) - norm.logpdf(target, outside, sigma)
    np.testing.assert_allclose(lira(target, np.zeros(1), shadows), expected)
    np.testing.assert_allclose(lira(target, np.zeros(1), shadows, online=False), (target - outside) / sigma)


def test_lira_of_known_gaussians_reaches_the_area_of_the_closed_form():
    """Means d apart with deviation 1 on both sides: the area is Phi(d / sqrt 2)."""
    d, rng = 1.2, np.random.default_rng(1)
    networks = gaussian(rng, 301, 2000, effect=d)
    shadows = networks.take(slice(1, None))
    scores = lira(networks.confidence[0], networks.population[0], shadows)
    found, exact = rates(scores, networks.members[0]).auc, norm.cdf(d / np.sqrt(2))
    assert found.low < exact < found.high
    # One threshold for all images does not know that some are easier: their own spread of 3 drowns the effect.
    assert (
        rates(loss_threshold(networks.confidence[0], networks.population[0], shadows), networks.members[0]).auc.value
        < 0.7
    )


def test_an_image_that_all_or_no_shadows_saw_still_has_a_score():
    networks = gaussian(np.random.default_rng(2), 8, 30, effect=1.0)
    members = networks.members.copy()
    members[:, 0], members[:, 1] = True, False
    shadows = Seen(networks.confidence, members, networks.population)
    for attack in ATTACKS.values():
        scores = attack.make(networks.confidence[0], networks.population[0], shadows)
        assert np.isfinite(scores).sum() == 30, attack.name


def test_rmia_counts_the_images_that_are_beaten_by_the_factor():
    """By hand, with one reference: p(x) = ((1 + a) q + 1 - a) / 2."""
    logit = lambda p: np.log(p / (1 - p))  # noqa: E731
    shadows = Seen(logit(np.array([[0.2, 0.5]])), np.zeros((1, 2), bool), logit(np.array([[0.5, 0.4, 0.3]])))
    target, population, a = logit(np.array([0.9, 0.5])), logit(np.array([0.5, 0.2, 0.6])), 0.3
    mean = lambda q: ((1 + a) * np.asarray(q) + 1 - a) / 2  # noqa: E731
    ratio = np.array([0.9, 0.5]) / mean([0.2, 0.5])
    of_others = np.array([0.5, 0.2, 0.6]) / mean([0.5, 0.4, 0.3])
    expected = [(r >= 2 * of_others).mean() for r in ratio]
    assert expected == [2 / 3, 1 / 3]
    scores = rmia(target, population, shadows, references=1, gamma=2.0, a=a)
    assert (np.floor(3 * scores) / 3).tolist() == expected
    assert (3 * scores % 1 < 0.5).all()  # what tells images of one share apart


@pytest.mark.parametrize("references", [0, 1])
def test_an_image_of_which_all_networks_are_utterly_wrong_has_a_score(references: int):
    networks = gaussian(np.random.default_rng(2), 8, 30, effect=1.0)
    sure = networks.confidence.copy()
    sure[:, 0] = -745.0  # the least that `confidence` says: the probability rounds to 0
    scores = rmia(
        sure[0], networks.population[0], Seen(sure, networks.members, networks.population), references=references
    )
    assert np.isfinite(scores).all()


def test_rmia_online_halves_networks_with_and_without_the_image():
    chances = np.array([[0.9, 0.3], [0.7, 0.1], [0.2, 0.2]])
    members = np.array([[True, False], [True, True], [False, False]])
    shadows = Seen(np.log(chances / (1 - chances)), members, np.zeros((3, 1)))
    found = rmia(np.array([2.0, 0.0]), np.array([0.0]), shadows, gamma=1.0)
    x = expit([2.0, 0.0]) / ((np.array([0.8, 0.1]) + np.array([0.2, 0.25])) / 2)
    z = 0.5 / ((1.3 * 0.5 + 0.7) / 2)
    assert np.floor(found).tolist() == (x >= z).tolist()


def test_scores_of_a_permuted_network_are_those_of_the_original():
    model, images = mlp(), some_digits(120)
    params = fit(model, images, recipe=LEARNS, epochs=3).params
    spec = fm.perm_spec(model, images.normalise(images.images[:2]))
    rng = np.random.default_rng(0)
    perms = {g: torch.from_numpy(rng.permutation(n)) for g, n in spec.sizes(params).items()}
    moved = fm.permute(params, perms, spec=spec)
    np.testing.assert_allclose(seen_by(model, moved, images), seen_by(model, params, images), atol=1e-3)


def test_confidence_is_the_log_odds_also_where_the_probability_rounds_to_one():
    logits = torch.tensor([[30.0, 0.0, 0.0], [200.0, 0.0, 0.0], [1.0, 2.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1])
    expected = [30 - np.log(2), 200 - np.log(2), 2 - np.log(np.exp(1) + 1)]
    np.testing.assert_allclose(confidence(logits, labels), expected)
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).log()
    assert np.isfinite(confidence(sure, torch.tensor([0, 0]))).all()
    with pytest.raises(ParamsError, match=r"logits are \(3, 1\)"):
        confidence(torch.zeros(3, 1), labels)
    with pytest.raises(ParamsError, match="logits of 1 of 3 images are NaN"):
        confidence(logits.index_fill(0, torch.tensor([1]), torch.nan), labels)
    for wrong, said in ((labels - 1, "from -1 to 0"), (labels + 3, "from 3 to 4"), (labels.float(), "torch.float32")):
        with pytest.raises(ParamsError, match=said):
            confidence(logits, wrong)


@pytest.mark.parametrize(("hits", "of"), [(0, 7), (7, 7), (3, 40), (120, 5000), (1, 1)])
def test_the_interval_of_a_share_is_scipys_exact_one(hits, of):
    expected = binomtest(hits, of).proportion_ci(0.95, method="exact")
    found = clopper_pearson(hits, of)
    np.testing.assert_allclose([found.low, found.high], [expected.low, expected.high], atol=1e-12)
    assert (found.value, found.hits, found.of) == (hits / of, hits, of)


def test_the_area_and_its_interval_are_those_of_a_count_over_pairs():
    """DeLong's components counted one by one, ties as halves."""
    rng = np.random.default_rng(3)
    above, below = rng.integers(1, 8, 40).astype(float), rng.integers(0, 6, 55).astype(float)
    wins = (above[:, None] > below) + 0.5 * (above[:, None] == below)
    area = wins.mean()
    variance = wins.mean(1).var(ddof=1) / 40 + wins.mean(0).var(ddof=1) / 55
    found = rates(np.concatenate([above, below]), np.arange(95) < 40).auc
    assert found.value == pytest.approx(area)
    odds = lambda p: np.log(p / (1 - p))  # noqa: E731
    half = (odds(found.high) - odds(found.low)) / 2 / norm.ppf(0.975)
    assert half == pytest.approx(np.sqrt(variance) / (area * (1 - area)))


def test_a_rate_of_false_alarms_is_never_exceeded_and_is_marked_where_it_cannot_be_measured():
    scores = np.r_[np.full(10, 5.0), np.full(990, 0.0), np.full(500, 5.0), np.full(500, -1.0)]
    found = rates(scores, np.arange(2000) >= 1000)
    assert found.tpr[0.01].value == 0.5  # 10 of 1,000 others reach 5
    assert found.tpr[0.001].value == 0.0  # and nothing lies above them
    assert [found.enough(0.01), found.enough(0.001)] == [True, False]
    assert (found.members, found.outsiders) == (1000, 1000)


def test_a_rate_of_false_alarms_is_met_by_a_threshold_among_scores_that_members_and_others_share():
    found = rates(np.tile(np.arange(1000), 2), np.arange(2000) < 1000, fprs=(0.01, 0.3))
    assert [rate.value for rate in found.tpr.values()] == [0.01, 0.3]


def test_infinite_scores_are_beyond_all_others():
    found = rates([np.inf, -np.inf, 0.0, 1.0], [True, False, False, True])
    assert (found.auc.value, found.balanced_accuracy) == (1.0, 1.0)


def test_scores_that_are_all_equal_leave_the_area_uncertain():
    few, more = (rates(np.zeros(2 * n), np.arange(2 * n) < n).auc for n in (2, 50))
    assert few.value == more.value == 0.5
    assert few.low < more.low < 0.5 < more.high < few.high


def test_the_owner_of_a_member_is_whose_network_is_surest_of_it():
    model, parts = linear(), [digits(slice(i * 60, (i + 1) * 60)) for i in range(3)]
    networks = [fit(model, part, epochs=40).params for part in parts]
    together = digits(slice(0, 180))
    sure = np.stack([seen_by(model, params, together) for params in networks])
    found = source_rate(source(sure), np.arange(3).repeat(60))
    assert found.low > 1 / 3
    counts = np.array([[50, 0], [10, 60]])
    assert by_class([0, 1, 1], counts).tolist() == [0, 1, 1]


@pytest.mark.parametrize("aligned", [True, False])
def test_a_client_works_out_the_other_network_of_two_from_their_mean(aligned):
    model = mlp()
    images = some_digits(100)
    spec = fm.perm_spec(model, images.normalise(images.images[:2]))
    a, b = (fit(mlp(seed), images, recipe=LEARNS, epochs=4).params for seed in (1, 2))
    moved = fm.permute(b, fm.align(b, to=a, spec=spec).perms, spec=spec) if aligned else b
    merged = fm.average([a, moved], [1, 3])
    # The second client was moved in the merge, so it has to find its own order first.
    found = others(merged, b, share=0.75, spec=spec, rng=np.random.default_rng(0), aligned=aligned)
    torch.testing.assert_close(fm.predict(model, found, images), fm.predict(model, a, images), atol=1e-3, rtol=1e-3)
    if aligned:  # without its order there is nothing to see
        lost = others(merged, b, share=0.75, spec=spec, rng=np.random.default_rng(0), aligned=False)
        assert (fm.predict(model, lost, images) - fm.predict(model, a, images)).abs().max() > 1


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: rates([1.0, 2.0], [True, True]), "2 of 2 images are members"),
        (lambda: rates([1.0, np.nan], [True, False]), "no NaN"),
        (lambda: clopper_pearson(3, 2), "3 hits of 2"),
        (lambda: rates([1.0, 2.0], [True, False], fprs=(-0.1,)), "fprs has -0.1; expected"),
        (lambda: rates([1.0, 2.0], [True, False], fprs=(np.nan,)), "fprs has nan; expected"),
        (lambda: clopper_pearson(5, 10, level=95), "level is 95; expected"),
        (lambda: source_rate([0, 1], [0]), r"guessed is \(2,\) and owners \(1,\)"),
        (lambda: source_rate([], []), "no member whose owner"),
        (lambda: Seen(np.zeros((2, 3)), np.zeros((2, 4), bool), np.zeros((2, 1))), r"members \(2, 4\)"),
        (lambda: lira(np.zeros(2), np.zeros(1), one_shadow()), "no image has two of the 1 shadows"),
        (lambda: rmia(np.zeros(2), np.zeros(1), one_shadow()), "each image is in all 1 shadows"),
        (lambda: lira(np.zeros(4), np.zeros(1), all_or_none()), "no image is in some shadows and out of others"),
        (lambda: others({}, {}, share=1.0, spec=None, rng=None), "share is 1.0"),
    ],
)
def test_what_cannot_be_attacked_is_one_clear_line(call, said):
    with pytest.raises((ConfigError, ParamsError), match=said):
        call()


def all_or_none() -> Seen:
    members = np.array([[True, True, False, False]] * 3)
    return Seen(np.arange(12.0).reshape(3, 4), members, np.zeros((3, 1)))


def one_shadow() -> Seen:
    return Seen(np.zeros((1, 2)), np.ones((1, 2), bool), np.zeros((1, 1)))


def test_a_member_meets_others_of_its_kind_only():
    """By brute force: of each member the chance that it is above an outsider, drawn as often of a kind as members are."""
    rng = np.random.default_rng(3)
    scores, kinds = rng.integers(0, 12, 300).astype(float), rng.integers(0, 4, 300)
    members = rng.random(300) < np.array([0.8, 0.4, 0.1, 1.0])[kinds]  # of kind 3 there is no other
    found = rates(scores, members, kinds=kinds, fprs=(0.1,))
    known = members & (kinds < 3)
    shares = [(known & (kinds == k)).sum() / known.sum() for k in range(3)]
    above = [
        np.mean((scores[known][:, None] > others) + 0.5 * (scores[known][:, None] == others))
        for others in (scores[~members & (kinds == k)] for k in range(3))
    ]
    assert found.auc.value == pytest.approx(np.dot(shares, above))
    assert (found.members, found.outsiders) == (known.sum(), (~members).sum())
    at = {t: sum(s * np.mean(scores[~members & (kinds == k)] >= t) for k, s in enumerate(shares)) for t in range(13)}
    lowest = min(t for t, false in at.items() if false <= 0.1)
    assert found.tpr[0.1].value == pytest.approx(np.mean(scores[known] >= lowest))
    alike = rates(scores, members, kinds=np.zeros(300))
    plain = rates(scores, members)
    assert dataclasses.astuple(alike.auc) == pytest.approx(dataclasses.astuple(plain.auc))
    assert alike.effective == pytest.approx(plain.outsiders)
    with pytest.raises(ConfigError, match="no member has a non-member of its kind"):
        rates(scores, members, kinds=members)
    with pytest.raises(ConfigError, match=r"kinds is \(2,\); expected \(300,\)"):
        rates(scores, members, kinds=[1, 2])


def test_the_interval_of_the_area_holds_where_kinds_weigh_unequally():
    """Scores of both sides are drawn alike within a kind, so the area is .5."""
    rng, inside = np.random.default_rng(4), 0
    for _ in range(300):
        kinds = rng.integers(0, 3, 240)
        members = rng.random(240) < np.array([0.7, 0.3, 0.1])[kinds]
        found = rates(rng.normal(size=240) + 2 * kinds, members, kinds=kinds).auc
        inside += found.low <= 0.5 <= found.high
    assert inside / 300 >= 0.92


def test_images_that_began_elsewhere_are_on_neither_side():
    """What the shadows say of them may be anything."""
    rng = np.random.default_rng(6)
    networks = gaussian(rng, 40, 100, effect=2.0)
    apart = ~networks.members & (rng.random(networks.members.shape) < 0.3)
    out = ~networks.members & ~apart
    target, population = networks.confidence[0], networks.population[0]
    for name in ATTACKS:
        scores = [
            ATTACKS[name].make(target, population, Seen(np.where(apart, x, networks.confidence), networks.members,
                                                        networks.population, out))
            for x in (-50.0, 50.0)
        ]  # fmt: skip
        np.testing.assert_array_equal(*scores)
        nowhere = Seen(
            networks.confidence,
            networks.members & (np.arange(100) > 0),
            networks.population,
            out & (np.arange(100) > 0),
        )  # an image of which no shadow says anything
        assert np.isfinite(ATTACKS[name].make(target, population, nowhere)).all(), name


def test_rmia_puts_the_larger_ratio_first_where_all_others_are_beaten():
    shadows = Seen(np.zeros((4, 5)), np.zeros((4, 5), bool), np.full((4, 50), -3.0))
    scores = rmia(np.array([20.0, 20.01, 21.0, 25.0, 30.0]), np.full(50, -3.0), shadows, references=1)
    assert (np.diff(scores) > 0).all()


def test_infinite_logits_that_leave_the_odds_unknown_are_refused():
    inf, label = torch.inf, torch.tensor([0])
    assert confidence(torch.tensor([[0.0, -inf, -inf]]), label) > 700
    assert confidence(torch.tensor([[-inf, 0.0, -inf]]), label) < -700
    for row in ([-inf, -inf, -inf], [inf, inf, 0.0]):
        with pytest.raises(ParamsError, match="infinite logits of 1 of 1 images leave the odds unknown"):
            confidence(torch.tensor([row]), label)
