"""Small networks for the images of the tests with groups that wait for each other: heads, and units within a head."""

import functools

import torch
import torch.nn.functional as F
from nets import noise
from torch import Tensor, nn

from fedmerge import PermSpec, perm_spec


class Layer(nn.Module):
    """``nn.TransformerEncoderLayer`` on patches: queries, keys and values are packed in one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 2, stride=2)
        self.place = nn.Parameter(0.3 * torch.randn(1, 4, 12))
        self.layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True, dropout=0.0)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.out(self.layer(x).mean(1))


class Functional(Layer):
    """The same by ``F.multi_head_attention_forward`` and raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer
        self.packed, self.bias = nn.Parameter(0.3 * torch.randn(36, 12)), nn.Parameter(torch.randn(36))
        self.back, self.shift = nn.Parameter(0.3 * torch.randn(12, 12)), nn.Parameter(torch.randn(12))
        self.up, self.down = nn.Parameter(torch.randn(12, 10)), nn.Parameter(torch.randn(10, 12))

    def layer_(self, x: Tensor) -> Tensor:
        """Attention and a hidden layer, each added to the stream."""
        t = x.transpose(0, 1)
        y, _ = F.multi_head_attention_forward(
            t, t, t, 12, 3, self.packed, self.bias, None, None, False, 0.0, self.back, self.shift, training=False,
            need_weights=False,
        )  # fmt: skip
        x = x + y.transpose(0, 1)
        return x + F.gelu(x @ self.up) @ self.down

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.out(self.layer_(x).mean(1))


class Separate(Layer):
    """Written by hand: three linear maps, heads cut by ``view``, a norm before, scores by ``matmul``."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer
        self.norm = nn.LayerNorm(12)
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def heads(self, x: Tensor) -> Tensor:
        """(N, heads, positions, units within)."""
        return x.view(*x.shape[:2], 3, 4).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        y = self.norm(x)
        q, k, v = self.heads(self.q(y)), self.heads(self.k(y)), self.heads(self.v(y))
        y = (q @ k.transpose(-1, -2) / 2).softmax(-1) @ v
        return self.out((x + self.o(y.transpose(1, 2).flatten(2))).mean(1))


class Lettered(Layer):
    """Attention by ``einsum``: heads, and units within, have axes of their own in every weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.layer
        self.packed, self.back = nn.Parameter(torch.randn(3, 3, 12, 4)), nn.Parameter(torch.randn(3, 4, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = (torch.einsum("nlc,hcd->nhld", x, w) for w in self.packed)
        scores = (torch.einsum("nhld,nhmd->nhlm", q, k) / 2).softmax(-1)
        return self.out((x + torch.einsum("nhlm,nhmd,hdc->nlc", scores, v, self.back)).mean(1))


class Squeezed(nn.Module):
    """A grouped convolution between two others, its channels weighed by squeeze and excitation (as in RegNet Y)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 5, 1), nn.Conv2d(5, 12, 1)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.grouped(F.relu(self.stem(x)))), inplace=True)
        x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.out(x.mean((2, 3)))


class InAWeight(nn.Module):
    """The units of ``down`` show in no activation: two weights are multiplied before any image meets them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(5, 48)), nn.Parameter(torch.randn(6, 5))
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(x.flatten(1) @ (self.up @ self.down).T))


NETWORKS = {
    "layer": Layer, "functional": Functional, "separate": Separate, "lettered": Lettered, "squeezed": Squeezed,
}  # fmt: skip


@functools.cache
def spec_of(name: str) -> PermSpec:
    return perm_spec(NETWORKS[name](), torch.randn(2, 3, 4, 4))


def planted(name: str, seed: int = 0) -> tuple[nn.Module, PermSpec, dict[str, Tensor], dict[str, Tensor]]:
    """A network, its symmetries, a state dict without symmetric weights, and an order of all groups."""
    spec = spec_of(name)
    torch.manual_seed(seed)
    model = NETWORKS[name]().eval()
    state = model.state_dict()
    extra = noise(state, seed + 1, 0.2)
    state = {k: v + extra[k].abs() if v.is_floating_point() else v for k, v in state.items()}
    return model, spec, state, spec.random(torch.Generator().manual_seed(seed))
