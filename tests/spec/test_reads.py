"""Which axes of a weight read units, and which make them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedmerge import PermSpec, perm_spec
from fedmerge.spec.axes import Factor


class Many(nn.Module):
    """Weights that are used in many ways."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.place = nn.Embedding(7, 6), nn.Parameter(torch.randn(1, 5, 6))
        self.right, self.left = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(9, 8))
        self.lettered, self.norm = nn.Parameter(torch.randn(10, 9)), nn.LayerNorm(10)
        self.conv, self.back = nn.Conv1d(10, 12, 1), nn.ConvTranspose1d(12, 13, 1)
        self.unused = nn.Linear(3, 3)
        self.out = nn.Linear(13, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu((self.words(x) + self.place) @ self.right)
        x = torch.relu(F.linear(x, self.left))
        x = torch.relu(torch.einsum("nti,oi->nto", x, self.lettered))
        x = torch.relu(self.conv(self.norm(x).transpose(1, 2)))
        return self.out(torch.relu(self.back(x)).mean(2))


def test_a_weight_reads_where_an_operator_sums_over_it() -> None:
    spec = perm_spec(Many(), torch.zeros(2, 5, dtype=torch.long))
    expected = {
        "words.weight": set(), "place": set(), "right": {0}, "left": {1}, "lettered": {1}, "norm.weight": set(),
        "norm.bias": set(), "conv.weight": {1}, "conv.bias": set(), "back.weight": {0}, "back.bias": set(),
        "out.weight": {1}, "out.bias": set(), "unused.weight": set(), "unused.bias": set(),
    }  # fmt: skip
    assert {name: set(axes) for name, axes in spec.reads.items()} == expected
    assert spec.makes("words.weight", 1)
    assert spec.makes("back.weight", 1)
    assert not spec.makes("back.weight", 0)


class Square(nn.Module):
    """A stream with a weight from it to itself, which has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.loop, self.out = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 2)
        self.same = self.loop

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x + torch.relu(self.same(self.loop(x) + x)))


def test_of_a_square_weight_one_axis_reads_and_both_names_of_a_tensor_say_so() -> None:
    spec = perm_spec(Square(), torch.randn(2, 4))
    assert len(spec.sizes()) == 1
    assert spec.reads["loop.weight"] == spec.reads["same.weight"] == {1}


def test_a_spec_by_hand_reads_on_all_axes_but_the_first() -> None:
    axis = ((Factor("g", 3),),)
    spec = PermSpec({"w": (axis, axis)}, {"w": (3, 3)}, frozenset({"w"}))
    assert spec.makes("w", 0)
    assert not spec.makes("w", 1)
