"""Tables as the terminal shows them, and how numbers are written."""

import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from experiments.compare.stages import compare, stage_table
from experiments.compare.verdict import sentence, verdicts
from experiments.records.runs import Failure, Run, find
from experiments.report.tables import failure_lines, number, percent, points, probability, render

WriteRun = Callable[..., Path]


def _row(table: pd.DataFrame, stage: str, setup: str = "") -> pd.Series:
    return table[(table["stage"] == stage) & (table["setup"] == setup)].iloc[0]


def _printed(table: pd.DataFrame, failures: tuple[Failure, ...] = (), width: int = 100) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(render(table, failures))
    return out.getvalue()


def _cells(table: pd.DataFrame) -> list[dict[str, str]]:
    """What stands in each row, without those that name a setup."""
    shown = render(table).columns
    rows = zip(*(column.cells for column in shown), strict=True)
    return [dict(zip([str(column.header) for column in shown], row, strict=True)) for row in rows if row[1]]


def test_a_p_value_is_the_same_in_every_place_and_stands_in_rows_of_outcomes_alone(
    write_bench: Callable[[], Path],
) -> None:
    path = write_bench()
    table = compare(find(path))
    tested = table[table["p"].notna()]
    assert set(tested["stage"]) == {"retrained"}
    for cells, (_, row) in zip(_cells(table), table.iterrows(), strict=True):
        assert cells["Δ points"] == points(row["difference"], (row["high"] - row["low"]) / 2)
        assert cells["p (Holm)"] == probability(row["p_holm"])
    said = {found.setup: sentence(found) for found in verdicts(find(path))}
    for _, row in tested.iterrows():
        for p in (row["p_holm"], row["control_p_holm"]):
            assert ("p < 0.001" if p < 0.001 else f"p = {probability(p)}") in said[row["setup"]]
    assert f"corrected together for these {2 * len(tested)} tests (Holm)" in str(render(table).caption)


def test_one_seed_has_a_difference_but_neither_interval_nor_test(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/f", strategy="fedavg")
    write_run("runs/m")
    table = compare(find(tmp_path / "runs"))
    row = _row(table, "merged", "strategy=merge-many")
    assert math.isfinite(row["difference"])
    assert all(math.isnan(row[name]) for name in ("low", "high", "p", "p_holm", "wilcoxon"))
    assert "interval" not in str(render(table).caption)
    assert points(row["difference"]) in [cells["Δ points"] for cells in _cells(table)]


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


def test_columns_are_those_that_say_something(write_bench: Callable[[], Path], write_run: WriteRun) -> None:
    table = compare(find(write_bench()))
    cells = _cells(table)
    assert list(cells[0]) == ["Stage", "Accuracy %", "Δ points", "p (Holm)", "Seeds", "Loss"]
    assert [c["Stage"] for c in cells] == table["title"].tolist()
    assert [c["Accuracy %"] for c in cells] == [percent(r["accuracy"], r["sd"]) for _, r in table.iterrows()]
    run = Run.load(write_run())
    notes = [c["Note"] for c in _cells(stage_table(run))]
    assert "the client that is best on val" in notes
    plain = stage_table(run).assign(note="", sd=math.nan)
    assert list(_cells(plain)[0]) == ["Stage", "Accuracy %", "Loss"]
    assert render(plain).caption is None


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
