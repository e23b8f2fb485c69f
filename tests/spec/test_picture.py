"""The picture of a spec: what is drawn, read off the figure, and the file."""

import functools
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from nets import Residual, SelfTied, mlp
from torch import nn

from fedmerge import models
from fedmerge.errors import ConfigError
from fedmerge.spec import PermSpec, perm_spec
from fedmerge.spec._picture import picture


def marked(figure: Figure, kind: str) -> list[str]:
    """The names of what is drawn as ``kind``."""
    gids = [artist.get_gid() or "" for artist in figure.axes[0].get_children()]
    return [gid.removeprefix(f"{kind}:") for gid in gids if gid.startswith(kind)]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.axes[0].texts)


def spec_of(name: str, width: float = 0) -> PermSpec:
    return perm_spec(
        models.build(name, classes=10, in_shape=(3, 32, 32), width=width, seed=0), torch.zeros(1, 3, 32, 32)
    )


def test_every_weight_is_an_edge_and_every_group_a_lane_with_its_units() -> None:
    figure = picture(perm_spec(mlp(4, 5, 6, 2), torch.zeros(1, 4)), "small")
    assert marked(figure, "edge") == ["0.weight", "2.weight", "4.weight"]
    assert marked(figure, "group") == ["0", "2"]
    assert marked(figure, "stays") == ["an input of the network", "an output of the network"]
    assert "0  5 units" in words(figure)
    assert "2  6 units" in words(figure)
    assert "small: 2 groups of units" in words(figure)


@pytest.mark.parametrize(
    ("name", "width", "weights", "groups"),
    [
        ("vgg11", 0.1, 9, 8),
        ("resnet20", 0.5, 22, 12),  # 19 convolutions, 2 projections, 1 linear layer
        ("resnet18", 0.1, 21, 12),  # 17 convolutions, 3 projections, 1 linear layer
        ("hlb", 8, 9, 5),
    ],
)
def test_the_networks_of_this_package_have_all_their_weights_drawn(
    name: str, width: float, weights: int, groups: int
) -> None:
    figure = picture(spec_of(name, width))
    assert len(marked(figure, "edge")) == weights
    assert len(marked(figure, "group")) == groups


def test_a_residual_stream_is_one_lane_as_long_as_the_weights_on_it() -> None:
    figure = picture(perm_spec(Residual(), torch.zeros(1, 20)))
    widths = {a.get_gid(): a.get_width() for a in figure.axes[0].patches if (a.get_gid() or "").startswith("group")}
    assert len(marked(figure, "edge")) == 6
    # the stream is touched in columns 0 to 5, the hidden units in columns 1 and 3; both reach 0.3 columns further
    assert widths["group:stem"] / widths["group:up.0"] == pytest.approx(5.6 / 2.6)


def test_an_arrow_ends_at_the_lanes_that_the_weight_reads_and_writes() -> None:
    figure = picture(perm_spec(mlp(4, 5, 6, 2), torch.zeros(1, 4)))
    bars = {a.get_gid(): a for a in figure.axes[0].patches if a.get_gid()}
    middle = {gid: bar.get_y() + bar.get_height() / 2 for gid, bar in bars.items()}
    (line,) = [line for line in figure.axes[0].lines if line.get_gid() == "edge:2.weight"]
    assert sorted(line.get_ydata()) == pytest.approx([middle["group:2"], middle["group:0"]])


def test_a_weight_from_a_stream_to_itself_is_a_loop_and_normalisation_a_stroke() -> None:
    figure = picture(perm_spec(SelfTied(), torch.zeros(1, 3, 5, 5)))
    assert marked(figure, "edge").count("loop.weight") == 1
    assert "edge:loop.weight" in [patch.get_gid() for patch in figure.axes[0].patches]
    assert len(marked(figure, "vector")) == 1


def test_depthwise_loops_and_a_grey_image_of_one_channel_does_not() -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Flatten(), nn.Linear(54, 1))
    figure = picture(perm_spec(model, torch.zeros(1, 1, 5, 5)))
    loops = [patch.get_gid() for patch in figure.axes[0].patches if (patch.get_gid() or "").startswith("edge")]
    assert loops == ["edge:1.weight"]
    assert sorted(marked(figure, "edge")) == ["0.weight", "1.weight", "3.weight"]
    assert "a single unit" in marked(figure, "stays")


def test_a_network_without_symmetries_is_drawn_grey() -> None:
    figure = picture(perm_spec(nn.Linear(3, 2), torch.zeros(1, 3)))
    assert marked(figure, "group") == []
    assert marked(figure, "edge") == ["weight"]
    assert "0 groups" in words(figure)


@pytest.mark.parametrize(
    ("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF"), (".PNG", b"\x89PNG")]
)
def test_equal_specs_give_equal_files(tmp_path: Path, suffix: str, start: bytes) -> None:
    spec = perm_spec(mlp(4, 5, 2), torch.zeros(1, 4))
    first, second = tmp_path / f"a{suffix}", tmp_path / "deeper" / f"b{suffix}"
    spec.draw(first, title="mlp")
    spec.draw(str(second), title="mlp")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(start)


def test_a_file_of_no_known_format_is_refused(tmp_path: Path) -> None:
    spec = perm_spec(mlp(4, 5, 2), torch.zeros(1, 4))
    with pytest.raises(ConfigError, match=r"a\.gif: a picture is a \.png, \.svg, \.pdf file"):
        spec.draw(tmp_path / "a.gif")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"a\.png cannot be written: .*choose another"):
        spec.draw(tmp_path / "file" / "a.png")


@functools.cache
def large(name: str) -> PermSpec:
    return perm_spec(models.build(name, classes=10, in_shape=(3, 32, 32), seed=0), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["densenet121", "vit_b_16"])
def test_large_networks_are_drawn_whole(name: str) -> None:
    figure = picture(large(name))
    # DenseNet-121: 1 + 2 * 58 + 3 convolutions, 1 linear layer; ViT-B: patches, 4 weights in each of 12 blocks, head
    assert len(marked(figure, "edge")) == {"densenet121": 121, "vit_b_16": 50}[name]
    assert max(figure.get_size_inches()) * 150 < 2**16


def test_the_table_of_a_large_network_is_no_wider_than_a_terminal_of_160() -> None:
    lines = str(large("densenet121")).splitlines()
    assert max(map(len, lines)) <= 160
    assert len(lines) < 4 * 120 + 20
