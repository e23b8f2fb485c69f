"""Alignment and merging of networks whose weights are no plain layers: a planted order is found and averaged away."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import noise
from pictures import SHAPE, pictures
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fedmerge import align, merge, perm_spec, permute, repair
from fedmerge.merge._fisher import fisher_information


class Net(nn.Module):
    """From 48 numbers to four, by a function of them and of named weights."""

    def __init__(self, join: Callable[[Any, Tensor], Tensor], **weights: nn.Module) -> None:
        super().__init__()
        self.join = join
        for name, weight in weights.items():
            setattr(self, name, weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x.flatten(1))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 3)


def products() -> nn.Module:
    """Contractions in the forms that no layer uses."""

    def join(m: Any, x: Tensor) -> Tensor:
        h = torch.relu(torch.inner(x, m.inner))
        h = torch.relu(torch.tensordot(h, m.tensordot, ([1], [1])))
        h = torch.relu(torch.einsum("...i,...oi->...o", h, m.dots))
        h = torch.relu(torch.einsum("bi,io", h, m.implicit))
        h = torch.relu(torch.stack([torch.addmv(m.bias, m.addmv, v) for v in h.unbind(0)]))
        h = torch.relu(torch.addbmm(m.shift, h.unflatten(1, (2, 3)).transpose(0, 1), m.addbmm))
        h = torch.exp(-torch.cdist(h, m.centres))
        h = torch.relu((h[:, None] * m.written).sum(-1))
        return m.head(h)

    return Net(
        join, inner=weight(5, 48), tensordot=weight(7, 5), dots=weight(6, 7), implicit=weight(6, 5), bias=weight(6),
        addmv=weight(6, 5), addbmm=weight(2, 3, 7), shift=weight(7), centres=weight(5, 7), written=weight(6, 5),
        head=nn.Linear(6, 4),
    )  # fmt: skip


def recurrent(kind: type[nn.RNNBase], **options: Any) -> nn.Module:
    """Four rows of twelve numbers, read in order by two layers."""
    layers = kind(12, 5, num_layers=2, batch_first=True, **options)
    width = layers(torch.zeros(1, 1, 12))[0].shape[-1]
    return Net(lambda m, x: m.head(m.layers(x.view(-1, 4, 12))[0][:, -1]), layers=layers, head=nn.Linear(width, 4))


def normed() -> nn.Module:
    """Weights divided by their norms, transposed and in groups."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.ReLU(), parametrizations.spectral_norm(nn.Conv2d(4, 5, 1)),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), parametrizations.weight_norm(nn.Linear(5, 6), dim=1),
        nn.Tanh(), nn.Linear(6, 4),
    )  # fmt: skip


def bags() -> nn.Module:
    """Sums of embeddings."""

    def join(m: Any, x: Tensor) -> Tensor:
        return m.head(torch.relu(m.middle(m.bag((x[:, :9] * 3).long().abs() % 8))))

    return Net(join, bag=nn.EmbeddingBag(8, 6), middle=nn.Linear(6, 5), head=nn.Linear(5, 4))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "products": products, "lstm": lambda: recurrent(nn.LSTM), "gru": lambda: recurrent(nn.GRU),
    "normed": normed, "bags": bags,
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_a_planted_order_is_found_and_averaged_away(name: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS[name]().eval()
    x = torch.randn(6, *SHAPE)
    spec = perm_spec(model, x)
    state = model.state_dict()
    extra = noise(state, 1, 0.2)
    state = {k: v + extra[k].abs() if v.is_floating_point() else v for k, v in state.items()}
    copy = permute(state, spec.random(torch.Generator().manual_seed(2)), spec=spec)
    data = pictures(6)

    def output(params: dict[str, Tensor]) -> Tensor:
        model.load_state_dict(params)
        with torch.no_grad():
            return model(x)

    expected = output(state)
    most = sum(float(state[k].double().square().sum()) for k in spec.parameters)
    for method in ("weight-matching", "activation-matching", "optimal-transport"):
        given = {"model": model, "data": data} if method == "activation-matching" else {}
        found = align(copy, to=state, spec=spec, method=method, **given)
        assert getattr(found, "left", ()) == ()
        assert found.objective == pytest.approx(most, rel=1e-5)
    for method in ("merge-many", "ot-fusion", "layer-wise"):
        merged = merge([state, copy], spec=spec, method=method).params
        torch.testing.assert_close(output(merged), expected, rtol=1e-3, atol=1e-4)
    closed = repair(model, merged, data=data, method="repair-closed-form", sources=[state, state])
    torch.testing.assert_close(output(closed), expected, rtol=1e-3, atol=1e-4)


def test_every_contraction_reads_what_it_sums_over() -> None:
    spec = perm_spec(products(), torch.randn(6, *SHAPE))
    expected = {
        "inner": {1}, "tensordot": {1}, "dots": {1}, "implicit": {0}, "bias": set(), "addmv": {1}, "addbmm": {0, 1},
        "shift": set(), "centres": {1}, "written": {1}, "head.weight": {1}, "head.bias": set(),
    }  # fmt: skip
    assert {name: set(axes) for name, axes in spec.reads.items()} == expected


def test_fisher_information_of_a_recurrent_network_is_that_of_each_image() -> None:
    torch.manual_seed(0)
    model, data = recurrent(nn.GRU).eval(), pictures(3)
    found = fisher_information(model, model.state_dict(), data)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for image in data.normalise(data.images):
        chance = model(image[None]).softmax(1)[0]
        for label in range(4):
            model.zero_grad()
            model(image[None]).log_softmax(1)[0, label].backward()
            for name, p in model.named_parameters():
                expected[name] += chance[label].detach() * p.grad.square() / 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value, rtol=1e-4, atol=1e-7)


def test_repair_leaves_a_projection_that_attention_takes_without_calling_it() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 8, batch_first=True, dropout=0.0)
    model = Net(lambda m, x: m.head(m.layer(x.view(-1, 4, 12)).mean(1)), layer=layer, head=nn.Linear(12, 4)).eval()
    a = model.state_dict()
    b = {name: tensor + extra for (name, tensor), extra in zip(a.items(), noise(a, 1, 0.1).values(), strict=True)}
    mean = {name: (a[name] + b[name]) / 2 for name in a}
    found = repair(model, mean, data=pictures(8), method="repair", sources=[a, b])
    assert torch.equal(found["layer.self_attn.out_proj.weight"], mean["layer.self_attn.out_proj.weight"])
    assert not torch.equal(found["layer.linear1.weight"], mean["layer.linear1.weight"])
