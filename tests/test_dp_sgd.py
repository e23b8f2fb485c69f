"""DP-SGD: clipped and blurred as written, and accounted for as in the literature."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import fedmerge as fm
from fedmerge.dp_sgd import poisson
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.tasks import ClientTask

RECIPE = fm.models.Recipe(lr=1.0, momentum=0.0, batch_size=64)


@pytest.fixture(scope="module")
def digits() -> fm.data.Images:
    return fm.data.load("digits").train.select(range(40))


class Twice(torch.nn.Module):
    """A layer that is used twice, so that the gradient of an image is a sum over both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.out = torch.nn.Linear(64, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.again(self.again(self.first(x.flatten(1)).relu()).relu()).relu())


class Tied(torch.nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.back = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.back.weight, self.out = self.first.weight, torch.nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.back(self.first(x.flatten(1)).relu()).relu())


def convolved() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.GroupNorm(2, 4), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(144, 16), torch.nn.LayerNorm(16), torch.nn.ReLU(), torch.nn.Linear(16, 10),
    )  # fmt: skip


def rows_of_images() -> torch.nn.Module:
    """A linear layer on each row of an image: its gradient is a sum over rows."""
    layers = torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(192, 10)
    return torch.nn.Sequential(torch.nn.Flatten(1, 2), *layers)


def frozen() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10))
    model[1].requires_grad_(False)
    return model


class Aside(torch.nn.Module):
    """A head that no answer uses, as auxiliary ones are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.out, self.aside = torch.nn.Linear(64, 8), torch.nn.Linear(8, 10), torch.nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.body(x.flatten(1)).relu())


class Words(torch.nn.Module):
    """Pixels as words, of which 0 stands for none."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = torch.nn.Embedding(17, 6, padding_idx=0), torch.nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = ((x - x.amin((1, 2, 3), keepdim=True)) * 3.7).long().clamp(0, 16)
        return self.out(self.table(pixels.flatten(1)).mean(1))


NETWORKS = {
    "aside": Aside,
    "words": Words,
    "rows": rows_of_images,
    "convolved": convolved,
    "frozen": frozen,
    "twice": Twice,
    "tied": Tied,
}
NETWORKS["mlp"] = lambda: fm.models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=0)
GHOST = {"aside", "places", "mlp", "rows", "convolved", "frozen"}


def stepped(
    digits: fm.data.Images, private: fm.DPSGD | None, network: str = "mlp", **recipe: object
) -> tuple[torch.nn.Module, dict]:
    """A network, and its gradient as one step of SGD at rate 1 over all images has it."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    done = fm.train(
        model, start, digits, recipe=dataclasses.replace(RECIPE, **recipe), epochs=1,
        generator=torch.Generator().manual_seed(3), private=private,
    )  # fmt: skip
    return model, {name: start[name] - value for name, value in done.params.items()}


@pytest.mark.parametrize("network", NETWORKS)
def test_without_noise_a_step_is_the_mean_of_the_clipped_gradients(
    digits: fm.data.Images, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, attach, ghost = 0.5, fm.DPSGD.attach, []
    monkeypatch.setattr(fm.DPSGD, "attach", lambda *a, **k: (made := attach(*a, **k), ghost.append(made.ghost))[0])
    model, moved = stepped(digits, fm.DPSGD(0.0, clip), network)
    assert ghost == [network in GHOST]
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters() if value.requires_grad}
    norms = []
    for x, y in zip(digits.normalise(digits.images), digits.labels, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        gradients = torch.autograd.grad(
            loss, [value for value in model.parameters() if value.requires_grad], materialize_grads=True
        )
        norms.append(float(torch.sqrt(sum((g**2).sum() for g in gradients))))
        for name, gradient in zip(expected, gradients, strict=True):
            expected[name] += gradient * min(1.0, clip / norms[-1]) / len(digits)
    assert min(norms) > clip  # all of them are cut
    for name, gradient in expected.items():
        torch.testing.assert_close(moved[name], gradient, atol=1e-6, rtol=1e-4)


def test_without_noise_and_clipping_it_is_plain_training(digits: fm.data.Images) -> None:
    _, plain = stepped(digits, None)
    _, moved = stepped(digits, fm.DPSGD(0.0, 1e9))
    for name, gradient in plain.items():
        torch.testing.assert_close(moved[name], gradient, atol=1e-6, rtol=1e-4)


def test_the_noise_is_gaussian_of_the_size_that_was_asked_for(digits: fm.data.Images) -> None:
    noise, clip = 2.0, 0.5
    _, clean = stepped(digits, fm.DPSGD(0.0, clip))
    _, moved = stepped(digits, fm.DPSGD(noise, clip))
    drawn = torch.cat([(moved[name] - clean[name]).flatten() for name in clean]).double().numpy()
    assert stats.kstest(drawn * len(digits) / (noise * clip), "norm").pvalue > 0.001  # 26,000 draws
    _, again = stepped(digits, fm.DPSGD(noise, clip))
    assert all(torch.equal(moved[name], again[name]) for name in moved)


def test_each_step_takes_each_image_with_equal_probability() -> None:
    batches = list(poisson(200, 5, torch.Generator().manual_seed(0)))
    many = [b for seed in range(200) for b in poisson(200, 5, torch.Generator().manual_seed(seed))]
    sizes = np.array([len(batch) for batch in many])
    assert len(batches) == 5
    assert abs(sizes.mean() - 40) < 4 * math.sqrt(200 * 0.2 * 0.8 / len(many))
    assert sizes.var() == pytest.approx(200 * 0.2 * 0.8, rel=0.15)  # binomial: images come and go by themselves
    assert all(len(set(batch.tolist())) == len(batch) for batch in many)


@pytest.mark.parametrize("network", ["mlp", "convolved", "twice"])
def test_batches_of_no_image_are_steps_of_noise(digits: fm.data.Images, network: str) -> None:
    _, moved = stepped(digits.select(range(3)), fm.DPSGD(1.0), network, batch_size=1, augment=True)
    assert all(bool(value.isfinite().all()) for value in moved.values())


def by_hand(noise: float, rate: float, steps: int, delta: float) -> float:
    """Epsilon by the moments of the subsampled Gaussian at whole orders, as Abadi et al. have it (theorem 2)."""

    def log_moment(order: int) -> float:
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        return float(np.logaddexp.reduce(terms))

    return min((steps * log_moment(order) - math.log(delta)) / (order - 1) for order in range(2, 65))


@pytest.mark.parametrize(("noise", "epochs", "published"), [(4.0, 100, 1.26), (1.1, 60, 3.01)])
def test_the_account_is_that_of_the_literature_or_tighter(noise: float, epochs: int, published: float) -> None:
    """Abadi et al. (2016), section 3.2: 1.26 at q = .01; TensorFlow Privacy's tutorial: 3.01 with Rényi's accountant."""
    images, batch = (10_000, 100) if noise == 4.0 else (60_000, 256)
    spent = fm.DPSGD(noise).epsilon(images=images, batch_size=batch, epochs=epochs, delta=1e-5)
    known = by_hand(noise, 1 / math.ceil(images / batch), epochs * math.ceil(images / batch), 1e-5)
    assert known == pytest.approx(published, rel=0.01)
    assert 0.75 * known < spent <= known


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 4.0, 8.0])
def test_the_noise_for_an_epsilon_is_the_least_that_keeps_it(epsilon: float) -> None:
    terms = {"images": 500, "batch_size": 50, "epochs": 20, "delta": 1e-4}
    private = fm.DPSGD.for_epsilon(epsilon, **terms)
    assert 0.98 * epsilon < private.epsilon(**terms) <= epsilon


def test_rounds_add_up_as_one_training_of_as_many_epochs() -> None:
    task = ClientTask(rounds=4, local_epochs=3, dp_epsilon=2.0, dp_delta=1e-4)
    spent = [task.spent(300, rounds) for rounds in range(5)]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert 1.9 < spent[4] <= 2.0
    batch = task.recipe().batch_size
    noise = task.private(300)
    assert noise is not None
    assert spent[2] == noise.epsilon(images=300, batch_size=batch, epochs=6, delta=1e-4)


def test_no_noise_protects_nothing() -> None:
    assert fm.DPSGD(0.0).epsilon(images=100, batch_size=10, epochs=1, delta=1e-3) == math.inf
    assert fm.DPSGD(1000.0).epsilon(images=1, batch_size=1, epochs=1, delta=0.5) == 0  # and no noise more than all


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: fm.DPSGD(-1.0), "noise_multiplier is -1.0"),
        (lambda: fm.DPSGD(1.0, 0.0), "max_grad_norm is 0.0"),
        (lambda: fm.DPSGD.for_epsilon(0.0, images=100, batch_size=10, epochs=1, delta=1e-3), "epsilon is 0.0; expected"),
        (lambda: fm.DPSGD(1.0).epsilon(images=100, batch_size=10, epochs=1, delta=0.01), "below 1 / images = 0.01"),
        (
            lambda: fm.DPSGD.for_epsilon(1e-7, images=100, batch_size=10, epochs=1, delta=1e-3),
            "noise_multiplier above 1000 with 10 steps; allow a larger epsilon",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_promised_is_refused_in_a_line(make, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as refused:
        make()
    assert "\n" not in str(refused.value)


def test_batch_norm_is_refused_and_what_to_take_is_said() -> None:
    digits = fm.data.load("digits").train.select(range(8))
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10), torch.nn.BatchNorm1d(10))
    with pytest.raises(ParamsError, match=r"BatchNorm cannot support .* LayerNorm$"):
        fm.train(
            model, model.state_dict(), digits, recipe=RECIPE, epochs=1, generator=torch.Generator(),
            private=fm.DPSGD(1.0),
        )  # fmt: skip


@pytest.mark.parametrize("norm", [torch.nn.GroupNorm(4, 8), torch.nn.LayerNorm(8)])
def test_norms_within_an_image_train_in_private_and_are_aligned(norm: torch.nn.Module, digits: fm.data.Images) -> None:
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 8), norm, torch.nn.ReLU(), torch.nn.Linear(8, 10)
    )
    done = fm.train(
        model, model.state_dict(), digits, recipe=RECIPE, epochs=1, generator=torch.Generator(), private=fm.DPSGD(1.0)
    )
    spec = fm.perm_spec(model, digits.normalise(digits.images[:2]))
    moved = fm.permute(done.params, spec.random(torch.Generator().manual_seed(0)), spec=spec)
    assert any(not torch.equal(moved[name], value) for name, value in done.params.items())
    before, after = (fm.predict(model, params, digits) for params in (done.params, moved))
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-4)
