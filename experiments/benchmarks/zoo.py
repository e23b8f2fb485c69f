"""Does tracing find the permutation symmetries of networks it has never seen?

Question: for every classification network of torchvision, does a random permutation of all traced groups keep
the output in float64 (relative error below 1e-9), and how much of the network may move?

Expected: every error below the bound, and more than 0.9 of the parameters on a permutable axis in at least
90 % of the networks: all but ``googlenet`` and ``inception_v3``, whose auxiliary heads eval mode does not use.
The exit status is 1 if an error bound fails.

Cost: about nine CPU minutes for all networks on one thread, more than half of them in building and running the
networks, and 10 GB of memory for the widest (``regnet_y_128gf``, 645 million parameters); one network is held at a
time.

    python -m experiments.benchmarks.zoo [--models resnet18 vit_b_16 ...] [--seed 0]
"""

import argparse
import contextlib
import gc
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fedmerge.spec import PermSpec, perm_spec
from fedmerge.spec.axes import axis_index

ERROR_BOUND = 1e-9
SHARE_BOUND = 0.9
_PIXELS = 64
_SIZES = {"vit_b_32": 96, "vit_l_32": 96, "inception_v3": 96, "alexnet": 96}
_BATCH = 2
_FIRST = "resnet18"


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What is measured on any network.

    Attributes:
        name: What it is called.
        parameters: Their number.
        groups: Number of groups of units that move together.
        share: Share of the parameters on a permutable axis.
        error: Relative distance of the outputs before and after a random permutation, in float64.
        seconds: CPU seconds of the tracing, its proof included.
    """

    name: str
    parameters: int
    groups: int
    share: float
    error: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.name} | {self.parameters:,} | {self.groups} | {self.share:.4f} | {self.error:.1e}"


@dataclass(frozen=True, kw_only=True)
class Row(Traced):
    """What is measured on a network of torchvision.

    Attributes:
        log10_symmetries: log10 of the number of permutations.
        frozen: Number of axes that stay without being an input, an output or a position.
        reason: The most frequent reason for them, or for all frozen axes if there is none.
    """

    log10_symmetries: float
    frozen: int
    reason: str


def traced(
    name: str, network: nn.Module, x: Tensor, error: Callable[[nn.Module, PermSpec, Tensor], float]
) -> tuple[PermSpec, dict[str, Any]]:
    """The symmetries of a network, and what :class:`Traced` says of it; ``error`` runs it permuted."""
    parameters, start = sum(p.numel() for p in network.parameters()), time.process_time()
    spec = perm_spec(network, x)
    seconds = time.process_time() - start
    return spec, {
        "name": name, "parameters": parameters, "groups": len(spec.groups), "share": spec.permutable_share(),
        "error": error(network, spec, x), "seconds": seconds,
    }  # fmt: skip


def names() -> list[str]:
    """Every classification network of torchvision."""
    return list(torchvision.models.list_models(module=torchvision.models))


def build(model: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A freshly initialised network, and random images of the smallest size that it comfortably takes."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = _SIZES.get(model, _PIXELS)
    options: dict[str, Any] = {}
    if model.startswith("vit"):
        pixels = 56 if model == "vit_h_14" else pixels
        options = {"image_size": pixels}
    elif model == "maxvit_t":  # its windows of 7 divide every resolution only from 224 on
        pixels = 224
        options = {"input_size": (pixels, pixels)}
    elif model in ("googlenet", "inception_v3"):
        options = {"init_weights": True}
    network = torchvision.models.get_model(model, weights=None, **options).eval()
    return network, torch.randn(_BATCH, 3, pixels, pixels, generator=generator)


def measure(model: str, seed: int = 0) -> Row:
    """Trace one network and run it permuted."""
    spec, found = traced(model, *build(model, seed), partial(permuted_error, seed=seed))
    inner = Counter(f.reason for f in spec.frozen if not f.reason.endswith(" of the network"))
    reasons = inner or Counter(f.reason for f in spec.frozen)
    return Row(
        **found, log10_symmetries=spec.log10_symmetries(), frozen=sum(inner.values()),
        reason=reasons.most_common(1)[0][0] if reasons else "",
    )  # fmt: skip


@torch.no_grad()
def permuted_error(network: nn.Module, spec: PermSpec, x: Tensor, seed: int = 0) -> float:
    """Relative distance of the outputs of ``network`` before and after a random permutation; it is consumed.

    Every weight and statistic is first drawn anew, so that no zero bias hides a mistake. The network is
    permuted in place, tensor by tensor, to hold its weights about once.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    network.double().eval()
    x = x.double()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and any(spec.axes.get(name, ())):
            factor, term = (torch.rand(tensor.shape, generator=generator, dtype=torch.float32) for _ in range(2))
            if tensor.dim() > 1:  # of mean 0 and about the scale of a fresh layer, for deep networks overflow
                term.sub_(0.5).div_((tensor.numel() / tensor.shape[0]) ** 0.5)
            tensor.mul_(factor.add_(0.5)).add_(term, alpha=0.05 if tensor.dim() < 2 else 0.5)
            del factor, term
    before = network(x)
    perms = spec.random(generator)
    for name, tensor in tensors.items():
        for dim, axis in enumerate(spec.axes.get(name, ())):
            if axis:
                tensor.copy_(tensor.index_select(dim, axis_index(axis, perms)))
    after = network(x)
    error = float((before - after).norm() / before.norm())
    return error if error == error else float("inf")


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """CPU seconds that do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def main(arguments: list[str] | None = None) -> int:
    """Print a row a network and a summary; 1 if a permutation changed an output."""
    parser = argparse.ArgumentParser(description="Permutation symmetries of torchvision's networks")
    parser.add_argument("--models", nargs="+", choices=names(), default=names(), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    print("| model | parameters | groups | share | error | log10 symmetries | CPU s | frozen axes | main reason |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    rows: list[Row] = []
    with single_thread():
        cold = measure(_FIRST, given.seed).seconds  # the first export of a process loads and compiles
        for model in given.models:
            row = measure(model, given.seed)
            rows.append(row)
            print(
                f"| {row} | {row.log10_symmetries:.0f} | {row.seconds:.2f} | {row.frozen} | {row.reason} |",
                flush=True,
            )
            gc.collect()
    right = sum(row.error < ERROR_BOUND for row in rows)
    wide = sum(row.share > SHARE_BOUND for row in rows)
    print(
        f"\n{len(rows)} networks: error below {ERROR_BOUND:g} in {right}; share above {SHARE_BOUND} in {wide} "
        f"({100 * wide / len(rows):.0f} %); {sum(row.seconds for row in rows):.0f} CPU seconds of tracing; "
        f"{cold:.2f} for {_FIRST} as the first of the process"
    )
    return 0 if right == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
