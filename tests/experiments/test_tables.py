"""Tables over stages, seeds and setups: every number against one computed here by hand."""

import io
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from experiments.keys import differing_keys, setups
from experiments.runs import Failure, Run, find
from experiments.tables import (
    compare,
    failure_lines,
    number,
    outcome,
    outcomes,
    percent,
    points,
    probability,
    render,
    stage_table,
    to_markdown,
)

WriteRun = Callable[..., Path]


def _printed(table: pd.DataFrame, failures: tuple[Failure, ...] = (), width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render(table, failures))
    return out.getvalue()


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


def test_any_stage_can_be_the_reference(write_run: WriteRun) -> None:
    run = Run.load(write_run())
    row = _row(compare([run], reference="plain-average"), "merged")
    merged, plain = _accuracies([run], "merged"), _accuracies([run], "plain-average")
    assert row["difference"] == pytest.approx(merged[0] - plain[0])


def test_setups_are_named_by_what_differs(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=1, lr=0.1)
    write_run("runs/b", seed=0, lr=0.1)
    write_run("runs/c", seed=0, lr=0.2, controls="none")
    runs = find(tmp_path / "runs")
    assert differing_keys(runs) == ["lr"]
    assert {name: [run.seed for run in group] for name, group in setups(runs).items()} == {
        "lr=0.1": [0, 1],
        "lr=0.2": [0],
    }


def test_a_key_that_one_run_lacks_and_booleans_are_spelt_out(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", nesterov=True)
    write_run("runs/b")
    assert list(setups(find(tmp_path / "runs"))) == ["nesterov=true", "nesterov=–"]


def test_what_a_run_does_not_use_neither_names_nor_parts_a_setup(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f0", strategy="fedavg", merger="average", restarts=7, controls="ensemble", retrain="labels")
    write_run("runs/f1", strategy="fedavg", merger="ties", controls="ensemble", retrain="both", seed=1)
    write_run("runs/a", merger="average", aligner="activation-matching")
    write_run("runs/m")
    runs = find(tmp_path / "runs")
    assert differing_keys(runs) == ["strategy", "merger"]
    assert {name: len(group) for name, group in setups(runs).items()} == {
        "strategy=merge-many, merger=average": 1,
        "strategy=fedavg": 2,
        "strategy=merge-many, merger=merge-many": 1,
    }


def test_retraining_counts_where_only_a_control_retrains(write_run: WriteRun, tmp_path: Path) -> None:
    for epochs in (1, 5):
        write_run(f"runs/{epochs}", strategy="fedavg", retrain_epochs=epochs, controls="plain-average-retrain")
    assert differing_keys(find(tmp_path / "runs")) == ["retrain-epochs"]


def test_passes_before_the_first_round_count_only_where_there_are_some(write_run: WriteRun, tmp_path: Path) -> None:
    for name, init in (("a", "shared"), ("b", "pretrained")):
        write_run(f"{name}/1", init=init, pretrain_epochs=1)
        write_run(f"{name}/5", init=init, pretrain_epochs=5)
    assert differing_keys(find(tmp_path / "a")) == []
    assert differing_keys(find(tmp_path / "b")) == ["pretrain-epochs"]


def test_alpha_parts_no_problem_that_is_not_dealt_by_it(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f", strategy="fedavg", partition="iid", partition_alpha=0.1)
    write_run("runs/m", partition="iid", partition_alpha=1.0)
    table = compare(find(tmp_path / "runs"))
    assert set(table["setup"]) == {"strategy=fedavg", "strategy=merge-many"}
    assert _row(table, "merged", "strategy=merge-many")["pairs"] == 1


def test_a_strategy_of_another_version_keeps_all_its_keys(write_run: WriteRun, tmp_path: Path) -> None:
    for merger in ("average", "soup-of-the-day"):
        write_run(f"runs/{merger}", strategy="fedfuture", merger=merger)
    write_run("runs/other", merger="soup-of-the-day")
    assert differing_keys(find(tmp_path / "runs")) == ["strategy", "merger"]


def test_a_repeated_seed_counts_once(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=0)
    write_run("runs/b", seed=0)
    assert _row(compare(find(tmp_path / "runs")), "merged")["n"] == 1


def test_runs_that_did_not_finish_are_left_out(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=0)
    write_run("runs/b", seed=1, finished=False)
    runs = find(tmp_path / "runs")
    assert _row(compare(runs), "merged")["n"] == 1
    empty = compare(runs[1:])
    assert empty.empty
    assert "Stage" in _printed(empty)


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


def test_p_values_are_corrected_for_all_tests_of_the_table(write_bench: Callable[[], Path]) -> None:
    table = compare(find(write_bench()))
    tested = table[table["p"].notna()]
    assert tested["p_holm"].min() == pytest.approx(min(1.0, len(tested) * tested["p"].min()))
    assert (tested["p_holm"] >= tested["p"]).all()
    row = tested.iloc[0]
    assert points(row["difference"], (row["high"] - row["low"]) / 2) in to_markdown(table)
    assert f"corrected for {len(tested)} tests after Holm" in to_markdown(table)


def test_outcomes_are_the_furthest_stage_of_each_setup_corrected_among_themselves(
    write_bench: Callable[[], Path],
) -> None:
    runs = find(write_bench())
    table = compare(runs)
    found = outcomes(table)
    assert found["stage"].tolist() == ["retrained"] * 4
    assert found["setup"].tolist() == list(dict.fromkeys(table["setup"]))
    assert found["p_holm"].min() == pytest.approx(min(1.0, 4 * found["p"].min()))
    assert outcome(runs[0]) == runs[0].stage("retrained")
    assert outcomes(compare([])).empty


def test_one_seed_has_a_difference_but_neither_interval_nor_test(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f", strategy="fedavg")
    write_run("runs/m")
    table = compare(find(tmp_path / "runs"))
    row = _row(table, "merged", "strategy=merge-many")
    assert math.isfinite(row["difference"])
    assert all(math.isnan(row[name]) for name in ("low", "high", "p", "p_holm", "wilcoxon"))
    assert "interval" not in to_markdown(table)
    assert points(row["difference"]) in to_markdown(table)


def test_the_terminal_shows_every_stage_within_100_columns(write_bench: Callable[[], Path]) -> None:
    table = compare(find(write_bench()))
    text = _printed(table)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert text.count("init=shared, strategy=merge-many\n".strip()) == 1
    for _, row in table.iterrows():
        line = next(x for x in text.splitlines() if x.strip().startswith(f"{row['title']} ") and
                    percent(row["accuracy"], row["sd"]) in x)  # fmt: skip
        assert line.split()[-1] == number(row["loss"])
    assert "difference in accuracy to FedAvg, paired by seed" in re.sub(r"\s+", " ", text)


def test_failures_stand_under_the_table_with_client_and_reason(write_run: WriteRun) -> None:
    failures = ({"round": 2, "client": 3, "reason": "loss [nan]"}, {"round": 2, "client": None, "reason": "no reply"})
    run = Run.load(write_run(failures=failures))
    text = _printed(stage_table(run), run.failures)
    assert "2 client replies were not used:" in text
    assert "round 2, client 3: loss [nan]" in text
    assert "round 2, an unknown client: no reply" in text


def test_a_long_list_of_failures_ends_in_a_count() -> None:
    lines = failure_lines([Failure(1, i, "gone") for i in range(40)])
    assert lines[-1] == "  and 28 more"
    assert failure_lines([]) == []
    assert failure_lines([Failure(1, 0, "gone")])[0] == "1 client reply was not used:"


def test_titles_are_not_read_as_markup(write_run: WriteRun) -> None:
    stages = [{"stage": "x", "title": "[red]x | y", "accuracy": 0.5, "loss": 1.0, "sd": None, "note": ""}]
    table = stage_table(Run.load(write_run(summary={"stages": stages})))
    assert "[red]x | y" in _printed(table)
    assert r"[red]x \| y" in to_markdown(table)


def test_markdown_is_a_table_with_the_same_numbers(write_bench: Callable[[], Path]) -> None:
    table = compare(find(write_bench()))
    head, rule, *rows = [line for line in to_markdown(table).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows]
    assert [h.strip() for h in head.strip("|").split("|")] == [
        "Setup", "Stage", "Accuracy %", "Δ points", "p (Holm)", "Seeds", "Loss",
    ]  # fmt: skip
    assert [r.strip().endswith(":") for r in rule.strip("|").split("|")] == [False, False, *[True] * 5]
    assert [c[:2] for c in cells] == table[["setup", "title"]].to_numpy().tolist()
    assert [c[2] for c in cells] == [percent(r["accuracy"], r["sd"]) for _, r in table.iterrows()]
    assert len({len(line) for line in [head, rule, *rows]}) == 1


def test_markdown_of_one_run_has_notes_and_failures(write_run: WriteRun) -> None:
    run = Run.load(write_run(failures=({"round": 1, "client": 0, "reason": "late"},)))
    text = to_markdown(stage_table(run), run.failures)
    assert "the client that is best on val" in text
    assert "round 1, client 0: late" in text
    plain = to_markdown(stage_table(run).assign(note="", sd=math.nan))
    assert plain.splitlines()[0].split("|")[-2].strip() == "Loss"
    assert plain.splitlines()[-1].startswith("| Centralised")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (percent(0.9361), "93.61"),
        (percent(0.9361, 0.0042), "93.61 ± 0.42"),
        (percent(math.nan), "–"),
        (points(0.0123), "+1.23"),
        (points(-0.0123, 0.01), "−1.23 ± 1.00"),
        (points(-0.00001), "+0.00"),
        (points(math.nan), "–"),
        (number(0.12345), "0.123"),
        (number(0.12345, 0.01), "0.123 ± 0.010"),
        (number(123456.0), "1.23e+05"),
        (number(math.nan), "–"),
        (number(math.inf), "∞"),
        (number(-math.inf), "−∞"),
        (probability(0.04), "0.040"),
        (probability(0.0001), "<0.001"),
        (probability(math.nan), "–"),
    ],
)
def test_numbers_as_they_are_shown(given: str, expected: str) -> None:
    assert given == expected
