"""FedAvg as a control: the bytes of a run of its own, beside a run that it does not change."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Message
from local_grid import LocalGrid
from safetensors.torch import load_file
from short_run import rows, run
from written import contents

from fedmerge import evaluate, repair
from fedmerge.tasks import CONFIG
from server import Callback, RunConfig

UNEVEN = {"rounds": 2, "partition": "dirichlet", "fraction_train": 0.75, "local_evaluation": False}


def trainings(grid: LocalGrid) -> int:
    return sum(kind == "train" for kind, _ in grid.asked)


def of_stage(path: Path, stage: str) -> list[dict]:
    return [{**row, "stage": ""} for row in rows(path) if row["stage"] == stage]


def test_clients_are_told_the_same_but_for_the_start() -> None:
    given = {"model": "lenet5", "local-epochs": 3, "batch-size": 7, "lr": 0.3, "momentum": 0.2, "seed": 4, "rounds": 2}
    config = RunConfig.parse({**given, "partition": "shards", "clients": 3, "retrain-epochs": 9})
    assert config.fedavg().client_task() == replace(config.client_task(), init="shared")
    assert config.fedavg().client_task() != RunConfig.parse({"init": "shared"}).client_task()


def test_its_rows_are_those_of_a_run_of_its_own(tmp_path: Path) -> None:
    found = run(tmp_path / "own", strategy="fedavgm", controls="fedavg", lr=0.1, **UNEVEN)
    alone = run(tmp_path / "alone", strategy="fedavg", init="shared", controls="none", lr=0.1, **UNEVEN)
    assert len(of_stage(tmp_path / "own", "fedavg")) == 2
    assert of_stage(tmp_path / "own", "fedavg") == of_stage(tmp_path / "alone", "aggregated")
    assert (found["stages"][-1]["title"], alone["stages"][-1]["title"]) == ("FedAvg, 2 rounds", "FedAvg, shared init")
    assert (found["stages"][-1]["accuracy"], found["stages"][-1]["loss"]) == (
        alone["stages"][-1]["accuracy"], alone["stages"][-1]["loss"],
    )  # fmt: skip


def test_it_begins_where_pretrained_clients_begin(tmp_path: Path) -> None:
    near = {"init": "pretrained", "pretrain_epochs": 2, "local_evaluation": False}
    run(tmp_path / "own", strategy="merge-many", controls="fedavg", **near)
    run(tmp_path / "alone", strategy="fedavg", controls="fedavg", **near)
    assert of_stage(tmp_path / "own", "fedavg") == of_stage(tmp_path / "alone", "aggregated")
    assert of_stage(tmp_path / "own", "pretrained") == of_stage(tmp_path / "alone", "pretrained")
    assert not of_stage(tmp_path / "alone", "fedavg")  # it would be the same run again


def test_it_changes_nothing_else_in_its_run(tmp_path: Path) -> None:
    found, without = (run(tmp_path / name, controls=name, rounds=2) for name in ("fedavg", "none"))
    for key in ("stages", "per_class", "calibration"):
        assert [row for row in found.pop(key) if row["stage"] != "fedavg"] == without.pop(key)
    assert found == without
    files = [contents(tmp_path / name) for name in ("fedavg", "none")]
    for name in ("config.toml", "summary.json", "metrics.jsonl"):
        del files[0][name], files[1][name]
    assert files[0] == files[1]


@pytest.mark.parametrize(("init", "times"), [("shared", 1), ("independent", 2)])
def test_fedavg_from_one_network_is_its_own_control_and_trained_once(tmp_path: Path, init: str, times: int) -> None:
    grid = LocalGrid(4)
    found = run(tmp_path / "a", grid, strategy="fedavg", init=init, controls="fedavg", local_evaluation=False)
    assert trainings(grid) == 4 * times
    assert ("fedavg" in [s["stage"] for s in found["stages"]]) == (times == 2)


def test_a_run_that_was_killed_during_its_control_has_the_same_bytes_when_resumed(tmp_path: Path) -> None:
    class Killed(Callback):
        def step(self, name: str, done: int, total: int) -> None:
            if (name, done, self.control) == ("clients train", total, True):
                raise KeyboardInterrupt
            self.control |= name == "control fedavg"

        control = False

    settings = {"controls": "fedavg, public-only", "local_epochs": 1, **UNEVEN}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[Killed()], **settings)
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["status"].startswith("failed")
    run(tmp_path / "a", resume=True, **settings)
    run(tmp_path / "b", **settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def spoilt(clients: range):
    """Clients that answer a run with independent networks, and fail where they are asked for a shared one."""

    def app(message: Message, context):
        from clients.app import app as own

        failing = message.metadata.message_type == "train" and message.content[CONFIG]["init"] == "shared"
        if failing and context.node_config["partition-id"] in clients:
            raise RuntimeError("out of paper")
        return own(message, context)

    return app


def test_a_client_that_fails_in_the_control_alone_is_named_and_left_out_of_it(tmp_path: Path) -> None:
    found = run(tmp_path / "a", LocalGrid(4, app=spoilt(range(1, 2))), controls="fedavg")
    (failure,) = found["failures"]
    assert (failure["round"], failure["client"]) == (1, 1)
    assert failure["reason"].startswith("control fedavg: ")
    assert "out of paper" in failure["reason"]
    assert found["stages"][-1]["stage"] == "fedavg"
    assert (found["asked"], found["answered"]) == (4, 4)


def test_a_control_that_no_client_answers_ends_itself_and_not_its_run(tmp_path: Path) -> None:
    found = run(tmp_path / "a", LocalGrid(4, app=spoilt(range(4))), controls="fedavg, ensemble")
    assert found["status"] == "finished"
    assert [f["client"] for f in found["failures"]] == [0, 1, 2, 3, None]
    assert "control fedavg: round 1 got 0 usable replies of 4" in found["failures"][-1]["reason"]
    assert "fedavg" not in [s["stage"] for s in found["stages"]]
    assert "ensemble" in [s["stage"] for s in found["stages"]]


def test_statistics_that_the_mean_spoils_are_measured_anew_in_a_row_of_their_own(tmp_path: Path) -> None:
    small = {
        "model": "resnet20",
        "width": 0.25,
        "clients": 2,
        "local_epochs": 1,
        "client_images": 60,
        "merger": "average",
        "repair": "none",
        "retrain": "none",
    }
    found = run(tmp_path / "own", controls="fedavg", local_evaluation=False, **small)
    run(tmp_path / "alone", strategy="fedavg", init="shared", controls="none", local_evaluation=False, **small)
    setup = RunConfig.read(tmp_path / "own" / "config.toml").setup()
    split, network = setup.split(), setup.network()
    mean = load_file(tmp_path / "alone" / "model.safetensors")
    expected = evaluate(network, repair(network, mean, data=split.public_images, method="recompute"), split.test_images)
    (row,) = (stage for stage in found["stages"] if stage["stage"] == "fedavg-recomputed")
    assert (row["accuracy"], row["loss"]) == (expected.accuracy, expected.loss)
    assert expected.loss != evaluate(network, mean, split.test_images).loss
