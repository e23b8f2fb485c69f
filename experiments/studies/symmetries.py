"""How many permutations of units keep the function of a network: the published table, counted again."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import fedmerge as fm
from experiments.report.theme import SERIES, figure, rows, styled
from experiments.studies.page import table
from experiments.studies.study import Cell, Config, Study, Work, each


def _perceptron() -> nn.Sequential:
    """Three hidden layers of 512 units on images of MNIST."""
    sizes = (784, 512, 512, 512)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(512, 10))


def _of_torchvision(name: str) -> nn.Module:
    import torchvision.models  # slow to import

    model: nn.Module = torchvision.models.get_model(name)
    return model


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP, 3 layers of 512": (_perceptron, (784,), 3498),
    "VGG16": (partial(_of_torchvision, "vgg16"), (3, 32, 32), 35160),
    "ResNet50": (partial(_of_torchvision, "resnet50"), (3, 32, 32), 55109),
}
"""Network -> how it is made, the shape of an input, and the published log10 of its number of permutations."""


@dataclass(frozen=True)
class Symmetries(Config):
    """``networks``: of :data:`NETWORKS`."""

    seeds: tuple[int, ...] = ()
    networks: tuple[str, ...] = tuple(NETWORKS)


def _count(network: str) -> dict[str, object]:
    make, shape, published = NETWORKS[network]
    model = make()
    kinds = nn.Conv2d | nn.Linear
    layers = [m.weight.shape[0] for n, m in model.named_modules() if isinstance(m, kinds) and "downsample" not in n]
    spec = fm.perm_spec(model, torch.zeros(1, *shape))
    return {
        "published": published,
        "by_layer": sum(math.floor(math.lgamma(n + 1) / math.log(10)) for n in layers[:-1]),
        "layers": len(layers) - 1,
        "groups": len(spec.sizes()),
        "log10": round(spec.log10_symmetries(), 2),
    }


def cells(config: Symmetries, work: Work) -> Iterator[Cell]:
    """A network a cell."""
    return each(_count, network=config.networks)


def _ours(rows: pd.DataFrame) -> str:
    lines = [[r.network, r.published, r.by_layer, r.layers, r.groups, f"{r.log10:.1f}"] for r in rows.itertuples()]
    head = [
        "network", "published, log10", "the same rule, log10", "hidden layers", "groups that move alone",
        "permutations that keep the function, log10",
    ]  # fmt: skip
    return table(head, lines)


def _answer(rows: pd.DataFrame) -> str:
    same = int((rows["published"] == rows["by_layer"]).sum())
    over = rows.loc[(rows["published"] - rows["log10"]).idxmax()]
    text = f"""
The published numbers follow for {same} of {len(rows)} networks from one rule: log10(n!) of every hidden layer, rounded
down layer by layer."""
    if over["published"] <= over["log10"]:
        return text
    return f"""{text} For {over["network"]} it counts too many: layers that write to one residual stream must move
together, and 10^{over["log10"]:.0f} permutations keep its function, not 10^{over["published"]}."""


@styled
def _draw(found: pd.DataFrame) -> Figure:
    fig, ax = figure("Permutations that keep the function", 1.4 + 0.7 * len(found))
    for i, row in enumerate(found.itertuples()):
        for shift, value, colour, label in (
            (-0.17, row.published, SERIES[1], "published"), (0.17, row.log10, SERIES[0], "keep the function"),
        ):  # fmt: skip
            ax.barh(i + shift, value, height=0.3, color=colour, label=label if not i else None)
            ax.text(value, i + shift, f" {value:,.0f}", va="center", size=9)
    rows(ax, list(found["network"]))
    ax.set(xlabel="log10 of their number", xlim=(0, 1.15 * float(found[["published", "log10"]].max().max())))
    ax.legend(fontsize=9, loc="lower right")
    return fig


STUDY = Study(
    "symmetries",
    cells,
    "how many permutations of units three networks have, beside the published table",
    title="How many permutations keep a network's function",
    source="table 1 of Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836",
    question="""
In how many orders can the units of a perceptron, of VGG16 and of ResNet50 be put without changing their answers?""",
    cost="ten CPU seconds",
    sizes={"quick": Symmetries(networks=("MLP, 3 layers of 512",)), "default": Symmetries()},
    answer=_answer,
    theirs="""
| Architecture | Number of permutation symmetries |
|---|--:|
| MLP (3 layers, 512 width) | 10^3498 |
| VGG16 | 10^35160 |
| ResNet50 | 10^55109 |""",
    ours=_ours,
    explains="""
Rounding down each layer costs one or two orders in the perceptron and eight in VGG16, whose two hidden layers of the
classifier are counted. In ResNet50 the table lets the 16 layers that write to its four residual streams permute each on
its own (and leaves the projections of the shortcuts out); that changes the function. Tracing finds one permutation a
stream. Signs, scales and swaps of whole branches are not counted by either.""",
    draw=_draw,
)
