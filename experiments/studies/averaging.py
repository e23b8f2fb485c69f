"""Which ways of averaging networks are there, what does each cost, and when is it valid?"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import fedmerge as fm
from experiments.report.theme import SERIES, legend, styled
from experiments.studies import trajectory
from experiments.studies.bench import Bench, Params, Training
from experiments.studies.page import mean_sd, table
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.streams import torch_stream

SITUATIONS = ("independent", "fine-tuned", "one run")
VALID = {
    "best on val": "always; it is what the others must beat",
    "ensemble": "always; n times the inference",
    "vanilla average": "one basin: networks of one start",
    "vanilla average, aligned": "networks that differ by an order of units, nearly",
    "Fisher": "one basin; needs images",
    "Fisher, aligned": "as the aligned average; needs images",
    "RegMean": "one basin; needs images, no labels",
    "RegMean, aligned": "as the aligned average; needs images, no labels",
    "greedy soup": "always; needs labels, and keeps one network where nothing helps",
    "learned coefficients": "one basin; needs labels and all networks in memory",
    "stitching": "always; a network as large as one, needs images, no labels",
    "task arithmetic": "one start, known; the steps added up (factor 1: their mean)",
    "TIES": "one start, known; steps that disagree in sign",
    "robust soup": "one start; between a network trained as usual and one trained on attacked images",
    "PAPA": "networks that train together from one start",
    "HWA": "the same, and the latest averages averaged again",
    "last": "",
    "SWA": "behind the point where training has come near a basin",
    "SWAD": "the same, from and to where validation loss says",
    "LAWA": "any training; the latest epochs",
    "EMA": "any training",
    "SWAG": "as SWA; a sample of networks, ten times the inference",
    "TWA": "as SWA; needs labels",
}


@dataclass(frozen=True)
class Averaging(Training):
    """``n`` networks; ``pretraining`` epochs of the common start; ``stitch``: the layer at which they are stitched."""

    seeds: tuple[int, ...] = (0, 1, 2)
    model: str = "cnn"
    images: int = 4000
    public_images: int = 500
    val_images: int = 500
    test_images: int = 2000
    epochs: int = 6
    batch_size: int = 32
    lr: float = 0.02
    n: int = 4
    pretraining: int = 3
    stitch: str = "fc1"


ATTACK = fm.PGD(epsilon=4, steps=4)
Made = Iterator[tuple[str, Params | Tensor, float]]
"""Name, network or probabilities of test, and how many networks an answer takes."""


def _several(bench: Bench, networks: list[Params], *, aligned: bool, base: Params | None) -> Made:
    """What both situations of several networks share."""
    best = max(networks, key=lambda params: bench.score(params, bench.val)["accuracy"])
    yield "best on val", best, 1
    yield "ensemble", sum(map(bench.probabilities, networks)) / len(networks), len(networks)  # type: ignore[misc]
    few: dict[str, Any] = {"model": bench.model, "data": bench.public, "device": bench.device}
    methods: dict[str, tuple[str, dict[str, Any]]] = {
        "vanilla average": ("average", {}),
        "Fisher": ("fisher", few),
        "RegMean": ("regmean", few),
    }
    for name, (method, options) in methods.items():
        for order in ("average", "merge-many") if aligned else ("average",):
            how = method if method != "average" else order
            more: dict[str, Any] = {} if method == "average" else {"order": order}
            found = fm.merge(networks, spec=bench.spec, method=how, rng=bench.rng("merge"), **options, **more)
            yield name + ", aligned" * (order == "merge-many"), found.params, 1
    soup = fm.merge(
        networks, spec=bench.spec, method="greedy-soup", rng=bench.rng("merge"), **{**few, "data": bench.val},
        order="merge-many" if aligned else "average",
    )  # fmt: skip
    yield "greedy soup", soup.params, 1
    yield "learned coefficients", trajectory.learned(bench, networks), 1
    if base is not None:
        vectors: dict[str, tuple[str, dict[str, Any]]] = {
            "task arithmetic": ("task-arithmetic", {"scale": 1.0}),
            "TIES": ("ties", {"model": bench.model}),
        }
        for name, (method, options) in vectors.items():
            yield name, fm.merge(networks, spec=bench.spec, method=method, base=base, **options).params, 1


def independent(bench: Bench, config: Averaging) -> Made:
    """Networks of initialisations of their own."""
    networks = [bench.trained(i) for i in range(config.n)]
    yield from _several(bench, networks, aligned=True, base=None)
    yield "stitching", trajectory.stitched(bench, networks[0], networks[1], config.stitch), 1


def finetuned(bench: Bench, config: Averaging) -> Made:
    """Networks of one briefly trained start, each with a learning rate of its own."""
    start = bench.trained(0, name="start-", epochs=config.pretraining)
    rates = [0.5 + i / max(1, config.n - 1) for i in range(config.n)]
    networks = [bench.trained(i, name="tuned-", start=lambda: start, rate=rate) for i, rate in enumerate(rates)]
    yield from _several(bench, networks, aligned=False, base=start)
    yield "stitching", trajectory.stitched(bench, networks[0], networks[1], config.stitch), 1
    hard = bench.trained(0, name="hard-", start=lambda: start, rate=0.5, attack=ATTACK)
    goal = fm.attacked(bench.model, start, bench.val, attack=ATTACK, device=bench.device)
    soups = [fm.average([networks[0], hard], [1 - share, share]) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    yield "robust soup", max(soups, key=lambda p: sum(bench.score(p, i)["accuracy"] for i in (bench.val, goal))), 1
    population, means = [dict(start)] * config.n, fm.running_average("lawa", latest=3)
    for epoch in range(config.epochs):
        rate = bench.recipe.lr * (1 - epoch / config.epochs)
        recipe = replace(bench.recipe, schedule="constant", warmup=0.0, lr=rate)
        for i, params in enumerate(population):
            population[i] = fm.train(
                bench.model, params, bench.parts[0], recipe=recipe, epochs=1, device=bench.device,
                generator=torch_stream(bench.seed, "population", epoch, i),
            ).params  # fmt: skip
        population = fm.papa(population, alpha=0.5)
        means.update(fm.average(population))
    yield "PAPA", fm.average(population), 1
    yield "HWA", means.params, 1


def one_run(bench: Bench, config: Averaging) -> Made:
    """One training at a constant rate, from a briefly trained start."""
    start = bench.trained(0, name="start-", epochs=config.pretraining)
    networks = trajectory.path(bench, start, config.epochs, "one-run")
    ends = networks[trajectory.SEGMENTS - 1 :: trajectory.SEGMENTS]
    half = ends[len(ends) // 2 :]
    yield "last", networks[-1], 1
    running: dict[str, tuple[str, list[Params], dict[str, Any]]] = {
        "SWA": ("swa", half, {}),
        "LAWA": ("lawa", ends, {"latest": 3}),
        "EMA": ("ema", networks, {"decay": 0.8}),
    }
    for name, (kind, seen, options) in running.items():
        average = fm.running_average(kind, **options)
        for params in seen:
            average.update(params)
        yield name, average.params, 1
    yield "SWAD", trajectory.swad(bench, networks), 1
    late = networks[len(networks) // 2 :]
    yield "SWAG", trajectory.swag(bench, late), 10
    yield "TWA", trajectory.learned(bench, late), 1


def cells(config: Averaging, work: Work) -> Iterator[Cell]:
    """Every method in the situations where it is defined."""

    def rows(seed: int, situation: str) -> Iterator[dict[str, object]]:
        bench = Bench(config, work, seed)
        make = {"independent": independent, "fine-tuned": finetuned, "one run": one_run}[situation]
        hard = fm.attacked(bench.model, bench.trained(0), bench.test, attack=ATTACK, device=bench.device)
        for name, found, inference in make(bench, config):
            given = found if isinstance(found, Tensor) else bench.probabilities(found)
            yield {
                "method": name,
                "accuracy": float((given.argmax(1) == bench.test.labels).double().mean()),
                "loss": float(F.nll_loss(given.clamp(min=1e-12).log(), bench.test.labels)),
                "attacked": -1.0 if isinstance(found, Tensor) else bench.score(found, hard)["accuracy"],
                "inference": inference,
            }

    return each(rows, seed=config.seeds, situation=SITUATIONS)


def _ours(rows: pd.DataFrame) -> str:
    body = []
    for (situation, method), part in rows.groupby(["situation", "method"], sort=False):
        body.append(
            [
                situation, method, mean_sd(part["accuracy"]), f"{part['loss'].mean():.3f}",
                mean_sd(part["attacked"]) if part["attacked"].min() >= 0 else "", f"{part['inference'].mean():g}",
                VALID[method],
            ]
        )  # fmt: skip
    said = (
        "Mean ± sd over the seeds. *Attacked*: accuracy on test images moved against one network by 4 of 255 a pixel "
        "(PGD, 4 steps)."
    )
    swa, lawa = (rows.loc[rows["method"] == name, ["seed", "accuracy", "loss"]].to_numpy() for name in ("SWA", "LAWA"))
    if swa.shape == lawa.shape and np.allclose(swa, lawa, rtol=0, atol=1e-5):  # but for the order of sums
        said += " SWA, of the second half of the epochs, and LAWA, of the latest three, are the same network here."
    return f"{said}\n\n" + table(
        ["situation", "method", "accuracy, %", "loss", "attacked, %", "networks an answer takes", "valid for"], body
    )


def _answer(rows: pd.DataFrame) -> str:
    found = 100 * rows.groupby(["situation", "method"])["accuracy"].mean()
    single = {"best on val", "last", "ensemble", "SWAG"}

    def best(situation: str) -> str:
        own = found[situation].drop(labels=[m for m in found[situation].index if m in single])
        return f"{own.idxmax()} ({own.max():.1f} %)"

    return (
        f"Of independent networks the best single result is that of {best('independent')} where the best network has "
        f"{found['independent', 'best on val']:.1f} % and the ensemble {found['independent', 'ensemble']:.1f}; of "
        f"networks of one start that of {best('fine-tuned')} against {found['fine-tuned', 'best on val']:.1f} and "
        f"{found['fine-tuned', 'ensemble']:.1f}; within one training that of {best('one run')} against "
        f"{found['one run', 'last']:.1f} for the last network."
    )


@styled
def _draw(rows: pd.DataFrame) -> Figure:
    fig = Figure(figsize=(7.5, 7.5), layout="constrained")
    ax = fig.subplots()
    found = rows.groupby(["situation", "method"], sort=False)["accuracy"].agg(["mean", "std"]).reset_index()
    for i, situation in enumerate(SITUATIONS):
        own = found[found["situation"] == situation]
        ax.errorbar(
            100 * own["mean"], own.index, xerr=100 * own["std"].fillna(0), fmt="o", color=SERIES[i], label=situation
        )
    ax.set_yticks(found.index, found["method"], size=8.5)
    ax.invert_yaxis()
    ax.set_xlabel("test accuracy, %")
    legend(fig, columns=3)
    return fig


STUDY = Study(
    "averaging",
    cells,
    "two dozen ways of averaging networks: accuracy, cost, and when each is valid",
    title="Ways of averaging networks",
    source="the note on Li et al., Deep Model Fusion: A Survey, 2023, arXiv:2309.15698",
    question="The survey lists averages of weights, soups, averages over a training, ensembles and model reuse. On the "
    "same networks: what does each reach, what does it cost, and when is it valid?",
    cost="10 CPU minutes",
    sizes={
        "quick": Averaging.quick(images=200, epochs=2, lr=0.05, n=2, pretraining=1),
        "default": Averaging(),
        "full": Averaging.full(epochs=30, batch_size=64, n=8, pretraining=10),
    },
    answer=_answer,
    theirs="The note has no numbers. It says that averages are valid for networks that share part of their training or "
    "lie in one basin, that the greedy soup performs best of the soups, that SWA averages only points near a local "
    "optimum, and that alignment comes first where networks are not in one order.",
    ours=_ours,
    explains="What the note says holds: weights of one start can be averaged, weights of independent networks cannot "
    "until they are aligned, and then only nearly. The greedy soup is never worse than its best network on val, "
    "which is why it is called best. All of these networks are small and see 4,000 images: with three seeds a "
    "difference of a point or two between neighbours means nothing.",
    draw=_draw,
)
