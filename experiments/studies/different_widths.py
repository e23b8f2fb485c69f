"""Networks of different widths fused into the width of either: what is it worth after a short training?"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

import fedmerge as fm
from experiments.studies.bench import Bench, Params, Training
from experiments.studies.page import table
from experiments.studies.pictures import lines
from experiments.studies.study import Cell, Study, Work, each
from fedmerge.merge import ordered

ALONE, UNITS, FRESH = "alone", "unit for unit", "public only, fresh"
TRANSPORT = {
    f"OT by {ground}" + " + REPAIR" * repair: (ground, repair)
    for ground in ("weights", "activations")
    for repair in (False, True)
}


@dataclass(frozen=True)
class DifferentWidths(Training):
    """``width`` is of the wide network, ``narrow`` of the other; ``finetuning``: epochs on the public images."""

    seeds: tuple[int, ...] = (0, 1)
    model: str = "cnn"
    width: float = 2
    narrow: float = 1
    images: int = 4000
    public_images: int = 500
    epochs: int = 8
    batch_size: int = 32
    lr: float = 0.02
    finetuning: int = 5


def cut(params: Params, like: Params) -> Params:
    """``params`` brought to the shapes of ``like``: units beyond them cut off, missing ones taken from ``like``."""
    fitted = {}
    for name, target in like.items():
        shared = tuple(slice(0, min(a, b)) for a, b in zip(params[name].shape, target.shape, strict=True))
        fitted[name] = target.clone()
        fitted[name][shared] = params[name][shared]
    return fitted


def cells(config: DifferentWidths, work: Work) -> Iterator[Cell]:
    """A wide and a narrow network of disjoint images, and every fusion of them into the width of one of them."""

    def rows(seed: int, result: str) -> Iterator[dict[str, object]]:
        widths = {"wide": config.width, "narrow": config.narrow}
        benches = {name: Bench(config, work, seed, parts=2, width=width) for name, width in widths.items()}
        networks = {name: benches[name].trained(i, benches[name].parts[i]) for i, name in enumerate(benches)}
        other = "narrow" if result == "wide" else "wide"
        bench, own, theirs = benches[result], networks[result], networks[other]

        def fused(ground: str, repair: bool) -> Params:
            pair, models = [own, theirs], [bench.model, benches[other].model]
            images: dict[str, Any] = {"model": models, "data": bench.public, "device": bench.device}
            seen = images if ground == "activations" else {}
            found = fm.merge(pair, spec=bench.spec, method="ot-fusion", ground=ground, rng=bench.rng("merge"), **seen)
            if not repair:
                return found.params
            sources = ordered(pair, found, spec=bench.spec)
            return fm.repair(
                bench.model, found.params, data=bench.public, method="repair", sources=sources, device=bench.device
            )

        ways: dict[str, Callable[[], Params]] = {
            ALONE: lambda: own,
            **{name: partial(fused, *options) for name, options in TRANSPORT.items()},
            UNITS: lambda: fm.average([own, cut(theirs, own)]),
            FRESH: lambda: bench.fresh(2),
        }
        together = sum(benches[name].probabilities(networks[name]) for name in benches)
        right = (together.argmax(1) == bench.test.labels).double()  # type: ignore[union-attr]
        yield {"network": "ensemble of both", "before": float(right.mean()), "after": -1.0, "seconds": 0.0}
        for name, make in ways.items():
            began = time.process_time()
            params = make()
            seconds = time.process_time() - began
            last = bench.trained(
                2, bench.public, name=f"{result}-{name}-", start=lambda params=params: params,  # type: ignore[misc]
                epochs=config.finetuning, rate=1.0 if name == FRESH else 0.5,
            )  # fmt: skip
            before, after = (bench.score(found)["accuracy"] for found in (params, last))
            yield {"network": name, "before": before, "after": after, "seconds": seconds}

    return each(rows, seed=config.seeds, result=("wide", "narrow"))


def _ours(rows: pd.DataFrame) -> str:
    found = rows.groupby(["result", "network"], sort=False)[["before", "after", "seconds"]].agg(["mean", "std"])
    body = []
    for (result, name), row in found.iterrows():
        shown = [
            f"{100 * row[key, 'mean']:.1f}" + (f" ± {100 * row[key, 'std']:.1f}" if row[key, "std"] >= 0 else "")
            for key in ("before", "after")
        ]
        tuned = row["after", "mean"] >= 0
        body.append(
            [result, name, shown[0], shown[1] if tuned else "", f"{row['seconds', 'mean']:.1f}" if tuned else ""]
        )
    return (
        "Test accuracy in %, before and after a training on the public images; mean ± sd over the seeds.\n\n"
        + table(["result", "network", "before", "after", "CPU s"], body)
    )


def _answer(rows: pd.DataFrame) -> str:
    after = 100 * rows.pivot_table(index=["seed", "result"], columns="network", values="after")
    parts = []
    for result in ("wide", "narrow"):
        own = after.xs(result, level="result")
        best = own[list(TRANSPORT)].mean().idxmax()
        less = own[best] - own[ALONE]
        parts.append(
            f"into the {result} width the best fusion ({best}) ends at {own[best].mean():.1f} %, the {result} network "
            f"alone, trained as long, at {own[ALONE].mean():.1f} ({less.mean():+.1f} points, above in "
            f"{(less > 0).sum()} of {len(less)}), units averaged as they come at {own[UNITS].mean():.1f}"
        )
    return (
        "What fusing two widths is worth is decided against the network of the wanted width alone: "
        + "; ".join(parts)
        + "."
    )


def _draw(rows: pd.DataFrame) -> Figure:
    order = {name: i for i, name in enumerate(("before", "after"))}
    long = rows.melt(["seed", "result", "network"], ["before", "after"], "stage", "accuracy")
    long = long[long["accuracy"] >= 0].assign(stage=long["stage"].map(order))
    panels = {f"into the {result} width": part for result, part in long.groupby("result", sort=False)}
    return lines(
        panels, x="stage", y="accuracy", by="network", label=("0: as fused, 1: trained on public", "test accuracy")
    )


STUDY = Study(
    "different-widths",
    cells,
    "a wide and a narrow network fused into the width of either, beside each alone with the same training",
    title="Fusing networks of different widths",
    source="Singh, Jaggi, Model Fusion via Optimal Transport, NeurIPS 2020, arXiv:1910.05653, and the slides on it",
    question="The client's network is not as wide as the server's. Fused by transport into the width of either, is the "
    "result better than the network of that width alone, after the same short training?",
    cost="1 CPU minute",
    sizes={
        "quick": DifferentWidths.quick(width=16, narrow=8, epochs=1, lr=0.05, finetuning=1),
        "default": DifferentWidths(),
        "full": DifferentWidths.full(
            model="vgg11",
            width=1,
            narrow=0.5,
            images=42000,
            public_images=5000,
            epochs=60,
            batch_size=128,
            lr=0.05,
            finetuning=10,
        ),
    },
    answer=_answer,
    theirs='"Model size at client != model size at server": transport gives soft maps between layers of different '
    "widths, "
    "where an average is not even defined. The slides print no number. For two VGG11 of one width, trained to 90 %, "
    "the paper has "
    "86.0 % fused and 90.7 % after finetuning.",
    ours=_ours,
    explains="The paper shows that such a fusion can be made and beats an average that does not exist. It is not "
    "compared with the network of the wanted width alone, trained on as long, which is what a server has; that row "
    "decides here. The best fusion is the best on test, which favours fusing. The same was measured before on two "
    "VGG11 of widths 1 and 0.5 (6 epochs of 10,625 images each, one seed): alone 60.0 and 60.4 %, the best fusions "
    "57.2 and 55.5, the ensemble of both 60.8.",
    draw=_draw,
)
