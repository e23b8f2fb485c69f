"""Does tracing find the permutation symmetries of networks that are no plain classifiers?

Question: for small networks of many families (transposed layers, grouped queries, norms that cast, parametrised
weights, recurrent layers, scans, experts, adapters), how much of each may move, does a random permutation of all groups
keep its output (relative error in float64 below 1e-9), and what stays, for which reason?

Expected: every error below the bound, and a share of at least 0.9, but for the networks in ``STAYS``, whose reason is
a part of their function. The exit status is 1 if an error, a share or a reason is another.

Cost: about ten CPU seconds.

    python -m experiments.benchmarks.hard_networks [--networks GPT-2 LSTM ...] [--seed 0]
"""

import argparse
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from experiments.benchmarks.hard_nets import NETWORKS
from experiments.benchmarks.zoo import ERROR_BOUND, SHARE_BOUND, Traced, single_thread, traced
from fedmerge.spec import PermSpec, permute
from fedmerge.spec.lifted import Lifted

STAYS = {
    "CNN, channels convolved": "reads its positions with their neighbours",
    "MLP, orthogonal layer": "keeps one side of the diagonal",
}
"""Networks of a lower share, and what in their function forbids more."""


@dataclass(frozen=True, kw_only=True)
class Row(Traced):
    """What is measured on a hard network.

    Attributes:
        stays: Reasons of the axes that stay without being an input, an output or a position, with their number of axes.
    """

    stays: dict[str, int]

    def right(self) -> bool:
        """Whether the network keeps its function, and enough of it moves or the known reason forbids it."""
        known = STAYS.get(self.name)
        enough = self.share >= SHARE_BOUND if known is None else any(known in reason for reason in self.stays)
        return self.error < ERROR_BOUND and enough and not any("changed the output" in reason for reason in self.stays)


def measure(network: str, seed: int = 0) -> Row:
    """Trace one network and run it permuted."""
    torch.manual_seed(seed)
    model, x = NETWORKS[network]()
    spec, found = traced(network, model.eval(), x, partial(permuted_error, seed=seed))
    ends = ("an input of the network", "an output of the network")
    reasons = (re.sub(r"_\d+\b", "", f.reason) for f in spec.frozen if f.reason not in ends)
    return Row(**found, stays=dict(Counter(reasons).most_common()))


@torch.no_grad()
def permuted_error(model: nn.Module, spec: PermSpec, x: Tensor, seed: int = 0) -> float:
    """Relative distance of the outputs of ``model`` before and after a random permutation, in float64 throughout.

    Every weight and estimate that moves is first drawn anew, so that no zero bias hides a mistake.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    state = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    for name, tensor in state.items():
        if tensor.is_floating_point() and any(spec.axes[name]):
            state[name] = state[name] * (0.5 + torch.rand(tensor.shape, generator=generator).double()) + 0.02
    moved = permute(state, spec.random(generator), spec=spec)
    x = x.double() if x.is_floating_point() else x
    with Lifted():  # type: ignore[no-untyped-call]
        before, after = (torch.func.functional_call(model.eval(), s, (x,), tie_weights=False) for s in (state, moved))
    error = float((before - after).norm() / before.norm())
    return error if error == error else float("inf")


def main(arguments: list[str] | None = None) -> int:
    """Print a row a network and a summary; 1 if one is not as it should be."""
    parser = argparse.ArgumentParser(description="Permutation symmetries of networks of many families")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print("| network | parameters | groups | share | error | CPU s | what stays, and why (axes) |")
    print("|---|--:|--:|--:|--:|--:|---|")
    rows: list[Row] = []
    with single_thread():
        for network in given.networks:
            row = measure(network, given.seed)
            rows.append(row)
            stays = "; ".join(f"{reason} ({n})" for reason, n in row.stays.items()) or "inputs and outputs only"
            print(f"| {row} | {row.seconds:.2f} | {stays} |", flush=True)
    right = sum(row.right() for row in rows)
    wide = sum(row.share >= SHARE_BOUND for row in rows)
    print(f"\n{len(rows)} networks: as expected {right}; share of at least {SHARE_BOUND} in {wide}")
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
