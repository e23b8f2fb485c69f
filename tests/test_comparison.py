"""Distances, agreement and planes against SciPy and against single evaluations."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine, jensenshannon

import fedmerge as fm
from fedmerge.data import Images
from fedmerge.errors import ConfigError, ParamsError


@pytest.fixture(scope="module")
def three():
    models = [fm.models.build("mlp", classes=10, in_shape=(1, 8, 8), seed=seed, width=8) for seed in range(3)]
    return models[0], *(dict(model.state_dict()) for model in models)


def flat(params) -> np.ndarray:
    return torch.cat([t.double().flatten() for t in params.values()]).numpy()


def test_distances_are_those_of_the_flattened_networks(three) -> None:
    model, a, b, _ = three
    found = fm.distance(a, b)
    assert found.l2 == pytest.approx(np.linalg.norm(flat(a) - flat(b)))
    assert found.cosine == pytest.approx(1 - cosine(flat(a), flat(b)))
    assert sum(d**2 for d in found.by_tensor.values()) == pytest.approx(found.l2**2)
    spec = fm.perm_spec(model, torch.zeros(1, 1, 8, 8))
    both = spec.random(torch.Generator().manual_seed(0))
    assert fm.distance(fm.permute(a, both, spec=spec), fm.permute(b, both, spec=spec)).l2 == pytest.approx(found.l2)
    aligned = fm.permute(b, fm.align(b, to=a, spec=spec).perms, spec=spec)
    assert fm.distance(a, aligned).l2 < found.l2


def test_statistics_of_norms_are_no_distance() -> None:
    norm = torch.nn.BatchNorm1d(3).state_dict()
    assert fm.distance(norm, {**norm, "running_mean": torch.ones(3)}).l2 == 0
    with pytest.raises(ParamsError, match="no floating-point weights"):
        fm.distance({"n": torch.ones(2, dtype=torch.int64)}, {"n": torch.ones(2, dtype=torch.int64)})


class Tied(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.one, self.two = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.two(torch.relu(self.one(x.flatten(1))))[:, :10]
        return scores


def test_a_tied_tensor_counts_once(digits: Images) -> None:
    models = [Tied(seed) for seed in range(3)]
    a, b, c = ({name: t.clone() for name, t in model.state_dict().items()} for model in models)
    once = {name: torch.nn.Parameter.detach(t) for name, t in models[1].named_parameters()}
    found = fm.distance(a, b, model=models[0])
    assert found.l2 == pytest.approx(np.linalg.norm(flat({n: a[n] for n in once}) - flat(once)))
    assert set(found.by_tensor) == {"one.weight", "one.bias", "two.bias"}
    assert fm.distance(a, b).l2 > found.l2 * 1.2
    plane = fm.plane(models[0], a, b, c, digits.select(range(20)), points=2, margin=0)
    assert plane.corners[1, 0] == pytest.approx(found.l2)


def test_agreement_is_that_of_the_predictions(three, digits: Images) -> None:
    model, a, b, _ = three
    part = digits.select(range(300))
    found = fm.agreement(model, a, b, part)
    p, q = (fm.predict(model, params, part).double().softmax(1).numpy() for params in (a, b))
    first, second, labels = p.argmax(1), q.argmax(1), part.labels.numpy()
    assert found.same == pytest.approx(np.mean(first == second))
    assert found.both_right == pytest.approx(np.mean((first == labels) & (second == labels)))
    assert found.both_wrong == pytest.approx(np.mean((first != labels) & (second != labels)))
    assert found.same_error == pytest.approx(np.mean((first == second) & (first != labels)))
    assert found.divergence == pytest.approx(np.mean(jensenshannon(p, q, axis=1) ** 2), rel=1e-6)


def test_the_plane_holds_its_three_networks(three, digits: Images) -> None:
    model, a, b, c = three
    part = digits.select(range(100))
    u, v = flat(b) - flat(a), flat(c) - flat(a)
    right_angle = v - u * (v @ u) / (u @ u)  # the third network straight above the first
    sizes = [t.numel() for t in a.values()]
    steps = torch.split(torch.as_tensor(right_angle), sizes)
    above = {n: (t.double() + s.view_as(t)).float() for (n, t), s in zip(a.items(), steps, strict=True)}
    found = fm.plane(model, a, b, above, part, points=3, margin=0)
    for (i, j), params in {(0, 0): a, (0, 2): b, (2, 0): above}.items():
        assert found.losses[i, j] == pytest.approx(fm.evaluate(model, params, part).loss, rel=1e-5)
    assert found.losses[0, 1] == pytest.approx(fm.evaluate(model, fm.average([a, b]), part).loss, rel=1e-5)
    assert found.xs[-1] == pytest.approx(fm.distance(a, b).l2)
    assert found.ys[-1] == pytest.approx(fm.distance(a, above).l2)
    wider = fm.plane(model, a, b, c, part, points=2, margin=0.5)
    assert wider.xs[0] < min(0, wider.corners[2, 0])
    assert wider.ys[1] > wider.corners[2, 1]


def test_no_plane_goes_through_a_line(three, digits: Images) -> None:
    model, a, b, _ = three
    with pytest.raises(ParamsError, match="lie on one line"):
        fm.plane(model, a, b, fm.average([a, b]), digits)
    with pytest.raises(ConfigError, match="points is 1"):
        fm.plane(model, a, b, a, digits, points=1)


def test_agreement_refuses_what_holds_nan_and_tells_an_overflow(three, digits: Images) -> None:
    model, a, b, _ = three
    part = digits.select(range(20))
    with pytest.raises(ParamsError, match="'out.bias' of model 1 holds 10 values that are NaN"):
        fm.agreement(model, a, {**b, "out.bias": torch.full((10,), float("nan"))}, part)
    too_large = {name: tensor * 1e30 for name, tensor in b.items()}
    assert np.isnan(fm.agreement(model, a, too_large, part).divergence)


class Normed(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.fc, self.norm, self.out = torch.nn.Linear(64, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 10)
        self.norm.running_var.fill_([9.0, 1.0, 4.0][seed])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.fc(x.flatten(1))).relu())


def test_statistics_of_norms_are_no_axis_of_a_plane_and_stay_variances_beyond_its_corners(digits: Images) -> None:
    part, models = digits.select(range(20)), [Normed(seed) for seed in range(3)]
    a, b, c = (dict(model.state_dict()) for model in models)
    found = fm.plane(models[0], a, b, c, part, points=3, margin=1.5)
    assert found.corners[1, 0] == pytest.approx(fm.distance(a, b).l2)
    assert np.hypot(*found.corners[2]) == pytest.approx(fm.distance(a, c).l2)
    assert np.isfinite(found.losses).all()
    with pytest.raises(ParamsError, match="lie on one line"):
        fm.plane(models[0], a, b, {**a, "norm.running_mean": torch.ones(5)}, part, points=2)
