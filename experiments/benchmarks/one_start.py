"""What does a grid save over separate runs, and what does it cost over the training in it?

Question: twelve short runs on digits, as one grid and one after the other by ``fedmerge run``: what is the ratio of
their wall times? And what is the ratio of the grid to the plain training loops in it, on one core, without Flower,
Ray, merging or evaluation?

The runs are 12 / ``--seeds`` ways of merging for each of ``--seeds`` seeds. Runs of one seed train equal clients,
which the grid does once; with ``--seeds 12`` nothing can be shared, and what is left is the start-up.

Expected: start-up (imports, Ray, the report) once and not twelve times, and local training as often as it differs.

Cost: thirteen starts of Ray, three to ten minutes on two cores. Other work on the machine spoils the ratios.

    python -m experiments.benchmarks.one_start [--seeds 3] [--clients 5] [--local-epochs 20] [--cpus 0]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tomli_w
import torch

from experiments.grids import files as grid
from server import RunConfig

RUNS = 12
MERGERS = ["average", "merge-many", "merge-many-paper", "hierarchical"]
GRID, APART = "one grid", f"{RUNS} separate runs"
FEDMERGE = [sys.executable, "-c", "from experiments.cli import main; main()"]


def plan(seeds: int, clients: int, epochs: int) -> dict[str, Any]:
    """The grid file."""
    base = {"clients": clients, "local-epochs": epochs, "retrain-epochs": 1, "controls": "none"}
    return {"base": base, "grid": {"merger": MERGERS[: RUNS // seeds], "seed": list(range(seeds))}}


def loops(config: RunConfig) -> float:
    """Seconds that the clients' training takes, one after the other in this process."""
    task = config.client_task()
    start = task.network().state_dict()
    began = time.perf_counter()
    for client in range(config.clients):
        task.train(client, start)
    return time.perf_counter() - began


def launched(*arguments: object) -> float:
    """Wall time of one call of fedmerge, from start to end of its process.

    Raises:
        RuntimeError: It failed.
    """
    began = time.perf_counter()
    done = subprocess.run([*FEDMERGE, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fedmerge {' '.join(map(str, arguments))} failed:\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def inside(folders: list[Path]) -> float:
    """Seconds that the runs took, each from its start to its end."""
    return float(sum(json.loads((folder / "env.json").read_text(encoding="utf-8"))["seconds"] for folder in folders))


def main(arguments: list[str] | None = None) -> int:
    """Print a row for each way of the grid, the separate runs and the loops."""
    parser = argparse.ArgumentParser(description="One grid of twelve runs against twelve separate runs")
    parser.add_argument("--seeds", type=int, default=3, choices=(3, 4, 6, 12), help="of 12 runs, so many seeds")
    parser.add_argument("--clients", type=int, default=5)
    parser.add_argument("--local-epochs", type=int, default=20)
    parser.add_argument("--cpus", type=int, default=0, help="cores for the clients; 0 is all of them")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        file = folder / "grid.toml"
        file.write_text(tomli_w.dumps(plan(given.seeds, given.clients, given.local_epochs)), encoding="utf-8")
        cells = grid.read(file)
        first_of_seed = {cell.config.seed: cell.config for cell in reversed(cells)}
        loops(cells[0].config)  # the first training of a process also loads libraries and the data
        distinct = sum(map(loops, first_of_seed.values()))
        cpus = ("--cpus", given.cpus)
        names, wall, on = [cell.name for cell in cells], {}, {}
        wall[GRID] = launched("bench", file, "--out", folder / "grid", *cpus)
        on[GRID] = inside([folder / "grid" / "cells" / name for name in names])
        wall[APART] = 0.0
        for cell in cells:
            config = folder / f"{cell.name}.toml"
            config.write_text(cell.config.to_toml(), encoding="utf-8")
            wall[APART] += launched("run", config, "--out", folder / "apart" / cell.name, *cpus)
        on[APART] = inside([folder / "apart" / name for name in names])
    asked = distinct * RUNS / given.seeds
    print(f"{RUNS} runs, {given.seeds} seeds, {given.clients} clients, {given.local_epochs} local epochs\n")
    print("| | Wall, s | in runs | start-up and report |\n|---|---:|---:|---:|")
    for way, seconds in wall.items():
        print(f"| {way} | {seconds:.1f} | {on[way]:.1f} | {seconds - on[way]:.1f} |")
    print(f"| plain loops of {RUNS} runs, one core | {asked:.1f} | | |")
    print(f"| those of them that differ | {distinct:.1f} | | |\n")
    print(f"{APART} / {GRID}: {wall[APART] / wall[GRID]:.2f}")
    for loops_of, seconds in ((f"{RUNS} runs", asked), ("those that differ", distinct)):
        ratios = f"{wall[GRID] / seconds:.2f}; without its start-up: {on[GRID] / seconds:.2f}"
        print(f"{GRID} / plain loops of {loops_of}: {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
