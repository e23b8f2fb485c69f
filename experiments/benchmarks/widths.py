"""Can networks of different widths be fused, and is it worth anything after a short retrain?

Question: two VGG11 of widths 0.5 and 1 (no normalisation layers) are trained on disjoint parts of CIFAR-10, each from
its own initialisation. Fused by optimal transport into the width of either, how accurate is the result, before and
after a short training on the public split, beside what one would do without fusion?

The plain alternatives, each with the same retraining: the network of the wanted width alone; the two averaged unit
for unit as far as the narrow one reaches (the rest kept from the wide one, or cut off); public images only, from a
fresh initialisation.

Cost: two VGG11 are trained for six epochs (25 CPU minutes on one core); each retraining of the wide one takes about
a minute an epoch on 5,000 images.

    python -m experiments.benchmarks.widths [--narrow 0.5] [--wide 1] [--epochs 2] --out runs/widths
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

import fedmerge as fm
from experiments.benchmarks.clients import trained
from fedmerge.merge import ensemble, ordered
from fedmerge.streams import numpy_stream, torch_stream
from fedmerge.tasks import ClientTask

Params = dict[str, Tensor]

TASK = ClientTask(
    dataset="cifar10", clients=4, model="vgg11", public_fraction=0.1, val_fraction=0.05, local_epochs=6, device="auto"
)


def cut(params: Params, like: Params) -> Params:
    """``params`` brought to the shapes of ``like``: units beyond them cut off, missing ones taken from ``like``."""
    fitted = {}
    for name, target in like.items():
        shared = tuple(slice(0, min(a, b)) for a, b in zip(params[name].shape, target.shape, strict=True))
        fitted[name] = target.clone()
        fitted[name][shared] = params[name][shared]
    return fitted


def main(arguments: list[str] | None = None) -> int:
    """Print and keep a row a network."""
    parser = argparse.ArgumentParser(description="Fusion of two widths of one network")
    parser.add_argument("--dataset", default=TASK.dataset)
    parser.add_argument("--model", default=TASK.model)
    parser.add_argument("--narrow", type=float, default=0.5)
    parser.add_argument("--wide", type=float, default=1.0)
    parser.add_argument("--local-epochs", type=int, default=TASK.local_epochs)
    parser.add_argument("--epochs", type=int, default=2, help="of the retraining on the public split")
    parser.add_argument("--test-images", type=int, default=0, help="evaluate on the first so many; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=Path, default=Path("runs/benchmark-clients"), help="where networks are kept")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = replace(
        TASK, dataset=given.dataset, model=given.model, seed=given.seed, local_epochs=given.local_epochs, device=device
    )
    tasks = {"wide": replace(task, width=given.wide), "narrow": replace(task, width=given.narrow)}
    split = task.split()
    public, test = split.public_images, split.test_images
    if given.test_images:
        test = test.select(range(min(len(test), given.test_images)))
    networks: dict[str, nn.Module] = {name: t.network() for name, t in tasks.items()}
    clients = {name: trained(given.clients, t, range(i, i + 1))[0] for i, (name, t) in enumerate(tasks.items())}
    spec = fm.perm_spec(networks["wide"], public.normalise(public.images[:2]))
    rows: list[dict[str, object]] = []

    def show(result: str, method: str, params: Params, seconds: float = 0.0) -> None:
        model = networks[result]
        before = fm.evaluate(model, params, test, device=device).accuracy
        recipe = replace(task.recipe(), lr=task.recipe().lr / 5)
        after = fm.train(
            model, params, public, recipe=recipe, epochs=given.epochs,
            generator=torch_stream(given.seed, "retrain"), device=device,
        )  # fmt: skip
        accuracy = fm.evaluate(model, after.params, test, device=device).accuracy
        rows.append({"result": result, "method": method, "before": before, "after": accuracy, "cpu_seconds": seconds})
        print(f"{result:7s} {method:34s} {before:.4f} -> {accuracy:.4f}   {seconds:6.1f} CPU s", flush=True)

    few = public.select(range(min(len(public), 500)))

    def fused(result: str, other: str, ground: str, *, repair: bool) -> Params:
        pair = [clients[result], clients[other]]
        seen: dict[str, Any] = {"model": [networks[result], networks[other]], "data": few}
        seen = seen if ground == "activations" else {}
        found = fm.merge(
            pair, spec=spec, method="ot-fusion", ground=ground, rng=numpy_stream(given.seed, "merge"), **seen
        )
        if not repair:
            return found.params
        sources = ordered(pair, found, spec=spec)
        return fm.repair(networks[result], found.params, data=few, method="repair", sources=sources, device=device)

    together = torch.stack([ensemble(networks[name], [clients[name]], test, device=device) for name in clients]).mean(0)
    score = float((together.argmax(1) == test.labels).float().mean())
    print(f"ensemble of both {score:.4f}", flush=True)
    for result, other in (("wide", "narrow"), ("narrow", "wide")):
        own, theirs = clients[result], clients[other]
        fusions: dict[str, Callable[[], Params]] = {
            f"OT by {ground}" + " + REPAIR" * repair: partial(fused, result, other, ground, repair=repair)
            for ground in ("weights", "activations")
            for repair in (False, True)
        }
        fusions["unit for unit"] = partial(fm.average, [own, cut(theirs, own)])
        show(result, "alone", own)
        for method, fuse in fusions.items():
            began = time.process_time()
            params = fuse()
            show(result, method, params, time.process_time() - began)
        show(result, "public only, fresh", dict(networks[result].state_dict()))
    given.out.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows).assign(ensemble=score)
    frame.to_csv(given.out / "rows.csv", index=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
