"""Fisher, RegMean, soups, task vectors and distillation against independent calculations."""

import numpy as np
import pytest
import torch
from nets import mlp, noise
from pictures import SHAPE, network, pictures
from torch import nn

from fedmerge import average, evaluate, merge, perm_spec, predict
from fedmerge.errors import ConfigError
from fedmerge.merge import ensemble
from fedmerge.merge._fisher import fisher_information
from fedmerge.merge._grams import gram_blocks


def pair(name: str = "mlp"):
    model = network(name)
    return model, perm_spec(model, torch.randn(2, *SHAPE)), network(name, 1).state_dict(), network(name, 2).state_dict()


def test_fisher_information_is_the_mean_squared_gradient_over_what_the_model_predicts() -> None:
    model, _, a, _ = pair()
    data = pictures(7)
    found = fisher_information(model, a, data)
    model.load_state_dict(a)
    model.eval()
    expected = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in model.named_parameters()}
    for image in data.normalise(data.images):
        logits = model(image[None])[0].log_softmax(0)
        for label, value in enumerate(logits):
            slopes = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
            for name, slope in zip(expected, slopes, strict=True):
                expected[name] += float(logits[label].detach().exp()) * slope.double() ** 2 / len(data)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("floor", [0.1, 0.0])
def test_fisher_merging_weighs_each_parameter_by_information_and_weight(floor: float) -> None:
    model, spec, a, b = pair()
    data = pictures(7)
    found = merge(
        [a, b], spec=spec, method="fisher", order="average", weights=[1, 3], model=model, data=data,
        floor=floor, normalise=False,
    )  # fmt: skip
    fa, fb = (fisher_information(model, m, data) for m in (a, b))
    epsilon = floor * torch.cat([f.flatten() for m in (fa, fb) for f in m.values()]).mean()
    mean = average([a, b], [1, 3])
    for name in fa:
        x, y = fa[name] + epsilon, 3 * (fb[name] + epsilon)
        expected = torch.where(x + y > 0, (x * a[name] + y * b[name]) / (x + y), mean[name].double())
        torch.testing.assert_close(found.params[name].double(), expected, rtol=1e-5, atol=1e-6)
    flat = merge([a, b], spec=spec, method="fisher", order="average", model=model, data=data, floor=1e9)
    torch.testing.assert_close(flat.params, average([a, b]), rtol=1e-5, atol=1e-6)


def test_regmean_solves_the_regression_onto_the_models_own_outputs() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    data = pictures(100)
    a, b = noise(model.state_dict(), 1), noise(model.state_dict(), 2)
    found = merge(
        [a, b], spec=spec, method="regmean", order="average", weights=[1, 3], model=model, data=data, scale=1.0
    )
    # One layer and the same inputs: its regression is the weighted mean, exactly.
    torch.testing.assert_close(found.params, average([a, b], [1, 3]), rtol=1e-4, atol=1e-5)


def test_regmean_of_a_second_layer_is_the_least_squares_solution() -> None:
    model, spec, a, b = pair()
    data = pictures(200)
    found = merge(
        [a, b], spec=spec, method="regmean", order="average", weights=[1, 3], model=model, data=data, scale=1.0
    )
    last = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]
    rows, targets = [], []
    for share, params in ((0.25, a), (0.75, b)):
        model.load_state_dict(params)
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(last).register_forward_pre_hook(
            lambda _m, x, seen=seen: seen.append(x[0].detach())
        )
        with torch.no_grad():
            out = model(data.normalise(data.images))
        handle.remove()
        x = torch.cat([seen[0], torch.ones(len(out), 1)], 1).double()
        rows.append(share**0.5 * x)
        targets.append(share**0.5 * out.double())
    x, y = torch.cat(rows), torch.cat(targets)
    got = torch.cat([found.params[f"{last}.weight"], found.params[f"{last}.bias"][:, None]], 1).double().T
    best = torch.linalg.lstsq(x, y, driver="gelsd").solution
    assert float((x @ got - y).norm()) == pytest.approx(float((x @ best - y).norm()), rel=1e-5)
    plain = average([a, b], [1, 3])
    mean = torch.cat([plain[f"{last}.weight"], plain[f"{last}.bias"][:, None]], 1).double().T
    assert float((x @ mean - y).norm()) > 1.05 * float((x @ best - y).norm())


@pytest.mark.parametrize(("mode", "numpys"), [("reflect", "reflect"), ("replicate", "edge"), ("circular", "wrap")])
@pytest.mark.parametrize("kernel", [(2,), (3, 2), (2, 3, 2)])
def test_regmean_of_padded_convolutions_is_the_regression_onto_unfolded_inputs(
    kernel: tuple[int, ...], mode: str, numpys: str
) -> None:
    dims = len(kernel)
    reshape = (nn.Flatten(2), nn.Identity(), nn.Unflatten(1, (1, 3)))[dims - 1]
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def net(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        last = kind(3, 4, kernel, padding=1, padding_mode=mode)
        return nn.Sequential(reshape, kind(3 if dims < 3 else 1, 3, 1), nn.Tanh(), last)

    nets, data, shares = (net(1), net(2)), pictures(30), (0.25, 0.75)
    a, b = (n.state_dict() for n in nets)
    spec = perm_spec(net(0), torch.zeros(2, *SHAPE))
    given = {"model": net(0), "data": data, "order": "average", "weights": [1, 3], "scale": 1.0}
    found = merge([a, b], spec=spec, method="regmean", **given).params
    rows, targets = [], []
    for share, own in zip(shares, nets, strict=True):
        with torch.no_grad():
            seen = own[:-1](data.normalise(data.images)).double().numpy()
            out = own(data.normalise(data.images)).double().movedim(1, -1).reshape(-1, 4).numpy()
        padded = np.pad(seen, [(0, 0), (0, 0), *[(1, 1)] * dims], mode=numpys)
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, tuple(range(2, 2 + dims)))
        x = np.moveaxis(windows, 1, 1 + dims).reshape(len(out), -1)  # an output's channels, then its kernel
        rows.append(share**0.5 * np.hstack([x, np.ones((len(x), 1))]))
        targets.append(share**0.5 * out)
    expected = torch.from_numpy(np.linalg.lstsq(np.vstack(rows), np.vstack(targets), rcond=None)[0].T)
    got = torch.cat([found["3.weight"].flatten(1), found["3.bias"][:, None]], 1).double()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    mean = average([a, b], [1, 3])["3.weight"].flatten(1).double()
    assert float((expected[:, :-1] - mean).abs().max()) > 1e-2


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 0, 1), (1, 2, 2)])
def test_the_gram_matrix_of_a_convolution_is_that_of_its_patches(stride: int, padding: int, dilation: int) -> None:
    layer = nn.Conv2d(3, 4, 2, stride=stride, padding=padding, dilation=dilation)
    model = nn.Sequential(layer)
    data = pictures(6)
    (gram,) = gram_blocks(model, model.state_dict(), data)[0].gram
    # Any output of the layer is a quadratic form of it: the mean squared output of unit u is w G w.
    with torch.no_grad():
        out = model(data.normalise(data.images)).double()
    rows = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach().double()
    torch.testing.assert_close(
        torch.einsum("ud,de,ue->u", rows, gram, rows), out.square().sum((0, 2, 3)) / len(data), rtol=1e-4, atol=1e-6
    )


def test_regmean_and_ties_refuse_shares_outside_their_range() -> None:
    model, spec, a, b = pair()
    with pytest.raises(ConfigError, match=r"scale of regmean is 1.5; expected a number in \[0, 1\]"):
        merge([a, b], spec=spec, method="regmean", model=model, data=pictures(), scale=1.5)
    with pytest.raises(ConfigError, match=r"density of ties is 0; expected a share in \(0, 1\]"):
        merge([a, b], spec=spec, method="ties", base=a, density=0)


def test_task_arithmetic_moves_the_base_by_the_scaled_mean_step() -> None:
    net = mlp(3, 4, 2)
    spec = perm_spec(net, torch.randn(2, 3))
    base, a, b = (noise(net.state_dict(), s) for s in range(3))
    found = merge([a, b], spec=spec, method="task-arithmetic", base=base, weights=[1, 3], scale=2.0)
    expected = {k: base[k] + 2 * (0.25 * (a[k] - base[k]) + 0.75 * (b[k] - base[k])) for k in base}
    torch.testing.assert_close(found.params, expected)
    once = merge([a, b], spec=spec, method="task-arithmetic", base=base)
    torch.testing.assert_close(once.params, average([a, b]))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_task_arithmetic_of_rounded_models_is_rounded_once(kind: torch.dtype) -> None:
    net = mlp(3, 4, 2)
    spec = perm_spec(net, torch.randn(2, 3))
    base = {k: v.to(kind) for k, v in noise(net.state_dict(), 0).items()}
    models = [{k: (v + 0.05 * noise(base, s)[k]).to(kind) for k, v in base.items()} for s in range(1, 9)]
    found = merge(models, spec=spec, method="task-arithmetic", base=base, scale=8.0).params
    for name, origin in base.items():
        exact = origin.double() + sum(model[name].double() - origin.double() for model in models)
        assert torch.equal(found[name], exact.to(kind))


def test_ties_trims_elects_and_averages_as_written_out_by_hand() -> None:
    net = nn.Sequential(nn.Linear(3, 2, bias=False))
    spec = perm_spec(net, torch.randn(2, 3))
    base = {"0.weight": torch.ones(2, 3)}
    steps = np.array([[5.0, 1, -4, 0.1, 3, 0.2], [-2.0, 6, -1, 0.3, 2, 0.1], [4.0, -5, 0.5, 0.2, -3, 0.4]])
    models = [{"0.weight": base["0.weight"] + torch.tensor(s, dtype=torch.float32).reshape(2, 3)} for s in steps]
    # Half of 6 are kept: (5, ., -4, ., 3, .), (-2, 6, ., ., 2, .), (4, -5, ., ., -3, .); the signs of the sums are
    # + (7), + (1), - (-4), 0, + (2), 0; those that agree: (5, 4), (6), (-4), none, (3, 2), none.
    expected = np.array([4.5, 6, -4, 0, 2.5, 0]).reshape(2, 3)
    found = merge(models, spec=spec, method="ties", base=base, density=0.5, scale=0.5)
    np.testing.assert_allclose(found.params["0.weight"].numpy(), 1 + 0.5 * expected, rtol=1e-6)


def test_a_greedy_soup_is_never_less_accurate_than_the_best_of_its_models() -> None:
    model, spec, a, b = pair()
    data = pictures(200)
    models = [a, b, network("mlp", 3).state_dict()]
    scores = [evaluate(model, m, data).accuracy for m in models]
    for order in ("merge-many", "average"):
        found = merge(models, spec=spec, method="greedy-soup", order=order, model=model, data=data)
        assert evaluate(model, found.params, data).accuracy >= max(scores)
    alone = merge(models, spec=spec, method="greedy-soup", order="average", weights=[0, 1, 0], model=model, data=data)
    torch.testing.assert_close(alone.params, dict(b), rtol=0, atol=0)
    half = [{k: v.half() for k, v in a.items()}, b]
    found = merge(half, spec=spec, method="greedy-soup", order="average", weights=[1e-9, 1], model=model, data=data)
    assert {v.dtype for v in found.params.values()} == {torch.float16}


def test_an_ensemble_is_the_mean_of_probabilities() -> None:
    model, _, a, b = pair()
    data = pictures(9)
    expected = (predict(model, a, data).softmax(1) + predict(model, b, data).softmax(1)) / 2
    torch.testing.assert_close(ensemble(model, [a, b], data), expected)


def test_distillation_brings_the_merged_network_nearer_to_the_ensemble() -> None:
    model, spec, a, b = pair()
    data = pictures(200)
    target = ensemble(model, [a, b], data)

    def distance(params) -> float:
        return float(nn.functional.kl_div(predict(model, params, data).log_softmax(1), target, reduction="batchmean"))

    start = merge([a, b], spec=spec, method="merge-many")
    found = merge([a, b], spec=spec, method="ensemble-distillation", model=model, data=data, epochs=10)
    assert distance(found.params) < 0.7 * distance(start.params)
