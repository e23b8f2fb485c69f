import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import SelfTied
from pictures import SHAPE, network, pictures
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from fedmerge import PermSpec, align, models, perm_spec, permute
from fedmerge.align import activation_matching
from fedmerge.align._activation_matching import _Joint, _Moments
from fedmerge.errors import ConfigError, ParamsError, UnknownNameError
from fedmerge.models._layers import ChannelLayerNorm
from fedmerge.spec.axes import Factor

METRICS = ["inner-product", "l2", "correlation", "mutual-information"]


def spec_of(model: nn.Module) -> PermSpec:
    return perm_spec(model, torch.randn(2, *SHAPE))


def find(model: nn.Module, a, b, spec: PermSpec, **options):
    given = {"data": pictures(), **options}
    return activation_matching(b, to=a, spec=spec, rng=np.random.default_rng(0), model=model, **given)


class Pixels(nn.Module):
    """Linear layers over the channels of each pixel, seen twice a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 5)
        self.norm = nn.LayerNorm(5)
        self.again = nn.Linear(5, 5)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.mix(x.permute(0, 2, 3, 1))))
        for _ in range(2):
            x = x + torch.relu(self.again(x))
        return self.out(x.amax((1, 2)))


LAYERS = {
    "mlp": lambda: network("mlp"),
    "residual": lambda: network("residual"),
    "self-tied": lambda: SelfTied(5),
    "pixels": Pixels,
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Conv2d(5, 6, 3),
        ChannelLayerNorm(6),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(6, 3, 2),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(27, 4),
    ),
}


@functools.cache
def linear_net() -> tuple[nn.Module, PermSpec]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Linear(5, 2))
    return model, perm_spec(model, torch.randn(2, 1, 2, 3))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_inner_product_of_a_linear_layer_is_matched_as_well_as_by_brute_force(seed: int) -> None:
    model, spec = linear_net()
    data = pictures(20, seed, (1, 2, 3))
    generator = torch.Generator().manual_seed(seed)
    a, b = ({k: torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()} for _ in range(2))
    x = data.normalise(data.images).flatten(1)
    za, zb = ((x @ p["1.weight"].T + p["1.bias"]).double() for p in (a, b))
    found = find(model, a, b, spec, data=data, metric="inner-product")
    best = max(float((za * zb[:, list(p)]).sum()) for p in itertools.permutations(range(5)))
    assert float((za * zb[:, found.perms["1"]]).sum()) == pytest.approx(best, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", ["cnn", "resnet20-layernorm", "hlb"])
def test_planted_permutations_of_the_zoo_are_undone(name: str) -> None:
    data = pictures(16, 0, (3, 32, 32))
    model = models.build(name, classes=4, in_shape=(3, 32, 32), seed=0, width=4 if name == "hlb" else 0.3)
    spec = perm_spec(model, data.normalise(data.images[:2]))
    a = model.state_dict()
    planted = spec.random(torch.Generator().manual_seed(1))
    found = find(model, a, permute(a, planted, spec=spec), spec, data=data)
    assert all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in planted)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", list(LAYERS))
def test_planted_permutations_of_all_groups_are_undone(name: str, metric: str) -> None:
    torch.manual_seed(0)
    model = LAYERS[name]()
    spec = spec_of(model)
    a = model.state_dict()
    planted = spec.random(torch.Generator().manual_seed(1))
    found = find(model, a, permute(a, planted, spec=spec), spec, metric=metric)
    assert all(torch.equal(found.perms[g], torch.argsort(planted[g])) for g in planted)


@pytest.mark.parametrize("name", list(LAYERS))
def test_the_distance_and_the_inner_product_give_the_same_permutation(name: str) -> None:
    model = LAYERS[name]()
    spec = spec_of(model)
    a, b = model.state_dict(), LAYERS[name]().state_dict()
    one, two = (find(model, a, b, spec, metric=m).perms for m in ("inner-product", "l2"))
    assert all(torch.equal(one[g], two[g]) for g in one)


@pytest.mark.parametrize("metric", METRICS)
def test_the_size_of_the_batches_changes_nothing(metric: str) -> None:
    model = LAYERS["conv"]()
    spec = spec_of(model)
    a, b = model.state_dict(), LAYERS["conv"]().state_dict()
    one, two = (find(model, a, b, spec, metric=metric, batch_size=n).perms for n in (7, 40))
    assert all(torch.equal(one[g], two[g]) for g in one)


def test_statistics_of_batches_are_those_of_all_samples() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 4, 300)) * [[[1], [2], [0.1], [5]]] + 1000
    moments = _Moments(4, "cpu")
    for columns in np.split(np.arange(300), [1, 50, 250]):
        moments.add(torch.from_numpy(a[:, columns]), torch.from_numpy(b[:, columns]))
    np.testing.assert_allclose(moments.inner(), a @ b.T, rtol=1e-12)
    np.testing.assert_allclose(moments.l2(), -((a[:, None] - b[None]) ** 2).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(moments.correlation(), np.corrcoef(a, b)[:4, 4:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("bins", [2, 5])
def test_mutual_information_is_that_of_scikit_learn(bins: int) -> None:
    generator = np.random.default_rng(bins)
    a = generator.normal(size=(3, 400))
    b = np.stack([a[0] + generator.normal(size=400), -a[1], generator.normal(size=400)])
    moments = _Moments(3, "cpu")
    moments.add(torch.from_numpy(a), torch.from_numpy(b))
    joint = _Joint(moments, bins)
    for columns in np.split(np.arange(400), [100]):
        joint.add(torch.from_numpy(a[:, columns]), torch.from_numpy(b[:, columns]))
    edges = joint.edges.numpy()
    expected = [
        [mutual_info_score(np.digitize(x, ex), np.digitize(y, ey)) for y, ey in zip(b, edges[1], strict=True)]
        for x, ex in zip(a, edges[0], strict=True)
    ]
    np.testing.assert_allclose(joint.information(), expected, atol=1e-12)


def test_a_unit_is_not_matched_to_its_negative() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    spec = perm_spec(model, torch.randn(2, 1, 1, 2))
    a = {**model.state_dict(), "1.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    b = {**a, "1.weight": torch.tensor([[-1.0, 0.01], [0.01, -1.0]])}
    data = pictures(200, 0, (1, 1, 2))
    for metric in METRICS:
        assert find(model, a, b, spec, data=data, metric=metric).perms["1"].tolist() == [1, 0], metric


@pytest.mark.parametrize("metric", METRICS)
def test_dead_units_take_the_places_that_are_left(metric: str) -> None:
    model = network("one-layer")
    spec = spec_of(model)
    (group,) = spec.groups
    a = {k: v.clone() for k, v in model.state_dict().items()}
    for unit, bias in ((2, 0.0), (5, -3.0)):
        a["1.0.weight"][unit] = 0
        a["1.0.bias"][unit] = bias
    planted = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    found = find(model, a, permute(a, {group: planted}, spec=spec), spec, metric=metric).perms[group]
    back = planted[found]
    alive = [i for i in range(9) if i not in (2, 5)]
    assert back[alive].tolist() == alive
    moments = _Moments(1, "cpu")
    moments.add(torch.full((1, 9), 0.1), torch.randn(1, 9))
    assert float(moments.correlation()) == 0


def two_factor(left: Factor, right: Factor) -> tuple[nn.Module, PermSpec]:
    """A layer of six units, which are a product of two factors, by hand."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.Linear(6, 4))
    axis = ((left, right),)
    axes = {"1.weight": (axis, ()), "1.bias": (axis,), "2.weight": ((), axis), "2.bias": ((),)}
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    return model, PermSpec(axes, shapes, frozenset(axes))


def test_a_group_that_is_the_only_factor_of_its_axis_is_matched() -> None:
    for left, right, group in ((Factor("h", 3), Factor(None, 2), "h"), (Factor(None, 2), Factor("d", 3), "d")):
        model, spec = two_factor(left, right)
        a = model.state_dict()
        planted = {group: torch.tensor([2, 0, 1])}
        found = find(model, a, permute(a, planted, spec=spec), spec)
        assert found.perms[group].tolist() == [1, 2, 0]


def test_a_concatenated_output_is_cut_at_its_segments() -> None:
    model, spec = two_factor(Factor("x", 6), Factor(None, 1))
    axis = ((Factor("p", 2),), (Factor("q", 4),))
    axes = {"1.weight": (axis, ()), "1.bias": (axis,), "2.weight": ((), axis), "2.bias": ((),)}
    spec = PermSpec(axes, spec.shapes, spec.parameters)
    a = model.state_dict()
    planted = {"p": torch.tensor([1, 0]), "q": torch.tensor([3, 0, 1, 2])}
    found = find(model, a, permute(a, planted, spec=spec), spec)
    assert {g: p.tolist() for g, p in found.perms.items()} == {"p": [1, 0], "q": [1, 2, 3, 0]}


def test_two_groups_of_one_axis_are_matched_together() -> None:
    model, spec = two_factor(Factor("h", 2), Factor("d", 3))
    a = model.state_dict()
    planted = {"h": torch.tensor([1, 0]), "d": torch.tensor([2, 0, 1])}
    found = find(model, a, permute(a, planted, spec=spec), spec)
    assert {g: p.tolist() for g, p in found.perms.items()} == {"h": [1, 0], "d": [1, 2, 0]}


def test_options_that_cannot_be_are_named() -> None:
    model = network("mlp")
    spec, state = spec_of(model), model.state_dict()
    with pytest.raises(UnknownNameError, match="unknown metric of activation matching 'corelation'.*'correlation'"):
        find(model, state, state, spec, metric="corelation")
    with pytest.raises(ConfigError, match="bins is 1 and batch_size 100; at least 2 and 1 are needed"):
        find(model, state, state, spec, bins=1)
    huge = {k: torch.full_like(v, 3e38) for k, v in state.items()}
    with pytest.raises(ParamsError, match="activations of group .* on pictures are not finite; leave that model out"):
        find(model, state, huge, spec)


def test_correlation_is_the_default() -> None:
    model = network("mlp")
    spec = spec_of(model)
    a, b = model.state_dict(), network("mlp", 3).state_dict()
    named = find(model, a, b, spec, metric="correlation")
    found = align(b, to=a, spec=spec, method="activation-matching", model=model, data=pictures())
    assert all(torch.equal(named.perms[g], found.perms[g]) for g in named.perms)
