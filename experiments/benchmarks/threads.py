"""From what size on does a second thread help a network to train?

Question: how long does a step of SGD take with all cores, over one thread, by the size of the network? With ``--busy``
as many other processes compute meanwhile as there are cores.

Expected: below ``fedmerge.threads.FEW`` operations a batch about 1, and several times that where the machine is busy.

Cost: half a minute.

    python -m experiments.benchmarks.threads [--busy] [--rounds 7]
"""

import argparse
import multiprocessing
import time
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import fedmerge as fm
from fedmerge.memory import usable_cores
from fedmerge.threads import FEW, operations

NETWORKS = (
    ("mlp", 128, (1, 8, 8)),
    ("mlp", 128, (1, 28, 28)),
    ("mlp", 512, (1, 28, 28)),
    ("lenet5", 0, (1, 28, 28)),
    ("cnn", 0, (3, 32, 32)),
)
BATCHES = (32, 128)


def seconds(network: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int = 10) -> float:
    """Wall time of a step."""
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)
    for step in range(steps + 3):
        if step == 3:
            began = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.cross_entropy(network(images), labels))
        optimizer.step()
    return (time.perf_counter() - began) / steps


def computing() -> None:
    """Use a core until ended."""
    torch.set_num_threads(1)
    matrix = torch.randn(512, 512)
    while True:
        matrix = (matrix @ matrix).tanh()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", action="store_true", help="while other processes use every core")
    parser.add_argument("--rounds", type=int, default=7, help="pairs of measurements; medians are shown")
    given, cores = parser.parse_args(), usable_cores()
    others = [multiprocessing.Process(target=computing, daemon=True) for _ in range(cores if given.busy else 0)]
    for other in others:
        other.start()
    table = Table("network", "batch", "Mflop", "one thread, ms", f"{cores} threads / one", f"below {FEW / 1e6:g}")
    for model, width, shape in NETWORKS:
        for rows in BATCHES:
            network = fm.models.build(model, classes=10, in_shape=shape, seed=0, width=width)
            images, labels = torch.randn(rows, *shape), torch.arange(rows) % 10
            found: dict[int, list[float]] = {1: [], cores: []}
            for _ in range(given.rounds):
                for threads in found:
                    torch.set_num_threads(threads)
                    found[threads].append(seconds(network, images, labels))
            cost = operations(network, images)
            one, ratio = median(found[1]), median(b / a for a, b in zip(*found.values(), strict=True))
            table.add_row(
                f"{model} {width:g}", str(rows), f"{cost / 1e6:.1f}", f"{one * 1e3:.2f}", f"{ratio:.2f}",
                "yes" if cost < FEW else "",
            )  # fmt: skip
    for other in others:
        other.terminate()
    Console().print(table)


if __name__ == "__main__":
    main()
