import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trained import DIGITS, PLAIN, fit, generator, linear, normed, soft_labels, some_digits

from fedmerge import models
from fedmerge.errors import DataError, ParamsError
from fedmerge.models import Recipe
from fedmerge.training import evaluate, predict, train


def _copy(params: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in params.items()}


def _assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor], **tolerance: float) -> None:
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], **(tolerance or {"rtol": 0, "atol": 0}))  # type: ignore[arg-type]


def test_one_step_of_plain_descent_equals_the_gradient_by_hand() -> None:
    model, data = linear(), some_digits(16)
    before = _copy(model.state_dict())
    done = fit(model, data, epochs=1)
    x = data.normalise(data.images).flatten(1)
    error = (x @ before["1.weight"].T + before["1.bias"]).softmax(1) - nn.functional.one_hot(data.labels, 10)
    expected = {
        "1.weight": before["1.weight"] - 0.1 * error.T @ x / 16,
        "1.bias": before["1.bias"] - 0.1 * error.mean(0),
    }
    _assert_same(done.params, expected, rtol=1e-5, atol=1e-6)
    assert done.steps == 1


@pytest.mark.parametrize(
    ("recipe", "optimizer"),
    [
        (
            Recipe(lr=0.05, momentum=0.8, nesterov=True, weight_decay=1e-2, batch_size=16),
            lambda weights: torch.optim.SGD(weights, 0.05, 0.8, weight_decay=1e-2, nesterov=True),
        ),
        (
            Recipe(optimizer="adam", lr=0.01, weight_decay=1e-2, batch_size=16),
            lambda weights: torch.optim.Adam(weights, 0.01, weight_decay=1e-2),
        ),
    ],
    ids=["sgd", "adam"],
)
def test_the_recipes_optimiser_is_the_one_that_is_used(recipe: Recipe, optimizer: Any) -> None:
    model, data = linear(), some_digits(16)
    done = fit(model, data, recipe=recipe, epochs=3)
    oracle = copy.deepcopy(model)
    steps = optimizer(oracle.parameters())
    for _ in range(3):  # one batch holds all images, so their order does not matter
        steps.zero_grad()
        nn.functional.cross_entropy(oracle(data.normalise(data.images)), data.labels).backward()
        steps.step()
    _assert_same(done.params, oracle.state_dict(), rtol=1e-4, atol=1e-5)


def test_the_same_generator_gives_the_same_bytes_and_another_one_does_not() -> None:
    model = models.build("resnet20", classes=10, in_shape=(1, 8, 8), width=0.25, seed=0)
    recipe = replace(models.recipe("resnet20"), batch_size=20)
    one, same, other = (fit(model, some_digits(50), recipe=recipe, generator=generator(seed)) for seed in (1, 1, 2))
    _assert_same(one.params, same.params)
    assert (one.losses, one.accuracies) == (same.losses, same.accuracies)
    assert any(not torch.equal(one.params[name], other.params[name]) for name in one.params)


def test_nothing_that_is_passed_in_is_modified() -> None:
    model = normed().eval()
    data, params = some_digits(40), {name: value + 1 for name, value in normed().state_dict().items()}
    kept, template, images = _copy(params), _copy(model.state_dict()), data.images.clone()
    state = torch.get_rng_state()
    fit(model, data, params=params)
    evaluate(model, params, data)
    predict(model, params, data)
    _assert_same(params, kept)
    _assert_same(model.state_dict(), template)
    assert not model.training
    assert all(weight.grad is None for weight in model.parameters())
    torch.testing.assert_close(data.images, images)
    assert torch.equal(state, torch.get_rng_state())


def test_the_result_is_a_state_dict_of_its_own_with_the_same_keys_and_dtypes() -> None:
    model = normed()
    given = _copy(model.state_dict())
    done = fit(model, some_digits(40), epochs=3)
    assert {name: value.dtype for name, value in done.params.items()} == {
        name: value.dtype for name, value in given.items()
    }
    assert list(done.params) == list(given)
    assert done.params["2.num_batches_tracked"] == 9  # 3 batches of 13 or 14 in each of 3 epochs
    assert not any(value.requires_grad for value in done.params.values())


def test_no_epochs_give_the_parameters_back() -> None:
    model = normed()
    done = fit(model, some_digits(5), epochs=0)
    _assert_same(done.params, model.state_dict())
    assert (done.losses, done.accuracies, done.steps) == ((), (), 0)


@pytest.mark.parametrize(("count", "batch"), [(64, 16), (65, 16), (3, 16), (17, 16), (33, 1)])
def test_steps_are_the_batches_of_all_epochs(count: int, batch: int) -> None:
    done = fit(linear(), some_digits(count), recipe=replace(PLAIN, batch_size=batch), epochs=3)
    assert done.steps == 3 * math.ceil(count / batch)


def test_every_image_is_seen_once_an_epoch_in_batches_of_nearly_equal_size() -> None:
    class Recorder(nn.Module):
        seen: list[list[bytes]]

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Recorder.seen.append([image.numpy().tobytes() for image in x])
            return self.out(x.flatten(1))

    Recorder.seen = []
    data = some_digits(65)
    fit(Recorder(), data, epochs=1)
    assert sorted(map(len, Recorder.seen)) == [13] * 5
    everything = [image.numpy().tobytes() for image in data.normalise(data.images)]
    assert sorted(image for batch in Recorder.seen for image in batch) == sorted(everything)


def test_the_schedule_spans_the_steps_of_this_call(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    plain_step = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return plain_step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    for count in (32, 160):  # the peak comes a fifth through, whatever the size of the slice
        rates.clear()
        fit(linear(), some_digits(count), recipe=replace(PLAIN, schedule="one-cycle", warmup=0.2), epochs=5)
        steps = 5 * count // 16
        assert len(rates) == steps
        assert int(np.argmax(rates)) in (steps // 5 - 1, steps // 5)
        assert 0 < rates[0] < rates[steps // 5]
        assert 0 < rates[-1] < rates[-2]


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_one_image_uses_the_running_statistics_and_keeps_them(count: int) -> None:
    model = normed()
    done = fit(model, some_digits(count), recipe=replace(PLAIN, batch_size=1))
    for name in ("2.running_mean", "2.running_var", "2.num_batches_tracked"):
        torch.testing.assert_close(done.params[name], model.state_dict()[name])
    assert not torch.equal(done.params["1.weight"], model.state_dict()["1.weight"])


def test_frozen_parameters_stay_although_the_recipe_decays_weights() -> None:
    model = normed()
    model.get_parameter("1.weight").requires_grad_(False)
    done = fit(model, some_digits(40), recipe=replace(PLAIN, weight_decay=0.1))
    torch.testing.assert_close(done.params["1.weight"], model.state_dict()["1.weight"], rtol=0, atol=0)
    assert not torch.equal(done.params["4.weight"], model.state_dict()["4.weight"])


def test_dropout_draws_from_the_generator_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), linear()[1])
    torch.manual_seed(1)
    one = fit(model, some_digits(40))
    torch.manual_seed(2)
    same, other = fit(model, some_digits(40)), fit(model, some_digits(40), generator=generator(5))
    _assert_same(one.params, same.params)
    assert not torch.equal(one.params["2.weight"], other.params["2.weight"])


def test_augmentation_moves_pixels_of_the_training_images() -> None:
    plain = fit(linear(), some_digits(40))
    moved = fit(linear(), some_digits(40), recipe=replace(PLAIN, augment=True))
    assert not torch.equal(plain.params["1.weight"], moved.params["1.weight"])


def test_losses_and_accuracies_are_means_over_images_and_reach_the_callback() -> None:
    told: list[tuple[int, float, float]] = []
    frozen = replace(PLAIN, lr=1e-30)  # so small that nothing moves: every epoch sees the same network
    model, data = linear(), some_digits(45)
    done = fit(model, data, recipe=frozen, on_epoch=lambda *seen: told.append(seen))
    found = evaluate(model, model.state_dict(), data)
    assert done.losses == pytest.approx([found.loss] * 2, rel=1e-6)
    assert done.accuracies == pytest.approx([found.accuracy] * 2)
    assert told == [(1, done.losses[0], done.accuracies[0]), (2, done.losses[1], done.accuracies[1])]
    assert done.seconds > 0


def test_training_on_digits_learns_them() -> None:
    model = models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
    shuffled = np.random.default_rng(0).permutation(len(DIGITS))  # neighbours share a writer
    done = train(
        model,
        model.state_dict(),
        DIGITS.select(shuffled[:250]),
        recipe=models.recipe("mlp"),
        epochs=models.recipe("mlp").epochs,
        generator=generator(),
    )
    assert done.accuracies[-1] > 0.99
    assert evaluate(model, done.params, DIGITS.select(shuffled[250:])).accuracy > 0.9


# Distillation


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.0, 3.0), (0.4, 2.0), (1.0, 2.0)])
def test_the_loss_with_a_teacher_equals_the_formula(weight: float, temperature: float) -> None:
    model, data, soft = linear(), some_digits(16), soft_labels(16, temperature)
    done = fit(model, data, epochs=1, teacher=soft, labels_weight=weight, temperature=temperature)
    logits = predict(model, model.state_dict(), data).double()
    hard = -logits.log_softmax(1)[range(16), data.labels].mean()
    student = (logits / temperature).softmax(1)
    divergence = (soft.double() * (soft.double() / student).log()).sum(1).mean()
    expected = weight * hard + (1 - weight) * temperature**2 * divergence
    assert done.losses[0] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_an_image_without_a_label_learns_from_the_teacher_alone(weight: float) -> None:
    model, data, soft = linear(), some_digits(16), soft_labels(16)
    data.labels[10:] = -1
    done = fit(model, data, epochs=1, teacher=soft, labels_weight=weight)
    before = model.state_dict()
    x = data.normalise(data.images).flatten(1)
    hot = nn.functional.one_hot(data.labels.clamp_min(0), 10)
    target = torch.where(data.labels[:, None] == -1, soft, weight * hot + (1 - weight) * soft)
    error = (x @ before["1.weight"].T + before["1.bias"]).softmax(1) - target
    torch.testing.assert_close(done.params["1.weight"], before["1.weight"] - 0.1 * error.T @ x / 16)
    right = (x @ before["1.weight"].T + before["1.bias"]).argmax(1)[:10] == data.labels[:10]
    assert done.accuracies[0] == float(right.double().mean())
    with pytest.raises(DataError, match="labels of .* name none of its 10 classes"):
        fit(model, data, epochs=1)


def test_a_loss_of_the_datas_own_is_lowered_on_the_rows_that_have_a_label() -> None:
    model, soft = linear(), soft_labels(60)
    data = some_digits(60)
    data.labels[20:] = -1  # some batches have no label at all
    made = [
        fit(model, replace(data, loss=loss), epochs=2, teacher=soft, labels_weight=0.3).params
        for loss in (None, nn.functional.cross_entropy, lambda answers, labels: 0 * answers.sum())
    ]
    torch.testing.assert_close(made[1], made[0])
    assert not torch.allclose(made[2]["1.weight"], made[0]["1.weight"], atol=1e-3)


def test_a_teacher_of_one_hot_labels_teaches_what_labels_teach() -> None:
    data = some_digits(40)
    labels = fit(linear(), data)
    taught = fit(linear(), data, teacher=nn.functional.one_hot(data.labels, 10).float(), labels_weight=0.0)
    _assert_same(labels.params, taught.params, rtol=1e-5, atol=1e-6)


def test_distillation_alone_does_not_read_the_labels() -> None:
    data = some_digits(40)
    wrong = replace(data, labels=(data.labels + 1) % 10)
    one, other = (fit(linear(), each, teacher=soft_labels(40), labels_weight=0.0) for each in (data, wrong))
    _assert_same(one.params, other.params)


def test_a_student_at_its_teacher_stays() -> None:
    model, data = linear(), some_digits(16)
    soft = predict(model, model.state_dict(), data).softmax(1)
    done = fit(model, data, teacher=soft, labels_weight=0.0)
    _assert_same(done.params, model.state_dict(), rtol=0, atol=1e-6)
    assert done.losses[0] == pytest.approx(0, abs=1e-6)


# FedProx


def test_the_proximal_term_is_that_of_the_formula() -> None:
    model, data, mu = linear(), some_digits(16), 0.7
    done = fit(model, data, epochs=3, proximal_mu=mu)
    oracle, start = copy.deepcopy(model), _copy(model.state_dict())
    optimizer = torch.optim.SGD(oracle.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        far = sum(((weight - start[name]) ** 2).sum() for name, weight in oracle.named_parameters())
        loss = nn.functional.cross_entropy(oracle(data.normalise(data.images)), data.labels)
        (loss + mu / 2 * far).backward()
        optimizer.step()
    _assert_same(done.params, oracle.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_strong_pull_keeps_the_network_near_its_start() -> None:
    model, data = linear(), some_digits(100)
    start = model.state_dict()["1.weight"]
    moved = [float((fit(model, data, epochs=5, proximal_mu=mu).params["1.weight"] - start).norm()) for mu in (0.0, 5.0)]
    assert moved[1] < 0.5 * moved[0]


def test_a_parameter_that_the_network_does_not_use_is_left_where_it_is() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    done = fit(model, some_digits(20), proximal_mu=0.1)
    torch.testing.assert_close(done.params["unused"], torch.ones(3))


# Evaluation


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_learns_what_the_cpu_learns() -> None:
    data = some_digits(64)
    cpu, gpu = (fit(linear(), data, device=device) for device in ("cpu", "cuda"))
    _assert_same(cpu.params, gpu.params, rtol=1e-3, atol=1e-4)
    assert evaluate(linear(), gpu.params, data, device="cuda").accuracy == pytest.approx(cpu.accuracies[-1], abs=0.1)


@pytest.mark.parametrize(
    "recipe",
    [
        PLAIN,
        Recipe(lr=0.1, momentum=0.9, batch_size=16),
        Recipe(lr=0.1, momentum=0.8, nesterov=True, schedule="one-cycle", warmup=0.3, batch_size=16),
    ],
)
def test_the_reach_is_how_far_a_gradient_of_one_would_have_moved_a_weight(recipe: Recipe) -> None:
    class Flat(nn.Module):
        """Its loss does not depend on its weight, whose gradient so is the correction alone."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 10) + 0 * self.w.sum()

    done = fit(Flat(), some_digits(50), recipe=recipe, correction={"w": torch.tensor([1.0, -2.0])})
    torch.testing.assert_close(done.params["w"], done.reach * torch.tensor([-1.0, 2.0]))
    if recipe is PLAIN:
        assert done.reach == pytest.approx(0.1 * done.steps)


def test_a_correction_is_added_to_the_gradient_of_what_it_names() -> None:
    model, data = linear(), some_digits(16)
    plain, moved = (
        fit(model, data, epochs=1, correction=c) for c in (None, {"1.bias": torch.arange(10, dtype=torch.float32)})
    )
    torch.testing.assert_close(moved.params["1.weight"], plain.params["1.weight"], rtol=0, atol=0)
    torch.testing.assert_close(moved.params["1.bias"], plain.params["1.bias"] - 0.1 * torch.arange(10))


def test_a_correction_that_fits_no_parameter_is_named_and_adam_has_no_reach() -> None:
    with pytest.raises(ParamsError, match=r"correction of '1.bias' is \(3,\); expected \(10,\)"):
        fit(linear(), some_digits(16), correction={"1.bias": torch.zeros(3)})
    with pytest.raises(ParamsError, match=r"correction of 'x' is \(3,\); expected no parameter of that name"):
        fit(linear(), some_digits(16), correction={"x": torch.zeros(3)})
    assert fit(linear(), some_digits(16), recipe=replace(PLAIN, optimizer="adam")).reach == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_goes_on_where_another_ended_if_it_is_given_the_optimisers_state(optimizer: str) -> None:
    model, data = linear(), some_digits(40)
    recipe = Recipe(optimizer=optimizer, lr=0.05, momentum=0.9, batch_size=40)  # one batch: order does not matter
    whole = fit(model, data, recipe=recipe, epochs=4).params
    first = fit(model, data, recipe=recipe, epochs=2, optimizer_state={})
    given = {name: tensor.clone() for name, tensor in first.optimizer_state.items()}
    second = fit(model, data, params=first.params, recipe=recipe, epochs=2, optimizer_state=first.optimizer_state)
    torch.testing.assert_close(second.params, whole, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dict(first.optimizer_state), given, rtol=0, atol=0)
    anew = fit(model, data, params=first.params, recipe=recipe, epochs=2).params
    assert float((anew["1.weight"] - whole["1.weight"]).abs().max()) > 1e-3
    with pytest.raises(ParamsError, match="the optimiser's state has 'nowhere/step'"):
        fit(model, data, recipe=recipe, optimizer_state={"nowhere/step": torch.ones(())})
