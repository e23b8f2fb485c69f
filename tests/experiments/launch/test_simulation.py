"""Simulations as a user starts them: Flower's runtime, Ray, separate processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fedmerge.errors import ConfigError
from server import read_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]
QUICK = ("--clients", "4", "--local-epochs", "3", "--width", "16")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def fedmerge(*args: object, cache: Path, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FEDMERGE_CACHE": str(cache), "COLUMNS": "120"}
    command = [str(Path(sys.executable).parent / "fedmerge"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert expect is None or done.returncode == expect, done.stdout + done.stderr
    return done


def metrics(path: Path) -> list[dict]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_one_and_two_actors_write_the_same_bytes_and_a_complete_run_directory(tmp_path: Path, cache: Path) -> None:
    for name, cpus in (("a", 1), ("b", 2)):
        done = fedmerge("run", *QUICK, "--cpus", cpus, "--out", tmp_path / name, cache=cache)
        for title in ("Mean client", "Plain average", "MergeMany, anchored", "+ retrain", "report:"):
            assert title in done.stdout
    a, b = tmp_path / "a", tmp_path / "b"
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    assert (a / "summary.json").read_bytes() == (b / "summary.json").read_bytes()
    assert metrics(a) == metrics(b)
    assert {p.name.split(".tfevents.")[0] for p in a.iterdir()} == {
        "config.toml", "env.json", "metrics.jsonl", "summary.json", "model.safetensors", "clients", "plots", "report.html",
        "events.out",
    }  # fmt: skip
    assert len(list((a / "plots").glob("*.png"))) >= 4
    again = fedmerge("run", *QUICK, "--out", a, cache=cache, expect=2)
    assert "already holds a run" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_a_client_that_raises_one_that_exits_and_one_that_sends_nan_are_named_and_left_out(
    tmp_path: Path, cache: Path
) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from pathlib import Path
from experiments.launch.simulation import simulate
from faulty_client import app
from server import RunConfig
if __name__ == "__main__":
    config = RunConfig.parse({{"clients": 6, "local-epochs": 3, "width": 16}})
    simulate([(config, Path({str(tmp_path / "a")!r}))], client_app=app)
"""
    (tmp_path / "script.py").write_text(script)
    environment = {**os.environ, "FEDMERGE_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, tmp_path / "script.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    reasons = {f["client"]: f["reason"] for f in summary["failures"] if not f["reason"].startswith("evaluation")}
    assert sorted(reasons) == [1, 3, 5]
    assert "the disk of client 1 is full" in reasons[1]
    assert "died" in reasons[3] or "exit" in reasons[3].lower() or "actor" in reasons[3].lower()
    assert "NaN" in reasons[5]
    assert (summary["asked"], summary["answered"]) == (6, 3)
    assert summary["status"] == "finished"
    table = fedmerge("report", tmp_path / "a", cache=cache).stdout
    for client in ("client 1", "client 3", "client 5"):
        assert client in table.lower()
    fedmerge("run", "--clients", 6, "--local-epochs", 3, "--width", 16, "--out", tmp_path / "b", cache=cache)
    for client in (0, 2, 4):
        name = f"clients/round-1-client-{client}.safetensors"
        torch.testing.assert_close(read_model(tmp_path / "a" / name), read_model(tmp_path / "b" / name), rtol=0, atol=0)


def test_a_grid_interrupted_is_finished_by_resume_and_compared(tmp_path: Path, cache: Path) -> None:
    grid = tmp_path / "grid.toml"
    grid.write_text(
        '[base]\nclients = 3\nlocal-epochs = 2\nwidth = 16\ncontrols = "none"\n'
        '[[cells]]\nstrategy = "merge-many"\n[[cells]]\nstrategy = "fedavg"\ninit = "shared"\n[grid]\nseed = [0, 1]\n'
    )
    environment = {**os.environ, "FEDMERGE_CACHE": str(cache)}
    command = [str(Path(sys.executable).parent / "fedmerge"), "bench", str(grid), "--out", str(tmp_path / "out")]
    running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    first = tmp_path / "out" / "cells" / "merge-many-seed=0" / "summary.json"
    end = time.monotonic() + 200
    while not first.exists() and time.monotonic() < end:
        time.sleep(0.05)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert first.exists()
    before = first.stat().st_mtime_ns
    refused = fedmerge("bench", grid, "--out", tmp_path / "out", cache=cache, expect=2)
    assert "already holds runs" in refused.stderr
    done = fedmerge("bench", grid, "--out", tmp_path / "out", "--resume", cache=cache)
    assert first.stat().st_mtime_ns == before  # what was finished did not run again
    assert "FedAvg, shared init" in done.stdout
    assert (tmp_path / "out" / "report.html").exists()
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "interrupted"), (signal.SIGKILL, -9, "")],
)
def test_a_run_that_is_ended_leaves_no_ray_behind(
    number: signal.Signals, code: int, said: str, tmp_path: Path, cache: Path
) -> None:
    environment = {**os.environ, "FEDMERGE_CACHE": str(cache)}
    command = [
        str(Path(sys.executable).parent / "fedmerge"),
        "run",
        "--local-epochs",
        "3000",
        "--out",
        str(tmp_path / "a"),
    ]
    running = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 200
    started: dict[int, str] = {}
    while len(started) < len(RAY) and time.monotonic() < end:
        time.sleep(0.1)
        started = _ray_below(running.pid)
    if len(started) < len(RAY):
        running.kill()
        running.communicate()
    assert set(started.values()) == set(RAY)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == code
    assert said in stderr
    end = time.monotonic() + 20
    while any(_alive(pid) for pid in started) and time.monotonic() < end:
        time.sleep(0.2)
    assert not [pid for pid in started if _alive(pid)]


RAY = ("raylet/raylet", "gcs/gcs_server", "ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::ClientAppActor")


def _ray_below(pid: int) -> dict[int, str]:
    """Ray's servers and agents, and a client, among the descendants of ``pid``: process id -> which of ``RAY``."""
    found = subprocess.run(["ps", "-ww", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout.splitlines()
    rows = {int(p): (int(parent), args) for p, parent, args in (line.split(None, 2) for line in found[1:])}

    def descends(p: int) -> bool:
        while p in rows and p != pid:
            p = rows[p][0]
        return p == pid

    kinds = {p: next((kind for kind in RAY if kind in args), None) for p, (_, args) in rows.items()}
    one = {kind: p for p, kind in kinds.items() if kind is not None and descends(p)}
    return {p: kind for kind, p in one.items()}


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_flwr_run_works_without_internet_from_a_clean_home(tmp_path: Path, cache: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for name in ("fedmerge", "clients", "server", "strategies", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, app / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, app / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FEDMERGE_CACHE": str(cache),
    }
    out = tmp_path / "out"
    command = [
        str(Path(sys.executable).parent / "flwr"), "run", ".", "--stream",
        "--run-config", f"out='{out}' local-epochs=2 width=16",
    ]  # fmt: skip
    before = _superlinks()
    try:
        done = subprocess.run(command, cwd=app, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "MergeMany, anchored" in done.stdout
        summary = json.loads((out / "summary.json").read_text())
        assert (summary["status"], summary["asked"]) == ("finished", 2)  # Flower's own number of nodes
    finally:
        for pid in _superlinks() - before:
            os.kill(pid, signal.SIGTERM)


def _superlinks() -> set[int]:
    found = subprocess.run(["pgrep", "-f", "flower-superlink"], capture_output=True, text=True)
    return {int(pid) for pid in found.stdout.split()}


CRASH = """
import sys
from pathlib import Path
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from experiments.launch.simulation import Resources, simulate
from fedmerge.errors import FedmergeError
from server import RunConfig

def broken(pool, count):
    raise OSError(24, "Too many open files")

def attempt(name, **resources):
    try:
        config = RunConfig.parse({"clients": 2}, "test")
        simulate([(config, Path(sys.argv[1]) / name)], resources=Resources(**resources))
    except FedmergeError as error:
        print(error)

BasicActorPool.add_actors_to_pool = broken  # as where the system refuses another process
attempt("crash")
import ray
ray.init(num_cpus=1, log_to_driver=False)  # Ray that is there already is used
attempt("large", cpus=2, client_cpus=2.0)
"""


def test_a_simulation_that_cannot_go_on_says_why_at_once(tmp_path: Path, cache: Path) -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "FEDMERGE_CACHE": str(cache)}, timeout=290,
    )  # fmt: skip
    assert time.monotonic() - started < 200  # the server alone would wait 300 s for its clients
    crash, large = done.stdout.splitlines()
    assert crash == "the simulation ended early: OSError: [Errno 24] Too many open files"
    assert crash in json.loads((tmp_path / "crash" / "summary.json").read_text())["status"]
    assert "asks for 2 cores and 0 GPUs: they have 1 cores and 0 GPUs; lower --client-cpus" in large


def test_impossible_resources_are_named(tmp_path: Path) -> None:
    from experiments.launch.simulation import Resources

    with pytest.raises(ConfigError, match="4 cores a client do not fit 2 cores; lower --client-cpus"):
        Resources(cpus=2, client_cpus=4.0).backend(gpu=False, clients=2, verbose=False)
    shared = Resources(cpus=4).backend(gpu=True, clients=10, verbose=False)
    assert shared["client_resources"]["num_gpus"] == pytest.approx(0.25, abs=2e-3)
    assert (
        Resources(cpus=4, client_gpus=0.1).backend(gpu=True, clients=10, verbose=False)["client_resources"]["num_gpus"]
        == 0.1
    )
