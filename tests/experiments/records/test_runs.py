"""Run directories, as files on disk, read back."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.records.runs import METRICS, Failure, Run, find
from fedmerge.errors import RunDirectoryError
from server.records import Summary


def test_a_finished_run_is_read_whole(write_run: Callable[..., Path]) -> None:
    path = write_run(seed=3, failures=({"round": 1, "client": 4, "reason": "NaN in fc.weight"},))
    run = Run.load(path)
    summary = json.loads((path / "summary.json").read_text())
    assert (run.status, run.finished, run.seed, run.rounds) == ("finished", True, 3, 1)
    assert (run.asked, run.answered) == (5, 4)
    assert run.failures == (Failure(1, 4, "NaN in fc.weight"),)
    assert [s.stage for s in run.stages] == [s["stage"] for s in summary["stages"]]
    assert [s.accuracy for s in run.stages] == [s["accuracy"] for s in summary["stages"]]
    assert run.labels["client 1"] == tuple(summary["labels"]["client 1"])
    assert run.merges[0].objective == tuple(summary["merges"][0]["objective"])
    assert run.interpolation is not None
    assert run.interpolation.split == "val"
    assert run.interpolation.naive.loss == tuple(summary["interpolation"]["naive"]["loss"])
    assert run.per_class[0].confusion == tuple(map(tuple, summary["per_class"][0]["confusion"]))
    assert run.calibration[0].bins[1].accuracy == summary["calibration"][0]["bins"][1]["accuracy"]
    assert run.client_classes[2].accuracy == tuple(summary["client_classes"][2]["accuracy"])
    assert run.env is not None
    assert run.env["versions"]["flwr"] == "1.41.0"
    merged = run.stage("merged")
    assert merged is not None
    assert merged.title == "MergeMany, anchored"
    assert run.stage("no such stage") is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.status = "other"  # type: ignore[misc]


def test_metrics_keep_their_order_and_types(write_run: Callable[..., Path]) -> None:
    path = write_run()
    metrics = Run.load(path).metrics
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert {c: str(metrics[c].dtype) for c in metrics} == METRICS
    assert metrics["accuracy"].tolist() == [line["accuracy"] for line in lines]
    assert [None if value is None else int(value) for value in metrics["client"].replace({float("nan"): None})] == [
        line["client"] for line in lines
    ]


def test_what_a_crash_left_is_readable(write_run: Callable[..., Path]) -> None:
    path = write_run(finished=False, rounds=3)
    run = Run.load(path)
    assert (run.status, run.finished, run.env, run.sizes) == ("unfinished", False, None, None)
    assert (run.labels, run.classes, run.merges, run.failures, run.interpolation) == ({}, (), (), (), None)
    assert (run.asked, run.answered, run.rounds) == (None, None, 3)
    last = run.metrics[(run.metrics["round"] == 3) & (run.metrics["split"] == "test")]
    clients = last.loc[last["stage"] == "client", "accuracy"]
    first, *others = run.stages
    assert (first.stage, first.title, first.note) == ("client", "Client", "mean of 5 clients")
    assert first.accuracy == pytest.approx(clients.mean())
    assert first.sd == pytest.approx(clients.std())
    assert [s.title for s in others][-2:] == ["Public only", "Centralised"]
    assert all(s.sd is None for s in others)


def test_a_run_that_has_measured_nothing_is_readable(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('strategy = "fedavg"\n')
    run = Run.load(tmp_path)
    assert (run.status, run.stages, run.rounds, run.seed, len(run.metrics)) == ("unfinished", (), 0, 0, 0)


def test_a_failed_run_says_why(write_run: Callable[..., Path]) -> None:
    run = Run.load(write_run(status="failed: 1 usable reply of 5"))
    assert run.status == "failed: 1 usable reply of 5"
    assert not run.finished


def test_a_loss_that_was_not_measured_is_nan(write_run: Callable[..., Path]) -> None:
    stages = [{"stage": "merged", "title": "Merged", "accuracy": 0.5, "loss": None, "sd": None, "note": None}]
    stage = Run.load(write_run(summary={"stages": stages})).stages[0]
    assert math.isnan(stage.loss)
    assert stage.note == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [{"stage": "merged"}]}, r"summary\.json has no key 'title'"),
        ({"stages": 3}, r"summary\.json makes no sense \(stages: Input should be a valid tuple"),
        ({"failures": [{"round": 1}]}, r"summary\.json has no key 'client'"),
        ({"labels": {"client 0": [1, 2]}}, r"client 0 counts 2 classes of 10"),
        (
            {"interpolation": {"clients": [0, 1], "alphas": [0, 1], "naive": {"loss": [1], "accuracy": [1]},
                               "aligned": {"loss": [1, 1], "accuracy": [1, 1]}}},
            r"2 alphas but a curve of another length",
        ),
    ],
)  # fmt: skip
def test_a_summary_of_another_format_is_named(
    write_run: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunDirectoryError, match=message):
        Run.load(write_run(summary=change))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", r"metrics\.jsonl, line 2 is not JSON"),
        ("[1]", r"line 2 holds a list, expected an object"),
        ('{"stage": "merged", "split": "test"}', r"line 2: round is None, expected a number"),
        ('{"round": 1.5, "stage": "merged", "split": "test"}', r"line 2: round is 1\.5, expected a whole number"),
        ('{"round": 1, "stage": 7, "split": "test"}', r"line 2: stage is 7, expected text"),
        ('{"round": 1, "stage": "m", "split": "test", "loss": "x"}', r"line 2: loss is 'x', expected a number"),
        ('{"round": true, "stage": "m", "split": "test"}', r"line 2: round is True, expected a number"),
    ],
)
def test_a_broken_line_is_named_with_file_and_number(write_run: Callable[..., Path], line: str, message: str) -> None:
    path = write_run()
    first = (path / "metrics.jsonl").read_text().splitlines()[0]
    (path / "metrics.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(RunDirectoryError, match=message):
        Run.load(path)


def test_a_torn_last_line_is_an_error_in_a_run_that_finished(write_run: Callable[..., Path]) -> None:
    path = write_run()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "st')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl, line \d+ is not JSON"):
        Run.load(path)


def test_files_that_cannot_be_parsed_are_named(write_run: Callable[..., Path]) -> None:
    path = write_run()
    (path / "env.json").write_text("{")
    with pytest.raises(RunDirectoryError, match=r"env\.json is not JSON"):
        Run.load(path)
    (path / "env.json").write_text("[]")
    with pytest.raises(RunDirectoryError, match=r"env\.json holds a list, expected an object"):
        Run.load(path)
    (path / "env.json").unlink()
    (path / "metrics.jsonl").write_bytes(b"{}\n\xff\xf0")
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl: line 2 is not UTF-8"):
        Run.load(path)
    (path / "config.toml").write_text("a = ")
    with pytest.raises(RunDirectoryError, match=r"config\.toml is not TOML"):
        Run.load(path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match=r"no run directory: it has no config\.toml"):
        Run.load(tmp_path)
    with pytest.raises(RunDirectoryError, match="is no folder: expected a run directory"):
        Run.load(tmp_path / "absent")
    with pytest.raises(RunDirectoryError, match="is no folder: expected a run directory or a folder of them"):
        find(tmp_path / "absent")
    with pytest.raises(RunDirectoryError, match=r"no run in .*make one with `fedmerge run"):
        find(tmp_path)


def test_find_takes_a_run_a_bench_and_a_folder(
    write_run: Callable[..., Path], write_bench: Callable[[], Path], tmp_path: Path
) -> None:
    assert [run.path for run in find(write_bench())] == sorted((tmp_path / "bench" / "cells").iterdir())
    write_run("runs/seed-10", seed=10)
    write_run("runs/seed-2", seed=2)
    (tmp_path / "runs" / "notes").mkdir()
    assert [run.path.name for run in find(tmp_path / "runs")] == ["seed-2", "seed-10"]
    assert [run.seed for run in find(tmp_path / "runs" / "seed-2")] == [2]


def test_a_run_directory_that_an_editor_saved_again_is_read(write_run: Callable[..., Path]) -> None:
    path = write_run()
    before = Run.load(path)
    for name in ("config.toml", "summary.json", "env.json", "metrics.jsonl"):
        text = (path / name).read_text(encoding="utf-8")
        (path / name).write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig" if name != "env.json" else "utf-16"))
    after = Run.load(path)
    assert (after.config, after.env) == (before.config, before.env)
    for field in dataclasses.fields(Summary):
        assert getattr(after, field.name) == getattr(before, field.name), field.name
    assert (before.asked, before.sizes is None, len(before.stages) > 3) == (before.answered, False, True)
    pd.testing.assert_frame_equal(after.metrics, before.metrics)
