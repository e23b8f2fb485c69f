"""What training, evaluation and prediction refuse."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from trained import PLAIN, fit, linear, normed, soft_labels, some_digits

from fedmerge.errors import ConfigError, DataError, FedmergeError, ParamsError
from fedmerge.training import DivergedError, evaluate, predict


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    model = linear()
    params = {name: value * math.nan for name, value in model.state_dict().items()}
    with pytest.raises(DivergedError, match=r"not finite at step 1 of 6 \(epoch 1\) on digits \(train\); lower the"):
        fit(model, some_digits(40), params=params)
    assert issubclass(DivergedError, FedmergeError)


def test_a_rate_far_too_high_is_found_at_the_step_where_it_breaks() -> None:
    with pytest.raises(DivergedError, match=r"not finite at step [2-9] of 12 .*lower the learning rate \(peak 1e\+38"):
        fit(normed(), some_digits(40), recipe=replace(PLAIN, lr=1e38), epochs=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": -1}, "epochs is -1; at least 0 is needed"),
        ({"labels_weight": 1.5}, r"labels_weight is 1.5; a number in \[0, 1\] is needed"),
        ({"labels_weight": 0.5}, "labels_weight is 0.5 without a teacher; give a teacher or leave it at 1"),
        ({"teacher": soft_labels(3)}, r"teacher is \(3, 10\); expected \(20, 10\)"),
        ({"teacher": torch.zeros(20, 10)}, "rows do not add up to 1; give softmax"),
        ({"teacher": soft_labels(20), "temperature": 0.0}, "temperature is 0.0 and proximal_mu 0.0; expected above 0"),
        ({"proximal_mu": -1.0}, "proximal_mu -1.0; expected above 0, and 0 or above"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(linear(), some_digits(20), **options)


def test_without_images_there_is_nothing_to_do() -> None:
    model, none = linear(), some_digits(0)
    with pytest.raises(DataError, match=r"digits \(train\) holds no images; nothing to train on"):
        fit(model, none)
    with pytest.raises(DataError, match="holds no images; nothing to evaluate"):
        evaluate(model, model.state_dict(), none)
    with pytest.raises(DataError, match="holds no images; nothing to evaluate"):
        predict(model, model.state_dict(), none)


def test_a_batch_of_no_images_is_refused() -> None:
    model = linear()
    with pytest.raises(ConfigError, match="batch_size is 0; expected a whole number of at least 1"):
        evaluate(model, model.state_dict(), some_digits(3), batch_size=0)


def test_parameters_of_another_network_are_refused() -> None:
    model = linear()
    with pytest.raises(ParamsError, match=r"not a state dict of Sequential: .*Missing key") as raised:
        evaluate(model, {}, some_digits(3))
    assert "\n" not in str(raised.value)
    with pytest.raises(ParamsError, match=r"size mismatch for 1\.bias"):
        fit(model, some_digits(3), params={**model.state_dict(), "1.bias": torch.zeros(3)})
