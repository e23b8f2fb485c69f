"""Is alignment here faster and better than where users would otherwise get it?

Question: on the same pairs of networks, in one process and in turn, what does an alignment cost in CPU seconds, what
objective does it reach, and does the permuted network still compute the same function? And what does merging many cost?

Ours are the aligners that need no images. The peers are those that a user has installed:

* ``rebasin`` (0.0.47 was measured): permutation coordinate descent and MergeMany, its own tracing included, because
  it cannot be had apart;
* ``ot`` (POT): layer-by-layer exact transport of incoming weights, as in OTFusion, with our specification and
  ``ot.emd`` as the solver.

The objective is the inner product of the reference and the permuted network over all trained parameters, in float64,
computed by this script for everyone. The output error is relative, in eval mode, on random images, with random affine
parameters and running statistics, so that nothing that stays behind goes unseen. Each network comes as a pair of
random weights, and as a planted pair (one network, permuted, plus noise of its own size), in which there is something
to find. ``--trained`` adds a pair of clients, trained on disjoint images from initialisations of their own, and for
``--many`` twelve of them; they are trained if need be, and kept.

Cost: about 15 CPU minutes, nearly all of it the peers'; training the pairs takes another 30.

    python -m experiments.benchmarks.alignment [--models vgg11 resnet18] [--repeats 3] [--many 2 3 6 12] [--trained]
"""

import argparse
import copy
import importlib.util
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedmerge as fm
from experiments.benchmarks import clients
from experiments.benchmarks.clients import trained
from experiments.benchmarks.zoo import single_thread
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.tasks import ClientTask

Params = dict[str, Tensor]
SIZES: Mapping[str, tuple[tuple[int, int, int], float]] = {
    "mlp": ((1, 28, 28), 512),
    "vgg11": ((3, 32, 32), 0),
    "resnet20": ((3, 32, 32), 0),
    "resnet18": ((3, 32, 32), 0),
    "hlb": ((3, 32, 32), 16),
}
TRAINED: Mapping[str, ClientTask] = {
    "mlp": replace(clients.TASK, dataset="mnist", model="mlp", width=512, local_epochs=4),
    "vgg11": replace(clients.TASK, width=1),
    "resnet20": replace(clients.TASK, model="resnet20", local_epochs=4),
    "resnet18": replace(clients.TASK, model="resnet18", clients=16, local_epochs=2),
    "hlb": replace(clients.TASK, clients=12, model="hlb", width=16, local_epochs=10),
}
"""Whose clients the trained networks are."""
CLIENTS = Path("runs/benchmark-clients")
OURS: Mapping[str, dict[str, Any]] = {
    "fedmerge weight-matching": {"method": "weight-matching"},
    "fedmerge weight-matching, 5 restarts": {"method": "weight-matching", "restarts": 5},
    "fedmerge optimal-transport": {"method": "optimal-transport"},
    "fedmerge optimal-transport + polish": {"method": "optimal-transport", "polish": True},
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network and images for it."""
    shape, width = SIZES[name]
    model = fm.models.build(name, classes=10, in_shape=shape, width=width, seed=0).eval()
    return model, torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module, seed: int) -> Params:
    """The state of a fresh network whose biases, affine parameters and statistics are drawn too."""
    generator = torch_stream(seed, "benchmark-weights")
    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            state[name] = tensor.clone()
        elif name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        elif tensor.dim() == 1:
            middle = 1.0 if name.endswith("weight") else 0.0
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.3 + middle
        else:
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / tensor[0].numel()) ** 0.5
    return state


def noisy(state: Params, seed: int) -> Params:
    """A state dict with noise of its own size on every parameter and none on the statistics."""
    generator = torch_stream(seed, "benchmark-noise")
    return {
        name: tensor + tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1 else tensor.clone()
        for name, tensor in state.items()
    }  # fmt: skip


def group_of(model: nn.Module, spec: fm.PermSpec, kind: str, n: int, name: str = "") -> list[Params]:
    """``n`` networks with random weights, ``n`` noisy copies of one, each in an order of its own, or ``n`` clients."""
    if kind == "trained":
        return trained(CLIENTS, TRAINED[name], range(n), say=lambda line: None)
    if kind == "random":
        return [drawn(model, i) for i in range(n)]
    generator = torch_stream(0, "benchmark-orders")
    truth = drawn(model, 0)
    return [fm.permute(noisy(truth, i), spec.random(generator), spec=spec) for i in range(n)]


def objective(a: Params, b: Params, spec: fm.PermSpec) -> float:
    """Inner product over the trained parameters."""
    return sum(float((a[name].double() * b[name].double()).sum()) for name in spec.parameters)


@torch.no_grad()
def output_error(model: nn.Module, before: Params, after: Params, images: Tensor) -> float:
    """Relative distance of the outputs of two state dicts, which should be one function."""
    outputs = []
    for state in (before, after):
        held = copy.deepcopy(model).double().eval()
        held.load_state_dict(state)
        outputs.append(held(images.double()))
    return float((outputs[0] - outputs[1]).norm() / outputs[0].norm())


def holding(model: nn.Module, state: Params) -> nn.Module:
    """A copy of the network with that state, in eval mode."""
    held = copy.deepcopy(model)
    held.load_state_dict(state)
    return held.eval()


def by_rebasin(model: nn.Module, a: Params, b: Params, spec: fm.PermSpec, images: Tensor) -> Params:
    """Permutation coordinate descent of ``rebasin``, which moves the second network in place."""
    from rebasin import PermutationCoordinateDescent

    moved = holding(model, b)
    PermutationCoordinateDescent(holding(model, a), moved, images[:2]).rebasin()
    return {name: tensor.detach().clone() for name, tensor in moved.state_dict().items()}


def by_pot(model: nn.Module, a: Params, b: Params, spec: fm.PermSpec, images: Tensor) -> Params:
    """Exact OTFusion with POT: every plan by ``ot.emd``, masses by norm, since equal ones would not need POT."""
    found = fm.merge([a, b], spec=spec, method="ot-fusion", mass="norm", normalise=True)
    perms = {g: torch.from_numpy(_harden(plan)) for g, plan in found.maps[1].items()}
    return fm.permute(b, perms, spec=spec)


def _harden(plan: Tensor) -> Any:
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(plan.numpy(), maximize=True)[1]


def contenders(peers: Sequence[str]) -> dict[str, Callable[..., Params]]:
    """Name -> ``(model, a, b, spec, images) -> b``, permuted."""
    found: dict[str, Callable[..., Params]] = {}
    for name, options in OURS.items():

        def ours(
            model: nn.Module, a: Params, b: Params, spec: fm.PermSpec, images: Tensor, options: Any = options
        ) -> Params:
            return fm.permute(b, fm.align(b, to=a, spec=spec, rng=numpy_stream(0, "align"), **options).perms, spec=spec)

        found[name] = ours
    if "rebasin" in peers:
        found["rebasin"] = by_rebasin
    if "ot" in peers:
        found["POT, OTFusion with mass by norm"] = by_pot
    return found


def pairs(models: Sequence[str], repeats: int, peers: Sequence[str], kinds: Sequence[str]) -> None:
    """The table of pairs."""
    print("| network | weights | method | CPU s | ratio | objective | error of the output |")
    print("|---|---|---|--:|--:|--:|--:|")
    for name in models:
        model, images = network(name)
        spec = fm.perm_spec(model, images[:2])
        for kind in kinds:
            a, b = group_of(model, spec, kind, 2, name)
            seconds: dict[str, list[float]] = {}
            moved: dict[str, Params] = {}
            failed: dict[str, str] = {}
            for _ in range(repeats):  # in turn, so that a busy machine is busy for everyone
                for method, align in contenders(peers).items():
                    began = time.process_time()
                    try:
                        moved[method] = align(model, a, b, spec, images)
                    except Exception as error:
                        failed[method] = f"{type(error).__name__}: {error}"[:80]
                        continue
                    seconds.setdefault(method, []).append(time.process_time() - began)
            base = statistics.median(seconds["fedmerge weight-matching"])
            for method in contenders(peers):
                if method in failed:
                    print(f"| {name} | {kind} | {method} | failed | | {failed[method]} | |")
                    continue
                spent = statistics.median(seconds[method])
                print(
                    f"| {name} | {kind} | {method} | {spent:.2f} | {spent / base:.1f} | "
                    f"{objective(a, moved[method], spec):.1f} | {output_error(model, b, moved[method], images):.0e} |",
                    flush=True,
                )


def many(name: str, counts: Sequence[int], peers: Sequence[str], kinds: Sequence[str]) -> None:
    """The table of many models."""
    model, images = network(name)
    spec = fm.perm_spec(model, images[:2])
    ours: dict[str, dict[str, Any]] = {
        "fedmerge merge-many": {"method": "merge-many"},
        "fedmerge merge-many, 1 restart": {"method": "merge-many", "restarts": 1},
        "fedmerge weight-matching to the first, mean": {"method": "merge-many", "restarts": 1, "max_sweeps": 0},
        "fedmerge merge-many, paper's start": {"method": "merge-many-paper"},
        "fedmerge ot-fusion (exact)": {"method": "ot-fusion"},
    }
    print(f"\n| {name}, n | weights | method | CPU s | squared norm of the mean |")
    print("|--:|---|---|--:|--:|")
    for n in counts:
        for kind in kinds:
            models = group_of(model, spec, kind, n, name)
            results: dict[str, tuple[float, Params]] = {}
            for method, options in ours.items():
                began = time.process_time()
                found = fm.merge(models, spec=spec, rng=numpy_stream(0, "merge"), **options)
                results[method] = time.process_time() - began, found.params
            if "rebasin" in peers:
                from rebasin import MergeMany

                held = [holding(model, m) for m in models]
                began = time.process_time()
                try:
                    working = copy.deepcopy(model)
                    merged = MergeMany(held, working, images[:2]).run()
                    results["rebasin MergeMany"] = time.process_time() - began, dict(merged.state_dict())
                except Exception as error:
                    print(f"| {n} | {kind} | rebasin MergeMany | failed | {type(error).__name__}: {error} |")
            for method, (spent, params) in results.items():
                value = objective(params, params, spec)
                print(f"| {n} | {kind} | {method} | {spent:.2f} | {value:.1f} |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print tracing, pairs and many."""
    parser = argparse.ArgumentParser(description="Alignment against its peers")
    four = [name for name in SIZES if name != "hlb"]
    parser.add_argument("--models", nargs="*", choices=SIZES, default=four, metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--many", type=int, nargs="*", default=[2, 3, 6, 12])
    parser.add_argument("--many-model", choices=SIZES, default="vgg11")
    parser.add_argument("--many-kinds", nargs="+", choices=("random", "planted", "trained"), default=["planted"])
    parser.add_argument("--peers", nargs="*", choices=("rebasin", "ot"), default=["rebasin", "ot"])
    parser.add_argument("--trained", action="store_true", help="pairs of trained clients, too")
    given = parser.parse_args(arguments)
    missing = [peer for peer in given.peers if importlib.util.find_spec(peer) is None]
    peers = [peer for peer in given.peers if peer not in missing]
    print("peers that are not installed: " + (", ".join(missing) or "none"))
    logging.disable(logging.WARNING)
    with single_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        print("\n| network | tracing, CPU s, first of the process, then median of 3 |\n|---|--:|")
        for name in given.models:
            model, images = network(name)
            spent = []
            for _ in range(4):
                began = time.process_time()
                fm.perm_spec(model, images[:2])
                spent.append(time.process_time() - began)
            print(f"| {name} | {spent[0]:.2f}, {statistics.median(spent[1:]):.2f} |", flush=True)
        print()
        if given.models:
            pairs(given.models, given.repeats, peers, ["random", "planted", *["trained"] * given.trained])
        if given.many:
            many(given.many_model, given.many, peers, given.many_kinds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
