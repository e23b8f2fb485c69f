"""The text of a spec, to the letter for small networks, and short for large ones."""

import pytest
import torch
from nets import SelfTied, mlp
from torch import Tensor, nn

from fedmerge import models
from fedmerge.spec import Frozen, PermSpec, perm_spec
from fedmerge.spec._table import shorten, sides

KEY = "name[a]: axis a of a tensor; m.*[a]: axis a of every tensor of module m; p.{x y}: p.x and p.y"


def traced(name: str, shape: tuple[int, int, int] = (3, 32, 32), width: float = 0) -> PermSpec:
    return perm_spec(models.build(name, classes=10, in_shape=shape, width=width, seed=0), torch.zeros(1, *shape))


def test_the_table_of_a_perceptron() -> None:
    # log10(5!) = 2.08, log10(12!) = 8.68; 5 * 4 + 5 + 12 * 5 + 12 + 2 * 12 of 123 parameters move, the last 2 biases do not
    assert str(perm_spec(mlp(4, 5, 12, 2), torch.zeros(2, 4))).splitlines() == [
        "group  units  log10(n!)  written by | read by",
        "0          5        2.1  0.*[0] | 2.weight[1]",
        "2         12        8.7  2.*[0] | 4.weight[1]",
        "",
        "stays, and why            axes  for example",
        "an input of the network      1  0.weight[1]",
        "an output of the network     2  4.*[0]",
        "",
        "2 groups, 10^10.8 permutations (the product of n! over groups of n units), 98.4 % of the parameters on a permutable axis",
        KEY,
    ]


def test_the_table_of_a_residual_stream_that_a_convolution_reads_and_writes() -> None:
    rows = str(perm_spec(SelfTied(), torch.zeros(1, 3, 5, 5))).splitlines()
    assert rows[1] == "stem       6        2.9  stem.*[0] norm.*[0] loop.weight[0] | loop.weight[1] head.weight[1]"
    assert rows[-2].startswith("1 group, 10^2.9 permutations")


def test_places_that_differ_in_a_number_are_one_entry() -> None:
    rows = str(traced("resnet20")).splitlines()
    assert rows[1].split(maxsplit=3)[3] == "conv.weight[0] norm.*[0] blocks.0-2.conv2.weight[0] blocks.0-2.norm2.*[0]"
    assert rows[2].strip() == "| blocks.{0-3.conv1.weight[1] 3.shortcut.0.weight[1]}"
    assert rows[3].split(maxsplit=3)[3] == "blocks.0.{conv1.weight[0] norm1.*[0]} | blocks.0.conv2.weight[1]"


def test_gaps_products_and_a_limit() -> None:
    names = [f"a.{i}.{kind}" for i in (0, 1, 2, 5) for kind in ("x1", "x2", "y")]
    spec = PermSpec({}, dict.fromkeys(names, (3, 3)), frozenset(names))
    places = [(name, 1) for name in names]
    assert shorten(places, spec, 4) == "a.{0-2,5}.*[1]"
    assert shorten(places[:-1], spec, 4) == "a.{0-2.*[1] 5.x1-2[1]}"
    assert shorten(places[:-1], spec, 1) == "a.0-2.*[1] and 1 more"
    assert shorten([], spec, 4) == ""


def test_every_reason_has_a_row_with_its_count() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.relu(self.b(torch.cumsum(self.a(x), 1))))

    lines = str(perm_spec(Odd(), torch.zeros(2, 4))).splitlines()
    (row,) = [line for line in lines if "cumsum" in line]
    assert row.split()[-3:] == ["3", "a.*[0]", "b.weight[1]"]
    assert any(line.startswith("an input of the network") and line.endswith("1  a.weight[1]") for line in lines)


def test_the_same_reason_at_several_operators_is_one_row() -> None:
    frozen = (Frozen("a", 0, "chunk_1: cut"), Frozen("b", 0, "chunk_12: cut"), Frozen("c", 0, "conv2d: cut"))
    spec = PermSpec({}, {"a": (2,), "b": (2,), "c": (2,)}, frozenset(), frozen)
    rows = [line.split("  ") for line in str(spec).splitlines() if "cut" in line]
    assert [[cell.strip() for cell in row if cell] for row in rows] == [
        ["chunk: cut", "2", "a[0] b[0]"],
        ["conv2d: cut", "1", "c[0]"],
    ]


def test_a_network_without_symmetries_has_a_table_too() -> None:
    lines = str(perm_spec(nn.Linear(3, 2), torch.zeros(1, 3))).splitlines()
    assert lines[0].startswith("group")
    assert lines[-2].startswith("0 groups, 10^0.0 permutations")


@pytest.mark.parametrize(
    ("name", "layer", "wrote", "read"),
    [
        ("transposed", nn.ConvTranspose2d(4, 6, 1), ("1.weight", 1), ("1.weight", 0)),
        ("straight", nn.Conv2d(4, 6, 1), ("1.weight", 0), ("1.weight", 1)),
    ],
)
def test_a_transposed_convolution_reads_its_first_axis(
    name: str, layer: nn.Module, wrote: tuple[str, int], read: tuple[str, int]
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), layer, nn.Conv2d(6, 2, 1))
    spec = perm_spec(model, torch.zeros(1, 3, 2, 2))
    assert read in sides(spec, "0")[1]
    (group,) = [g for g, n in spec.sizes().items() if n == 6]
    assert wrote in sides(spec, group)[0]


def test_a_table_of_embeddings_writes_its_columns() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(7, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.words(x))

    spec = perm_spec(Words(), torch.zeros(1, 3, dtype=torch.int64))
    (group,) = spec.groups
    assert sides(spec, group) == ([("words.weight", 1)], [("out.weight", 1)])


def test_the_table_of_resnet18_is_no_wider_than_a_terminal_of_160() -> None:
    assert max(map(len, str(traced("resnet18")).splitlines())) <= 160
