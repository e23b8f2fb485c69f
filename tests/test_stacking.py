"""Stacked ensembles against the mean, scikit-learn, and members whose competence is known."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import fedmerge as fm
from fedmerge.errors import ConfigError, DataError, ParamsError


def members(n: int, classes: int = 4, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Three members, each right about the classes that it knows, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    found = []
    for known in ([0, 1], [2, 3], []):
        logits = rng.normal(size=(n, classes))
        logits[:, [c for c in range(classes) if c not in known]] += 1.5  # what it does not know, it says often
        rows = np.isin(labels, known)
        logits[rows, labels[rows]] += 4
        found.append(torch.from_numpy(np.exp(log_softmax(logits, axis=1))).float())
    return found, torch.from_numpy(labels)


def test_at_an_infinite_penalty_the_stack_is_the_mean() -> None:
    predictions, labels = members(60)
    found = fm.stack(predictions, labels, strengths=[math.inf])
    mean = torch.stack(predictions).double().mean(0).float()
    torch.testing.assert_close(found.predict(predictions), mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(found.out_of_fold, mean, rtol=1e-6, atol=1e-9)
    large = fm.stack(predictions, labels, strengths=[1e9])
    torch.testing.assert_close(large.predict(predictions), mean, rtol=1e-4, atol=1e-6)


def test_who_knows_a_class_is_believed_about_it() -> None:
    predictions, labels = members(300)
    fresh, answers = members(1000, seed=1)
    found = fm.stack(predictions, labels)
    mean = torch.stack(fresh).mean(0)
    share = {
        name: float((p.argmax(1) == answers).float().mean())
        for name, p in (("mean", mean), ("stack", found.predict(fresh)))
    }
    assert share["stack"] > share["mean"] + 0.1
    assert share["stack"] > 0.9


def test_the_fit_is_where_its_loss_has_no_slope() -> None:
    predictions, labels = members(200)
    found = fm.stack(predictions, labels, strengths=[0.05])
    z = torch.cat([p.double().clamp_min(1e-4).log() for p in predictions], dim=1)
    w = torch.tensor(found.weights, requires_grad=True)
    centred = torch.tensor(found.bias + z.mean(0).numpy() @ found.weights, requires_grad=True)
    logits = torch.stack(predictions).double().mean(0).log() + (z - z.mean(0)) @ w + centred
    loss = torch.nn.functional.cross_entropy(logits, labels) + 0.025 * (w.square().sum() + centred.square().sum())
    for slope in torch.autograd.grad(loss, [w, centred]):  # convex, so this is the minimum
        assert slope.abs().max() < 1e-4


def test_what_very_sure_members_say_below_the_first_floor_counts_where_that_helps() -> None:
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(1, 4, size=400))
    knows, guesses = (torch.from_numpy(rng.normal(size=(400, 4))) for _ in range(2))
    knows[torch.arange(400), labels] += 3
    # Both are sure of a class that hardly ever is; of the others the mean hears one alone.
    knows[:, 0], guesses[:, 0], labels[:5] = 30, 22, 0
    sure = [knows.softmax(1), guesses.softmax(1)]
    assert max(float(p[:, 1:].max()) for p in sure) < 1e-7
    found = {floor: fm.stack(sure, labels, floors=[floor]) for floor in (1e-4, 1e-14)}
    right = {floor: (one.out_of_fold.argmax(1) == labels)[5:].float().mean() for floor, one in found.items()}
    assert right[1e-4] < 0.5 < 0.8 < right[1e-14]
    assert torch.equal(fm.stack(sure, labels, floors=[1e-4, 1e-14]).out_of_fold, found[1e-14].out_of_fold)
    predictions, labels = members(300)
    predictions = [(2 * p.log()).softmax(1) for p in predictions]  # seldom that sure: the first floor stays
    kept, first = fm.stack(predictions, labels), fm.stack(predictions, labels, floors=[1e-4])
    assert min(p.min() for p in predictions) < kept.floor == 1e-4
    assert torch.equal(kept.out_of_fold, first.out_of_fold)


def test_no_image_is_answered_by_a_fit_that_saw_its_label() -> None:
    rng = np.random.default_rng(0)
    noise = [torch.from_numpy(rng.dirichlet(np.ones(4), size=80)).float() for _ in range(20)]
    labels = torch.from_numpy(rng.integers(4, size=80))  # nothing to learn, and enough numbers to learn it by heart
    found = fm.stack(noise, labels, strengths=[1e-6])
    assert (found.predict(noise).argmax(1) == labels).float().mean() > 0.9
    assert (found.out_of_fold.argmax(1) == labels).float().mean() < 0.5
    assert fm.stack(noise, labels).strength >= 1  # so it keeps near to the mean


def test_rare_and_missing_classes_are_stacked_too() -> None:
    predictions, labels = members(60)
    rare = labels.clone()
    rare[labels == 3] = 2
    rare[0] = 3  # one image of class 3
    assert fm.stack(predictions, rare).predict(predictions).isfinite().all()
    rare[0] = 2
    found = fm.stack(predictions, rare, strengths=[0.01])
    assert np.all(found.weights[:, 3] == 0)
    assert found.bias[3] == 0
    mean = torch.stack(predictions).double().mean(0)
    for answers in (found.predict(predictions), found.out_of_fold):
        torch.testing.assert_close(answers[:, 3].double(), mean[:, 3], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(answers.sum(1), torch.ones(60))
    among = [p[:, :3] / p[:, :3].sum(1, keepdim=True) for p in predictions]
    weighed = fm.stack(among, rare, strengths=[0.01], folds=2)  # not the same z, so not the same numbers: as many right
    right = [
        (answers[:, :3].argmax(1) == rare).float().mean()
        for answers in (found.predict(predictions), weighed.predict(among))
    ]
    assert right[0] == pytest.approx(float(right[1]), abs=0.1)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"predictions": []}, ParamsError, "predictions have shapes"),
        ({"predictions": [torch.rand(6, 3), torch.rand(5, 3)]}, ParamsError, r"shapes \[\(6, 3\), \(5, 3\)\]"),
        ({"predictions": [torch.randn(6, 3)]}, ParamsError, "no probabilities"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, DataError, r"labels are torch.int64 \(5,\)"),
        ({"labels": torch.zeros(6)}, DataError, "expected int64"),
        ({"labels": torch.full((6,), 3)}, DataError, "labels run from 3 to 3; expected 0 to 2"),
        ({"strengths": [-1]}, ConfigError, r"strengths \[-1\]"),
        ({"strengths": [math.nan]}, ConfigError, "numbers from 0"),
        ({"strengths": ["a"]}, ConfigError, "numbers from 0"),
        ({"strengths": 0.1}, ConfigError, "strengths 0.1"),
        ({"strengths": np.array([0.1, 1.0])}, ConfigError, "expected at least 2, and numbers from 0"),
        ({"seed": -1}, ConfigError, "seed is -1; expected a whole number from 0"),
        ({"seed": 2**40}, ConfigError, "below"),
        ({"predictions": [torch.ones(6, 0)] * 2}, ParamsError, "no probabilities"),
        ({"predictions": [torch.ones(0, 3)], "labels": torch.arange(0)}, DataError, "of the 0 labelled images"),
        ({"folds": 1}, ConfigError, "folds is 1"),
        ({"floors": [0.0]}, ConfigError, "floor is 0.0"),
        ({"floors": []}, ConfigError, "floors is empty"),
    ],
)
def test_what_cannot_be_stacked_is_refused(change: dict[str, object], kind: type[Exception], message: str) -> None:
    good = {"predictions": [torch.full((6, 3), 1 / 3)] * 2, "labels": torch.arange(6) % 3}
    fm.stack(**good, strengths=[1.0])
    with pytest.raises(kind, match=message):
        fm.stack(**{**good, **change})


def test_one_image_a_class_is_too_few() -> None:
    with pytest.raises(DataError, match="no class has two of the 3 labelled images"):
        fm.stack([torch.full((3, 3), 1 / 3)], torch.arange(3))
    found = fm.stack([torch.full((6, 3), 1 / 3)], torch.arange(6) % 3)
    with pytest.raises(ParamsError, match="2 members of 3 classes were given; the stack was fitted on 1 of 3"):
        found.predict([torch.full((6, 3), 1 / 3)] * 2)
    assert found.predict([torch.ones(0, 3)]).shape == (0, 3)
