"""Losses, accuracies and answers of a network, in one pass over images."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from trained import normed, some_digits

import fedmerge as fm
from fedmerge.training import evaluate, predict


def test_evaluation_agrees_with_prediction_for_any_batch_size() -> None:
    model, data = normed(), some_digits(57)
    logits = predict(model, model.state_dict(), data, batch_size=10)
    assert logits.shape == (57, 10)
    assert logits.dtype == torch.float32
    expected = nn.functional.cross_entropy(logits.double(), data.labels)
    for batch_size in (1, 20, 57, 500):
        found = evaluate(model, model.state_dict(), data, batch_size=batch_size)
        assert found.loss == pytest.approx(float(expected), rel=1e-6)
        assert found.accuracy == pytest.approx(float((logits.argmax(1) == data.labels).double().mean()))
        assert found.examples == 57
        assert found.answers is None


def test_answers_come_out_of_the_same_pass_and_leave_loss_and_accuracy_alone() -> None:
    model, data = normed(), some_digits(57)
    batches: list[int] = []
    model.register_forward_pre_hook(lambda module, inputs: batches.append(len(inputs[0])))
    plain = evaluate(model, model.state_dict(), data, batch_size=20)
    del batches[:]
    found = evaluate(model, model.state_dict(), data, batch_size=20, answers=True)
    assert batches == [20, 20, 17]
    assert found == plain
    probabilities = predict(model, model.state_dict(), data).double().softmax(1)
    assert found.answers is not None
    torch.testing.assert_close(found.answers.predicted, probabilities.argmax(1))
    torch.testing.assert_close(found.answers.confidence, probabilities.amax(1), rtol=1e-5, atol=0)


def test_prediction_is_in_eval_mode_and_in_the_order_of_the_images() -> None:
    model, data = normed().train(), some_digits(30)
    expected = copy.deepcopy(model).eval()(data.normalise(data.images)).detach()
    torch.testing.assert_close(predict(model, model.state_dict(), data, batch_size=7), expected)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_training_and_attacks_go_on_under_a_callers_no_grad(around: Callable[[], AbstractContextManager[None]]) -> None:
    digits = fm.data.load("digits").train.select(range(60))
    model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0, width=8)

    def made() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        generator, recipe = torch.Generator().manual_seed(0), fm.models.recipe("mlp")
        done = fm.train(model, model.state_dict(), digits, recipe=recipe, epochs=1, generator=generator)
        return done.params, fm.attacked(model, done.params, digits, attack=fm.PGD(4, steps=2)).images

    params, images = made()
    with around():
        again, same = made()
    assert torch.equal(images, same)
    assert all(torch.equal(again[name], value) for name, value in params.items())
