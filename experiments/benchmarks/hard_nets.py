"""Small networks of many families, written as their authors write them: what :mod:`hard_networks` traces."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrizations

_WORDS, _STEPS = 29, 7
Built = tuple[nn.Module, Tensor]


class Net(nn.Module):
    """Layers by name, and the function that joins them."""

    def __init__(self, join: Callable[..., Tensor], /, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.join = join
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """What the layers make of ``x``."""
        result: Tensor = self.join(self, x)
        return result


def words() -> Tensor:
    """Two sentences."""
    return torch.arange(2 * _STEPS).reshape(2, _STEPS) % _WORDS


def images(channels: int = 3, pixels: int = 16) -> Tensor:
    """Two images."""
    return torch.randn(2, channels, pixels, pixels, generator=torch.Generator().manual_seed(0))


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight is (in, out)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.1)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """What the layers make of ``x``."""
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class RMSNorm(nn.Module):
    """The norm of T5 and Llama, which computes in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """What the layers make of ``x``."""
        h = x.to(torch.float32)
        return self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def heads(x: Tensor, n: int) -> Tensor:
    """(batch, words, n d) as (batch, n, words, d)."""
    return x.view(*x.shape[:-1], n, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """The inverse of :func:`heads`."""
    return x.transpose(1, 2).flatten(2)


def gpt2(d: int = 16, n: int = 4) -> Built:
    """Transposed layers, packed attention, a head tied to the words."""

    def block(m: Any, x: Tensor) -> Any:
        q, k, v = (heads(t, n) for t in m.attention(m.before(x)).split(d, dim=2))
        x = x + m.project(joined(F.scaled_dot_product_attention(q, k, v, is_causal=True)))
        return x + m.down(F.gelu(m.up(m.after(x)), approximate="tanh"))

    def forward(m: Any, x: Tensor) -> Any:
        h = m.words(x) + m.places(torch.arange(x.shape[1]))
        for layer in m.blocks:
            h = layer(h)
        return F.linear(m.norm(h), m.words.weight)

    blocks = [
        Net(block, before=nn.LayerNorm(d), attention=Conv1D(d, 3 * d), project=Conv1D(d, d), after=nn.LayerNorm(d),
            up=Conv1D(d, 4 * d), down=Conv1D(4 * d, d)) for _ in range(2)
    ]  # fmt: skip
    tables = {"words": nn.Embedding(_WORDS, d), "places": nn.Embedding(_STEPS, d)}
    return Net(forward, **tables, blocks=nn.ModuleList(blocks), norm=nn.LayerNorm(d)), words()


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def llama(d: int = 16, n: int = 4, shared: int = 2) -> Built:
    """Rotated queries and keys of which several queries share one, gated units."""

    def block(m: Any, x: Tensor) -> Any:
        h = m.before(x)
        q, k, v = heads(m.q(h), n), heads(m.k(h), n // shared), heads(m.v(h), n // shared)
        y = F.scaled_dot_product_attention(_rotated(q), _rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + m.o(joined(y))
        h = m.after(x)
        return x + m.down(F.silu(m.gate(h)) * m.up(h))

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=False)

    blocks = [
        Net(block, before=RMSNorm(d), q=linear(d, d), k=linear(d, d // shared), v=linear(d, d // shared),
            o=linear(d, d), after=RMSNorm(d), gate=linear(d, 24), up=linear(d, 24), down=linear(24, d))
        for _ in range(2)
    ]  # fmt: skip
    return nn.Sequential(nn.Embedding(_WORDS, d), *blocks, RMSNorm(d), linear(d, _WORDS)), words()


def t5(d: int = 16, n: int = 4) -> Built:
    """A bias for every distance between words, a softmax in float32."""

    def block(m: Any, x: Tensor) -> Any:
        h = m.before(x)
        far = (torch.arange(_STEPS)[None] - torch.arange(_STEPS)[:, None]).clamp(-3, 3) + 3
        scores = heads(m.q(h), n) @ heads(m.k(h), n).mT + m.bias(far).permute(2, 0, 1)[None]
        x = x + m.o(joined(F.softmax(scores.float(), dim=-1).type_as(scores) @ heads(m.v(h), n)))
        h = m.after(x)
        return x + m.down(F.gelu(m.gate(h)) * m.up(h))

    layers = {name: nn.Linear(d, d, bias=False) for name in "qkvo"}
    layers |= {"gate": nn.Linear(d, 24), "up": nn.Linear(d, 24), "down": nn.Linear(24, d)}
    net = Net(block, before=RMSNorm(d), after=RMSNorm(d), bias=nn.Embedding(7, n), **layers)
    return nn.Sequential(nn.Embedding(_WORDS, d), net, RMSNorm(d), nn.Linear(d, 3)), words()


def normed_cnn(norm: Callable[[nn.Module], nn.Module]) -> Built:
    """A convolutional network whose weights are divided by their norm."""
    layers = [norm(nn.Conv2d(3, 8, 3)), nn.ReLU(), norm(nn.Conv2d(8, 12, 3, 2)), nn.ReLU(), nn.Conv2d(12, 16, 3)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), norm(nn.Linear(16, 3))), images()


def recurrent(kind: Callable[..., nn.Module], **options: Any) -> Built:
    """A classifier of sentences by its last state."""

    def forward(m: Any, x: Tensor) -> Any:
        y = m.layers(m.words(x))[0]
        return m.head(y[:, -1])

    layers = kind(12, 10, num_layers=2, batch_first=True, **options)
    width = layers(torch.zeros(1, 1, 12))[0].shape[-1]
    return Net(forward, words=nn.Embedding(_WORDS, 12), layers=layers, head=nn.Linear(width, 3)), words()


def densenet() -> Built:
    """Concatenation of everything before."""
    return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=3), images(pixels=32)


def swin() -> Built:
    """Attention in windows that shift."""
    kind = torchvision.models.swin_transformer.SwinTransformer
    return kind([2, 2], 12, [2, 2], [2, 3], [4, 4], num_classes=3), images(pixels=32)


def mamba(d: int = 12, inner: int = 16, states: int = 5, rank: int = 3) -> Built:
    """A selective scan, step by step."""

    def block(m: Any, x: Tensor) -> Any:
        u, gate = m.into(m.norm(x)).chunk(2, -1)
        u = F.silu(m.conv(u.mT)[..., : x.shape[1]].mT)
        step, b, c = m.choose(u).split([rank, states, states], -1)
        step = F.softplus(m.step(step))
        decay, drive = torch.exp(step[..., None] * -m.logs.exp()), (step * u)[..., None] * b[:, :, None]
        h, y = torch.zeros(x.shape[0], inner, states), []
        for t in range(x.shape[1]):
            h = decay[:, t] * h + drive[:, t]
            y.append(torch.einsum("...dn,...n->...d", h, c[:, t]))
        return x + m.out((torch.stack(y, 1) + u * m.skip) * F.silu(gate))

    net = Net(
        block, norm=RMSNorm(d), into=nn.Linear(d, 2 * inner), conv=nn.Conv1d(inner, inner, 3, groups=inner, padding=2),
        choose=nn.Linear(inner, rank + 2 * states), step=nn.Linear(rank, inner), skip=nn.Parameter(torch.ones(inner)),
        logs=nn.Parameter(torch.rand(inner, states)), out=nn.Linear(inner, d),
    )  # fmt: skip
    return nn.Sequential(nn.Embedding(_WORDS, d), net, nn.Linear(d, 3)), words()


def unet() -> Built:
    """Three ways up: bilinear, transposed, pixels from channels."""

    def forward(m: Any, x: Tensor) -> Any:
        a = m.a(x).relu()
        b = m.b(F.max_pool2d(a, 2)).relu()
        c = F.interpolate(m.c(F.max_pool2d(b, 2)).relu(), scale_factor=2, mode="bilinear")
        d = F.pixel_shuffle(m.d(torch.cat([c, b], 1)), 2)
        return m.head(torch.cat([d, m.up(b), a], 1).relu())

    def conv(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs))

    net = Net(forward, a=conv(3, 6), b=conv(6, 8), c=conv(8, 10), d=conv(18, 20), up=nn.ConvTranspose2d(8, 4, 2, 2),
              head=nn.Conv2d(15, 2, 1))  # fmt: skip
    return net, images()


def lora() -> Built:
    """Adapters of low rank on frozen weights."""

    def linear(m: Any, x: Tensor) -> Any:
        return F.linear(x, m.weight + 2.0 * (m.b @ m.a), m.bias)

    def adapted(inputs: int, outputs: int) -> Net:
        return Net(
            linear, weight=nn.Parameter(torch.randn(outputs, inputs)), bias=nn.Parameter(torch.zeros(outputs)),
            a=nn.Parameter(torch.randn(3, inputs)), b=nn.Parameter(torch.zeros(outputs, 3)),
        )  # fmt: skip

    return nn.Sequential(adapted(8, 16), nn.GELU(), adapted(16, 12), nn.GELU(), nn.Linear(12, 3)), torch.randn(2, 8)


def experts(d: int = 12, n: int = 3) -> Built:
    """Each word goes to two of three experts."""

    def layer(m: Any, x: Tensor) -> Any:
        h = x.flatten(0, 1)
        weights, chosen = m.router(h).softmax(-1).topk(2, dim=-1)
        given = F.one_hot(chosen, n).permute(2, 1, 0)
        out = torch.zeros_like(h)
        for i, expert in enumerate(m.experts):
            which, rows = torch.where(given[i])
            out.index_add_(0, rows, expert(h[rows]) * weights[rows, which, None])
        return x + out.view_as(x)

    every = nn.ModuleList(nn.Sequential(nn.Linear(d, 20), nn.ReLU(), nn.Linear(20, d)) for _ in range(n))
    net = Net(layer, router=nn.Linear(d, n), experts=every)
    return nn.Sequential(nn.Embedding(_WORDS, d), net, nn.LayerNorm(d), nn.Linear(d, 3)), words()


def mixer(d: int = 12) -> Built:
    """Layers across positions and across channels in turn."""

    def block(m: Any, x: Tensor) -> Any:
        x = x + m.tokens(m.before(x).mT).mT
        return x + m.channels(m.after(x))

    def mlp(n: int) -> nn.Module:
        return nn.Sequential(nn.Linear(n, 2 * n), nn.GELU(), nn.Linear(2 * n, n))

    net = Net(block, before=nn.LayerNorm(d), tokens=mlp(16), after=nn.LayerNorm(d), channels=mlp(d))
    layers = {"patches": nn.Sequential(nn.Conv2d(3, d, 4, 4), nn.Flatten(2)), "block": net, "head": nn.Linear(d, 3)}
    return Net(lambda m, x: m.head(m.block(m.patches(x).mT).mean(1)), **layers), images()


def channel_attention() -> Built:
    """Gates of channels from their neighbours among the channels."""

    def forward(m: Any, x: Tensor) -> Any:
        h = m.stem(x).relu()
        h = h * m.mix(h.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]
        return m.head(m.last(h).relu().mean((2, 3)))

    layers = {"stem": nn.Conv2d(3, 12, 3), "mix": nn.Conv1d(1, 1, 3, padding=1), "last": nn.Conv2d(12, 12, 1)}
    return Net(forward, **layers, head=nn.Linear(12, 3)), images()


def orthogonal() -> Built:
    """An orthogonal layer, of the exponential of a triangle."""
    layers = [nn.Linear(8, 16), nn.Tanh(), parametrizations.orthogonal(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 3)]
    return nn.Sequential(*layers), torch.randn(2, 8)


NETWORKS: dict[str, Callable[[], Built]] = {
    "GPT-2": gpt2,
    "Llama, grouped queries": llama,
    "T5": t5,
    "CNN, weight norm": lambda: normed_cnn(parametrizations.weight_norm),
    "CNN, weight norm by hooks": lambda: normed_cnn(nn.utils.weight_norm),
    "CNN, spectral norm": lambda: normed_cnn(parametrizations.spectral_norm),
    "CNN, spectral norm by hooks": lambda: normed_cnn(nn.utils.spectral_norm),
    "LSTM": lambda: recurrent(nn.LSTM),
    "LSTM, both ways, projected": lambda: recurrent(nn.LSTM, bidirectional=True, proj_size=6),
    "GRU": lambda: recurrent(nn.GRU),
    "DenseNet": densenet,
    "Swin": swin,
    "Mamba": mamba,
    "U-Net": unet,
    "LoRA": lora,
    "mixture of experts": experts,
    "MLP-Mixer": mixer,
    "CNN, channels convolved": channel_attention,
    "MLP, orthogonal layer": orthogonal,
}
