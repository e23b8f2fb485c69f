"""Where units show while a network computes, and their values."""

import torch
import torch.nn.functional as F
from attention import planted
from nets import SelfTied
from pictures import SHAPE, network, pictures
from torch import Tensor, nn

from fedmerge import perm_spec
from fedmerge.align._activations import Activations, Observed
from fedmerge.align._views import Piece, View
from fedmerge.spec.axes import Factor


def shown(model: nn.Module) -> dict[tuple[str, ...], list[str]]:
    """Groups -> the operators that show them."""
    images = torch.randn(3, *SHAPE)
    views = Observed(model.eval(), perm_spec(model, images), images).views
    return {key: [view.node for view in found] for key, found in views.items()}


def test_units_are_seen_after_the_norm_and_once_for_each_layer_of_a_stream() -> None:
    assert list(shown(SelfTied(5)).values()) == [["batch_norm", "conv2d_1"]]
    assert sorted(shown(network("residual")).values()) == [
        ["linear", "linear_2", "linear_4"], ["linear_1"], ["linear_3"]
    ]  # fmt: skip


class ChannelsLast(nn.Module):
    """A norm of the channels between two moves of the axes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 5, 1), nn.LayerNorm(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out(F.relu(x).mean((2, 3)))


def test_a_move_of_axes_between_a_layer_and_its_norm_is_looked_through() -> None:
    assert shown(ChannelsLast()) == {("conv",): ["layer_norm"]}


class Scaled(nn.Module):
    """Units that no operator makes: a parameter meets the input by multiplication, and is summed over."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.randn(5)), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x.mean((1, 2, 3))[:, None] * self.scale))


def test_units_that_no_layer_makes_are_seen_where_they_first_show() -> None:
    assert shown(Scaled()) == {("scale",): ["mul"]}


class OverPositions(nn.Module):
    """A small network over a table of positions, whose output is added for every image (as in Swin V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", torch.randn(16, 2))
        self.hidden, self.back, self.out = nn.Linear(2, 5), nn.Linear(5, 3), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.back(torch.relu(self.hidden(self.table)))
        return self.out(x.flatten(2).transpose(1, 2) * bias).mean(1)


def test_units_that_no_image_reaches_are_seen_in_what_they_make_of_constants() -> None:
    assert shown(OverPositions()) == {("hidden",): ["linear"]}


def test_packed_projections_show_heads_and_units_within_as_products() -> None:
    model, spec, _, _ = planted("functional")
    images = torch.randn(3, *SHAPE)
    views = Observed(model, spec, images).views
    assert set(views) == {("back",), ("packed", "packed#1"), ("packed", "packed#2"), ("down",)}
    assert len(views["packed", "packed#1"]) == 2  # queries, and keys
    found: dict[View, Tensor] = {}
    Observed(model, spec, images).run(model, images, lambda view, out: found.setdefault(view, out))
    (values,) = views["packed", "packed#2"]
    units = values.units(found[values], spec.sizes())
    tokens = (model.patches(images).flatten(2).transpose(1, 2) + model.place).transpose(0, 1)  # (positions, N, 12)
    expected = (tokens @ model.packed[24:].T + model.bias[24:]).flatten(0, 1).T
    torch.testing.assert_close(units, expected.detach().double(), rtol=1e-4, atol=1e-5)


def test_a_view_of_another_width_counts_that_width() -> None:
    axis = (((Factor("g", 3), Factor(None, 2))), (Factor("h", 4),))
    out = torch.arange(2 * 14.0).reshape(2, 14)  # 5 units of g by 2, then 4 of h
    g, h = (View("layer", (Piece(1, axis, s),)) for s in range(2))
    sizes = {"g": 5, "h": 4}
    assert (g.key, h.key) == (("g",), ("h",))
    torch.testing.assert_close(g.units(out, sizes), out[:, :10].reshape(2, 5, 2).movedim(1, 0).flatten(1).double())
    torch.testing.assert_close(h.units(out, sizes), out[:, 10:].T.double())


def test_groups_on_two_axes_number_the_units_together() -> None:
    out = torch.randn(2, 6, 5, 4)  # images, (3 of a by 2 that stay), positions, 4 of b
    axes = (((Factor("a", 3), Factor(None, 2)),), ((Factor("b", 4),),))
    view = View("layer", (Piece(1, axes[0], 0), Piece(3, axes[1], 0)))
    assert view.key == ("a", "b")
    expected = out.reshape(2, 3, 2, 5, 4).permute(1, 4, 0, 2, 3).reshape(12, -1).double()
    torch.testing.assert_close(view.units(out, {"a": 3, "b": 4}), expected)


def test_only_one_batch_is_held_and_what_works_in_place_spoils_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)).eval()
    spec = perm_spec(model, torch.randn(2, *SHAPE))
    data = pictures(25)
    seen: list[tuple[Tensor, Tensor]] = []
    sizes = spec.sizes(), spec.sizes()
    looked = Activations((model, model), spec, data, batch_size=10, device="cpu", sizes=sizes)
    looked.stream(lambda _key, a, b: seen.append((a, b)))
    assert [a.shape for a, _ in seen] == [(5, 10), (5, 10), (5, 5)]
    expected = model[1](data.normalise(data.images).flatten(1)).T.double()
    for side in zip(*seen, strict=True):
        torch.testing.assert_close(torch.cat(side, 1), expected, rtol=1e-5, atol=1e-5)


def test_a_network_is_not_changed_by_being_observed() -> None:
    model = network("mlp").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    shown(model)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
