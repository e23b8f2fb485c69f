"""Several runs over the same clients, one after the other: an in-process grid in place of Flower's simulation."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
from flwr.app import Context, RecordDict
from local_grid import LocalGrid
from no_ray import simulate_here
from written import contents

from experiments.grids import bench
from experiments.grids import files as grid
from experiments.launch import simulation
from experiments.launch.simulation import simulate
from fedmerge.errors import FedmergeError
from server import Callback, RunConfig, RunDirectory

BASE = {"clients": 3, "width": 16, "local-epochs": 1, "retrain-epochs": 1, "controls": "none"}
# Dropout draws from torch's global generator, FedAdam and SCAFFOLD keep state.
RUNS = {
    "dropout": {**BASE, "model": "reduced-vgg", "width": 0.1, "rounds": 2},
    "fedadam": {**BASE, "strategy": "fedadam", "init": "shared", "rounds": 3, "seed": 1},
    "scaffold": {**BASE, "strategy": "scaffold", "init": "shared", "rounds": 2, "optimizer": "sgd"},
    "average": {**BASE, "merger": "average", "local-evaluation": False},
}


@pytest.fixture(autouse=True)
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kind of each message that the clients of a simulation in this process get."""
    asked: list[str] = []

    class Counting(LocalGrid):
        def push_messages(self, messages):
            messages = list(messages)
            asked.extend(message.metadata.message_type for message in messages)
            return super().push_messages(messages)

    simulate_here(monkeypatch.setattr, Counting)
    return asked


class Told(Callback):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def row(self, row) -> None:
        if row.split == "test" and row.client is None:
            self.lines.append(row.stage)


def jobs(out: Path, names=tuple(RUNS)) -> list[tuple[RunConfig, Path]]:
    return [(RunConfig.parse(RUNS[name]), out / name) for name in names]


def test_a_run_writes_the_same_bytes_whatever_ran_before_it_and_each_stands_below_its_name(
    tmp_path: Path, questions: list[str]
) -> None:
    told = Told()
    simulate(jobs(tmp_path / "together"), callbacks=[told])
    assert questions.count("query") == 3  # each client says once who it is
    for name in reversed(RUNS):
        simulate(jobs(tmp_path / "alone", [name]))
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")
    said: dict[str, list[str]] = {}
    for line in told.lines:
        if line.startswith("run "):
            below = said.setdefault(line, [])
        else:
            below.append(line)
    assert list(said) == [f"run {i} of 4: {name}" for i, name in enumerate(RUNS, 1)]
    for head, lines in said.items():
        file = tmp_path / "together" / head.split(": ")[1] / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        written = [row["stage"] for row in rows if row["split"] == "test" and row["client"] is None]
        assert [line for line in lines if " " not in line] == written  # without sentences


def test_a_single_run_has_no_headline(tmp_path: Path) -> None:
    told = Told()
    simulate(jobs(tmp_path, ["average"]), callbacks=[told])
    assert not [line for line in told.lines if line.startswith("run ")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize(("given", "said"), [(0.25, True), (0.0, False), (-1.0, False)])
def test_a_share_of_a_gpu_that_nobody_uses_is_named(given: float, said: bool, tmp_path: Path) -> None:
    told = Told()
    simulate(jobs(tmp_path, ["average"]), resources=simulation.Resources(client_gpus=given), callbacks=[told])
    assert ("not used, for nothing is computed on a GPU: --client-gpus 0.25" in told.lines) == said


@pytest.mark.parametrize("error", [KeyboardInterrupt("now"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
def test_a_full_disk_or_ctrl_c_ends_all_runs_and_loses_nothing_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = set(threading.enumerate())
    text = (
        '[base]\nclients = 3\nwidth = 16\nlocal-epochs = 1\ncontrols = "none"\nstrategy = "fedavg"\n'
        "[grid]\nseed = [0, 1, 2, 3]\n[[cells]]\nrounds = 2\n"
    )
    (tmp_path / "grid.toml").write_text(text)
    cells = grid.read(tmp_path / "grid.toml")
    names = [cell.name for cell in cells]
    write = RunDirectory.write_bytes

    def broken(self: RunDirectory, name: str, content: bytes) -> None:
        if self.path.name == names[2] and name == "model.safetensors":
            raise error
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_bytes", broken)
        with pytest.raises((FedmergeError, KeyboardInterrupt), match=r"the disk is full: .*--resume|now"):
            bench.run(cells, tmp_path / "out")
    assert set(threading.enumerate()) <= before  # other tests of this process may have left some
    summaries = [tmp_path / "out" / "cells" / name / "summary.json" for name in names]
    statuses = [json.loads(file.read_text())["status"] if file.exists() else "" for file in summaries]
    assert [status == "finished" for status in statuses] == [True, True, False, False]
    first = summaries[0].stat().st_mtime_ns
    assert bench.run(cells, tmp_path / "out", resume=True) == {}
    assert summaries[0].stat().st_mtime_ns == first
    bench.run(cells, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_failed_run_is_reported_and_the_next_goes_on_if_somebody_hears_of_it(tmp_path: Path) -> None:
    ended = {}
    runs = [
        (RunConfig.parse(BASE | {"lr": 1e30}), tmp_path / "hot"),
        (RunConfig.parse(BASE | {"rounds": 2}), tmp_path / "good"),
    ]
    simulate(runs, on_end=lambda path, error: ended.update({path.name: str(error)}))
    assert "got 0 usable replies of 3" in ended["hot"]
    assert ended["good"] == "None"
    with pytest.raises(FedmergeError, match="got 0 usable replies of 3"):
        simulate([(config, path.with_suffix(".2")) for config, path in runs])
    assert not RunDirectory(tmp_path / "good.2").finished


def test_a_simulation_that_ends_early_ends_the_run_that_waits_for_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Flower does it: the server goes on in a thread of its own while the simulation raises."""

    class Silent(LocalGrid):
        def pull_messages(self, message_ids):
            waits.set()
            return []

    waits = threading.Event()
    servers: list[threading.Thread] = []

    def serve(server_app, clients: int) -> None:
        context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={})
        with pytest.raises(FedmergeError, match="ended early"):
            server_app(Silent(clients), context)

    def run_simulation(*, server_app, client_app, num_supernodes, backend_config) -> None:
        servers.append(threading.Thread(target=serve, args=(server_app, num_supernodes)))
        servers[0].start()
        assert waits.wait(20)
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(simulation, "run_simulation", run_simulation)
    said = "the simulation ended early: OSError: [Errno 24] Too many open files"
    with pytest.raises(FedmergeError, match=said.replace("[", r"\[")):
        simulate(jobs(tmp_path, ["average"]))
    status = json.loads((tmp_path / "average" / "summary.json").read_text())["status"]
    assert status == f"failed: {said}"
    servers[0].join(5)
    assert not servers[0].is_alive()
