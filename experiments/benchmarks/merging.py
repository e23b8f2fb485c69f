"""How much of the clients' accuracy does each way of merging keep, and how does that fall with their number?

Question: n networks are trained on disjoint parts of one data set, each from its own initialisation. How accurate is
their merge, by every merger of the registry, before and after its normalisation statistics are corrected on public
images, beside the mean client, the best client (chosen on val) and the ensemble?

Every number is of the test split; every choice (the best client, the greedy soup) is made on val; statistics, Fisher
information and the like come from the public split. The same clients serve every merger (paired). Mergers that need
a common base (task arithmetic, TIES) are left out, because independent initialisations have none.

Rows are appended to ``rows.csv`` as they are measured, and what is there is not measured again; the tables and the
picture are made from that file.

Cost: CIFAR-10 with ``hlb`` of base width 16 and 12 clients trains for about 10 CPU minutes a seed, and merges for
about as long.

    python -m experiments.benchmarks.merging cifar10 --n 3 6 9 12 --seeds 0 1 2 --out runs/merging-cifar10
    python -m experiments.benchmarks.merging mnist --n 6 --seeds 0 1 2 --out runs/merging-mnist
"""

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import torch
from torch import Tensor, nn

import fedmerge as fm
from experiments.benchmarks.clients import trained
from experiments.benchmarks.rows import Rows
from fedmerge.data import Images
from fedmerge.merge import ensemble, ordered, takes
from fedmerge.models import recipe
from fedmerge.streams import numpy_stream
from fedmerge.tasks import ClientTask

Params = dict[str, Tensor]

TASKS = {
    "cifar10": ClientTask(
        dataset="cifar10", clients=12, model="hlb", width=16, public_fraction=0.1, val_fraction=0.05,
        local_epochs=10, device="auto",
    ),
    "digits": ClientTask(
        dataset="digits", clients=6, model="mlp", width=32, public_fraction=0.1, val_fraction=0.1, local_epochs=10,
        device="auto",
    ),
    "mnist": ClientTask(
        dataset="mnist", clients=6, model="mlp", public_fraction=1 / 60, val_fraction=0.05, local_epochs=10,
        device="auto",
    ),
}  # fmt: skip
_PLAIN = ("none", "repair", "repair-closed-form")
REPAIRS = {"cifar10": ("none", "recompute"), "mnist": _PLAIN, "digits": _PLAIN}
LOOKED_AT, LOOKED_AT_BY_FISHER = 1000, 200
"""Public images that statistics, Gram matrices and activation matching, and Fisher information, look at."""

EXTRA: Mapping[str, tuple[str, dict[str, Any]]] = {
    "merge-many, activation matching": ("merge-many", {"aligner": "activation-matching", "restarts": 1}),
    "merge-many, optimal transport": ("merge-many", {"aligner": "optimal-transport", "restarts": 1}),
}
"""Variants of a merger that are a row of their own."""


KEYS = ("seed", "n", "method", "repair")


def first(images: Images, count: int) -> Images:
    """The first images, or all if there are fewer."""
    return images.select(range(min(len(images), count)))


def options_of(method: str, model: nn.Module, public: Images, val: Images, task: ClientTask) -> dict[str, Any]:
    """What a merger needs besides the networks."""
    few = first(public, LOOKED_AT_BY_FISHER if method == "fisher" else LOOKED_AT)
    options: dict[str, Any] = {}
    if "data" in takes(method):
        options |= {"model": model, "data": val if method == "greedy-soup" else few}
    if method == "ensemble-distillation":
        options |= {"data": public, "recipe": recipe(task.model), "epochs": 5}
    return options


def measure(
    task: ClientTask, ns: Sequence[int], seed: int, methods: Sequence[str], table: Rows, folder: Path, tested: int
) -> None:
    """Every row of one seed that is not there yet."""
    asked = [("ensemble", ""), *((name, how) for name in methods for how in REPAIRS[task.dataset])]
    if all(table.has(seed=seed, n=n, method=name, repair=how) for n in ns for name, how in asked):
        return
    task = replace(task, seed=seed)
    split, model = task.split(), task.network()
    public, val = split.public_images, split.val_images
    test = first(split.test_images, tested) if tested else split.test_images
    spec = fm.perm_spec(model, public.normalise(public.images[:2]))
    clients = trained(folder, task, range(max(ns)))
    base: dict[str, Any] = {"dataset": task.dataset, "model": task.model, "width": task.width, "seed": seed}
    test_scores = [fm.evaluate(model, c, test).accuracy for c in clients]
    val_scores = [fm.evaluate(model, c, val).accuracy for c in clients]
    for n in ns:
        few, weights = clients[:n], [float(len(held)) for held in split.clients[:n]]
        if not table.has(seed=seed, n=n, method="ensemble", repair=""):
            best = max(range(n), key=val_scores.__getitem__)
            together = ensemble(model, few, test).argmax(1)
            for name, value in (
                ("mean client", sum(test_scores[:n]) / n),
                ("best client", test_scores[best]),
                ("ensemble", float((together == test.labels).float().mean())),
            ):
                table.add(**base, n=n, method=name, repair="", accuracy=value, cpu_seconds=0.0)
        for name in methods:
            method, more = EXTRA.get(name, (name, {}))
            repairs = [r for r in REPAIRS[task.dataset] if not table.has(seed=seed, n=n, method=name, repair=r)]
            if not repairs:
                continue
            options = options_of(method, model, public, val, task) | more
            if more.get("aligner") == "activation-matching":
                options["aligner_options"] = {"model": model, "data": first(public, LOOKED_AT)}
            began = time.process_time()
            rng = numpy_stream(seed, "merge", n)
            found = fm.merge(few, spec=spec, method=method, weights=weights, rng=rng, **options)
            spent = time.process_time() - began
            sources = ordered(few, found, spec=spec)
            for how in repairs:
                began = time.process_time()
                params = fm.repair(
                    model, found.params, data=first(public, LOOKED_AT), method=how, sources=sources, weights=weights
                )
                cost = spent + time.process_time() - began
                accuracy = fm.evaluate(model, params, test).accuracy
                table.add(**base, n=n, method=name, repair=how, accuracy=accuracy, cpu_seconds=cost)


def summary(path: Path) -> pd.DataFrame:
    """Method and repair against n: mean ± sd over seeds of the accuracy, in %, and the median CPU seconds."""
    rows = pd.read_csv(path, keep_default_na=False)
    groups = rows.groupby(["method", "repair", "n"], sort=False)
    table = groups["accuracy"].agg(["mean", "std", "count"]).join(groups["cpu_seconds"].median())
    return table.reset_index()


def markdown(found: pd.DataFrame) -> str:
    """The summary as a table for people: a row a method, a column a number of clients."""
    ns = sorted(found["n"].unique())
    lines = ["| method | statistics | " + " | ".join(f"n = {n}" for n in ns) + " | CPU s, n = " + f"{ns[-1]} |"]
    lines.append("|---|---|" + "---:|" * (len(ns) + 1))
    for (method, how), part in found.groupby(["method", "repair"], sort=False):
        cells = part.set_index("n")
        shown = [_percent(cells.loc[n, "mean"], cells.loc[n, "std"]) if n in cells.index else "–" for n in ns]
        seconds = f"{cells.loc[ns[-1], 'cpu_seconds']:.1f}" if ns[-1] in cells.index else "–"
        lines.append(f"| {method} | {how} | " + " | ".join(shown) + f" | {seconds} |")
    return "\n".join(lines)


def _percent(mean: float, sd: float) -> str:
    return f"{100 * mean:.1f}" + ("" if pd.isna(sd) else f" ± {100 * sd:.1f}")


def picture(found: pd.DataFrame, out: Path, published: Mapping[int, float] | None = None) -> None:
    """Accuracy against the number of clients: every merger at its best repair, with the clients and the ensemble."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    last = found["n"].max()
    colours = iter(plt.get_cmap("tab20").colors)  # type: ignore[attr-defined]
    labels = []
    for method, part in found.groupby("method", sort=False):
        ends = part[part["n"] == last]
        if ends.empty:
            continue
        how = ends.loc[ends["mean"].idxmax(), "repair"]
        line = part[part["repair"] == how].sort_values("n")
        reference = method in ("mean client", "best client", "ensemble")
        colour = "0.35" if reference else next(colours)
        axes.errorbar(
            line["n"], 100 * line["mean"], 100 * line["std"].fillna(0), color=colour, marker="o", markersize=4,
            linestyle="--" if reference else "-", capsize=2,
        )  # fmt: skip
        labels.append((100 * float(line["mean"].iloc[-1]), f"{method}" + (f" + {how}" if how else ""), colour))
    if published:
        axes.plot(list(published), [100 * v for v in published.values()], ":k", marker="x")
        labels.append((100 * list(published.values())[-1], "published MergeMany (width 64, full data)", "k"))
    low, gap = -1e9, 3.2
    for height, text, colour in sorted(labels):
        low = max(height, low + gap)
        axes.annotate(text, (last, height), (last + 0.45, low), fontsize=7.5, color=colour, va="center",
                      arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5})  # fmt: skip
    axes.set(xlabel="number of clients n", ylabel="test accuracy, %", xticks=sorted(found["n"].unique()))
    axes.set_xlim(right=last + (last - found["n"].min()) * 0.75 + 1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, then write ``rows.csv``, ``table.md`` and ``picture.png``."""
    based = {name for name in fm.mergers() if "base" in takes(name)}
    every = [name for name in fm.mergers() if name not in based] + list(EXTRA)
    parser = argparse.ArgumentParser(description="Accuracy of every merger against the number of clients")
    parser.add_argument("dataset", choices=TASKS)
    parser.add_argument("--n", type=int, nargs="+", default=[3, 6])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-images", type=int, default=0, help="evaluate on the first so many; 0 for all")
    parser.add_argument("--width", type=float, default=0)
    parser.add_argument("--methods", nargs="+", choices=every, default=every, metavar="MERGER")
    parser.add_argument("--clients", type=Path, default=Path("runs/benchmark-clients"), help="where networks are kept")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    task = TASKS[given.dataset]
    task = replace(task, width=given.width or task.width, device="cuda" if torch.cuda.is_available() else "cpu")
    table = Rows(given.out / "rows.csv", KEYS)
    for seed in given.seeds:
        measure(task, given.n, seed, given.methods, table, given.clients, given.test_images)
    found = summary(table.path)
    text = markdown(found)
    (given.out / "table.md").write_text(text + "\n", encoding="utf-8")
    published = {3: 0.821, 6: 0.440, 9: 0.245, 12: 0.185} if given.dataset == "cifar10" else None
    picture(found, given.out / "picture.png", published)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
