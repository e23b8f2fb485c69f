"""The tidy table of a bench: every row held against the files of its cell, and read back as it was written."""

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from experiments.records.results import COLUMNS, COSTS, METRICS, costs, results_table, write_results
from experiments.records.runs import Run, find
from fedmerge.errors import RunDirectoryError

WriteRun = Callable[..., Path]


def test_every_number_of_the_metrics_is_a_row(write_bench: Callable[[], Path]) -> None:
    runs = find(write_bench())
    table = results_table(runs)
    for run in runs:
        of_cell = table[table["cell"] == run.path.name]
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        expected = [
            (line["round"], line["stage"], line["client"], line["split"], metric, line[metric])
            for line in lines
            for metric in METRICS
        ]
        found = [
            (row["round"], row["stage"], None if pd.isna(row["client"]) else row["client"], row["split"],
             row["metric"], row["value"])
            for row in of_cell.to_dict("records")
        ]  # fmt: skip
        assert found == expected


def test_varied_keys_seed_and_init_are_columns(write_bench: Callable[[], Path]) -> None:
    table = results_table(find(write_bench()))
    assert list(table.columns[:5]) == ["cell", "status", "seed", "init", "strategy"]
    assert set(table.columns) == {*COLUMNS, "strategy"}
    shared = table[(table["init"] == "shared") & (table["seed"] == 2)]
    assert set(shared["cell"]) == {"fedavg-shared-seed-2", "merge-many-shared-seed-2"}


def test_init_is_a_column_where_it_does_not_vary_and_null_where_it_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('strategy = "fedavg"\n')
    (tmp_path / "metrics.jsonl").write_text('{"round": 1, "stage": "aggregated", "split": "test", "accuracy": 0.5}\n')
    (row,) = results_table(find(tmp_path)).to_dict("records")
    assert (row["status"], row["metric"], row["value"]) == ("unfinished", "accuracy", 0.5)
    assert pd.isna(row["init"])
    assert all(pd.isna(row[name]) for name in COSTS)


def test_costs_are_sums_of_what_was_measured_and_null_otherwise(write_run: WriteRun) -> None:
    run = Run.load(write_run(rounds=3, clients=4))
    found = costs(run)
    assert found["client_seconds"] == pytest.approx(3 * 4 * 0.25)
    assert found["wall_seconds"] == 41.7
    assert (found["bytes_up"], found["bytes_down"]) == (180_680, 180_680)
    assert (found["server_seconds"], found["peak_memory"]) == (None, None)


def test_what_the_server_took_is_read_from_the_environment(write_run: WriteRun) -> None:
    found = costs(Run.load(write_run(env={"server_seconds": 1.25, "peak_memory": 10**9})))
    assert (found["server_seconds"], found["peak_memory"]) == (1.25, 10**9)
    assert set(found) == set(COSTS)


def test_parquet_and_csv_hold_the_same_rows(write_bench: Callable[[], Path]) -> None:
    path = write_bench()
    parquet, csv = write_results(path)
    table = results_table(find(path))
    pd.testing.assert_frame_equal(pd.read_parquet(parquet), table)
    text = pd.read_csv(csv, dtype={name: str(kind) for name, kind in table.dtypes.items()})
    pd.testing.assert_frame_equal(text, table)
    assert sorted(p.name for p in path.iterdir()) == ["cells", "results.csv", "results.parquet"]


def test_the_mean_of_a_stage_is_a_filter_and_a_groupby(write_bench: Callable[[], Path]) -> None:
    path = write_bench()
    table = pd.read_parquet(write_results(path)[0])
    end = table[(table["metric"] == "accuracy") & (table["split"] == "test") & (table["round"] == table["rounds_done"])]
    means = end.groupby(["strategy", "init", "stage"])["value"].mean()
    runs = [r for r in find(path) if (r.config["strategy"], r.config["init"]) == ("merge-many", "shared")]
    by_hand = [s.accuracy for r in runs if (s := r.stage("merged")) is not None]
    assert means["merge-many", "shared", "merged"] == pytest.approx(sum(by_hand) / 3)


def test_keys_of_several_types_become_text_and_numbers_stay_numbers(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", width=32, extra=1, lr=1)
    write_run("runs/b", width=64, extra="many", lr=0.5, nesterov=True)
    table = results_table(find(tmp_path / "runs"))
    kinds = {name: str(table[name].dtype) for name in ("width", "extra", "lr", "nesterov")}
    assert kinds == {"width": "Int64", "extra": "string", "lr": "Float64", "nesterov": "boolean"}
    assert set(table["extra"]) == {"1", "many"}


def test_a_key_that_a_cell_does_not_use_is_null(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/fedavg", strategy="fedavg", merger="average")
    for merger in ("average", "ties"):
        write_run(f"runs/{merger}", merger=merger)
    table = results_table(find(tmp_path / "runs"))
    found = table.groupby("cell")["merger"].agg(lambda values: values.iloc[0])
    assert pd.isna(found["fedavg"])
    assert found[["average", "ties"]].tolist() == ["average", "ties"]


def test_equal_files_give_equal_tables(write_bench: Callable[[], Path]) -> None:
    path = write_bench()
    first = [file.read_bytes() for file in write_results(path)]
    assert [file.read_bytes() for file in write_results(path)] == first


def test_cells_that_left_nothing_leave_a_table_with_columns(write_run: WriteRun, tmp_path: Path) -> None:
    (write_run("runs/a") / "metrics.jsonl").unlink()
    table = results_table(find(tmp_path / "runs"))
    assert len(table) == 0
    assert set(COLUMNS) <= set(table.columns)


def test_a_folder_without_runs_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run in"):
        write_results(tmp_path)
    assert list(tmp_path.iterdir()) == []
