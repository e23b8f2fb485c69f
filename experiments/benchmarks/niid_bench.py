"""Is FedAvg here as strong as the published one, and are FedProx, SCAFFOLD and FedNova?

Question: NIID-Bench's simple CNN on CIFAR-10, ten clients, every client in every round, local SGD of rate 0.01,
momentum 0.9, weight decay 1e-5, batches of 64, reflected crops and flips (Li et al., ICDE 2022, arXiv:2102.02079, and
the loaders of its repository). How accurate is the global network after 50 rounds of 10 local epochs, beside the
published figures and beside FedAvg of the same set-up in plain PyTorch? That is written out below and shares with
fedmerge who holds which images, the network and its first weights, but no draw of batches and crops.

Not as in the source: pixels are normalised by channel; an epoch has batches of nearly equal size (the plain loop has
the source's small last one); 0.4 % of the training images are kept from the clients. SCAFFOLD's correction goes through
the momentum (see ``strategies._scaffold``); its FedProx is the best of several strengths, ours that of ``--mu``.

Cost: 50 rounds of 10 epochs are 390,000 steps a strategy and seed: minutes on a GPU, a day on a CPU core. For a
reduction, ``--rounds``, ``--epochs`` and ``--images`` (those of all clients together). All runs are kept in ``--out``;
a second call goes on where the first was ended.

    FEDMERGE_DATA=... python -m experiments.benchmarks.niid_bench --out runs/niid-bench [--seeds 3]
"""

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks.in_process import InProcess
from fedmerge import data
from fedmerge.streams import torch_stream
from fedmerge.tasks import device_of
from fedmerge.training import evaluate
from server import Run, RunConfig, RunDirectory

PLAIN = "FedAvg, plain PyTorch"
NAMES = {"fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD", "fednova": "FedNova", "plain": PLAIN}
ANCHORS = {
    ("dirichlet", "fedavg"): "68.2 (NIID-Bench), 62.47 ± .43 (Flower)",
    ("dirichlet", "fedprox"): "67.9 (NIID-Bench)",
    ("dirichlet", "scaffold"): "69.8 (NIID-Bench), 68.08 ± .96 (Flower)",
    ("dirichlet", "fednova"): "66.8 (NIID-Bench)",
    ("iid", "fedavg"): "71.32 ± .33 (Flower)",
}
"""Published accuracies in percent: the table of NIID-Bench's repository, and Flower's baseline ``niid_bench``."""


def configuration(given: argparse.Namespace, partition: str, strategy: str, seed: int) -> RunConfig:
    """The set-up as a run of fedmerge. What a reduction takes from the clients lies in the public split, unused."""
    kept = 0.002
    dataset = data.load(given.dataset)
    pool = len(dataset.train) if dataset.test is not None else round(0.8 * len(dataset.train))
    public = max(kept, 1 - kept - given.images / pool) if given.images else kept
    return RunConfig.parse(
        {
            "dataset": given.dataset, "model": "cnn", "kernel-size": given.kernel_size, "clients": given.clients,
            "partition": partition, "partition-alpha": given.alpha, "init": "shared", "rounds": given.rounds,
            "local-epochs": given.epochs, "batch-size": 64, "lr": 0.01, "augment": not given.no_augment,
            "public-fraction": public, "val-fraction": kept, "strategy": strategy,
            "strategy-options": f"proximal_mu={given.mu}" if strategy == "fedprox" else "",
            "controls": "none", "local-evaluation": False, "keep-clients": False, "retrain": "none", "seed": seed,
        },
        "niid_bench",
    )  # fmt: skip


def federate(config: RunConfig, path: Path) -> list[float]:
    """Accuracies of the global network after each round, from a run of fedmerge that is continued if it was begun."""
    directory = RunDirectory.open(path, config, resume=path.exists())
    Run(config, directory).execute(InProcess(config.clients))
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["accuracy"] for line in lines if line["stage"] == "aggregated"]


def plain_federate(config: RunConfig) -> list[float]:
    """FedAvg (McMahan et al., AISTATS 2017, arXiv:1602.05629) without fedmerge: batches, crops, steps and the mean."""
    device = device_of(config.device)
    split, network = config.setup().split(), config.setup().network().to(device)
    test, sizes = split.test_images, [len(c) for c in split.clients]
    clients = [split.client(i).to(device) for i in range(config.clients)]
    draws = torch_stream(config.seed, "plain-fedavg")
    params = {name: value.clone() for name, value in network.state_dict().items()}
    accuracies = []
    for _ in range(config.rounds):
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        for images, size in zip(clients, sizes, strict=True):
            network.load_state_dict(params)
            network.train()
            optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-5)
            pixels = images.normalise(images.images)
            for _ in range(config.epochs()):
                for rows in torch.randperm(size, generator=draws).to(device).tensor_split(list(range(64, size, 64))):
                    batch = crop_and_flip(pixels[rows], draws) if config.augment else pixels[rows]
                    optimizer.zero_grad()
                    F.cross_entropy(network(batch), images.labels[rows]).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
            for name, value in network.state_dict().items():
                total[name] += value * (size / sum(sizes))
        params = total
        accuracies.append(evaluate(network, params, test, device=device).accuracy)
    return accuracies


def crop_and_flip(batch: Tensor, draws: torch.Generator) -> Tensor:
    """Each image padded by four reflected pixels, cut to its size at random, and turned with probability 1/2."""
    count, _, height, width = batch.shape
    padded = F.pad(batch, (4, 4, 4, 4), mode="reflect")
    top, left = (torch.randint(9, (count, 1), generator=draws).to(batch.device) for _ in range(2))
    rows = top + torch.arange(height, device=batch.device)
    columns = left + torch.arange(width, device=batch.device)
    columns = torch.where(torch.rand(count, 1, generator=draws).to(batch.device) < 0.5, columns.flip(1), columns)
    picture = torch.arange(count, device=batch.device)[:, None, None]
    return padded.permute(0, 2, 3, 1)[picture, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, and the published figure, as Markdown."""
    lines = [
        "| Partition | Strategy | Accuracy, % | Seeds | Published, % | Seconds a seed |",
        "|---|---|---|---|---|---|",
    ]
    for (partition, strategy), group in pd.DataFrame(rows).groupby(["partition", "strategy"], sort=False):
        scores = 100 * group["accuracy"]
        spread = "" if len(group) < 2 else f" ± {scores.std():.2f}"
        published = ANCHORS.get((partition, "fedavg" if strategy == "plain" else strategy), "")
        lines.append(
            f"| {partition} | {NAMES[strategy]} | {scores.mean():.2f}{spread} | {len(group)} | {published} | "
            f"{group['seconds'].mean():.0f} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print and keep a row for each partition, strategy and seed."""
    parser = argparse.ArgumentParser(description="NIID-Bench's simple CNN on CIFAR-10, here and in plain PyTorch")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--partitions", nargs="+", default=["iid", "dirichlet"], choices=data.partitions())
    parser.add_argument("--strategies", nargs="+", default=["plain", *list(NAMES)[:-1]], choices=list(NAMES))
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.5, help="concentration of the dirichlet partition")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=10, help="a client's passes over its images in a round")
    parser.add_argument("--images", type=int, default=0, help="of all clients together; 0 for all there are")
    parser.add_argument("--mu", type=float, default=0.01, help="strength of FedProx")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--kernel-size", type=int, default=0, help="of the CNN; 0 is its own 5")
    parser.add_argument("--no-augment", action="store_true", help="without crops and flips")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    file = given.out / "rows.csv"
    terms = {"rounds": given.rounds, "epochs": given.epochs, "images": given.images, "augment": not given.no_augment}
    rows: list[dict[str, Any]] = pd.read_csv(file).to_dict("records") if file.is_file() else []
    if rows and any(rows[0][name] != value for name, value in terms.items()):
        print(f"{file} was measured with other rounds, epochs, images or crops; choose another --out", file=sys.stderr)
        return 2
    given.out.mkdir(parents=True, exist_ok=True)
    for partition in given.partitions:
        for strategy in given.strategies:
            for seed in range(given.seeds):
                if any((r["partition"], r["strategy"], r["seed"]) == (partition, strategy, seed) for r in rows):
                    continue
                config = configuration(given, partition, "fedavg" if strategy == "plain" else strategy, seed)
                began = time.perf_counter()
                if strategy == "plain":
                    accuracies = plain_federate(config)
                else:
                    accuracies = federate(config, given.out / f"{partition}-{strategy}-{seed}")
                seconds = time.perf_counter() - began
                final = accuracies[-1] if accuracies else math.nan
                rows.append(
                    {"partition": partition, "strategy": strategy, "seed": seed, "accuracy": final, "seconds": seconds,
                     **terms}
                )  # fmt: skip
                pd.DataFrame(rows).to_csv(file, index=False)
                print(f"{partition}, {NAMES[strategy]}, seed {seed}: {final:.4f} in {seconds:.0f} s", flush=True)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
