"""The ServerApp as `flwr run` calls it, with the configuration of pyproject.toml, over a grid in this process."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from local_grid import LocalGrid

import server.app
from fedmerge.errors import FedmergeError
from server import RunConfig, RunDirectory

ROOT = Path(__file__).parents[2]


def flwr_run(**changes: Any) -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {key.replace("_", "-"): value for key, value in changes.items()}
    server.app.app(LocalGrid(2), Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config))


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
        ({"out": __file__}, f"fedmerge: {__file__} is a file; give a folder with --out"),
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
