"""One tidy table for a folder of runs: ``results.parquet`` and ``results.csv``, with the same rows.

A row is one number: what one ``metric`` of one ``stage`` was in one ``round`` of one ``cell``. So every question is
a filter and a ``groupby``::

    table = pd.read_parquet("results.parquet")
    end = table[(table["metric"] == "accuracy") & (table["split"] == "test") & (table["round"] == table["rounds_done"])]
    end.groupby(["strategy", "init", "stage"])["value"].agg(["mean", "std", "count"])

What was not measured has no row, or null in a column, and so has a key that a cell does not use (``merger`` of FedAvg;
to keep such rows, ``groupby(..., dropna=False)``); nothing is filled in.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.records.keys import differing_keys, used
from experiments.records.runs import Run, find
from server import RunDirectory
from server.records import Sizes

COLUMNS: dict[str, str] = {
    "cell": "name of the run's folder, below those above it where two are called the same",
    "status": "finished, failed, unfinished or unreadable; a comparison should keep the finished ones",
    "seed": "seed of the run; equal seeds share the split of the data, so differences may be paired by it",
    "init": "independent: each client begins at a network of its own; shared: all at one; pretrained: at one that was "
    "trained on the public split; null: not in the config",
    "stage": "which network, for example aggregated, merged, repaired, retrained, client",
    "round": "from 1; 0 is before training",
    "rounds_done": "the last round of this cell",
    "client": "number of the client whose network this is; null for the server's",
    "split": "images it was measured on: test, val, or local (the client's own training images)",
    "metric": "accuracy (share in [0, 1]), loss (mean cross-entropy), examples, seconds",
    "value": "the number; in `seconds` it is training for local rows, evaluation for the others",
    "client_seconds": "whole cell: seconds of local training, summed over clients and rounds",
    "server_seconds": "whole cell: seconds of alignment, merging, repair and retraining at the server, without "
    "evaluations and controls",
    "wall_seconds": "whole cell: seconds from start to end; after --resume, since it was resumed",
    "bytes_up": "whole cell: bytes of the networks that clients sent",
    "bytes_down": "whole cell: bytes of the networks that were sent to clients, for local evaluation too",
    "peak_memory": "whole cell: the most resident bytes of the server's process while it ran, with what the process "
    "held before; after --resume, since it was resumed",
    "epsilon": "whole cell: the most that a client spent of its privacy, over all rounds, at the delta of its "
    "configuration; empty where clients trained without differential privacy, or without noise",
}
"""Columns and what they mean; between ``init`` and ``stage`` stands each config key in which the cells differ."""

COSTS = ("client_seconds", "server_seconds", "wall_seconds", "bytes_up", "bytes_down", "peak_memory", "epsilon")
"""The columns that say what a cell took. They hold for the cell as a whole and are repeated in each of its rows."""

METRICS = ("accuracy", "loss", "examples", "seconds")

_TYPES = {
    **dict.fromkeys(("cell", "status", "init", "stage", "split", "metric"), "string"),
    **dict.fromkeys(("seed", "round", "rounds_done", "client", "bytes_up", "bytes_down", "peak_memory"), "Int64"),
    **dict.fromkeys(("value", "client_seconds", "server_seconds", "wall_seconds", "epsilon"), "Float64"),
}


def costs(run: Run) -> dict[str, float | None]:
    """What ``run`` took, a value for each of :data:`COSTS`, None for what its files do not say.

    The clients' seconds are the sum of what each measured around its training.
    """
    env, sizes = run.env or {}, run.sizes or Sizes()
    return {
        "client_seconds": run.client_seconds,
        "server_seconds": env.get("server_seconds"),
        "wall_seconds": env.get("seconds"),
        "bytes_up": sizes.bytes_up,
        "bytes_down": sizes.bytes_down,
        "peak_memory": env.get("peak_memory"),
        "epsilon": run.epsilon,
    }


def results_table(runs: Sequence[Run]) -> pd.DataFrame:
    """The tidy table of ``runs``: the columns of :data:`COLUMNS` and a column for each key in which they differ.

    Rows come in the order of ``runs``, then of each run's ``metrics.jsonl``, then of :data:`METRICS`.
    """
    keys = [key for key in differing_keys(runs) if key not in COLUMNS]
    lines = pd.concat([run.metrics for run in runs], ignore_index=True)
    values = lines[list(METRICS)].to_numpy(dtype=float, na_value=math.nan).ravel()
    kept = np.flatnonzero(~np.isnan(values))
    line, metric = np.divmod(kept, len(METRICS))
    measured = {name: lines[name].take(line) for name in ("stage", "round", "client", "split")}
    measured |= {"metric": pd.Series(METRICS).take(metric), "value": pd.Series(values[kept])}
    configs = [used(run.config) for run in runs]
    of_run: dict[str, Sequence[Any]] = {
        "cell": [run.name for run in runs],
        "status": [run.status.split(":")[0] for run in runs],
        "seed": [run.seed for run in runs],
        "init": [run.config.get("init") for run in runs],
        "rounds_done": [run.rounds for run in runs],
        **{key: [config.get(key) for config in configs] for key in keys},
        **{
            name: list(of)
            for name, of in zip(COSTS, zip(*(costs(run).values() for run in runs), strict=True), strict=True)
        },
    }
    which = np.repeat(np.arange(len(runs)), [len(run.metrics) for run in runs])[line]
    types: Mapping[str, str] = _TYPES | {key: _type([run.config.get(key) for run in runs]) for key in keys}
    names = list(COLUMNS)
    at = names.index("stage")
    return pd.DataFrame(
        {
            name: (measured[name] if name in measured else _typed(of_run[name], types[name]).take(which))
            .astype(types[name])
            .array
            for name in [*names[:at], *keys, *names[at:]]
        }
    )


def write_results(path: str | Path, runs: Sequence[Run] | None = None) -> list[Path]:
    """Write ``results.parquet`` and ``results.csv`` into the folder ``path`` of runs; returns their paths.

    A reader sees the old file or the new one, never half of one.

    Args:
        path: A folder of runs, see :func:`experiments.records.runs.find`.
        runs: Its runs, where they have been read already.

    Raises:
        RunDirectoryError: there is no run, or one that cannot be read.
    """
    table = results_table(find(path) if runs is None else runs)
    parquet = io.BytesIO()
    table.to_parquet(parquet, index=False)
    folder = RunDirectory(Path(path))
    folder.write_bytes("results.parquet", parquet.getvalue())
    folder.write_text("results.csv", table.to_csv(index=False, lineterminator="\n"))
    return [folder.path / "results.parquet", folder.path / "results.csv"]


def _type(values: Sequence[Any]) -> str:
    """The narrowest column type that holds all of ``values``; text where they are of several kinds."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} and kinds:
        return "Float64" if float in kinds else "Int64"
    return "boolean" if kinds == {bool} else "string"


def _typed(values: Sequence[Any], kind: str) -> pd.Series:
    """``values`` as ``kind``; what is no text becomes it, but a missing value stays missing."""
    column = pd.Series(values, dtype=object)
    return column.map(str, na_action="ignore").astype(kind) if kind == "string" else column.astype(kind)
