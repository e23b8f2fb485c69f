"""A lower bound on epsilon by one training: against a count of every outcome, and where epsilon is known."""

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from fedmerge.errors import ConfigError
from fedmerge.privacy import audited_epsilon, one_run


def by_counting(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """The largest chance of so many right guesses, every outcome counted one by one (theorem 5.2)."""
    odds = math.exp(epsilon)
    chance = [math.comb(guesses, k) * odds**k / (1 + odds) ** guesses for k in range(guesses + 1)]
    beside = [sum(chance[correct - i : correct]) / i for i in range(1, correct + 1)]
    return sum(chance[correct:]) + 2 * canaries * delta * max(beside, default=0.0)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(
    ("correct", "guesses", "canaries"), [(20, 20, 20), (31, 40, 40), (38, 40, 200), (60, 100, 100)]
)
def test_the_bound_is_where_so_many_right_guesses_are_no_longer_too_good_to_be_true(correct, guesses, canaries, delta):
    found = audited_epsilon(correct, guesses, canaries, delta=delta)
    refuted = [by_counting(correct, guesses, canaries, e, delta) < 0.05 for e in np.linspace(0, 6, 601)]
    steps = sum(refuted)
    assert refuted == sorted(refuted, reverse=True)  # below the bound all, above it none
    assert steps
    assert (steps - 1) / 100 <= found <= steps / 100
    assert by_counting(correct, guesses, canaries, found, delta) == pytest.approx(0.05, abs=1e-8)


@pytest.mark.parametrize("delta", [1e-6, 1e-4])
@pytest.mark.parametrize("strength", [1.0, 2.0, 4.0])
def test_the_bound_is_that_of_jax_privacy(strength: float, delta: float) -> None:
    auditing = pytest.importorskip("jax_privacy.auditing", reason="jax-privacy is not installed")
    rng = np.random.default_rng(0)
    kept = rng.random(1000) < 0.5
    scores = strength * kept + rng.normal(0, 1, 1000)
    least = float(np.quantile(scores, 0.9))
    auditor = auditing.CanaryScoreAuditor(scores[kept], scores[~kept])
    theirs = auditor.epsilon_one_run(0.05, delta, threshold_strategy=auditing.Explicit(least))
    guessed = scores >= least  # it guesses at members alone, those at least as sure as a threshold
    ours = audited_epsilon(int((guessed & kept).sum()), int(guessed.sum()), 1000, delta=delta)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_more_right_guesses_prove_more_and_a_weaker_claim_or_more_certainty_less():
    bounds = [audited_epsilon(v, 100, 500, delta=1e-5) for v in range(50, 101)]
    assert bounds == sorted(bounds)
    assert bounds[0] == 0 < bounds[-1]
    for weaker in ({"delta": 1e-3}, {"confidence": 0.99}, {"canaries": 50_000}):
        given = {"canaries": 500, "delta": 1e-5, **weaker}
        assert audited_epsilon(90, 100, given.pop("canaries"), **given) < bounds[40]


def test_randomised_response_is_hardly_ever_found_less_private_than_it_is_and_nearly_as_much():
    """Its guesses are right with the chance that the bound is made for, so misses are as frequent as allowed."""
    rng, epsilon, m = np.random.default_rng(0), 1.0, 1000
    right = rng.binomial(m, math.e / (1 + math.e), 1000)
    bound = {v: audited_epsilon(v, m, m, delta=0.0) for v in set(right.tolist())}
    above = sum(bound[v] > epsilon for v in right.tolist())
    assert binomtest(above, len(right)).proportion_ci(0.999).high > 0.02
    assert binomtest(above, len(right), 0.05, alternative="greater").pvalue > 0.001
    many = 100_000
    assert 0.97 * epsilon < audited_epsilon(round(many * math.e / (1 + math.e)), many, many, delta=0.0) < epsilon


def of_a_gaussian(sigma: float, delta: float) -> float:
    """Epsilon of Gaussian noise at sensitivity 1, exactly: Balle and Wang, ICML 2018, theorem 8."""
    spent = lambda e: norm.cdf(0.5 / sigma - e * sigma) - math.exp(e) * norm.cdf(-0.5 / sigma - e * sigma)  # noqa: E731
    return float(brentq(lambda e: spent(e) - delta, 1e-9, 50))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_a_gaussian_is_never_found_less_private_than_it_is(sigma):
    rng, delta = np.random.default_rng(1), 1e-5
    found = []
    for _ in range(40):
        kept = rng.random(1000) < 0.5
        found.append(one_run(kept + rng.normal(0, sigma, 1000), kept, delta=delta))
    bounds = [one.epsilon for one in found]
    assert max(bounds) <= of_a_gaussian(sigma, delta)
    assert np.median(bounds) > {0.5: 2.5, 1.0: 1.2, 4.0: -1.0}[sigma]
    assert all(one.correct <= one.guesses <= one.canaries == 1000 for one in found)


def test_what_a_leaking_training_gives_away_exceeds_what_it_claims():
    """A claim of epsilon 1 of a training that tells of each canary with epsilon 3 is refuted."""
    rng = np.random.default_rng(2)
    kept = rng.random(2000) < 0.5
    told = np.where(rng.random(2000) < 1 / (1 + math.exp(-3.0)), kept, ~kept)
    assert 1.0 < one_run(told.astype(float), kept, delta=1e-5).epsilon < 3.0


def test_scores_that_know_nothing_prove_nothing():
    rng = np.random.default_rng(3)
    nothing = [one_run(rng.random(500), rng.random(500) < 0.5, delta=1e-5).epsilon for _ in range(200)]
    assert binomtest(sum(bound > 0 for bound in nothing), 200, 0.05, alternative="greater").pvalue > 0.001


@pytest.mark.parametrize("first", [True, False])
def test_equal_scores_prove_nothing_in_whatever_order_the_canaries_are_given(first: bool):
    kept = np.arange(1000) < 500
    assert one_run(np.zeros(1000), kept if first else ~kept, delta=0.0).epsilon == 0.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: audited_epsilon(5, 4, 10, delta=0.0), "5 right of 4 guesses at 10 canaries"),
        (lambda: audited_epsilon(4, 40, 10, delta=0.0), "4 right of 40 guesses at 10 canaries"),
        (lambda: audited_epsilon(4, 5, 10, delta=-0.1), "delta is -0.1"),
        (lambda: audited_epsilon(4, 5, 10, delta=0.1, confidence=1.0), "confidence 1"),
        (lambda: one_run([1.0, 2.0], [True], delta=0.0), r"scores are \(2,\) and kept \(1,\)"),
        (lambda: one_run([math.nan], [True], delta=0.0), "no NaN"),
        (lambda: one_run([1.0], [True], delta=0.0, shares=()), "at least one number"),
    ],
)
def test_what_is_no_audit_is_refused_in_a_line(call, said):
    with pytest.raises(ConfigError, match=said) as refused:
        call()
    assert "\n" not in str(refused.value)
