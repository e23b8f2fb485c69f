"""Two networks that are right everywhere and that no permutation of units connects by a straight line."""

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

import fedmerge as fm
from experiments.report.theme import SERIES, styled
from experiments.studies.page import table
from experiments.studies.study import Cell, Config, Study, Work, each


@dataclass(frozen=True)
class Counterexample(Config):
    """``side``: points along each side of the square; ``points``: of each line between the networks."""

    seeds: tuple[int, ...] = ()
    side: int = 200
    points: int = 25


class TwoLayers(nn.Module):
    """Two hidden layers of two rectified units, one output without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(N, 1)`` of points ``(N, 2)``; at 0 and above the label is 1."""
        score: Tensor = self.out(torch.relu(self.two(torch.relu(self.one(x)))))
        return score


def _network(one: list[float], one_bias: list[float], two: list[float], two_bias: list[float]) -> dict[str, Tensor]:
    """Diagonals of the two weights, and their biases; the output is minus the sum of the last two units."""
    return {
        "one.weight": torch.tensor(one).diag(),
        "one.bias": torch.tensor(one_bias),
        "two.weight": torch.tensor(two).diag(),
        "two.bias": torch.tensor(two_bias),
        "out.weight": torch.tensor([[-1.0, -1.0]]),
    }


A = _network([-1.0, -1.0], [1.0, 0.0], [-1.0, 1.0], [1.0, 0.0])
B = _network([1.0, 1.0], [0.0, 1.0], [1.0, -1.0], [0.0, 1.0])
ORDERS = {"stays": torch.tensor([0, 1]), "swapped": torch.tensor([1, 0])}


def square(side: int) -> tuple[Tensor, Tensor]:
    """The middles of ``side`` x ``side`` cells of the square [-1, 1]^2, and their labels: 1 where x1 < 0 and x2 > 0."""
    middles = (2 * torch.arange(side) + 1) / side - 1
    x = torch.cartesian_prod(middles, middles)
    return x, (x[:, 0] < 0) & (x[:, 1] > 0)


def answers(params: dict[str, Tensor], x: Tensor) -> Tensor:
    """The labels that a network gives."""
    with torch.no_grad():
        scores: Tensor = torch.func.functional_call(TwoLayers(), params, (x,))[:, 0]
    return scores >= 0


@functools.cache
def _spec() -> fm.PermSpec:
    return fm.perm_spec(TwoLayers(), torch.zeros(1, 2))


def permuted(first: str, second: str) -> dict[str, Tensor]:
    """B with the units of either layer in their order, or swapped."""
    return fm.permute(B, {"one": ORDERS[first], "two": ORDERS[second]}, spec=_spec())


def cells(config: Counterexample, work: Work) -> Iterator[Cell]:
    """The line from A to each of the four permutations of B."""
    x, labels = square(config.side)

    def line(first: str, second: str) -> list[dict[str, object]]:
        b, found = permuted(first, second), []
        for alpha in torch.linspace(0, 1, config.points).tolist():
            right = answers(fm.average([A, b], [1 - alpha, alpha]), x) == labels
            found.append({"alpha": round(alpha, 6), "accuracy": float(right.double().mean())})
        return found

    return each(line, first=ORDERS, second=ORDERS)


def _ours(rows: pd.DataFrame) -> str:
    found = []
    for (first, second), line in rows.groupby(["first", "second"], sort=False):
        at = line.set_index("alpha")["accuracy"]
        found.append(
            [first, second, f"{at.iloc[0]:.4f}", f"{at.iloc[-1]:.4f}", f"{at.loc[0.5]:.4f}", f"{at.min():.4f}"]
        )
    return table(["first layer of B", "second layer", "A", "B", "half-way", "lowest on the line"], found)


def _answer(rows: pd.DataFrame) -> str:
    half = rows[rows["alpha"] == 0.5]["accuracy"]
    ends = rows[rows["alpha"].isin([0.0, 1.0])]["accuracy"]
    return f"""
Both networks are right on {100 * ends.min():.2f} % of the square, and half-way to each of the {len(half)} permutations
of the second the network is right on {100 * half.min():.2f} to {100 * half.max():.2f} % of it: no permutation of units
connects them without a barrier. So the conjecture that permutations connect all solutions can only be about those that
training finds."""


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(7.5, 5.2), layout="constrained")
    side = 200
    x, labels = square(side)
    shown = {"A, and the labels": answers(A, x), "B": answers(B, x)}
    for first, second in itertools.product(ORDERS, repeat=2):
        middle = fm.average([A, permuted(first, second)])
        shown[f"half-way: layer 1 {first},\nlayer 2 {second}"] = answers(middle, x)
    for ax, (title, given) in zip(fig.subplots(2, 3).flat, shown.items(), strict=True):
        ax.imshow(
            given.view(side, side).T.numpy(), origin="lower", extent=(-1, 1, -1, 1), vmin=0, vmax=1,
            cmap=ListedColormap(["#ffffff", SERIES[0]]), interpolation="nearest",
        )  # fmt: skip
        share = float((given == labels).double().mean())
        ax.set_title(f"{title}\n{100 * share:.2f} % right", size=9)
        ax.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), xlabel="$x_1$", ylabel="$x_2$")
        ax.grid(visible=False)
        ax.spines[:].set_visible(True)
    return fig


STUDY = Study(
    "counterexample",
    cells,
    "two networks that no permutation connects, with the regions that they decide",
    title="A counterexample to connection by permutation",
    source="the counterexample of Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836",
    question="""
Two networks with two hidden layers of two units are right everywhere. Does one of the four permutations of units make
the straight line between them free of a barrier?""",
    cost="a second",
    sizes={"quick": Counterexample(side=20, points=5), "default": Counterexample(), "full": Counterexample(side=2000)},
    answer=_answer,
    theirs=r"""
Points $x$ of $[-1, 1]^2$ have the label 1 where $x_1 < 0$ and $x_2 > 0$, and with $\sigma$ the rectifier

$$f_A(x) = -(1\ 1)\,\sigma(\mathrm{diag}(-1, 1)\,\sigma(\mathrm{diag}(-1, -1)\,x + (1, 0)) + (1, 0))$$

$$f_B(x) = -(1\ 1)\,\sigma(\mathrm{diag}(1, -1)\,\sigma(\mathrm{diag}(1, 1)\,x + (0, 1)) + (0, 1))$$

"can perfectly fit the data. However there exists no permutation that satisfies LMC." No number is printed.""",
    ours=_ours,
    explains=r"""
Nothing differs: both are exact. On the square itself every midpoint is right on three quarters; two of them decide
along the diagonal, whose points the grid gives to the wrong label: half a cell a row, which is 1 / (2 side) of all.
Both functions equal $-\sigma(x_1) - \sigma(-x_2)$ on the square, so they do not differ in what they compute, only in
how.""",
    draw=_draw,
)
