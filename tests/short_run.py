"""A short run over an in-process grid, and what its files say: for the tests of the server."""

import json
from collections.abc import Sequence
from pathlib import Path

from local_grid import LocalGrid

from server import Callback, Run, RunConfig, RunDirectory

QUICK = {
    "clients": 4,
    "local-epochs": 2,
    "width": 16,
    "retrain-epochs": 2,
    "controls": "plain-average, paper-start, ensemble",
}


def run(
    path: Path, grid: LocalGrid | None = None, *, resume: bool = False, callbacks: Sequence[Callback] = (), **changes
):
    values = {**QUICK, **{k.replace("_", "-"): v for k, v in changes.items()}}
    config = RunConfig.parse(values)
    directory = RunDirectory.open(path, config, resume=resume)
    grid = grid or LocalGrid(config.clients)
    Run(config, directory, *callbacks).execute(grid)
    return json.loads((path / "summary.json").read_text())


def accuracy(summary, stage: str) -> float:
    return next(s["accuracy"] for s in summary["stages"] if s["stage"] == stage)


def rows(path: Path, without: tuple[str, ...] = ("seconds",)) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in without} for line in lines]
