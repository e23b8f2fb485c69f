"""A process trains for a step before anybody's seconds count, and nothing else knows of it."""

import time
from pathlib import Path

import pytest
import torch
from local_grid import LocalGrid
from short_run import rows, run
from written import contents

from fedmerge import tasks
from fedmerge.tasks import ClientTask


def test_what_happens_once_in_a_process_is_in_no_clients_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed = []

    def slowly(task: ClientTask) -> None:
        warmed.append(task)
        time.sleep(0.2)

    monkeypatch.setattr(ClientTask, "warm_up", slowly)
    run(tmp_path / "a", LocalGrid(2), clients=2, controls="none", local_epochs=1)
    assert len(warmed) == 3  # the server, then before each client's clock
    assert all(row["seconds"] < 0.2 for row in rows(tmp_path / "a", without=()) if row["split"] == "local")


def test_a_process_is_warmed_up_once_and_no_byte_or_stream_depends_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm: set = set()
    monkeypatch.setattr(tasks, "_WARM", warm)
    settings = {"clients": 2, "controls": "none", "local_epochs": 1}
    state = torch.get_rng_state()
    run(tmp_path / "cold", LocalGrid(2), **settings)
    assert len(warm) == 1
    assert torch.equal(torch.get_rng_state(), state)
    run(tmp_path / "warm", LocalGrid(2), **settings)
    assert len(warm) == 1
    monkeypatch.setattr(ClientTask, "warm_up", lambda task: None)
    run(tmp_path / "never", LocalGrid(2), **settings)
    assert contents(tmp_path / "cold") == contents(tmp_path / "warm") == contents(tmp_path / "never")


def test_a_step_that_cannot_be_made_is_left_to_the_training_that_reports_it() -> None:
    ClientTask(dataset="nowhere").warm_up()
