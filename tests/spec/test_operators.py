"""Each family of operators, on networks small enough to count their groups by hand."""

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced import Net, relative_error, sizes, trace

from fedmerge.spec import Factor, perm_spec


def pooled(*layers: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 2))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))
WORDS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def test_grouped_convolutions_in_a_row_share_their_groups() -> None:
    model = pooled(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 3, groups=3), nn.ReLU(), nn.Conv2d(9, 12, 3, groups=3), channels=12
    )
    spec = trace(model, IMAGES)
    assert spec.sizes() == {"0": 3, "0#1": 2, "1": 3, "3": 4}


def test_groups_of_different_number_keep_what_both_can_move() -> None:
    model = pooled(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1, groups=4), channels=8)
    spec = trace(model, IMAGES)
    # Between the two, 2 groups of 4 for one and 4 groups of 2 for the other: 2 x 2 x 2. The first 2 is shared
    # with the stem (2 x 4), and the first two with the end (2 x 2 x 2).
    assert sizes(spec) == [2, 2, 2, 2, 4]


def test_a_depthwise_convolution_with_a_multiplier_moves_channels_and_copies() -> None:
    model = pooled(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 12, 3, groups=4), nn.BatchNorm2d(12), channels=12)
    spec = trace(model, IMAGES)
    assert spec.sizes() == {"0": 4, "1": 3}
    assert spec.axes["2.running_var"][0] == ((Factor("0", 4), Factor("1", 3)),)


def test_a_residual_stream_beside_a_grouped_convolution_takes_its_structure() -> None:
    model = Net(
        lambda m, x: m.head((s := m.stem(x)).add(m.grouped(s)).mean((2, 3))),
        stem=nn.Conv2d(3, 6, 1),
        grouped=nn.Conv2d(6, 6, 3, padding=1, groups=2),
        head=nn.Linear(6, 2),
    )
    assert trace(model, IMAGES).sizes() == {"stem": 2, "stem#1": 3}


def test_group_norm_permutes_groups_and_channels_within() -> None:
    model = pooled(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), channels=6)
    assert trace(model, IMAGES).sizes() == {"0": 2, "0#1": 3}
    assert trace(pooled(nn.Conv2d(3, 6, 1), nn.GroupNorm(1, 6), channels=6), IMAGES).sizes() == {"0": 6}
    assert trace(pooled(nn.Conv2d(3, 6, 1), nn.GroupNorm(6, 6), channels=6), IMAGES).sizes() == {"0": 6}


def test_a_transposed_convolution_moves_like_a_convolution() -> None:
    model = pooled(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 2), channels=5)
    assert sizes(trace(model, IMAGES)) == [4, 5]
    model = pooled(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=2), channels=6)
    spec = trace(model, IMAGES)
    assert sizes(spec) == [2, 2, 3]
    assert [f.size for f in spec.axes["1.weight"][0][0]] == [2, 2]
    assert [f.size for f in spec.axes["1.bias"][0][0]] == [2, 3]


def test_an_image_without_a_batch_axis_keeps_its_channels_apart_from_its_rows() -> None:
    model = Net(
        lambda m, x: m.head(F.max_pool2d(m.b(m.a(x)), 2).mean((1, 2))),
        a=nn.Conv2d(3, 4, 3),
        b=nn.Conv2d(4, 5, 1),
        head=nn.Linear(5, 2),
    )
    assert trace(model, IMAGES[0]).sizes() == {"a": 4, "b": 5}


@pytest.mark.parametrize("batch_first", [True, False])
def test_packed_attention_moves_heads_and_queries_apart_from_values(batch_first: bool) -> None:
    model = Net(
        lambda m, x: m.head(m.attention(h := m.stem(x), h, h, need_weights=False)[0].mean(1)),
        stem=nn.Linear(8, 12),
        attention=nn.MultiheadAttention(12, 3, batch_first=batch_first),
        head=nn.Linear(12, 2),
    )
    spec = trace(model, WORDS)
    # 12 units enter, 12 leave; 3 heads; 4 units of a head for queries and keys, 4 for values
    assert sizes(spec) == [3, 4, 4, 12, 12]
    packed = spec.axes["attention.in_proj_weight"][0]
    assert [tuple(f.size for f in segment) for segment in packed] == [(3, 4)] * 3
    assert packed[0] == packed[1] != packed[2]
    assert spec.axes["attention.out_proj.weight"][1] == packed[2:]


def test_a_transformer_with_class_token_and_position_embedding_keeps_its_function() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.patch(x).reshape(x.shape[0], 8, 9).permute(0, 2, 1)
        h = torch.cat([m.token.expand(x.shape[0], -1, -1), h], dim=1) + m.position
        return m.head(m.layer(h)[:, 0])

    model = Net(
        forward,
        patch=nn.Conv2d(3, 8, 2, 2),
        token=nn.Parameter(torch.zeros(1, 1, 8)),
        position=nn.Parameter(torch.randn(1, 10, 8)),
        layer=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        head=nn.Linear(8, 2),
    )
    spec = trace(model, IMAGES)
    assert sizes(spec) == [2, 4, 4, 8, 16]
    inner = [f for f in spec.frozen if "network" not in f.reason]
    assert [(f.name, f.axis, f.reason) for f in inner] == [("position", 1, "a position in an image")]


def test_heads_chosen_before_the_three_parts_are_picked_are_found_too() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = m.qkv(x).reshape(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.softmax((0.5 * q) @ k.transpose(-2, -1) + m.bias[m.numbers].permute(2, 0, 1), -1) @ v
        return m.head(mixed.transpose(1, 2).reshape(2, 5, 8).mean(1))

    model = Net(forward, qkv=nn.Linear(8, 24), bias=nn.Parameter(torch.randn(9, 2)), head=nn.Linear(8, 2))
    model.register_buffer("numbers", torch.arange(5)[:, None] - torch.arange(5)[None] + 4)
    spec = trace(model, WORDS)
    assert sizes(spec) == [2, 4, 4]
    assert spec.axes["bias"][1] == ((Factor("qkv", 2),),)
    assert any(f.name == "bias" and "by number" in f.reason for f in spec.frozen)


def test_einsum_attention_of_chunks_ties_the_summed_axes() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (t.reshape(2, 5, 3, 4) for t in m.qkv(x).chunk(3, dim=-1))
        mixed = torch.einsum("b h i j, b j h d -> b i h d", torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1), v)
        return m.head(mixed.flatten(2).mean(1))

    assert sizes(trace(Net(forward, qkv=nn.Linear(8, 36), head=nn.Linear(12, 2)), WORDS)) == [3, 4, 4]


def test_a_masked_attention_keeps_the_order_of_its_positions() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.stem(x.transpose(1, 2)).transpose(1, 2)  # stem mixes positions, so they have units of their own
        mask = m.mask if m.masked else None
        return m.head(F.scaled_dot_product_attention(h, h, h, mask, is_causal=not m.masked).mean(1))

    for masked in (True, False):
        model = Net(forward, stem=nn.Linear(5, 6), mask=nn.Parameter(torch.randn(6, 6)), head=nn.Linear(8, 2))
        model.masked = masked
        spec = trace(model, WORDS)
        assert sizes(spec) == ([6] if masked else [])
        assert masked or any("causal" in f.reason for f in spec.frozen)


def test_an_embedding_moves_its_features_and_keeps_its_rows() -> None:
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = trace(model, torch.arange(7).reshape(1, 7))
    assert sizes(spec) == [4, 6]
    assert any(f.name == "0.weight" and f.axis == 0 and "index" in f.reason for f in spec.frozen)


def test_a_channel_shuffle_and_a_split_keep_the_units_that_meet_together() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = torch.cat([m.a(x), m.b(x)], 1)
        h = h.view(2, 2, 4, 6, 6).transpose(1, 2).contiguous().view(2, 8, 6, 6)
        left, right = h.chunk(2, dim=1)
        return m.head(torch.cat([left, m.c(right)], 1).mean((2, 3)))

    model = Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 5, 1), head=nn.Linear(9, 2))
    spec = trace(model, IMAGES)
    # a and b are interleaved, so unit i of one goes with unit i of the other, on its side of the split.
    assert sizes(spec) == [2, 2, 5]
    assert spec.axes["a.weight"][0] == spec.axes["b.weight"][0]
    assert spec.axes["head.weight"][1] == ((Factor("a", 2), Factor(None, 2)), (Factor("c", 5),))


def test_a_split_that_cuts_a_unit_in_two_is_frozen_and_reported() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        left, right = m.a(x).flatten(1).split([6, 10], dim=1)
        return m.b(left) + m.c(right)

    model = Net(forward, a=nn.Conv2d(3, 4, 5), b=nn.Linear(6, 2), c=nn.Linear(10, 2))
    spec = trace(model, IMAGES)
    assert spec.groups == ()
    assert any(f.name == "a.weight" and "cut within its units" in f.reason for f in spec.frozen)


def test_slices_move_within_and_strides_stay() -> None:
    model = Net(lambda m, x: m.b(m.a(x)[..., 2:6]).mean(1), a=nn.Linear(8, 9), b=nn.Linear(4, 3))
    assert sizes(trace(model, WORDS)) == [2, 3, 4]
    model = Net(lambda m, x: m.b(m.a(x)[..., ::2]).mean(1), a=nn.Linear(8, 9), b=nn.Linear(5, 3))
    assert any("takes a piece" in f.reason for f in trace(model, WORDS).frozen)


def test_a_piece_overwritten_in_place_is_a_piece_of_the_whole() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        bias = m.a.bias.clone()
        bias[2:4].zero_()
        return m.b(torch.relu(F.linear(x, m.a.weight, bias)).mean(1))

    assert sizes(trace(Net(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 3)), WORDS)) == [2, 2, 2]


def test_gated_units_meet_their_gates() -> None:
    model = nn.Sequential(nn.Linear(8, 10), nn.GLU(), nn.Linear(5, 4), nn.PReLU(4), nn.Flatten(1), nn.Linear(4, 2))
    spec = trace(model, WORDS[:, 0])
    assert spec.sizes() == {"0": 5, "2": 4}
    assert spec.axes["0.weight"][0] == ((Factor("0", 5),), (Factor("0", 5),))
    assert spec.axes["3.weight"][0] == ((Factor("2", 4),),)


def test_channels_padded_with_zeros_take_the_units_that_they_meet() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.head((F.pad(h, (0, 0, 0, 0, 1, 2)) + m.b(h)).mean((2, 3)))

    model = Net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 7, 1), head=nn.Linear(7, 2))
    spec = trace(model, IMAGES)
    assert sizes(spec) == [2, 4]
    assert spec.axes["head.weight"][1] == ((Factor(None, 1),), (Factor("a", 4),), (Factor("b", 2),))


def test_windows_and_shifts_of_positions_leave_channels_free() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.stem(x).permute(0, 2, 3, 1)
        h = torch.roll(F.pad(h, (0, 0, 1, 1, 0, 0), mode="constant"), (1, 2), (1, 2)).flip(1)
        h = h.view(2, 3, 2, 4, 2, 4).permute(0, 1, 3, 2, 4, 5).reshape(24, 4, 4)
        return m.head(h.view(2, 12, 16).mean(1))

    model = Net(forward, stem=nn.Conv2d(3, 4, 1), head=nn.Linear(16, 2))
    spec = trace(model, IMAGES)
    assert spec.sizes() == {"stem": 4}
    assert spec.axes["head.weight"][1] == ((Factor(None, 4), Factor("stem", 4)),)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_border_read_from_the_image_keeps_its_positions(mode: str) -> None:
    model = pooled(nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), nn.Conv2d(4, 5, 1), channels=5)
    assert trace(model, IMAGES).sizes() == {"0": 4, "1": 5}


def test_a_softmax_over_the_parts_of_a_packed_tensor_ties_them() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.head(m.a(x).unflatten(-1, (3, 4)).softmax(-2).select(-2, 0).mean(1))

    model = Net(forward, a=nn.Linear(8, 12), head=nn.Linear(4, 2))
    spec = trace(model, WORDS)
    assert sizes(spec) == [4]
    assert [[f.size for f in segment] for segment in spec.axes["a.weight"][0]] == [[4]] * 3


def test_stacked_tensors_keep_their_own_units_until_they_meet() -> None:
    def apart(m: Net, x: Tensor) -> Tensor:
        return m.head(torch.stack([m.a(x), m.b(x)], 2).flatten(2).mean(1))

    def together(m: Net, x: Tensor) -> Tensor:
        return m.head(torch.stack([m.a(x), m.b(x)], -1).sum(-1).mean(1))

    def layers(n: int) -> dict[str, nn.Module]:
        return {"a": nn.Linear(8, 4), "b": nn.Linear(8, 4), "head": nn.Linear(n, 2)}

    assert trace(Net(apart, **layers(8)), WORDS).sizes() == {"a": 4, "b": 4}
    assert trace(Net(together, **layers(4)), WORDS).sizes() == {"a": 4}


def test_repeated_norms_follow_the_units_that_they_divide() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = F.normalize(m.a(x), dim=-1)
        return m.head((h * m.gate.amax()).var(1) + h.amax(1))

    model = Net(forward, a=nn.Linear(8, 6), gate=nn.Parameter(torch.rand(3)), head=nn.Linear(6, 2))
    assert sizes(trace(model, WORDS)) == [3, 6]


def test_a_constant_buffer_stays() -> None:
    model = Net(lambda m, x: m.head(m.a(m.table)).mean(0) + 0 * x.sum(), a=nn.Linear(2, 5), head=nn.Linear(5, 3))
    model.register_buffer("table", torch.randn(4, 2))
    spec = trace(model, WORDS)
    assert spec.sizes() == {"a": 5}
    assert spec.axes["table"] == ((), ())
    assert any(f.name == "a.weight" and f.axis == 1 and "constant" in f.reason for f in spec.frozen)


def test_a_constant_follows_what_it_meets_and_an_order_stays() -> None:
    def ones(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.head((h + torch.ones_like(h)).mean(1))

    def order(m: Net, x: Tensor) -> Tensor:
        return m.head((m.a(x) + torch.arange(5.0)).mean(1))

    assert trace(Net(ones, a=nn.Linear(8, 5), head=nn.Linear(5, 2)), WORDS).sizes() == {"a": 5}
    assert trace(Net(order, a=nn.Linear(8, 5), head=nn.Linear(5, 2)), WORDS).groups == ()


def test_weights_that_eval_mode_does_not_use_are_frozen_and_reported() -> None:
    model = Net(lambda m, x: m.b(m.a(x)).mean(1), a=nn.Linear(8, 5), b=nn.Linear(5, 2), spare=nn.Linear(5, 3))
    spec = trace(model, WORDS)
    assert spec.sizes() == {"a": 5}
    assert {f.name for f in spec.frozen if f.reason == "not used in eval mode"} == {"spare.weight", "spare.bias"}


def test_operators_in_place_that_change_a_shape_are_not_understood() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        h.transpose_(1, 2)
        return m.head(h.mean(2))

    spec = trace(Net(forward, a=nn.Linear(8, 5), head=nn.Linear(5, 2)), WORDS)
    assert any("transpose_" in f.reason for f in spec.frozen)


def test_a_batch_is_proved_on_its_first_rows_and_a_fixed_one_on_all() -> None:
    seen: list[int] = []

    def free(m: Net, x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return m.head(m.a(x))

    def fixed(m: Net, x: Tensor) -> Tensor:
        seen.append(x.shape[0])
        return m.head(m.a(x).reshape(4, 5))

    x = torch.randn(4, 8)
    assert trace(Net(free, a=nn.Linear(8, 5), head=nn.Linear(5, 2)), x).sizes() == {"a": 5}
    assert seen[1:3] == [2, 2]
    seen.clear()
    assert trace(Net(fixed, a=nn.Linear(8, 5), head=nn.Linear(5, 2)), x).sizes() == {"a": 5}
    assert seen[1:4] == [2, 4, 4]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "pixels", "options"),
    [
        ("resnet", "resnext50_32x4d", 32, {}),
        ("regnet", "regnet_y_400mf", 32, {}),
        ("shufflenetv2", "shufflenet_v2_x0_5", 32, {}),
        ("mobilenetv3", "mobilenet_v3_small", 32, {}),
        ("efficientnet", "efficientnet_b0", 32, {}),
        (
            "densenet", "DenseNet", 32,
            {"growth_rate": 16, "block_config": (2, 3, 2, 2), "num_init_features": 32},
        ),
        (
            "swin_transformer",
            "SwinTransformer",
            32,
            {"patch_size": [2, 2], "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 3], "window_size": [4, 4]},
        ),
        (
            "vision_transformer",
            "VisionTransformer",
            32,
            {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96},
        ),
        (
            "maxvit",
            "MaxVit",
            32,
            {"input_size": (32, 32), "stem_channels": 16, "partition_size": 4, "block_channels": [16],
             "block_layers": [2], "head_dim": 8, "stochastic_depth_prob": 0.0},
        ),
    ],
)  # fmt: skip
def test_networks_of_torchvision_keep_their_function(
    family: str, name: str, pixels: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = getattr(importlib.import_module(f"torchvision.models.{family}"), name)(**options)
    x = torch.randn(1, 3, pixels, pixels)
    spec = perm_spec(model, x)
    assert not any("changed the output" in f.reason for f in spec.frozen)
    assert spec.permutable_share() > 0.95
    assert spec.log10_symmetries() > math.log10(math.factorial(100))
    assert relative_error(model, spec, x) < 1e-9
