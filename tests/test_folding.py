"""Folding of BatchNorm: the same function in eval mode, in float64, from a state dict of the same architecture."""

from collections.abc import Callable

import pytest
import torch
from pictures import pictures
from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from fedmerge import fold_norms, models, repair
from fedmerge.errors import SpecError


def randomised(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """A float64 state dict in which no statistic and no scale is trivial: some are negative, one a norm is 0."""
    generator = torch.Generator().manual_seed(seed)
    state = {k: v.double() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for part in ("weight", "bias", "running_mean", "running_var"):
                if f"{name}.{part}" in state:
                    drawn = torch.randn(module.num_features, generator=generator, dtype=torch.float64)
                    state[f"{name}.{part}"] = drawn.abs() + 0.1 if part == "running_var" else drawn
            if module.affine:
                state[f"{name}.weight"][0] = 0
    return state


def outputs(model: nn.Module, params: dict[str, Tensor], x: Tensor) -> Tensor:
    model = model.double().eval()
    model.load_state_dict(params)
    with torch.no_grad():
        return model(x)


def check(model: nn.Module, *shape: int):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = randomised(model)
    before = {k: v.clone() for k, v in state.items()}
    found = fold_norms(model, state, x.float())
    torch.testing.assert_close(state, before, rtol=0, atol=0)
    assert found.params.keys() == state.keys()
    assert all(found.params[k].dtype == v.dtype for k, v in state.items())
    expected = outputs(model, state, x)
    assert float((outputs(model, found.params, x) - expected).norm()) < 1e-12 * float(expected.norm())
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert sorted([*found.folded, *found.partly, *found.kept]) == sorted(norms)
    for name in (*found.folded, *found.partly):
        norm = model.get_submodule(name)
        torch.testing.assert_close(norm.running_var + norm.eps, torch.ones_like(norm.running_var))
    return found


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5), (3, 6, 6)),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same"), nn.BatchNorm2d(6, eps=1e-2), (4, 6, 6)),
        (nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), (3, 7)),
        (nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), (2, 3, 3, 3)),
        (nn.Linear(7, 5), nn.BatchNorm1d(5), (7,)),
    ],
)
def test_a_layer_with_bias_takes_all_of_its_norm(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    found = check(nn.Sequential(layer, norm, nn.ReLU()), *shape)
    assert found.folded == ("1",)
    torch.testing.assert_close(found.params["1.weight"], torch.ones_like(found.params["1.weight"]))
    for part in ("bias", "running_mean"):
        assert not found.params[f"1.{part}"].any()


def test_a_layer_without_bias_takes_the_scale_and_leaves_the_shift() -> None:
    found = check(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)), 3, 6, 6)
    assert found.partly == {"1": "the shift: the layer before it has no bias"}
    torch.testing.assert_close(found.params["1.weight"], torch.ones(5).double())
    assert found.params["1.bias"].all()
    bare = check(nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False)), 3, 6, 6)
    assert bare.partly.keys() == {"1"}
    assert bare.params["1.running_mean"].all()


@pytest.mark.parametrize("bias", [True, False])
def test_behind_max_pooling_only_the_sign_of_a_negative_scale_stays(bias: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.MaxPool2d(3, 2, padding=1), nn.Dropout(), nn.BatchNorm2d(8))
    found = check(model, 3, 8, 8)
    assert "the sign of some units: max pooling is in between" in found.partly["3"]
    assert set(found.params["3.weight"].tolist()) == {-1.0, 1.0}
    assert bool(found.params["3.bias"].any()) is not bias


@pytest.mark.parametrize(
    ("build", "whole"),
    [
        (lambda: models.build("resnet20", classes=10, in_shape=(3, 16, 16), width=0.25, seed=0), False),
        (lambda: models.build("hlb", classes=10, in_shape=(3, 16, 16), width=2, kernel_size=2, seed=0), False),
        (lambda: make_layers(cfgs["A"], batch_norm=True), True),
    ],
    ids=["resnet20", "hlb", "vgg11_bn"],
)
def test_every_norm_of_a_known_network_is_folded(build: Callable[[], nn.Module], whole: bool) -> None:
    found = check(build(), 3, 32 if whole else 16, 32 if whole else 16)
    assert not found.kept
    assert bool(found.partly) is not whole


class Odd(nn.Module):
    """One obstacle an output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.rows = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(4, 4)
        self.first, self.both, self.again = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.batch, self.length = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm1d(12)
        self.tied, self.twin, self.behind = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.twin.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(torch.relu(x))
        y = self.conv(x)
        x = self.both(y) + y
        x = self.again(self.shared(x)) + self.shared(-x)
        x = self.batch(self.shared(x))
        x = self.behind(self.tied(x)) + self.twin(x)
        return self.length(self.rows(x.flatten(1, 2)))


def test_what_cannot_be_folded_is_kept_and_named() -> None:
    found = check(Odd(), 3, 4, 4)
    assert not found.folded
    assert not found.partly
    assert {name: reason.split(",")[0] for name, reason in found.kept.items()} == {
        "first": "no linear or convolution layer is right before it",
        "both": "others read the output of the layer before it too",
        "again": "its tensors",
        "batch": "it normalises by the batch",
        "behind": "its tensors",
        "length": "it does not normalise the units of the layer before it",
    }


def test_repair_folds_where_asked() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4))
    data = pictures()
    sources = [model.state_dict(), {k: v * 2 for k, v in model.state_dict().items()}]
    for method in ("none", "recompute", "repair", "repair-closed-form"):
        plain = repair(model, sources[0], data=data, method=method, sources=sources)
        folded = repair(model, sources[0], data=data, method=method, sources=sources, fold=True)
        x = data.normalise(data.images)
        with torch.no_grad():
            model.eval().load_state_dict(plain)
            expected = model(x)
            model.load_state_dict(folded)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(folded["1.weight"], torch.ones(5))


def test_a_network_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(SpecError, match="Sequential cannot be traced with an example input of shape"):
        fold_norms(nn.Sequential(nn.Linear(3, 2)), {}, torch.zeros(1, 5))
