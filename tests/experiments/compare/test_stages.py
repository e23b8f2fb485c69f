"""Stages over seeds and setups: every number against one computed here by hand."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from scipy import stats

from experiments.compare.stages import compare, outcome, outcomes, stage_table
from experiments.records.runs import Run, find
from experiments.report.tables import render

WriteRun = Callable[..., Path]


def _row(table: pd.DataFrame, stage: str, setup: str = "") -> pd.Series:
    return table[(table["stage"] == stage) & (table["setup"] == setup)].iloc[0]


def _accuracies(runs: list[Run], stage: str) -> list[float]:
    return [s.accuracy for run in runs if (s := run.stage(stage)) is not None]


def test_the_table_of_one_run_is_its_summary(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    table = stage_table(run)
    assert table["title"].tolist() == [s.title for s in run.stages]
    assert table["accuracy"].tolist() == [s.accuracy for s in run.stages]
    assert table["loss"].tolist() == [s.loss for s in run.stages]
    assert table["sd"].notna().tolist() == [s.stage == "client-mean" for s in run.stages]


def test_mean_and_sample_deviation_over_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(f"runs/{seed}", seed=seed)
    runs = find(tmp_path / "runs")
    row = _row(compare(runs), "merged")
    found = _accuracies(runs, "merged")
    assert row["n"] == 3
    assert row["accuracy"] == pytest.approx(statistics.mean(found), rel=1e-12)
    assert row["sd"] == pytest.approx(statistics.stdev(found), rel=1e-12)


def test_one_seed_has_no_deviation(write_run: WriteRun) -> None:
    row = _row(compare([Run.load(write_run())]), "merged")
    assert row["n"] == 1
    assert math.isnan(row["sd"])


def test_differences_to_fedavg_are_paired_by_seed(write_bench: Callable[[], Path]) -> None:
    runs = find(write_bench())
    table = compare(runs)
    setup = "init=independent, strategy=merge-many"
    row = _row(table, "retrained", setup)
    ours = _accuracies([r for r in runs if setup == f"init={r.config['init']}, strategy={r.config['strategy']}"],
                       "retrained")  # fmt: skip
    theirs = _accuracies(
        [r for r in runs if r.config["strategy"] == "fedavg" and r.config["init"] == "independent"], "aggregated"
    )
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert row["pairs"] == 3
    assert row["difference"] == pytest.approx(statistics.mean(differences))
    assert row["difference_sd"] == pytest.approx(statistics.stdev(differences))
    assert row["p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    between = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (row["low"], row["high"]) == pytest.approx((between.low, between.high))
    own = _row(table, "aggregated", "init=independent, strategy=fedavg")
    assert own["pairs"] == 0
    assert math.isnan(own["difference"])


def test_a_seed_without_its_counterpart_is_not_paired(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f0", strategy="fedavg", seed=0)
    write_run("runs/m0", seed=0)
    write_run("runs/m1", seed=1)
    row = _row(compare(find(tmp_path / "runs")), "merged", "strategy=merge-many")
    assert (row["n"], row["pairs"]) == (2, 1)
    assert math.isnan(row["p"])


def test_another_problem_is_no_counterpart(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f", strategy="fedavg", partition_alpha=0.1)
    write_run("runs/m")
    table = compare(find(tmp_path / "runs"))
    assert table.loc[table["setup"].str.contains("merge-many"), "difference"].isna().all()


def test_plain_fedavg_is_preferred_and_serves_both_initialisations(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", strategy="fedavg-retrain", init="independent")
    write_run("runs/b", strategy="fedavg", init="shared")
    write_run("runs/c", strategy="merge-many", init="independent")
    retrain, plain, merged = find(tmp_path / "runs")
    row = _row(compare([retrain, plain, merged]), "merged", "init=independent, strategy=merge-many")
    (reference,) = _accuracies([plain], "aggregated")
    assert row["difference"] == pytest.approx(row["accuracy"] - reference)


def test_the_mean_of_clients_that_went_on_from_a_retrained_network_is_not_fedavg(write_run: WriteRun) -> None:
    for rounds in (1, 3):
        run = Run.load(write_run(f"runs/{rounds}", strategy="fedavg-retrain", init="shared", rounds=rounds))
        table = compare([run]).set_index("stage")
        assert run.stage("fedavg") is None
        assert math.isnan(table.loc["retrained", "difference"]) == (rounds > 1)


def test_any_stage_can_be_the_reference(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    row = _row(compare([run], reference="plain-average"), "merged")
    merged, plain = _accuracies([run], "merged"), _accuracies([run], "plain-average")
    assert row["difference"] == pytest.approx(merged[0] - plain[0])


def test_held_against_the_control_a_contrast_is_one_test(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(3):
        write_run(f"runs/{seed}", seed=seed)
    table = compare(find(tmp_path / "runs"), reference="client-best-retrained")
    row = _row(table, "retrained")
    assert table["control_p"].isna().all()
    assert row["p_holm"] == row["p"]


def test_alpha_parts_no_problem_that_is_not_dealt_by_it(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f", strategy="fedavg", partition="iid", partition_alpha=0.1)
    write_run("runs/m", partition="iid", partition_alpha=1.0)
    table = compare(find(tmp_path / "runs"))
    assert set(table["setup"]) == {"strategy=fedavg", "strategy=merge-many"}
    assert _row(table, "merged", "strategy=merge-many")["pairs"] == 1


def test_a_repeated_seed_counts_once(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=0)
    write_run("runs/b", seed=0)
    assert _row(compare(find(tmp_path / "runs")), "merged")["n"] == 1


def test_runs_that_did_not_finish_are_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=0)
    write_run("runs/b", seed=1, finished=False)
    runs = find(tmp_path / "runs")
    assert _row(compare(runs), "merged")["n"] == 1
    assert render(compare(runs[1:])).columns[0].header == "Stage"


def test_a_stage_that_some_seeds_lack_comes_last_and_counts_its_own_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=0)
    extra = [{"stage": "extra", "title": "Extra", "accuracy": 0.5, "loss": 1.0, "sd": None, "note": ""}]
    write_run("runs/b", seed=1, summary={"stages": extra})
    table = compare(find(tmp_path / "runs"))
    assert table["stage"].iloc[-1] == "extra"
    assert _row(table, "extra")["n"] == 1


def test_equal_differences_have_no_p_value(write_run: WriteRun, tmp_path: Path) -> None:
    def stages(stage: str, accuracy: float) -> list[dict[str, object]]:
        return [{"stage": stage, "title": stage, "accuracy": accuracy, "loss": 1.0, "sd": None, "note": ""}]

    for seed in range(2):
        write_run(f"runs/f{seed}", strategy="fedavg", seed=seed, summary={"stages": stages("aggregated", 0.5)})
        write_run(f"runs/m{seed}", seed=seed, summary={"stages": stages("merged", 0.75)})
    row = _row(compare(find(tmp_path / "runs")), "merged", "strategy=merge-many")
    assert (row["pairs"], row["difference"]) == (2, 0.25)
    assert math.isnan(row["p"])


def test_outcomes_are_the_furthest_stage_of_each_setup(write_bench: Callable[[], Path]) -> None:
    runs = find(write_bench())
    table = compare(runs)
    found = outcomes(table)
    assert found["stage"].tolist() == ["retrained"] * 4
    assert found["setup"].tolist() == list(dict.fromkeys(table["setup"]))
    assert outcome(runs[0]) == runs[0].stage("retrained")
    assert outcomes(compare([])).empty


def test_the_tested_family_is_each_outcome_against_fedavg_and_the_control_corrected_once(
    write_bench: Callable[[], Path],
) -> None:
    runs = find(write_bench())
    table = compare(runs)
    raw: dict[tuple[str, str], float] = {}
    for init in ("independent", "shared"):
        of = {
            strategy: [r for r in runs if r.config["strategy"] == strategy and r.config["init"] == init]
            for strategy in ("fedavg", "merge-many")
        }
        fedavg = _accuracies(of["fedavg"], "aggregated")
        best = _accuracies(of["merge-many"], "client-best-retrained")
        for strategy, members in of.items():
            ends = _accuracies(members, "retrained")
            setup = f"init={init}, strategy={strategy}"
            raw[setup, "p"] = stats.ttest_rel(ends, fedavg).pvalue
            raw[setup, "control_p"] = stats.ttest_rel(ends, best).pvalue
    ordered = sorted(raw, key=lambda key: raw[key])
    corrected: dict[tuple[str, str], float] = {}
    for rank, key in enumerate(ordered):
        before = corrected[ordered[rank - 1]] if rank else 0.0
        corrected[key] = min(1.0, max(before, (len(raw) - rank) * raw[key]))
    ends = outcomes(table).set_index("setup")
    for (setup, test), p in raw.items():
        assert ends.loc[setup, test] == pytest.approx(p)
        assert ends.loc[setup, f"{test}_holm"] == pytest.approx(corrected[setup, test])
    others = table[table["stage"] != "retrained"]
    assert others[["p", "p_holm", "control_p", "control_p_holm", "wilcoxon", "control_wilcoxon"]].isna().all(axis=None)
    assert others["low"].notna().any()
