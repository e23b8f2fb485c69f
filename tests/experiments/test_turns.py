"""Several runs side by side: over an in-process grid that gives one reply at a look, and of nothing but turns."""

import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
from local_grid import LocalGrid
from no_ray import simulate_here
from written import contents

from experiments import bench, grid, simulation, turns
from experiments.simulation import Resources, simulate
from experiments.turns import Turns
from fedmerge.errors import ConfigError, FedmergeError
from server import Observer, RunConfig, RunDirectory

BASE = {"clients": 3, "width": 16, "local-epochs": 1, "retrain-epochs": 1, "controls": "none"}
# Dropout draws from torch's global generator, FedAdam and SCAFFOLD keep state; the last two are asked the same.
RUNS = {
    "dropout": {**BASE, "model": "reduced-vgg", "width": 0.1, "rounds": 2},
    "fedadam": {**BASE, "strategy": "fedadam", "init": "shared", "rounds": 3, "seed": 1},
    "scaffold": {**BASE, "strategy": "scaffold", "init": "shared", "rounds": 2, "optimizer": "sgd"},
    "merged": {**BASE, "merger": "merge-many"},
    "average": {**BASE, "merger": "average", "local-evaluation": False},
}


class Slow(LocalGrid):
    """One reply at a look: between two of them a run gives its turn away."""

    def pull_messages(self, message_ids):
        return super().pull_messages(list(message_ids)[:1])


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_here(monkeypatch.setattr, Slow)
    monkeypatch.setattr(turns, "_POLL", 0.001)


class Told(Observer):
    """Remembers what it is told, and in which thread."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.bars: list[list[int]] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def stage(self, row) -> None:
        if row["split"] == "test" and row["client"] is None:
            self.lines.append(f"  {row['stage']}")

    def waiting(self, what: str, total: int) -> None:
        self.bars.append([total, 0])

    def replied(self, client: int | None, error: bool) -> None:
        if self.bars:  # those who say who they are have none
            self.bars[-1][1] += 1


def jobs(out: Path, names=tuple(RUNS)) -> list[tuple[RunConfig, Path]]:
    return [(RunConfig.parse(RUNS[name]), out / name) for name in names]


def test_runs_side_by_side_write_the_same_bytes_as_one_after_the_other(tmp_path: Path) -> None:
    told = {}
    for at_once in (1, 2, 3):
        told[at_once] = Told()
        simulate(jobs(tmp_path / str(at_once)), resources=Resources(runs=at_once), observer=told[at_once])
    for at_once in (2, 3):
        assert contents(tmp_path / str(at_once)) == contents(tmp_path / "1")
        assert sorted(told[at_once].lines) != sorted(told[1].lines)  # more headlines: the runs spoke in turns
    heads = [line for line in told[1].lines if line.startswith("run ")]
    assert heads == [f"run {i} of 5: {name}" for i, name in enumerate(RUNS, 1)]


def test_what_runs_say_stands_below_the_name_of_each(tmp_path: Path) -> None:
    told = Told()
    simulate(jobs(tmp_path), resources=Resources(runs=2), observer=told)
    said: dict[str, list[str]] = {}
    for line in told.lines:
        if line.startswith("run "):
            below = said.setdefault(line.split(": ")[1], [])
        else:
            below.append(line.strip())
    for name, lines in said.items():
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        written = [row["stage"] for row in rows if row["split"] == "test" and row["client"] is None]
        assert [line for line in lines if "," not in line] == written
    assert max(total for total, _ in told.bars) == 6  # one bar for the clients of both
    assert all(came <= total for total, came in told.bars)


def test_a_single_run_has_no_headline(tmp_path: Path) -> None:
    told = Told()
    simulate(jobs(tmp_path, ["average"]), observer=told)
    assert not [line for line in told.lines if line.startswith("run ")]


def test_only_one_run_computes_at_a_time_and_others_go_on_while_it_waits() -> None:
    computing, most, order = [], [], []
    configs = [RunConfig.parse(BASE | {"seed": seed}) for seed in range(4)]
    side_by_side = Turns([(config, Path(f"{i}")) for i, config in enumerate(configs)], Observer())

    def one(config: RunConfig, path: Path, observer: Observer) -> None:
        for _ in range(20):
            computing.append(path.name)
            time.sleep(0.005)
            most.append(len(computing))
            computing.remove(path.name)
            order.append(path.name)
            side_by_side.pause()

    side_by_side.execute(one, at_once=2)
    assert set(most) == {1}
    assert {name: order.count(name) for name in "0123"} == dict.fromkeys("0123", 20)
    assert order.index("1") < len(order) - 1 - order[::-1].index("0")  # 1 began before 0 had ended


def test_clients_are_never_asked_the_same_for_two_runs_at_once() -> None:
    """Equal tasks wait until the answers are there that both ask for; what differs goes on beside them."""
    fedavg = BASE | {"strategy": "fedavg", "init": "shared", "rounds": 3}
    configs = {
        "a": RunConfig.parse(fedavg),
        "b": RunConfig.parse(fedavg | {"strategy": "fedadam"}),
        "c": RunConfig.parse(fedavg | {"seed": 1}),
        "d": RunConfig.parse(fedavg | {"merger": "average", "rounds": 1}),
    }
    side_by_side = Turns([(config, Path(name)) for name, config in configs.items()], Observer())
    going: dict[str, int] = {}
    met: set[tuple[str, int, str, int]] = set()

    def one(config: RunConfig, path: Path, observer: Observer) -> None:
        for server_round in range(1, config.rounds + 1):
            going[path.name] = server_round
            met.update((path.name, server_round, other, r) for other, r in going.items() if other != path.name)
            end = time.monotonic() + 5  # where nobody comes, the last lines fail
            partner = {"a": "c", "c": "a"}.get(path.name, path.name) if server_round == 1 else path.name
            while partner not in going and time.monotonic() < end:
                side_by_side.pause()
            for _ in range(3):
                side_by_side.pause()
            observer.stage({"round": server_round, "split": "local", "client": 0, "stage": "client"})
        del going[path.name]

    side_by_side.execute(one, at_once=3)
    same = {("a", "b"), ("b", "a"), ("a", "d"), ("d", "a"), ("b", "d"), ("d", "b")}
    assert not [pair for pair in met if (pair[0], pair[2]) in same and pair[1] == pair[3] == 1]
    assert any({"a", "b"} == {one, other} for one, _, other, _ in met)  # beyond round 1 they may
    assert any({"a", "c"} == {one, other} for one, r, other, q in met if r == q == 1)


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
            bench.run(cells, tmp_path / "out", resources=Resources(runs=2))
    assert set(threading.enumerate()) <= before  # other tests of this process may have left some
    summaries = [tmp_path / "out" / "cells" / name / "summary.json" for name in names]
    statuses = [json.loads(file.read_text())["status"] if file.exists() else "" for file in summaries]
    assert [status == "finished" for status in statuses] == [True, True, False, False]
    before = (tmp_path / "out" / "cells" / names[0] / "summary.json").stat().st_mtime_ns
    assert bench.run(cells, tmp_path / "out", resources=Resources(runs=2), resume=True) == {}
    assert (tmp_path / "out" / "cells" / names[0] / "summary.json").stat().st_mtime_ns == before
    bench.run(cells, tmp_path / "whole", resources=Resources(runs=1))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_failed_run_is_reported_while_another_goes_on(tmp_path: Path) -> None:
    ended = {}
    runs = [
        (RunConfig.parse(BASE | {"lr": 1e30}), tmp_path / "hot"),
        (RunConfig.parse(BASE | {"rounds": 2}), tmp_path / "good"),
    ]
    simulate(runs, resources=Resources(runs=2), on_end=lambda path, error: ended.update({path.name: str(error)}))
    assert "got 0 usable replies of 3" in ended["hot"]
    assert ended["good"] == "None"
    with pytest.raises(FedmergeError, match="got 0 usable replies of 3"):  # the first error, not what it did to others
        simulate([(config, path.with_suffix(".2")) for config, path in runs], resources=Resources(runs=2))
    assert json.loads((tmp_path / "good.2" / "summary.json").read_text())["status"].startswith(
        "failed: ended with another run"
    )


def test_how_many_runs_go_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, expected in ((1, 1), (2, 2), (64, 2)):
        monkeypatch.setattr(simulation, "usable_cores", lambda cores=cores: cores)
        assert Resources().at_once(12) == expected
        assert Resources().at_once(1) == 1
        assert Resources(runs=5).at_once(12) == 5
        assert Resources(runs=5).at_once(3) == 3
    with pytest.raises(ConfigError, match="-1 runs at once: expected a number from 1, or 0"):
        Resources(runs=-1).at_once(2)
