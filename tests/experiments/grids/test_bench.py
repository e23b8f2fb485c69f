"""Grids over an in-process Flower grid: everything of `fedmerge bench` but Ray."""

import errno
import json
import os
import sys
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, Context, Message
from no_ray import simulate_here
from written import contents

from clients.app import app as fedmerge_app
from experiments import cli
from experiments.grids import bench
from experiments.grids import files as grid
from experiments.launch import simulation
from experiments.launch.sharing import SharedTraining, common_rounds
from experiments.records.runs import Run
from fedmerge.errors import ConfigError, DataError, FedmergeError, RunDirectoryError
from fedmerge.tasks import ARRAYS
from server import RunConfig, RunDirectory

GRID = """
[base]
clients = 3
width = 16
local-epochs = 2
retrain-epochs = 1
controls = "none"
local-evaluation = false
[[cells]]
merger = "average"
[[cells]]
name = "aligned"
grid = { aligner = ["weight-matching", "activation-matching"] }
[[cells]]
strategy = "fedavg"
[[cells]]
strategy = "fedavg"
rounds = 2
[grid]
seed = [0]
"""
NAMES = [
    "average-seed=0",
    "aligned-seed=0-weight-matching",
    "aligned-seed=0-activation-matching",
    "fedavg-seed=0",
    "fedavg-rounds=2-seed=0",
]


def read(tmp_path: Path, text: str = GRID, **options) -> list[grid.Cell]:
    file = tmp_path / "grid.toml"
    file.write_text(text)
    return grid.read(file, **options)


class Counting:
    """fedmerge's ClientApp, which counts trainings and fails where told."""

    def __init__(self, fail=lambda client, task: False) -> None:
        self.trained, self.fail = [], fail

    def __call__(self, message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            client = context.node_config["partition-id"]
            self.trained.append(client)
            if self.fail(client, message.content["config"]):
                raise RuntimeError("out of paper")
        return fedmerge_app(message, context)


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_here(monkeypatch.setattr)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each cell of the grid run by itself, in a folder of its name."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        simulate_here(patch.setattr)
        for cell in read(folder):
            simulation.simulate([(cell.config, folder / cell.name)])
    return folder


def seconds_of_training(path: Path) -> list[float]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row["seconds"] for row in rows if row["split"] == "local" and row["round"] == 1]


def test_local_training_is_done_once_for_all_ways_of_merging_and_changes_no_byte(tmp_path: Path, alone: Path) -> None:
    cells = read(tmp_path)
    assert [cell.name for cell in cells] == NAMES
    app = Counting()
    assert bench.run(cells, tmp_path / "out", client_app=app) == {}
    # Round 1 is the same for all five cells; round 2 is there once.
    assert sorted(app.trained) == [0, 0, 1, 1, 2, 2]
    assert not (tmp_path / "out" / "shared").exists()
    for name in NAMES:
        assert contents(tmp_path / "out" / "cells" / name) == contents(alone / name)
    times = [seconds_of_training(tmp_path / "out" / "cells" / name) for name in NAMES]
    assert times[0] == times[1] == times[2] == times[3] == times[4]  # the cost of the training, not of reading it
    assert min(times[0]) > 0


def test_only_answers_that_another_run_asks_for_are_kept() -> None:
    def rounds(*changes: dict) -> list[int]:
        configs = [RunConfig.parse({"controls": "none", **change}) for change in changes]
        return list(common_rounds(configs).values())

    assert rounds({"seed": 0}, {"seed": 1}) == []  # nobody asks again
    assert rounds({"merger": "average"}, {"repair": "none"}, {"seed": 1}) == [1]
    many = {"strategy": "fedavg", "rounds": 20}
    assert rounds({"strategy": "fedavg"}, {**many, "rounds": 5}, many, {"merger": "average"}) == [5]
    assert rounds({**many, "strategy": "fedadam"}, many) == [1]
    assert rounds({"strategy": "fedprox", "strategy-options": "proximal_mu=0.1"}, {"strategy": "fedavg"}) == []
    control = {"controls": "fedavg", "rounds": 3}
    assert rounds(control) == []
    assert rounds(control, {"strategy": "fedavg", "init": "shared", "rounds": 3, "restarts": 2}) == [3]
    assert rounds(control, {**control, "merger": "average"}) == [1, 3]  # their own first round, and all of the control


def test_fedavg_is_trained_once_as_a_control_of_several_cells_and_as_a_cell(tmp_path: Path) -> None:
    text = GRID.replace('controls = "none"', 'controls = "fedavg"').replace("rounds = 2", 'init = "shared"')
    average, *_, fedavg, shared = read(tmp_path, text)
    cells = [average, fedavg, shared]
    app = Counting()
    assert bench.run(cells, tmp_path / "out", client_app=app) == {}
    assert sorted(app.trained) == [0, 0, 1, 1, 2, 2]  # from networks of their own, and from a shared one
    found = [Run.load(tmp_path / "out" / "cells" / cell.name) for cell in cells]
    rivals = [run.stage("fedavg") or run.stage("aggregated") for run in found]
    assert len({(rival.accuracy, rival.loss) for rival in rivals}) == 1
    assert [run.stage("fedavg") is None for run in found] == [False, False, True]


def test_a_kept_answer_that_cannot_be_read_is_computed_again(tmp_path: Path) -> None:
    cells = read(tmp_path)[:2]
    app = SharedTraining(Counting(), tmp_path / "shared", common_rounds(cell.config for cell in cells))
    simulation.simulate([(cells[0].config, tmp_path / "a")], client_app=app)
    kept = sorted((tmp_path / "shared").iterdir())
    assert len(kept) == 3
    kept[0].write_bytes(b"")
    kept[1].write_bytes(kept[1].read_bytes()[:1000])
    simulation.simulate([(cells[0].config, tmp_path / "b")], client_app=app)
    assert len(app.app.trained) == 5
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_answers_with_nan_are_not_kept(tmp_path: Path) -> None:
    def spoiled(message: Message, context: Context) -> Message:
        reply = fedmerge_app(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] == 1:
            arrays = reply.content[ARRAYS].to_torch_state_dict()
            reply.content[ARRAYS] = ArrayRecord({k: v * float("nan") for k, v in arrays.items()})
        return reply

    cells = read(tmp_path)[:2]
    app = SharedTraining(spoiled, tmp_path / "shared", common_rounds(cell.config for cell in cells))
    simulation.simulate([(cells[0].config, tmp_path / "a")], client_app=app)
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_a_finished_grid_is_left_as_it_is(tmp_path: Path) -> None:
    cells = read(tmp_path)[:2]
    bench.run(cells, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    app = Counting()
    bench.run(cells, tmp_path / "out", client_app=app, resume=True)
    assert app.trained == []
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == before


def test_a_grid_that_has_grown_runs_what_is_new(tmp_path: Path) -> None:
    cells = read(tmp_path)
    bench.run(cells[:1], tmp_path / "out")
    before = (tmp_path / "out" / "cells" / NAMES[0] / "summary.json").stat().st_mtime_ns
    bench.run([cells[0], *cells[3:]], tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "cells" / NAMES[0] / "summary.json").stat().st_mtime_ns == before
    assert all(Run.load(tmp_path / "out" / "cells" / name).finished for name in (NAMES[0], *NAMES[3:]))


def test_a_failed_cell_is_recorded_the_rest_goes_on_and_resume_tries_it_again(tmp_path: Path, alone: Path) -> None:
    average, *_, fedavg, longer = read(tmp_path)
    cells = [longer, average, fedavg]
    tried = Counting(fail=lambda client, task: task["server-round"] == 2)
    failed = bench.run(cells, tmp_path / "out", client_app=tried)
    assert list(failed) == [NAMES[4]]
    assert "round 2 got 0 usable replies of 3" in failed[NAMES[4]]
    assert "out of paper" in failed[NAMES[4]]
    assert Run.load(tmp_path / "out" / "cells" / NAMES[4]).status == f"failed: {failed[NAMES[4]]}"
    assert all(Run.load(tmp_path / "out" / "cells" / cell.name).finished for cell in (average, fedavg))
    again = Counting()
    assert bench.run(cells, tmp_path / "out", client_app=again, resume=True) == {}
    assert sorted(again.trained) == [0, 1, 2]  # round 2 of the one that failed
    assert contents(tmp_path / "out" / "cells" / NAMES[4]) == contents(alone / NAMES[4])


def test_training_that_diverges_fails_its_own_cell_only(tmp_path: Path) -> None:
    cells = read(tmp_path, GRID + '[[cells]]\nname = "hot"\nlr = 1e30\n')
    failed = bench.run([cells[-1], cells[0]], tmp_path / "out")
    assert list(failed) == ["hot-seed=0"]
    assert "the loss is not finite" in failed["hot-seed=0"]
    assert Run.load(tmp_path / "out" / "cells" / NAMES[0]).finished


def test_a_cell_that_ends_before_it_writes_anything_is_recorded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = read(tmp_path)[:2]
    real = simulation.server_app

    def broken(runs, *callbacks, resume):
        if runs[0][1].name == NAMES[0]:
            raise ValueError("no such luck")
        return real(runs, *callbacks, resume=resume)

    monkeypatch.setattr(simulation, "server_app", broken)
    assert bench.run(cells, tmp_path / "out") == {NAMES[0]: "no such luck"}
    assert Run.load(tmp_path / "out" / "cells" / NAMES[0]).status == "failed: no such luck"


def test_a_full_disk_is_one_message_and_loses_nothing_finished(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average, aligned, *_, longer = read(tmp_path)
    cells = [average, aligned, longer]
    write = RunDirectory.write_bytes

    def full(self: RunDirectory, name: str, content: bytes) -> None:
        if self.path.name == NAMES[1] and name == "model.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_bytes", full)
        with pytest.raises(FedmergeError, match=rf"the disk is full: .*{NAMES[1]} could not be written.*--resume"):
            bench.run(cells, tmp_path / "out")
    first = tmp_path / "out" / "cells" / NAMES[0] / "summary.json"
    before = first.stat().st_mtime_ns
    assert bench.run(cells, tmp_path / "out", resume=True) == {}
    assert first.stat().st_mtime_ns == before
    for cell in cells:
        assert contents(tmp_path / "out" / "cells" / cell.name) == contents(alone / cell.name)


def test_a_run_that_was_killed_between_its_last_files_is_finished_by_resume(tmp_path: Path) -> None:
    cells = read(tmp_path)[:1]
    bench.run(cells, tmp_path / "out")
    run = tmp_path / "out" / "cells" / NAMES[0]
    before = contents(run)
    (run / "summary.json").unlink()
    (run / "clients" / "round-1-client-2.safetensors").unlink()
    bench.run(cells, tmp_path / "out", resume=True)
    assert contents(run) == before
    for file in run.rglob("*"):  # and one that was killed while its config was written
        if file.is_file():
            file.unlink()
    (run / "clients").rmdir()
    (run / ".config.toml.tmp").write_text("clie")
    bench.run(cells, tmp_path / "out", resume=True)
    assert contents(run) == before


def test_a_run_that_was_killed_before_its_checkpoint_went_does_its_last_round_again(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = read(tmp_path)[4:]
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "finish", lambda self: None)
        bench.run(cells, tmp_path / "out")
    run = tmp_path / "out" / "cells" / NAMES[4]
    assert (run / "checkpoint").exists()
    app = Counting()
    bench.run(cells, tmp_path / "out", client_app=app, resume=True)
    assert sorted(app.trained) == [0, 1, 2]
    assert contents(run) == contents(alone / NAMES[4])


def test_a_folder_with_other_runs_is_left_alone(tmp_path: Path) -> None:
    cells = read(tmp_path)
    out = tmp_path / "out"
    RunDirectory.open(out / "cells" / NAMES[0], cells[0].config)
    with pytest.raises(RunDirectoryError, match="already holds runs; choose another --out, or --resume"):
        bench.run(cells, out)
    wider = read(tmp_path, GRID.replace("width = 16", "width = 32"))
    with pytest.raises(RunDirectoryError, match=r"another grid: average-seed=0 has width = 16.* there, 32.* here"):
        bench.run(wider, out, resume=True)
    longer = [grid.Cell(NAMES[0], cells[0].config.model_copy(update={"rounds": 2}))]
    with pytest.raises(RunDirectoryError, match=r"average-seed=0 has rounds = 1 there, 2 here"):
        bench.run(longer, out, resume=True)
    with pytest.raises(RunDirectoryError, match=r"another grid: average-seed=0 is there and not in this one"):
        bench.run(cells[1:], out, resume=True)


def test_a_run_and_a_file_are_no_folders_for_a_grid(tmp_path: Path) -> None:
    cells = read(tmp_path)
    RunDirectory.open(tmp_path / "run", cells[0].config)
    for resume in (False, True):
        with pytest.raises(
            RunDirectoryError, match="run is a run, whose folder has no room for a grid; choose another"
        ):
            bench.run(cells, tmp_path / "run", resume=resume)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.toml"]
    with pytest.raises(RunDirectoryError, match="config.toml is a file; give a folder with --out"):
        bench.run(cells, tmp_path / "run" / "config.toml")


def test_networks_that_do_not_take_the_images_are_named_before_the_first_run(tmp_path: Path) -> None:
    text = '[base]\nclients = 3\n[grid]\nmodel = ["mlp", "vgg11"]\nseed = [0, 1]\n'
    with pytest.raises(FedmergeError) as caught:
        read(tmp_path, text, check=simulation.try_out)
    assert "2 of 4 runs cannot be made" in str(caught.value)
    assert "vgg11-seed=0, vgg11-seed=1: " in str(caught.value)


def test_data_that_cannot_be_had_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def load(dataset: str) -> None:
        looked.append(dataset)
        raise DataError("no such photographs")

    monkeypatch.setattr(simulation.data, "load", load)
    simulation._refused_data.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"2 of 2 runs cannot be made .*seed=0, seed=1: no such photographs"):
            read(tmp_path, "[base]\ndataset = 'mnist'\n[grid]\nseed = [0, 1]\n", check=simulation.try_out)
    finally:
        simulation._refused_data.cache_clear()
    assert looked == ["mnist"]


def command(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `fedmerge bench ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["fedmerge", "bench", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


@pytest.mark.usefixtures("undrawn")
def test_the_command_reports_failed_runs_at_its_end_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GRID[: GRID.index("[[cells]]\nname")] + "[[cells]]\nlr = 1e30\n[quick]\nclients = 2\n"
    (tmp_path / "grid.toml").write_text(text)
    given = (tmp_path / "grid.toml", "--out", tmp_path / "out", "--quick")
    assert command(*given, monkeypatch=monkeypatch) == 1
    printed = capsys.readouterr()
    assert "2 runs into" in printed.out
    assert "Plain average" in printed.out or "Mean client" in printed.out
    assert "lr=1e+30 failed: round 1 got 0 usable replies of 2" in printed.err
    assert "error: 1 of 2 runs failed, the others are complete; --resume" in printed.err
    assert (tmp_path / "out" / "report.html").exists()
    assert command(*given, "--resume", monkeypatch=monkeypatch) == 1  # deterministic: it fails again
    assert Run.load(tmp_path / "out" / "cells" / "average").config["clients"] == 2
    assert command(tmp_path / "grid.toml", "--out", tmp_path / "out", "--resume", monkeypatch=monkeypatch) == 2
    assert "holds runs of another grid: average has clients = 2 there, 3 here" in capsys.readouterr().err
