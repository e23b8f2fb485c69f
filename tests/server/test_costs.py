"""What a run says it took, against clocks and memory of our own."""

import json
import time
from pathlib import Path

import pytest
import torch
from short_run import rows, run

from fedmerge import pipeline
from server import Callback, Run
from server._costs import Clock
from strategies import MergeMany


def env(path: Path) -> dict:
    return json.loads((path / "env.json").read_text())


class Slow(Callback):
    """Takes its time to hear of a stage; cuts the run off where told."""

    def __init__(self, cut: int = 0) -> None:
        self.trainings, self.cut = 0, cut

    def row(self, row) -> None:
        time.sleep(0.1)

    def step(self, name: str, done: int, total: int) -> None:
        if (name, done) == ("clients train", 0):
            self.trainings += 1
            if self.trainings == self.cut:
                raise KeyboardInterrupt


@pytest.fixture
def slow_merge(monkeypatch: pytest.MonkeyPatch) -> float:
    """Merging takes a quarter of a second longer."""
    real = pipeline.merge

    def merge(*args, **kwargs):
        time.sleep(0.25)
        return real(*args, **kwargs)

    monkeypatch.setattr(pipeline, "merge", merge)
    return 0.25


def test_the_seconds_of_the_server_are_its_aggregation_without_evaluations_and_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_merge: float
) -> None:
    inside, asides = [], []
    aggregate, on_stage = MergeMany.aggregate, Run.on_stage

    def timed(log, function):
        def wrapped(*args, **kwargs):
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                log.append(time.perf_counter() - started)

        return wrapped

    monkeypatch.setattr(MergeMany, "aggregate", timed(inside, aggregate))
    monkeypatch.setattr(Run, "on_stage", timed(asides, on_stage))
    run(tmp_path / "a", callbacks=[Slow()], rounds=2, controls="all", local_evaluation=False)
    stages = [r for r in rows(tmp_path / "a") if r["stage"] in ("merged", "repaired", "retrained")]
    assert len(inside) == 2
    assert len(asides) == len(stages) == 6
    took = env(tmp_path / "a")["server_seconds"]
    assert took == pytest.approx(sum(inside) - sum(asides), abs=0.1)
    assert 2 * slow_merge < took < sum(inside) - 6 * 0.05


def test_a_resumed_run_keeps_the_seconds_of_the_rounds_before(tmp_path: Path, slow_merge: float) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[Slow(cut=3)], rounds=3, controls="none")
    assert 2 * slow_merge < env(tmp_path / "a")["server_seconds"] < env(tmp_path / "a")["seconds"] + 0.1
    run(tmp_path / "a", resume=True, rounds=3, controls="none")
    assert env(tmp_path / "a")["server_seconds"] > 3 * slow_merge


def test_a_failed_run_says_what_it_took(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", callbacks=[Slow(cut=1)])
    assert env(tmp_path / "a")["server_seconds"] == 0


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux says how high memory went")
def test_each_run_of_a_process_has_its_own_peak() -> None:
    def held(megabytes: int) -> int:
        clock = Clock()
        torch.ones(megabytes * 2**18)
        peak = clock.end("cpu").peak_memory
        assert peak is not None
        return peak

    assert held(400) - held(1) > 300 * 2**20
