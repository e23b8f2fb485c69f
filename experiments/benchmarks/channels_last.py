"""Do convolutions train faster with channels last in memory?

Question: how many CPU seconds does an epoch of :func:`fedmerge.train` take with ``channels_last`` in its recipe, over
those without, by network and width? Both train from one network on the same batches, in turn; how far their weights are
apart after that stands beside it.

Expected: on a CPU below 1 for narrow convolutions, about 1 for wide ones; weights apart by round-off.

Cost: a minute.

    python -m experiments.benchmarks.channels_last [--networks cnn hlb:8 hlb:16 hlb:64 resnet20:0.25] [--images 256]
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import fedmerge as fm
from fedmerge.training import Training

NETWORKS = ("cnn", "hlb:8", "hlb:16", "hlb:64", "resnet20:0.25")


def trained(network: torch.nn.Module, recipe: fm.models.Recipe, data: fm.data.Images) -> tuple[float, Training]:
    """CPU seconds of an epoch, and what came of it."""
    began = time.process_time()
    found = fm.train(
        network, network.state_dict(), data, recipe=recipe, epochs=1, generator=torch.Generator().manual_seed(0)
    )
    return time.process_time() - began, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="MODEL[:WIDTH]")
    parser.add_argument("--images", type=int, default=256, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of measurements; medians are shown")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    images = torch.randint(256, (given.images, 3, 32, 32), dtype=torch.uint8, generator=draws)
    data = fm.data.Images(
        images, torch.arange(given.images) % 10, tuple("0123456789"), (0.5,) * 3, (0.25,) * 3, name="noise"
    )
    table = Table("network", "images / CPU second", "channels last: seconds / those", "largest difference of a weight")
    for name in given.networks:
        model, _, width = name.partition(":")
        network = fm.models.build(model, classes=10, in_shape=data.shape, seed=0, width=float(width or 0))
        plain = replace(fm.models.recipe(model), lr=1e-3)
        pairs, apart = [], 0.0
        for _ in range(given.rounds + 1):
            (before, a), (after, b) = (trained(network, replace(plain, channels_last=on), data) for on in (False, True))
            pairs.append((before, after))
            apart = max(float((a.params[k].double() - b.params[k].double()).abs().max()) for k in a.params)
        warm = pairs[1:]
        table.add_row(
            name, f"{given.images / median(x for x, _ in warm):.0f}", f"{median(y / x for x, y in warm):.2f}",
            f"{apart:.1e}",
        )  # fmt: skip
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
