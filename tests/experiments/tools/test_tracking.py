"""Runs logged to a real MLflow store on this disk, and read back from it."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.records.results import costs
from experiments.records.runs import Run, find
from experiments.tools.tracking import Tracker
from fedmerge.errors import ConfigError, FedmergeError

WriteRun = Callable[..., Path]
pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of a new store."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "merging")
    monkeypatch.chdir(tmp_path)  # artifacts of a local store lie in the current folder
    import mlflow  # here, for it takes seconds, which every process that collects tests would spend

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'store.db'}")
    yield mlflow.MlflowClient()
    mlflow.set_tracking_uri(before)


def logged(client: Any) -> list[Any]:
    """All runs of the experiment, by name."""
    found = client.search_runs([client.get_experiment_by_name("merging").experiment_id])
    return sorted(found, key=lambda run: (run.info.run_name, run.info.status != "FAILED"))


def files(client: Any, run_id: str, folder: str | None = None) -> set[str]:
    found = set()
    for entry in client.list_artifacts(run_id, folder):
        found |= files(client, run_id, entry.path) if entry.is_dir else {entry.path}
    return found


def test_a_run_is_logged_with_its_configuration_every_round_and_its_files(write_run: WriteRun, client: Any) -> None:
    path = write_run(rounds=3, env={"server_seconds": 1.5})
    (path / "clients").mkdir()
    (path / "clients" / "round-3-client-0.safetensors").touch()
    (path / "plots").mkdir()
    (path / "plots" / "a.png").touch()
    Tracker().log(path)
    (found,) = logged(client)
    run = Run.load(path)
    assert found.data.params == {key: str(value) for key, value in run.config.items()}
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    assert found.info.end_time - found.info.start_time == 41_700
    m = run.metrics
    for stage in ("merged", "retrained"):
        history = client.get_metric_history(found.info.run_id, f"accuracy/test/{stage}")
        expected = m[(m["stage"] == stage) & (m["split"] == "test")]
        assert {h.step: h.value for h in history} == dict(zip(expected["round"], expected["accuracy"], strict=True))
    of_clients = client.get_metric_history(found.info.run_id, "loss/local/client")
    local = m[m["split"] == "local"]
    assert [h.value for h in of_clients] == [
        pytest.approx(local[local["round"] == r]["loss"].mean()) for r in (1, 2, 3)
    ]
    known = {name: value for name, value in costs(run).items() if value is not None}
    assert known.items() <= found.data.metrics.items()
    assert files(client, found.info.run_id) == {
        "config.toml", "env.json", "metrics.jsonl", "summary.json", "plots/a.png",
    }  # fmt: skip


def test_what_is_there_is_not_logged_again_and_a_grid_may_grow(
    write_run: WriteRun, tmp_path: Path, client: Any
) -> None:
    for seed in range(2):
        write_run(f"bench/cells/seed-{seed}", seed=seed)
    write_run("bench/cells/seed-2", seed=2, status="failed: no replies")
    Tracker().log(tmp_path / "bench")
    above, *below = logged(client)
    assert above.info.run_name == "bench"
    assert [(run.info.run_name, run.info.status) for run in below] == [
        ("seed-0", "FINISHED"), ("seed-1", "FINISHED"), ("seed-2", "FAILED"),
    ]  # fmt: skip
    assert {run.data.tags["mlflow.parentRunId"] for run in below} == {above.info.run_id}
    assert below[2].data.tags["fedmerge.status"] == "failed: no replies"
    write_run("bench/cells/seed-3", seed=3)
    (tmp_path / "bench" / "report.html").write_text("of four runs")
    summary = tmp_path / "bench" / "cells" / "seed-2" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"status": "finished"}))
    Tracker().log(tmp_path / "bench")
    again = logged(client)
    assert [run.info.run_name for run in again] == ["bench", "seed-0", "seed-1", "seed-2", "seed-2", "seed-3"]
    assert again[4].info.status == "FINISHED"
    assert files(client, above.info.run_id) == {"report.html"}


def test_what_was_not_measured_is_left_out(write_run: WriteRun, client: Any) -> None:
    path = write_run(finished=False)
    with (path / "metrics.jsonl").open("w") as file:
        file.write('{"round": 1, "stage": "merged", "split": "test", "accuracy": 0.5}\n')
    Tracker().log(path)
    (found,) = logged(client)
    assert found.data.metrics == {"accuracy/test/merged": 0.5}
    assert not any(math.isnan(value) for value in found.data.metrics.values())
    assert found.info.status == "FAILED"
    assert find(path)[0].status == "unfinished"


def test_a_store_that_refuses_is_named(tmp_path: Path, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.modules["mlflow"].set_tracking_uri("gopher://nowhere")
    with pytest.raises(FedmergeError, match=r"MLflow \(gopher://nowhere\): "):
        Tracker()


def test_without_mlflow_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r'--mlflow needs MLflow, .*: pip install "fedmerge\[mlflow\]"'):
        Tracker()
