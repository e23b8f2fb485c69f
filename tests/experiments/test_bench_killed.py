"""`fedmerge bench` as a user starts it, on Ray: killed and resumed, and with clients that die."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.results import COSTS
from experiments.runs import find
from experiments.tables import compare

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
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
        out, err = running.communicate(timeout=400)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
    return running.returncode, out, err


def contents(out: Path) -> dict[str, object]:
    """The final table, and every file of the runs that is not about time or cost."""
    runs = find(out)
    rows = compare(runs)
    table = rows[[name for name in rows.columns if name not in COSTS]]
    files: dict[str, object] = {"table": table.to_csv(index=False)}
    for run in runs:
        for file in sorted(run.path.rglob("*.safetensors")):
            files[str(file.relative_to(out))] = file.read_bytes()
        summary = {k: v for k, v in json.loads((run.path / "summary.json").read_text()).items() if k != "costs"}
        files[f"{run.path.name} summary"] = json.dumps(summary)
        files[f"{run.path.name} metrics"] = run.metrics.drop(columns="seconds").to_csv(index=False)
    return files


def finished(out: Path) -> dict[str, int]:
    """When each finished cell was finished."""
    return {m.parent.name: m.stat().st_mtime_ns for m in out.glob("cells/*/.finished")}


def test_a_grid_killed_at_random_moments_and_resumed_ends_in_the_same_table_and_runs_nothing_twice(
    tmp_path: Path,
) -> None:
    config, cache, out = tmp_path / "grid.toml", tmp_path / "cache", tmp_path / "killed"
    config.write_text(GRID)
    assert finish(config, "--out", tmp_path / "whole", cache=cache)[0] == 0
    rng = random.Random(20)
    ends: dict[str, int] = {}
    for at_least in (0, 1, 4):  # cells finished; then a random moment, somewhere in the next ones
        running = start(config, "--out", out, "--resume", cache=cache, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 300
        while running.poll() is None and time.monotonic() < until:
            # Nothing has happened before the first client has trained.
            if len(finished(out)) >= at_least and (list(out.glob("shared/*")) or finished(out)):
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        now = finished(out)
        assert {name: now[name] for name in ends} == ends
        ends = now
    code, printed, _ = finish(config, "--out", out, "--resume", cache=cache)
    assert code == 0
    assert "FedAvg" in printed
    now = finished(out)
    assert {name: now[name] for name in ends} == ends
    assert len(now) == 6
    assert contents(out) == contents(tmp_path / "whole")
    assert not (out / "shared").exists()


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
from experiments import bench
from experiments.grid import Cell
from server import RunConfig
if __name__ == "__main__":
    base = {{"clients": 6, "local-epochs": 2, "width": 16, "strategy": "fedavg", "controls": "none"}}
    cells = [Cell("dead", RunConfig.parse(base | {{"lr": 0.5}})), Cell("good", RunConfig.parse(base))]
    failed = bench.run(cells, Path({str(tmp_path / "out")!r}), client_app=Deadly())
    assert list(failed) == ["dead"], failed
    print(failed["dead"])
""")
    environment = {
        **os.environ,
        "FEDMERGE_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round 1 got 0 usable replies of 6" in done.stdout
    dead, good = (
        json.loads((tmp_path / "out" / "cells" / name / "summary.json").read_text()) for name in ("dead", "good")
    )
    assert dead["status"].startswith("failed: round 1 got 0 usable replies")
    assert (good["status"], good["answered"], good["failures"]) == ("finished", 6, [])
