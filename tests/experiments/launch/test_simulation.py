"""Simulations as a user starts them: Flower's runtime, Ray, separate processes.

They are started in a folder whose packages are called as fedmerge's. Ray is started for what only Ray shows, among it
that it computes, byte for byte, what a grid in this process computes; everything else is tested there.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from site import getsitepackages

import plain
import pytest
import torch
from no_ray import simulate_here
from processes import RAY, alive, printed, ray_below, start, superlinks
from strangers import strangers
from written import contents

from experiments import cli
from experiments.grids import bench, files
from experiments.launch import simulation
from experiments.records.runs import find
from fedmerge.errors import ConfigError
from server import RunConfig, RunDirectory, read_model

slow = pytest.mark.slow
ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
TITLES = ("Mean client", "Plain average", "MergeMany, anchored", "+ retrain")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What this process simulates, it simulates without Ray. The fixture is the command, run in this process."""
    simulate_here(monkeypatch.setattr)

    def command(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["fedmerge", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code

    return command


def test_a_run_tells_its_stages_and_writes_a_complete_directory(
    tmp_path: Path, here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    here("run", "--clients", 4, "--local-epochs", 3, "--width", 16, "--cpus", 2, "--out", tmp_path / "a")
    out = capsys.readouterr().out
    for title in (*TITLES, "report:"):
        assert title in out
    assert {p.name.split(".tfevents.")[0] for p in (tmp_path / "a").iterdir()} == {
        "config.toml", "env.json", "metrics.jsonl", "summary.json", "model.safetensors", "clients", "plots", "report.html",
        "events.out",
    }  # fmt: skip
    assert len(list((tmp_path / "a" / "plots").glob("*.png"))) >= 4


SMALL = {"clients": 3, "local-epochs": 3, "width": 16, "controls": "none", "init": "shared"}
# First those whose clients fail: the others have clients although more died than Flower's pool would survive.
CELLS = {
    "faulty": {"clients": 6, "local-epochs": 3, "width": 16, "controls": "none", "seed": 7},
    "dead": {"clients": 1, "local-epochs": 2, "width": 16, "strategy": "fedavg", "controls": "none", "lr": 0.5, "seed": 9},
    "average": {**SMALL, "merger": "average"},
    "merge-many": {**SMALL, "merger": "merge-many"},
    "fedavg": {**SMALL, "strategy": "fedavg", "rounds": 2},
    "fedadam": {**SMALL, "strategy": "fedadam", "rounds": 2},
    "average 1": {**SMALL, "merger": "average", "seed": 1},
    "merge-many 1": {**SMALL, "merger": "merge-many", "seed": 1},
    "plain": {
        "clients": 3, "local-epochs": 1, "width": 0.25, "controls": "none", "init": "shared", "strategy": "fedavg",
        "rounds": 2, "model": "resnet20", "partition": "dirichlet", "seed": 2,
    },
}  # fmt: skip
CELLS_ON_RAY = """
import json
import sys
from pathlib import Path
tests, out, cells = sys.argv[1:]
sys.path.insert(0, tests)  # Ray's workers find the modules there too
from experiments.grids import bench
from experiments.grids.files import Cell
from experiments.launch.simulation import Resources
from faulty_client import Faulty
from server import RunConfig
cells = [Cell(name, RunConfig.parse(config)) for name, config in json.loads(cells).items()]
app = Faulty(Path(out) / "trained")
print(json.dumps(bench.run(cells, Path(out), client_app=app, resources=Resources(cpus=1))))
"""


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[Path, dict[str, str]]:
    """``CELLS`` on one Ray, and the cells that failed."""
    out = tmp_path_factory.mktemp("ray")
    said = printed(sys.executable, "-c", CELLS_ON_RAY, ROOT / "tests", out, json.dumps(CELLS), cache=cache)
    return out, json.loads(said.splitlines()[-1])


@slow
def test_a_client_that_raises_one_that_exits_and_one_that_sends_nan_are_named_and_left_out(
    tmp_path: Path,
    on_ray: tuple[Path, dict[str, str]],
    here: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    faulty = on_ray[0] / "cells" / "faulty"
    summary = json.loads((faulty / "summary.json").read_text())
    reasons = {f["client"]: f["reason"] for f in summary["failures"] if not f["reason"].startswith("evaluation")}
    assert sorted(reasons) == [1, 3, 5]
    assert "the disk of client 1 is full" in reasons[1]
    assert "died" in reasons[3] or "exit" in reasons[3].lower() or "actor" in reasons[3].lower()
    assert "NaN" in reasons[5]
    assert (summary["asked"], summary["answered"]) == (6, 3)
    assert summary["status"] == "finished"
    here("report", faulty)
    table = capsys.readouterr().out.lower()
    for client in ("client 1", "client 3", "client 5"):
        assert client in table
    simulation.simulate([(RunConfig.parse(CELLS["faulty"]), tmp_path / "whole")])
    for client in (0, 2, 4):
        name = f"clients/round-1-client-{client}.safetensors"
        torch.testing.assert_close(read_model(faulty / name), read_model(tmp_path / "whole" / name), rtol=0, atol=0)


@slow
def test_a_cell_whose_clients_all_die_fails_and_the_next_ones_have_clients_again(
    on_ray: tuple[Path, dict[str, str]],
) -> None:
    out, failed = on_ray
    assert list(failed) == ["dead"]
    assert "round 1 got 0 usable replies of 1" in failed["dead"]
    found = {name: json.loads((out / "cells" / name / "summary.json").read_text()) for name in CELLS}
    assert found["dead"]["status"].startswith("failed: round 1 got 0 usable replies")
    for name in ("average", "merge-many", "plain"):
        assert (found[name]["status"], found[name]["failures"]) == ("finished", [])
        assert found[name]["answered"] == found[name]["asked"]


@slow
def test_clients_train_once_for_all_cells_and_write_the_bytes_of_one_process(
    tmp_path: Path, on_ray: tuple[Path, dict[str, str]], here: Callable[..., None]
) -> None:
    """Four runs ask one client after the other the same, two ask something else: on Ray, in processes of their own."""
    shared = {name: change for name, change in CELLS.items() if change.items() >= SMALL.items()}
    trained = sorted(line for line in (on_ray[0] / "trained").read_text().splitlines() if line[0] in "01")
    # Round 1 once for each seed; round 2 for both strategies that have one, whose networks differ by then.
    once = [f"{seed} 1 {client}" for seed in (0, 1) for client in range(3)]
    assert trained == sorted([*once, *2 * [f"0 2 {client}" for client in range(3)]])
    cells = [files.Cell(name, RunConfig.parse(change)) for name, change in shared.items()]
    assert bench.run(cells, tmp_path) == {}
    for name in shared:
        assert contents(on_ray[0] / "cells" / name) == contents(tmp_path / "cells" / name)


@slow
def test_fedavg_on_ray_gives_the_weights_of_a_plain_pytorch_loop(on_ray: tuple[Path, dict[str, str]]) -> None:
    run = on_ray[0] / "cells" / "plain"
    expected, found = plain.federate(RunConfig.read(run / "config.toml")), read_model(run / "model.safetensors")
    torch.testing.assert_close(found, {k: expected[k] for k in found}, rtol=1e-5, atol=1e-6)


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
init = "shared"
rounds = 5
[grid]
seed = [0, 1, 2]
"""
ENDINGS = {signal.SIGKILL: (-9, ""), signal.SIGTERM: (143, "interrupted"), signal.SIGINT: (130, "interrupted")}


@slow
def test_a_grid_that_is_ended_leaves_no_ray_behind_and_resumed_writes_the_bytes_of_one_that_was_not(
    tmp_path: Path, cache: Path, here: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = tmp_path / "grid.toml", tmp_path / "out"
    config.write_text(GRID)
    command = ("bench", config, "--out", out, "--cpus", 1, "--resume")
    cwd = strangers(tmp_path / "elsewhere")
    ends: dict[str, int] = {}
    pids: set[int] = set()
    for number, (code, said) in ENDINGS.items():
        running, started = start(BIN / "fedmerge", *command, cache=cache, cwd=cwd), {}
        try:
            while running.poll() is None and (len(finished(out)) <= len(ends) or set(started.values()) != set(RAY)):
                time.sleep(0.02)
                started = started if len(finished(out)) <= len(ends) else ray_below(running.pid)
            running.send_signal(number)
            _, stderr = running.communicate(timeout=60)
        finally:
            running.kill()
        assert set(started.values()) == set(RAY)
        assert (number, running.returncode) == (number, code)
        assert said in stderr
        pids |= set(started)
        now = finished(out)
        assert len(ends) < len(now) < 9
        assert {name: now[name] for name in ends} == ends  # what was finished did not run again
        ends = now
    here(*command)  # Ray has gone on twice
    assert "FedAvg, shared init" in capsys.readouterr().out
    now = finished(out)
    assert {name: now[name] for name in ends} == ends
    assert bench.run(files.read(config), tmp_path / "whole") == {}
    assert len(now) == len(find(tmp_path / "whole")) == 9
    for name in now:
        assert contents(out / "cells" / name) == contents(tmp_path / "whole" / "cells" / name)
    assert (out / "report.html").exists()
    end = time.monotonic() + 20  # Ray's agents take a while to see that they are alone
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.2)
    assert not [pid for pid in pids if alive(pid)]


def finished(out: Path) -> dict[str, int]:
    """When each finished cell was finished."""
    return {p.name: (p / "summary.json").stat().st_mtime_ns for p in out.glob("cells/*") if RunDirectory(p).finished}


@pytest.fixture(scope="module")
def flwr_run(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Callable[[Path, str], str]]:
    """What `flwr run APP` prints, without internet and from a clean home. One SuperLink serves all runs."""
    home = tmp_path_factory.mktemp("flower")
    environment = {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "FLWR_HOME": str(home / "home"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }
    cwd, before = strangers(home / "elsewhere"), superlinks()

    def run(app: Path, config: str) -> str:
        command = (BIN / "flwr", "run", app, "--stream", "--run-config", config)
        for _ in range(4):
            try:
                return printed(*command, cwd=cwd, cache=cache, **environment)
            except AssertionError as error:  # Flower gives its SuperLink 15 seconds, few where other tests run
                if "Failed to start local SuperLink within" not in str(error):
                    raise
        return printed(*command, cwd=cwd, cache=cache, **environment)

    yield run
    for pid in superlinks() - before:
        os.kill(pid, signal.SIGTERM)


@slow
def test_flwr_run_works_without_internet_from_a_clean_home(
    tmp_path: Path, flwr_run: Callable[[Path, str], str]
) -> None:
    app = tmp_path / "app"
    app.mkdir()
    for name in ("fedmerge", "clients", "server", "strategies", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, app / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, app / name)
    out = tmp_path / "out"
    assert "MergeMany, anchored" in flwr_run(app, f"out='{out}' local-epochs=2 width=16")
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["asked"]) == ("finished", 2)  # Flower's own number of nodes


@slow
def test_flwr_run_starts_the_example_of_an_own_app(flwr_run: Callable[[Path, str], str]) -> None:
    said = flwr_run(ROOT / "examples" / "own-app", "num-server-rounds=1 local-epochs=2")
    accuracies = [float(found) for found in re.findall(r"round \d: accuracy ([\d.]+)", said)]
    assert len(accuracies) == 2
    assert accuracies[0] < 0.3
    assert accuracies[1] > 0.75
    assert "Received 2 results and 0 failures" in said


CRASH = """
import sys
from pathlib import Path
import ray
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

ray.init(num_cpus=1, log_to_driver=False)  # Ray that is there already is used
end, ray.shutdown = ray.shutdown, lambda: None
attempt("large", cpus=2, client_cpus=2.0)
ray.shutdown = end
BasicActorPool.add_actors_to_pool = broken  # as where the system refuses another process
attempt("crash")
print(ray.is_initialized())
"""


@slow
def test_a_simulation_that_cannot_go_on_says_why_at_once(tmp_path: Path, cache: Path) -> None:
    started = time.monotonic()
    said = printed(sys.executable, "-c", CRASH, tmp_path, cache=cache)
    assert time.monotonic() - started < 200  # the server alone would wait 300 s for its clients
    large, crash, left = said.splitlines()
    assert crash == "the simulation ended early: OSError: [Errno 24] Too many open files"
    assert crash in json.loads((tmp_path / "crash" / "summary.json").read_text())["status"]
    assert "asks for 2 cores and 0 GPUs: they have 1 cores and 0 GPUs; lower --client-cpus" in large
    assert left == "False"


def test_impossible_resources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="4 cores a client do not fit 2 cores; lower --client-cpus"):
        simulation.Resources(cpus=2, client_cpus=4.0).backend(gpus=0, clients=2, verbose=False)
    with pytest.raises(ConfigError, match="--cpus -1: expected a number of cores, or 0 for all of them"):
        simulation.Resources(cpus=-1).backend(gpus=0, clients=2, verbose=False)
    for none in (0.0, math.nan):
        with pytest.raises(ConfigError, match=f"--client-cpus {none:g}: expected more than 0 cores"):
            simulation.Resources(client_cpus=none).backend(gpus=0, clients=2, verbose=False)
    shared = simulation.Resources(cpus=4).backend(gpus=1, clients=10, verbose=False)
    assert shared["client_resources"]["num_gpus"] == pytest.approx(0.25, abs=2e-3)
    share = simulation.Resources(cpus=4, client_gpus=0.1).backend(gpus=1, clients=10, verbose=False)
    assert share["client_resources"]["num_gpus"] == 0.1


@pytest.mark.parametrize(("gpus", "at_once"), [(1, 1), (1, 3), (2, 4), (4, 6), (4, 2), (8, 50)])
def test_clients_that_train_at_once_are_spread_over_all_gpus(gpus: int, at_once: int) -> None:
    found = simulation.Resources(cpus=at_once).backend(gpus=gpus, clients=at_once, verbose=False)
    share = found["client_resources"]["num_gpus"]
    each = math.floor(1 / share)  # Ray puts so many on one GPU before it begins the next
    assert each * gpus >= at_once
    assert (each - 1) * gpus < at_once  # and no more than it must


DETACHED = """
import pathlib, sys, fedmerge
assert pathlib.Path(fedmerge.__file__).is_relative_to(sys.prefix), fedmerge.__file__
"""


@slow
def test_the_wheel_in_an_environment_of_its_own_runs_the_demo_that_it_ships_with_the_bytes_of_one_process(
    tmp_path: Path, cache: Path, here: Callable[..., None]
) -> None:
    pytest.importorskip("hatchling", reason="builds the wheel; one of the test dependencies")
    build = "import sys, hatchling.build; print(hatchling.build.build_wheel(sys.argv[1]))"
    wheel = tmp_path / printed(sys.executable, "-c", build, tmp_path, cache=cache).split()[-1]
    home = tmp_path / "environment"
    venv.create(home, symlinks=True)
    python, cwd = home / "bin" / "python", strangers(tmp_path / "elsewhere")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    printed(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cache=cache, cwd=cwd)
    (site,) = home.glob("lib/python*/site-packages")
    # All that fedmerge needs, without what files of paths there add: an editable install of this folder is such a file.
    (site / "needed.pth").write_text("\n".join(getsitepackages()))
    clean = {"PYTHONPATH": "", "PATH": f"{home / 'bin'}:{os.environ['PATH']}", "FEDMERGE_DATA": ""}
    printed(python, "-c", DETACHED, cache=cache, cwd=cwd, **clean)
    said = printed(home / "bin" / "fedmerge", "bench", "demo", "--quick", "--cpus", 1, cache=cache, cwd=cwd, **clean)
    for words in ("2 runs into runs/demo-quick", "MergeMany, anchored", "report:"):
        assert words in said
    out = cwd / "runs" / "demo-quick"
    assert "MergeMany, anchored" in (out / "report.html").read_text()
    cells = files.read(files.found(Path("demo")), quick=True)
    assert bench.run(cells, tmp_path / "whole") == {}
    for cell in cells:
        assert json.loads((out / "cells" / cell.name / "summary.json").read_text())["status"] == "finished"
        assert contents(out / "cells" / cell.name) == contents(tmp_path / "whole" / "cells" / cell.name)
