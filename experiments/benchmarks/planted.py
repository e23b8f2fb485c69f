"""Does MergeMany find the true alignment of many networks, when there is one?

Question: N clients are one residual network plus noise of the same size, each with its units in an order of its own.
What share of the oracle's objective (the squared norm of the mean under the true orders) does each merger reach?

Expected: the default start reaches at least 0.99 with 3 and with 12 clients; the paper's own start stays far below
with 12, because the mean of many unaligned networks is noise, and so is what its first pass aligns to.

Cost: about two CPU minutes for 10 seeds.

    python -m experiments.benchmarks.planted [--n 3 12] [--seeds 10]
"""

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor, nn

import fedmerge as fm
from fedmerge.streams import numpy_stream, torch_stream

METHODS = {
    "average": "average",
    "MergeMany, paper's start": "merge-many-paper",
    "MergeMany, anchored (default)": "merge-many",
    "cycle-consistent": "cycle-consistent",
    "hierarchical": "hierarchical",
}
BOUND = 0.99


class Residual(nn.Module):
    """Two residual blocks of 48 hidden units on one stream of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(20, 32)
        self.up = nn.ModuleList([nn.Linear(32, 48) for _ in range(2)])
        self.down = nn.ModuleList([nn.Linear(48, 32) for _ in range(2)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(N, 10)``."""
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        logits: Tensor = self.head(x)
        return logits


def federation(n: int, seed: int, noise: float) -> tuple[fm.PermSpec, list[dict[str, Tensor]], float]:
    """The symmetries, ``n`` clients in orders of their own, and the oracle's objective."""
    network = Residual()
    spec = fm.perm_spec(network, torch.randn(2, 20))
    generator = torch_stream(seed, "planted", n)
    shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
    truth = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    true_order = [
        {name: t + noise * torch.randn(t.shape, generator=generator) for name, t in truth.items()} for _ in range(n)
    ]
    return spec, [fm.permute(m, spec.random(generator), spec=spec) for m in true_order], objective(true_order)


def objective(models: list[dict[str, Tensor]]) -> float:
    """Squared norm of the mean."""
    return sum(float(tensor.double().square().sum()) for tensor in fm.average(models).values())


def main(arguments: list[str] | None = None) -> int:
    """Print the shares; 1 if the default stays below the bound in the mean over the seeds."""
    parser = argparse.ArgumentParser(description="Share of the oracle's objective on planted federations")
    parser.add_argument("--n", type=int, nargs="+", default=[3, 12])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--noise", type=float, default=1.0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| N | merger | share of the oracle, mean ± sd | lowest | CPU s, median |")
    print("|--:|---|--:|--:|--:|")
    fine = True
    for n in given.n:
        for title, method in METHODS.items():
            if method not in fm.mergers():
                continue
            shares, seconds = [], []
            for seed in range(given.seeds):
                spec, models, oracle = federation(n, seed, given.noise)
                began = time.process_time()
                found = fm.merge(models, spec=spec, method=method, rng=numpy_stream(seed, "merge"))
                seconds.append(time.process_time() - began)
                shares.append(objective([found.params]) / oracle)
            spread = statistics.stdev(shares) if len(shares) > 1 else 0.0
            print(
                f"| {n} | {title} | {statistics.mean(shares):.3f} ± {spread:.3f} | {min(shares):.3f} | "
                f"{statistics.median(seconds):.2f} |",
                flush=True,
            )
            fine = fine and (method != "merge-many" or statistics.mean(shares) >= BOUND)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
