"""Weights that are computed from other tensors: weight norm, spectral norm, orthogonal maps."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from traced import sizes, trace

import fedmerge as fm
from fedmerge.spec import perm_spec

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils:FutureWarning")
@pytest.mark.parametrize(
    "norm", [weight_norm, parametrizations.weight_norm, spectral_norm, parametrizations.spectral_norm]
)
def test_a_norm_moves_with_the_weight_that_it_divides(norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    layers = [norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), norm(nn.ConvTranspose2d(4, 5, 3)), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), norm(nn.Linear(5, 6)), nn.ReLU(), nn.Linear(6, 2))
    spec = trace(model, IMAGES)
    assert sizes(spec) == [4, 5, 6]
    assert spec.permutable_share() > 0.99
    estimates = [name for name in spec.axes if name not in spec.parameters and not name.startswith("0.")]
    assert all(spec.axes[name][0] for name in estimates)  # the vectors of a spectral norm
    state = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    moved = fm.permute(state, spec.random(torch.Generator().manual_seed(0)), spec=spec)
    found = fm.align(moved, to=state, spec=spec, method="weight-matching", rng=np.random.default_rng(0))
    torch.testing.assert_close(fm.permute(moved, found.perms, spec=spec), state)


@pytest.mark.parametrize("way", ["matrix_exp", "cayley", "householder"])
def test_an_orthogonal_map_of_one_triangle_stays(way: str) -> None:
    layer = parametrizations.orthogonal(nn.Linear(6, 4), orthogonal_map=way)
    spec = perm_spec(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), layer, nn.ReLU(), nn.Linear(4, 2)), torch.randn(2, 3))
    assert spec.groups == ()
    assert any("keeps one side of the diagonal" in f.reason for f in spec.frozen)


def test_a_buffer_that_meets_the_activations_is_a_constant() -> None:
    class Projection(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 5)
            self.register_buffer("direction", torch.randn(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.mv(self.a(x), self.direction)

    spec = perm_spec(Projection(), torch.randn(2, 8))
    assert spec.groups == ()
    assert any(f.name == "a.weight" and f.reason == "a constant of the network" for f in spec.frozen)
