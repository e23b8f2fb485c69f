r"""Two networks that are right everywhere and that no permutation of units connects by a straight line.

Ainsworth et al., "Git Re-Basin", ICLR 2023, arXiv:2209.04836, on the limits of its conjecture: points x of the square
:math:`[-1, 1]^2` are labelled 1 where :math:`x_1 < 0` and :math:`x_2 > 0`, and with :math:`\sigma` the rectifier

.. math::
    f_A(x) &= -(1\ 1)\, \sigma(\mathrm{diag}(-1, 1)\, \sigma(\mathrm{diag}(-1, -1)\, x + (1, 0)) + (1, 0)) \\
    f_B(x) &= -(1\ 1)\, \sigma(\mathrm{diag}(1, -1)\, \sigma(\mathrm{diag}(1, 1)\, x + (0, 1)) + (0, 1))

both equal :math:`-\sigma(x_1) - \sigma(-x_2)` on the square, which is 0 on the quadrant of label 1 and negative elsewhere. So
the label is 1 where f is at least 0. Either hidden layer has 2 units: four permutations, and this is what is half-way, with
:math:`d = (x_2 - x_1) / 2`.

===================  ===============  ========================================================
first, second layer  f at the middle  label 1 is given
===================  ===============  ========================================================
stays, stays         -1               nowhere: wrong on the quarter that has it
stays, swapped       -1               nowhere: the same
swapped, stays       -2 max(0, -d)    above the diagonal: on half of the square, not on a quarter
swapped, swapped     -2 max(0, -d)    above the diagonal: the same
===================  ===============  ========================================================

Each is right on three quarters of the square, against all of it at both ends.
"""

import itertools
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from fedmerge import align, aligners, perm_spec, permute
from fedmerge.align import needs_images

SIDE = 256  # points a side; a power of two, so that every number below is exact in binary
A = {
    "one.weight": [[-1.0, 0.0], [0.0, -1.0]],
    "one.bias": [1.0, 0.0],
    "two.weight": [[-1.0, 0.0], [0.0, 1.0]],
    "two.bias": [1.0, 0.0],
    "out.weight": [[-1.0, -1.0]],
}
B = {
    "one.weight": [[1.0, 0.0], [0.0, 1.0]],
    "one.bias": [0.0, 1.0],
    "two.weight": [[1.0, 0.0], [0.0, -1.0]],
    "two.bias": [0.0, 1.0],
    "out.weight": [[-1.0, -1.0]],
}
STAYS, SWAPPED = [0, 1], [1, 0]


class TwoLayers(nn.Module):
    """Two hidden layers of two rectified units, one output without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))))


NETWORK = TwoLayers()
SPEC = perm_spec(NETWORK, torch.zeros(1, 2))


def tensors(numbers: dict[str, list]) -> dict[str, Tensor]:
    return {name: torch.tensor(value) for name, value in numbers.items()}


def grid() -> tuple[Tensor, Tensor]:
    """The middles of 256 x 256 cells of the square, and their labels."""
    middles = (2 * torch.arange(SIDE) + 1) / SIDE - 1
    x = torch.cartesian_prod(middles, middles)
    return x, (x[:, 0] < 0) & (x[:, 1] > 0)


def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.func.functional_call(NETWORK, params, (x,))[:, 0]


def accuracy(params: dict[str, Tensor]) -> Fraction:
    x, label = grid()
    return Fraction(int(((output(params, x) >= 0) == label).sum()), SIDE**2)


def midpoint(first: list[int], second: list[int]) -> dict[str, Tensor]:
    """Half-way between A and B after those permutations of B's units."""
    a, perms = tensors(A), {"one": torch.tensor(first), "two": torch.tensor(second)}
    moved = permute(tensors(B), perms, spec=SPEC)
    return {name: (a[name] + moved[name]) / 2 for name in a}


def test_both_networks_are_right_everywhere_and_equal() -> None:
    x, _ = grid()
    assert accuracy(tensors(A)) == accuracy(tensors(B)) == 1
    expected = -torch.relu(x[:, 0]) - torch.relu(-x[:, 1])
    for numbers in (A, B):
        torch.testing.assert_close(output(tensors(numbers), x), expected, rtol=0, atol=0)


def test_there_are_four_permutations() -> None:
    assert SPEC.sizes() == {"one": 2, "two": 2}
    assert 10 ** SPEC.log10_symmetries() == pytest.approx(4)


@pytest.mark.parametrize("second", [STAYS, SWAPPED])
@pytest.mark.parametrize("first", [STAYS, SWAPPED])
def test_every_midpoint_is_right_on_three_quarters_of_the_square(first: list[int], second: list[int]) -> None:
    x, _ = grid()
    found = midpoint(first, second)
    if first == STAYS:
        expected, right = torch.full((len(x),), -1.0), Fraction(3, 4)
    else:
        # label 1 on n (n + 1) / 2 points on or above the diagonal, where n^2 / 4 of the n^2 have it
        expected = -2 * torch.relu((x[:, 0] - x[:, 1]) / 2)
        right = 1 - (Fraction(SIDE * (SIDE + 1), 2) - Fraction(SIDE**2, 4)) / SIDE**2
        assert right == Fraction(3, 4) - Fraction(1, 2 * SIDE)  # the diagonal itself, half a cell a row
    torch.testing.assert_close(output(found, x), expected, rtol=0, atol=0)
    assert accuracy(found) == right


@pytest.mark.parametrize("second", [STAYS, SWAPPED])
@pytest.mark.parametrize("first", [STAYS, SWAPPED])
def test_no_threshold_saves_a_midpoint(first: list[int], second: list[int]) -> None:
    x, label = grid()
    scores = output(midpoint(first, second), x)
    thresholds = [*scores.unique().tolist(), 1.0]
    best = max(int(((scores >= threshold) == label).sum()) for threshold in thresholds)
    assert best == 3 * SIDE**2 // 4  # that of the label 0 everywhere


@pytest.mark.parametrize("method", [name for name in aligners() if not needs_images(name)])
def test_no_aligner_finds_a_line_without_a_barrier(method: str) -> None:
    perms = align(tensors(B), tensors(A), spec=SPEC, method=method, restarts=4).perms
    first, second = (perms[group].tolist() for group in ("one", "two"))
    assert [first, second] in [list(pair) for pair in itertools.product((STAYS, SWAPPED), repeat=2)]
    assert accuracy(midpoint(first, second)) <= Fraction(3, 4)
