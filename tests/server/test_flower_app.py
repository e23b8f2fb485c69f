"""The ServerApp as `flwr run` calls it, with the configuration of pyproject.toml, over a grid in this process."""

import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from local_grid import LocalGrid
from PIL import Image

import server.app
from fedmerge import tasks
from fedmerge.errors import DataError, FedmergeError, RoundError, RunDirectoryError
from server import RunConfig, RunDirectory, held

ROOT = Path(__file__).parents[2]


def flwr_run(grid: LocalGrid | None = None, **changes: Any) -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {key.replace("_", "-"): value for key, value in changes.items()}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    server.app.app(grid or LocalGrid(2), context)


def test_the_configuration_of_the_app_runs_with_as_many_clients_as_nodes_and_is_written_resolved(
    tmp_path: Path,
) -> None:
    flwr_run(out=str(tmp_path / "a"), width=8, local_epochs=1, controls="none")
    assert RunDirectory(tmp_path / "a").finished
    expected = {"clients": 2, "width": 8, "local-epochs": 1, "controls": "none"}
    assert RunConfig.read(tmp_path / "a" / "config.toml") == RunConfig.parse(expected)


def test_what_the_app_has_by_default_is_no_choice_against_masked_sums(tmp_path: Path) -> None:
    flwr_run(out=str(tmp_path / "a"), width=8, local_epochs=1, secure=True)
    assert RunDirectory(tmp_path / "a").finished
    assert RunConfig.read(tmp_path / "a" / "config.toml").retrain == "labels"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"strategy": "fedavrg"}, "fedmerge: run config: unknown strategy 'fedavrg'"),
        ({"lr": float("inf")}, "fedmerge: run config: lr = inf: Input should be a finite number"),
        ({"out": __file__}, f"fedmerge: {__file__} is a file; give a folder with out"),
    ],
)
def test_what_is_wrong_with_a_run_config_is_a_line_of_flowers_log(
    changes: dict[str, Any], line: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR", logger="flwr")  # a simulation of this process may have silenced it
    with pytest.raises(FedmergeError):
        flwr_run(clients=2, **changes)
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said.startswith(line)
    assert "\n" not in said


def test_a_run_that_came_to_nothing_says_why_and_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    small = {"out": str(tmp_path / "a"), "width": 8, "local_epochs": 1, "controls": "none"}
    with pytest.raises(DataError):
        flwr_run(client_images=100_000, **small)
    assert "client_images is 100000" in RunDirectory(tmp_path / "a").status
    flwr_run(**small)
    assert RunDirectory(tmp_path / "a").finished


def test_a_run_that_was_killed_goes_on_where_its_run_config_says_resume(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(client: int, reply: Message) -> Message:
        if reply.metadata.message_type == "train" and grid.asked.count(("train", client)) == 2:
            raise Killed
        return reply

    small = {"width": 8, "local_epochs": 1, "controls": "none", "rounds": 2, "init": "shared"}
    flwr_run(out=str(tmp_path / "whole"), **small)
    grid = LocalGrid(2, spoil=kill)
    with pytest.raises(Killed):
        flwr_run(grid, out=str(tmp_path / "cut"), **small)
    with pytest.raises(
        RunDirectoryError, match="already holds a run; choose another out, or resume=true to continue it"
    ):
        flwr_run(out=str(tmp_path / "cut"), **small)
    flwr_run(out=str(tmp_path / "cut"), resume=True, **small)
    whole, cut = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


@pytest.mark.parametrize("change", ["classes", "images"])
def test_a_node_with_another_data_set_of_that_name_trains_nothing(change: str, tmp_path: Path) -> None:
    """Its classes have other names, or its pictures are other ones of the same classes and numbers."""

    def write(classes: tuple[str, ...], bright: int) -> None:
        rng = np.random.default_rng(0)
        for name in classes:
            (tmp_path / "data" / name).mkdir(parents=True)
            for i in range(20):
                picture = rng.integers(0, bright, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(picture).save(tmp_path / "data" / name / f"{i}.png")
        tasks.read_anew()

    class Node(LocalGrid):
        def _answer(self, message: Message) -> Message:
            if (
                message.metadata.message_type == "train" and len(self.asked) == 3
            ):  # after both have introduced themselves
                (tmp_path / "data").rename(tmp_path / "servers")
                write(
                    ("bee", "cat", "dog") if change == "classes" else ("ant", "bee", "cat"),
                    256 if change == "classes" else 128,
                )
            return super()._answer(message)

    write(("ant", "bee", "cat"), 256)
    small = {"out": str(tmp_path / "run"), "width": 8, "local_epochs": 1, "controls": "none", "model": "mlp"}
    with pytest.raises(RoundError, match="is another data set on this node than on the server") as failed:
        flwr_run(Node(2), dataset=str(tmp_path / "data"), **small)
    assert "\n" not in str(failed.value)
    assert not (tmp_path / "run" / "clients").exists()


def test_two_processes_are_not_at_work_in_one_folder(tmp_path: Path) -> None:
    with held(tmp_path / "a"), pytest.raises(RunDirectoryError, match="another process is at work in .* another out"):
        flwr_run(out=str(tmp_path / "a"), width=8, local_epochs=1, controls="none")
    assert not (tmp_path / "a").exists()
