"""What the studies of `hlb` as in snimu/rebasin-results share: sizes, and paths before and after alignment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd
import torch

import fedmerge as fm
from experiments.studies.bench import Bench, Params, Training
from experiments.studies.page import mean_sd, table
from fedmerge.spec import PermSpec
from fedmerge.spec.axes import Factor

RAW, ALIGNED, OWN = "a to b", "a to b (aligned)", "b to b (aligned)"
PATHS = (RAW, ALIGNED, OWN)


@dataclass(frozen=True)
class Rebasin(Training):
    """How snimu/rebasin-results trains `hlb`, but for its width and its images."""

    seeds: tuple[int, ...] = (0,)
    epochs: int = 6
    batch_size: int = 64
    lr: float = 0.5

    @classmethod
    def quick(cls, **keys: Any) -> Self:
        """See :class:`Training`."""
        return super().quick(**{"epochs": 2, "batch_size": 32, "lr": 0.05, **keys})

    @classmethod
    def full(cls, **keys: Any) -> Self:
        """As published, three seeds."""
        return super().full(**{"seeds": (0, 1, 2), "width": 64, "epochs": 12, "batch_size": 512, "lr": 1.6, **keys})


def paths(bench: Bench, a: Params, b: Params, points: int, *, theirs: bool = False) -> list[dict[str, object]]:
    """Loss and accuracy along the three paths, statistics recomputed at points between; and what alignment moved.

    ``moved`` is the share of the units that may move which alignment put elsewhere, ``distance`` the relative distance
    between b before and after. ``theirs`` climbs from the identity and leaves the widest group alone, as
    snimu/rebasin-results does.
    """
    sizes = bench.spec.sizes(b)
    spec = held(bench.spec, max(sizes, key=sizes.__getitem__)) if theirs else bench.spec
    start = "identity" if theirs else "forward-greedy"
    found = fm.align(b, to=a, spec=spec, rng=bench.rng("align"), start=start)
    aligned = fm.permute(b, found.perms, spec=spec)
    orders = list(found.perms.values())
    moved = sum(int((p != torch.arange(len(p))).sum()) for p in orders) / sum(len(p) for p in orders)
    rows = []
    for name, (first, last) in zip(PATHS, ((a, b), (a, aligned), (b, aligned)), strict=True):
        curve = fm.interpolate(
            bench.model, first, last, bench.test, points=points, correct=bench.recomputed, device=bench.device
        )
        rows += [
            {
                "path": name, "alpha": round(float(alpha), 6), "loss": float(loss), "accuracy": float(accuracy),
                "moved": moved, "distance": fm.distance(b, aligned).relative,
            }
            for alpha, loss, accuracy in zip(curve.alphas, curve.losses, curve.accuracies, strict=True)
        ]  # fmt: skip
    return rows


def held(spec: PermSpec, group: str) -> PermSpec:
    """The symmetries but for those of one group."""

    def kept(factor: Factor) -> Factor:
        return Factor(None, factor.size) if factor.group == group else factor

    axes = {
        name: tuple(tuple(tuple(map(kept, segment)) for segment in axis) for axis in entry)
        for name, entry in spec.axes.items()
    }
    return replace(spec, axes=axes)


def normalised(rows: pd.DataFrame, by: str, column: str) -> pd.Series:
    """``column`` with the start points of all paths moved to where that of the first value of ``by`` begins."""
    starts, first = (rows.groupby(keys)[column].transform("first") for keys in (["seed", by, "path"], ["seed", "path"]))
    return rows[column] - starts + first


def summary(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """For each value of ``by``, path and seed: ends, middle, and the barriers over the chord."""
    found = []
    for (value, path, seed), line in rows.groupby([by, "path", "seed"], sort=False):
        line = line.sort_values("alpha")
        curve = fm.Curve(*(line[c].to_numpy() for c in ("alpha", "loss", "accuracy")))
        found.append(
            {
                by: value, "path": path, "seed": seed, "start": line["accuracy"].iloc[0],
                "middle": line["accuracy"].iloc[len(line) // 2], "lowest": line["accuracy"].min(),
                "loss barrier": fm.barrier(curve).loss, "error barrier": fm.barrier(curve).error,
                "moved": line["moved"].iloc[0], "distance": line["distance"].iloc[0],
            }
        )  # fmt: skip
    return pd.DataFrame(found)


def shown(rows: pd.DataFrame, by: str) -> str:
    """The summary as a table, a row a value of ``by``: three paths side by side, and what alignment moved."""
    found = summary(rows, by)
    lines: list[Sequence[object]] = []
    for value, part in found.groupby(by, sort=False):
        at = {path: part[part["path"] == path] for path in PATHS}
        cells = [f"{mean_sd(of['middle'])} ({mean_sd(of['loss barrier'], 2, 1)})" for of in at.values()]
        raw = at[RAW]
        cells = [mean_sd(raw["start"]), *cells, mean_sd(raw["moved"], 0), mean_sd(raw["distance"], 2, 1)]
        lines.append([f"{value:g}", *cells])
    middles = [f"middle of {path} (loss barrier)" for path in PATHS]
    return table([by, "a", *middles, "units moved, %", "distance of b (aligned) from b"], lines)
