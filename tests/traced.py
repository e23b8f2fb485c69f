"""What the tests of tracing share: networks of a few layers and a function that joins them, traced and run permuted."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.spec import PermSpec, perm_spec, permute
from fedmerge.spec.lifted import Lifted


def relative_error(model: nn.Module, spec: PermSpec, x: Tensor, seed: int = 0) -> float:
    """Distance of the outputs before and after a random permutation of all groups, in float64."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(seed)
    state = {
        k: v * (0.5 + torch.rand(v.shape, generator=generator)) + 0.05 if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    moved = permute(state, spec.random(generator), spec=spec)
    x = x.double() if x.is_floating_point() else x
    with Lifted():  # also what the network makes inside
        a = torch.func.functional_call(model, state, (x,))
        b = torch.func.functional_call(model, moved, (x,))
    return float((a - b).norm() / a.norm())


def trace(model: nn.Module, x: Tensor) -> PermSpec:
    """The spec of ``model``, whose handlers must be right before the proof has to correct them."""
    torch.manual_seed(0)
    spec = perm_spec(model, x)
    assert not any("changed the output" in f.reason for f in spec.frozen), str(spec)
    assert relative_error(model, spec, x) < 1e-10, str(spec)
    return spec


class Net(nn.Module):
    """Layers by name, and the function that joins them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.join = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.join(self, x)
        return result


def sizes(spec: PermSpec) -> list[int]:
    return sorted(spec.sizes().values())
