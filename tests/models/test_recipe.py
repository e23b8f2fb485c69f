import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedmerge import models
from fedmerge.errors import ConfigError
from fedmerge.models import Recipe


def test_a_constant_rate_stays() -> None:
    assert {Recipe(lr=0.3).rate(progress) for progress in np.linspace(0, 1, 9)} == {0.3}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
def test_the_rate_rises_in_a_straight_line_during_warm_up(schedule: str) -> None:
    recipe = Recipe(lr=2.0, schedule=schedule, warmup=0.25)
    assert [recipe.rate(progress) for progress in (0, 0.125, 0.25)] == pytest.approx([0, 1, 2])


def test_cosine_falls_to_zero_through_half_the_rate() -> None:
    recipe = Recipe(lr=2.0, schedule="cosine")
    # (1 + cos(pi / 3)) / 2 = 3 / 4 of the peak at a third of the way
    assert [recipe.rate(progress) for progress in (0, 1 / 3, 0.5, 1)] == pytest.approx([2, 1.5, 1, 0])


def test_one_cycle_falls_in_a_straight_line() -> None:
    recipe = Recipe(lr=1.0, schedule="one-cycle", warmup=0.2)
    assert [recipe.rate(progress) for progress in (0.2, 0.4, 0.8, 1)] == pytest.approx([1, 0.75, 0.25, 0])


@pytest.mark.parametrize("name", [*models.names(), "resnet50"])
def test_every_rate_of_a_default_recipe_lies_between_zero_and_its_peak(name: str) -> None:
    recipe = models.recipe(name)
    rates = [recipe.rate(progress) for progress in np.linspace(0, 1, 101)]
    assert min(rates) >= -1e-12
    assert max(rates) <= recipe.lr
    assert max(rates) >= 0.95 * recipe.lr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "adamw"}, "optimizer of a recipe is 'adamw'; expected sgd or adam"),
        ({"lr": 0.0}, "lr of a recipe is 0.0; expected a positive number"),
        ({"lr": float("nan")}, "lr of a recipe is nan"),
        ({"momentum": 1.0}, r"momentum of a recipe is 1.0; expected a number in \[0, 1\)"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov of a recipe is True; expected false where momentum is 0"),
        ({"weight_decay": -1e-4}, "weight_decay of a recipe is -0.0001; expected 0 or a positive number"),
        ({"batch_size": 0}, "batch_size of a recipe is 0; expected at least 1"),
        ({"schedule": "step"}, "schedule of a recipe is 'step'; expected constant, cosine, one-cycle"),
        ({"warmup": 1.0}, "warmup of a recipe is 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing of a recipe is -0.1"),
        ({"epochs": -1}, "epochs of a recipe is -1; expected at least 0"),
    ],
)
def test_a_value_outside_its_range_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(Recipe(), **change)


@pytest.mark.parametrize(
    "changes",
    [{"lr": "fast"}, {"lr": math.nan}, {"lr": math.inf}, {"batch_size": 2.5}, {"epochs": None}, {"augment": 1},
     {"optimizer": 3}, {"batch_size": True}, {"momentum": math.nan}, {"warmup": [0.1]}],
)  # fmt: skip
def test_values_of_another_kind_are_named(changes: dict[str, object]) -> None:
    ((name, given),) = changes.items()
    with pytest.raises(ConfigError, match=re.escape(f"{name} of a recipe is {given!r}; expected ")):
        Recipe(**changes)  # type: ignore[arg-type]
