"""`fedmerge bench` as a user starts it, on Ray: killed and resumed, and with clients that die."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from experiments.compare.stages import compare
from experiments.records.results import COSTS
from experiments.records.runs import find
from server import RunDirectory

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
GRID = """
[base]
clients = 3
width = 16
local-epochs = 2
retrain-epochs = 1
controls = "none"
[[cells]]
merger = "average"
[[cells]]
name = "merge-many"
[[cells]]
strategy = "fedavg"
rounds = 3
[grid]
seed = [0, 1]
"""


def start(*args: object, cache: Path, **options) -> subprocess.Popen[str]:
    """`fedmerge bench` in a process group of its own, which a kill takes with all that Ray started."""
    environment = {**os.environ, "FEDMERGE_CACHE": str(cache), "COLUMNS": "120"}
    command = [str(Path(sys.executable).parent / "fedmerge"), "bench", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, start_new_session=True, **options)


def finish(*args: object, cache: Path) -> tuple[int, str, str]:
    running = start(*args, cache=cache, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = running.communicate(timeout=1800)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    return running.returncode, out, err


def script(folder: Path) -> str:
    """What ``script.py`` in ``folder`` prints; Ray's workers find the modules beside it."""
    environment = {
        **os.environ,
        "FEDMERGE_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
    }
    done = subprocess.run(
        [sys.executable, folder / "script.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(out: Path) -> dict[str, object]:
    """The final tables, and every file of the runs that is not about time or cost."""
    runs = find(out)
    rows, tidy = compare(runs), pd.read_csv(out / "results.csv", dtype=str)
    tidy = tidy[tidy["metric"] != "seconds"]
    files: dict[str, object] = {
        name: table[[column for column in table.columns if column not in COSTS]].to_csv(index=False)
        for name, table in (("table", rows), ("tidy table", tidy))
    }
    for run in runs:
        for file in sorted(run.path.rglob("*.safetensors")):
            files[str(file.relative_to(out))] = file.read_bytes()
        files[f"{run.path.name} summary"] = (run.path / "summary.json").read_bytes()
        files[f"{run.path.name} metrics"] = run.metrics.drop(columns="seconds").to_csv(index=False)
    return files


def finished(out: Path) -> dict[str, int]:
    """When each finished cell was finished."""
    return {p.name: (p / "summary.json").stat().st_mtime_ns for p in out.glob("cells/*") if RunDirectory(p).finished}


@pytest.mark.parametrize(
    ("given", "cells", "kills"),
    [(GRID, 6, (0, 1, 4)), (ROOT / "experiments" / "configs" / "one-shot.toml", 51, (0, 10, 30))],
    ids=["small", "one-shot"],
)
def test_a_grid_killed_at_random_moments_and_resumed_ends_in_the_same_table_and_runs_nothing_twice(
    tmp_path: Path, given: str | Path, cells: int, kills: tuple[int, ...]
) -> None:
    config, cache, out = tmp_path / "grid.toml", tmp_path / "cache", tmp_path / "killed"
    config.write_text(given if isinstance(given, str) else given.read_text())
    options = ["--quick"] if "[quick]" in config.read_text() else []
    assert finish(config, *options, "--out", tmp_path / "whole", cache=cache)[0] == 0
    options += ["--out", out, "--resume"]
    rng = random.Random(20)
    ends: dict[str, int] = {}
    for at_least in kills:  # cells finished; then a random moment, somewhere in the next ones
        running = start(config, *options, cache=cache, stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 1800
            while running.poll() is None and time.monotonic() < until:
                # Nothing has happened before the first client has trained.
                if len(finished(out)) >= at_least and (list(out.glob("shared/*")) or finished(out)):
                    break
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 1.5))
            assert running.poll() is None
        finally:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        now = finished(out)
        assert {name: now[name] for name in ends} == ends
        ends = now
        print(f"killed with {len(ends)} of {cells} cells finished")
    code, printed, _ = finish(config, *options, cache=cache)
    assert code == 0
    assert "FedAvg" in printed
    now = finished(out)
    assert {name: now[name] for name in ends} == ends
    assert len(now) == cells
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / "shared").exists()


def test_clients_train_once_whatever_runs_side_by_side(tmp_path: Path) -> None:
    """Four runs ask one client after the other the same, two ask something else: on Ray, in processes of their own."""
    (tmp_path / "counted.py").write_text(f"""
from pathlib import Path
from flwr.clientapp import ClientApp
from clients.app import app as fedmerge_app

class Counted(ClientApp):
    def __call__(self, message, context):
        if message.metadata.message_type == "train":
            task = message.content["config"]
            with Path({str(tmp_path / "trained")!r}).open("a") as file:
                file.write(f"{{task['seed']}} {{task['server-round']}} {{context.node_config['partition-id']}}\\n")
        return fedmerge_app(message, context)
""")
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from counted import Counted
from experiments.grids import bench
from experiments.grids.files import Cell
from server import RunConfig
if __name__ == "__main__":
    base = {{"clients": 3, "local-epochs": 3, "width": 16, "controls": "none", "init": "shared"}}
    changes = [
        {{"merger": "average"}}, {{"merger": "merge-many"}}, {{"strategy": "fedavg", "rounds": 2}},
        {{"strategy": "fedadam", "rounds": 2}}, {{"merger": "average", "seed": 1}}, {{"merger": "merge-many", "seed": 1}},
    ]
    cells = [Cell(f"cell-{{i}}", RunConfig.parse(base | change)) for i, change in enumerate(changes)]
    failed = bench.run(cells, Path({str(tmp_path / "out")!r}), client_app=Counted())
    assert not failed, failed
""")
    script(tmp_path)
    trained = sorted((tmp_path / "trained").read_text().splitlines())
    # Round 1 once for each seed; round 2 for both strategies that have one, whose networks differ by then.
    once = [f"{seed} 1 {client}" for seed in (0, 1) for client in range(3)]
    assert trained == sorted([*once, *2 * [f"0 2 {client}" for client in range(3)]])


def test_a_cell_whose_clients_all_die_fails_and_the_next_ones_have_clients_again(tmp_path: Path) -> None:
    """Dead processes come back more often than Flower's pool would survive: 12 deaths, then a good cell."""
    (tmp_path / "deadly.py").write_text("""
import os
from flwr.clientapp import ClientApp
from clients.app import app as fedmerge_app

class Deadly(ClientApp):
    def __call__(self, message, context):
        if message.metadata.message_type == "train" and message.content["config"]["lr"] == 0.5:
            os._exit(1)
        return fedmerge_app(message, context)
""")
    (tmp_path / "script.py").write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from deadly import Deadly
from experiments.grids import bench
from experiments.grids.files import Cell
from server import RunConfig
if __name__ == "__main__":
    base = {{"clients": 6, "local-epochs": 2, "width": 16, "strategy": "fedavg", "controls": "none"}}
    cells = [Cell("dead", RunConfig.parse(base | {{"lr": 0.5}})), Cell("good", RunConfig.parse(base))]
    failed = bench.run(cells, Path({str(tmp_path / "out")!r}), client_app=Deadly())
    assert list(failed) == ["dead"], failed
    print(failed["dead"])
""")
    assert "round 1 got 0 usable replies of 6" in script(tmp_path)
    dead, good = (
        json.loads((tmp_path / "out" / "cells" / name / "summary.json").read_text()) for name in ("dead", "good")
    )
    assert dead["status"].startswith("failed: round 1 got 0 usable replies")
    assert (good["status"], good["answered"], good["failures"]) == ("finished", 6, [])
