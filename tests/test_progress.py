"""Whoever listens is told how far long work has come; the numbers are those that come without."""

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pictures import SHAPE, network, pictures

import fedmerge as fm
from fedmerge.models import Recipe
from fedmerge.progress import Lines, counted, duration, steps

MODEL, DATA = network("self-tied"), pictures(8)
MODELS = [dict(network("self-tied", seed).state_dict()) for seed in range(3)]
SPEC = fm.perm_spec(MODEL, torch.zeros(2, *SHAPE))
RECIPE = Recipe(batch_size=2)
WORK: dict[str, tuple[int, Callable[[], Any]]] = {
    "training": (
        8,
        lambda: (
            fm.train(MODEL, MODELS[0], DATA, recipe=RECIPE, epochs=2, generator=torch.Generator().manual_seed(0)).params
        ),
    ),
    "evaluating": (3, lambda: fm.evaluate(MODEL, MODELS[0], DATA, batch_size=3).loss),
    "interpolating": (5, lambda: fm.interpolate(MODEL, *MODELS[:2], DATA, points=5).losses),
    "aligning models": (2, lambda: fm.merge(MODELS, spec=SPEC).params),
    "carrying models": (3, lambda: fm.merge(MODELS, spec=SPEC, method="ot-fusion").params),
}


@pytest.mark.parametrize("name", WORK)
def test_every_step_is_told_in_turn_and_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fedmerge.progress"], "_SECONDS", 0.0)
    total, work = WORK[name]
    told: list[tuple[str, int, int]] = []
    with fm.progress(lambda *said: told.append(said)):
        heard = work()
    count = len(told)
    torch.testing.assert_close(work(), heard, rtol=0, atol=0)
    assert [said[1:] for said in told if said[0] == name] == [(done, total) for done in range(total + 1)]
    assert len(told) == count  # after the block nobody listens


def test_work_within_work_is_told_inside_it_and_work_that_breaks_off_ends() -> None:
    told = []

    def work() -> None:
        with counted("outer", 5) as advance:
            advance(1)
            assert list(steps("inner", "ab")) == ["a", "b"]
            assert list(steps("not worth it", "a")) == ["a"]
            raise ZeroDivisionError

    with fm.progress(lambda *said: told.append(said)), pytest.raises(ZeroDivisionError):
        work()
    assert told == [("outer", 0, 5), ("inner", 0, 2), ("inner", 2, 2), ("outer", 5, 5)]


def test_lines_of_progress_come_the_more_seldom_the_longer_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    said, now = [], 0.0

    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines = Lines(lambda text: said.append((now, text)))
    lines("rounds", 0, 1)
    lines("clients train", 0, 7200)
    for second in range(1, 7200):
        now = float(second)
        lines("clients train", second, 7200)
    assert said[0] == (10.0, "rounds; clients train: 10 of 7200, about 2 h left")
    assert said[-1][1].endswith("min left")
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(said)]
    assert min(gaps) >= 10
    assert max(gaps) > 300
    assert len(said) < 60


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (90, "2 min"), (5000, "83 min"), (9000, "2 h")]
)
def test_an_estimate_is_said_as_roughly_as_it_is_known(seconds: float, text: str) -> None:
    assert duration(seconds) == text
