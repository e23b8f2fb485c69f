"""A grid of runs on one Ray runtime: read, laid out, run, resumed."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.simulation import Resources, simulate
from fedmerge.errors import ConfigError, RunDirectoryError
from server import Observer, RunConfig, read_toml

_TABLES = ("base", "cells", "grid")


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its name says how it differs from the base."""

    name: str
    config: RunConfig


def read(path: Path) -> list[Cell]:
    """The cells of a grid file, in its order.

    The file has three tables: ``[base]`` (keys that all runs share), ``[[cells]]`` (differences; one run each)
    and ``[grid]`` (key -> list of values; every combination, for every cell).

    Raises:
        ConfigError: An unknown table, key or value, an empty grid, or two cells that are the same run.
    """
    given = read_toml(path)
    for table in given:
        if table not in _TABLES:
            raise ConfigError(f"{path}: unknown table {table!r}; known are [base], [[cells]] and [grid]")
    base, grid = given.get("base", {}), given.get("grid", {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid.{key} = {values!r}: expected a list of at least one value")
    cells: dict[str, Cell] = {}
    for i, cell in enumerate(given.get("cells", [{}])):
        for combination in itertools.product(*grid.values()):
            changes: dict[str, Any] = {**cell, **dict(zip(grid, combination, strict=True))}
            config = RunConfig.parse({**base, **changes}, f"{path}: cell {i + 1}")
            name = "-".join(_slug(key, value) for key, value in changes.items()) or "run"
            if name in cells:
                raise ConfigError(f"{path}: two cells are the same run, {name}")
            cells[name] = Cell(name, config)
    return list(cells.values())


def run(
    cells: Sequence[Cell],
    out: Path,
    *,
    resources: Resources | None = None,
    observer: Observer | None = None,
    resume: bool = False,
    verbose: bool = False,
) -> None:
    """Run every cell that is not finished, each into ``out/cells/NAME``; Ray starts once.

    Raises:
        RunDirectoryError: ``out`` holds runs already and ``resume`` is false, or runs of another grid.
        FedmergeError: A cell cannot run (said before the first begins), or failed.
    """
    folder = out / "cells"
    present = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    if present and not resume:
        raise RunDirectoryError(f"{out} already holds runs; choose another --out, or --resume to finish them")
    others = sorted(present - {cell.name for cell in cells})
    if others:
        raise RunDirectoryError(f"{out} holds runs of another grid ({others[0]}); choose another --out")
    waiting = [(cell.config, folder / cell.name) for cell in cells if not _finished(folder / cell.name, cell.config)]
    if waiting:
        simulate(waiting, resources=resources, observer=observer, resume=resume, verbose=verbose)


def _finished(path: Path, config: RunConfig) -> bool:
    try:
        status = json.loads((path / "summary.json").read_text())["status"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(status == "finished") and RunConfig.read(path / "config.toml") == config


def _slug(key: str, value: Any) -> str:
    text = f"{key}={value}" if not isinstance(value, str) else value or key
    return "".join(c if c.isalnum() or c in "._=" else "-" for c in text)
