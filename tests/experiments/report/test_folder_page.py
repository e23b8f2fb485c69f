"""Reports of several runs: parsed as XML and as HTML, their numbers held against the files they come from."""

import base64
import hashlib
import re
from dataclasses import replace
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest
from pages import WITHOUT_CURVES, WriteRun, every, page_of, rows_of, shades_of, text_of

from experiments.compare.ranks import mean_ranks
from experiments.compare.stages import compare, outcomes
from experiments.compare.verdict import sentence, verdicts
from experiments.records.differences import differences
from experiments.records.runs import find
from experiments.report import page as report
from experiments.report.many import Many, short
from experiments.report.page import MOST_ILLUSTRATED, write_report
from experiments.report.tables import number, percent, points, probability
from fedmerge.errors import RunDirectoryError


@pytest.fixture(scope="module")
def standard(standard_bench: Path) -> tuple[Path, Element]:
    """A bench and its page; neither is to be changed."""
    return standard_bench, page_of(standard_bench)


@pytest.mark.usefixtures("undrawn")
def test_the_verdict_stands_before_everything_but_the_title(
    write_run: WriteRun, standard: tuple[Path, Element]
) -> None:
    run = write_run()
    for path, root in ((run, page_of(run)), standard):
        (header,) = every(root, "header")
        (first,) = [text_of(p) for p in every(header, "p", **{"class": "verdict"})]
        folded = [text_of(p) for more in every(header, "details") for p in every(more, "p")]
        found = verdicts(find(path))
        assert [first, *folded] == [sentence(replace(of, setup=short(of.setup))) for of in found]
        text = text_of(header)
        assert text.index(first) < text.index("finished: " if len(found) > 1 else "seed 0.")


def test_several_runs_begin_with_their_results_over_seeds(standard: tuple[Path, Element]) -> None:
    path, root = standard
    table = compare(find(path))
    ends = outcomes(table)
    shown = rows_of(root, "results")
    ends = ends.sort_values("accuracy", ascending=False, kind="stable")
    assert [f"init={row['init']}, strategy={row['strategy']}" for row in shown] == list(ends["setup"])
    assert [row["Setup"] for row in shown] == [short(setup) for setup in ends["setup"]]
    assert list(shown[0])[:2] == ["Setup", "Accuracy %"]
    for row, end in zip(shown, ends.to_dict("records"), strict=True):
        assert row["Accuracy %"] == percent(end["accuracy"], end["sd"])
        assert row["Δ points"] == points(end["difference"], (end["high"] - end["low"]) / 2)
        assert row["p"] == probability(end["p_holm"])
        assert row["p, control"] == probability(end["control_p_holm"])
        assert row["n"] == "3"
        assert row["Loss"] == number(end["loss"], end["loss_sd"])
        assert (row["Clients, s"], row["Up, MB"]) == ("1.25", "0.181")
    assert {row["Network"] for row in shown} == {"MergeMany, anchored + repair + retrain", "FedAvg + retrain"}
    assert "not measured: server seconds and peak memory" in text_of(root)
    assert "corrected together for these 8 tests (Holm)" in text_of(root)
    assert "12 of 12 runs finished: 4 setups, which differ in init and strategy, 3 seeds each." in text_of(root)
    assert (path / "results.parquet").is_file()
    best = ends.sort_values("accuracy", ascending=False, kind="stable").iloc[0]
    assert text_of(every(root, "dt")[0]) == short(best["setup"])


def test_every_stage_of_every_setup_is_a_row_with_its_exact_value(standard: tuple[Path, Element]) -> None:
    path, root = standard
    table = Many.of(find(path)).table
    shown = rows_of(root, "stages")
    assert [row["Accuracy %"] for row in shown] == [percent(r["accuracy"], r["sd"]) for _, r in table.iterrows()]
    (html,) = every(root, "table", id="stages-table")
    at = [text_of(th) for th in every(html, "th")].index("Accuracy %")
    exact = [float(every(row, "td")[at].get("data-value", "")) for row in every(html, "tr")[1:]]
    assert exact == table["accuracy"].tolist()


def test_each_cell_says_how_to_repeat_it_from_the_folder_of_the_report(standard: tuple[Path, Element]) -> None:
    runs = every(standard[1], "details", **{"class": "run"})
    assert len(runs) == 12
    assert all(run.get("open") is None for run in runs)
    name = text_of(every(runs[4], "strong")[0])
    commands = [text_of(pre) for pre in every(runs[4], "pre")]
    assert commands[0] == f"fedmerge run cells/{name}/config.toml --out again/{name}"
    assert commands[1] == "fedmerge run --strategy fedavg --seed 1"


def test_pictures_of_several_runs_carry_their_numbers_as_a_table(standard: tuple[Path, Element]) -> None:
    path, root = standard
    found = mean_ranks(find(path))
    assert found is not None
    assert sorted(p.stem for p in (path / "plots").iterdir()) == [
        "outcomes", "ranks", "reliability", "stage-accuracy", "steps"
    ]  # fmt: skip
    figures = {text_of(every(f, "caption")[0]): f for f in every(root, "figure") if every(f, "caption")}
    first = [text_of(cell) for cell in every(figures["Mean rank"], "tr")[1]]
    assert first[:2] == [short(found.methods[0]), f"{found.ranks[0]:,.4g}"]
    assert f"Critical difference: {found.critical:.2f} ranks" in text_of(root)


@pytest.mark.usefixtures("undrawn")
def test_setups_by_class_are_means_over_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, right in enumerate((8, 4)):
        by_class = [{"stage": "retrained", "split": "test", "confusion": [[right, 10 - right], [0, 10]]}]
        write_run(f"runs/{seed}", seed=seed, summary={"classes": ["cat", "dog"], "labels": {}, "per_class": by_class})
    rows = shades_of(page_of(tmp_path / "runs"), "each setup's outcome")
    assert rows == [["Setup", "Worst class", "cat", "dog"], ["merge-many", "60.00", "60.0", "100.0"]]


@pytest.mark.usefixtures("undrawn")
def test_configurations_of_a_few_runs_stand_side_by_side(write_run: WriteRun, writer: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", lr=0.1, summary=WITHOUT_CURVES)
    writer(tmp_path / "runs" / "b", lr=0.2, name="faster", tags="thesis", summary=WITHOUT_CURVES)
    root = page_of(tmp_path / "runs")
    (section,) = every(root, "section", id="differences")
    rows = [[text_of(cell) for cell in row] for row in every(section, "tr")]
    assert rows[0] == ["Key", "a", "b"]
    assert rows[1:] == [[key, *values] for key, values in differences(find(tmp_path / "runs")).items()]
    assert ["lr", "0.1", "0.2"] in rows
    assert {row["Run"]: row["Called"] for row in rows_of(root, "runs")} == {"a": "", "b": "faster (thesis)"}


@pytest.mark.usefixtures("undrawn")
def test_every_run_is_a_row_that_leads_to_its_details(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/good", summary=WITHOUT_CURVES)
    write_run("runs/bad", seed=1, summary=WITHOUT_CURVES, status="failed: 1 usable reply of 5")
    root = page_of(tmp_path / "runs")
    shown = {row["Run"]: row for row in rows_of(root, "runs")}
    assert (shown["good"]["Status"], shown["bad"]["Status"]) == ("finished", "failed")
    links = [link.get("href") for link in every(every(root, "table", id="runs-table")[0], "a")]
    assert sorted(map(str, links)) == ["#run-bad", "#run-good"]
    assert {str(details.get("id")) for details in every(root, "details", **{"class": "run"})} == {"run-bad", "run-good"}


def test_only_our_script_may_run_and_it_is_the_file(standard: tuple[Path, Element]) -> None:
    path, root = standard
    (script,) = every(root, "script")
    for name in report.SCRIPTS:
        assert (Path(report.__file__).parent / "templates" / name).read_text() in (script.text or "")
    text = (path / "report.html").read_text()
    inline = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert inline is not None
    digest = base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


@pytest.mark.usefixtures("undrawn")
def test_one_setup_over_seeds_with_a_failed_run(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/0", seed=0, summary=WITHOUT_CURVES)
    write_run("runs/1", seed=1, summary=WITHOUT_CURVES)
    write_run("runs/2", seed=2, summary=WITHOUT_CURVES, status="failed: 1 usable reply of 5")
    root = page_of(tmp_path / "runs")
    assert text_of(every(root, "h1")[0]) == "merge-many on digits"
    assert "2 of 3 runs finished: one setup, 2 seeds each." in text_of(root)
    assert "2 failed (1 usable reply of 5)" in text_of(every(root, "p", role="status")[0])
    assert [row["n"] for row in rows_of(root, "results")] == ["2"]


def test_runs_of_unequal_seeds_and_of_many_kinds_are_counted(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=0, dataset="digits", strategy="fedavg")
    write_run("runs/b", seed=1, dataset="digits", strategy="fedavg")
    write_run("runs/c", seed=0, dataset="mnist", summary=WITHOUT_CURVES)
    text = text_of(page_of(tmp_path / "runs"))
    assert "2 setups, which differ in dataset and strategy, 1 to 2 seeds each" in text


@pytest.mark.usefixtures("undrawn")
def test_keys_that_a_run_does_not_use_are_a_dash_and_shared_by_those_that_do(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("runs/f", strategy="fedavg", partition="iid", restarts=9)
    for merger in ("merge-many", "average"):
        write_run(f"runs/{merger}", partition="iid", merger=merger, summary=WITHOUT_CURVES)
    root = page_of(tmp_path / "runs")
    shown = {row["strategy"]: row["merger"] for row in rows_of(root, "results")}
    assert shown["fedavg"] == "–"
    shared = {text_of(row[0]): text_of(row[1]) for row in every(root, "tr") if len(row) == 2}
    assert shared["restarts"] == "3"
    assert "partition-alpha" not in shared
    alone = {text_of(row[0]): text_of(row[1]) for row in every(page_of(tmp_path / "runs" / "f"), "tr") if len(row) == 2}
    assert (alone["merger"], alone["partition-alpha"], alone["init"]) == ("–", "–", "independent")


def test_a_folder_in_which_nothing_finished_is_reported(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", finished=False)
    root = page_of(tmp_path / "runs")
    assert "0 of 1 runs finished" in text_of(root)
    assert not (tmp_path / "runs" / "plots").exists()
    assert [table.get("id") for table in every(root, "table", **{"class": "sortable"})] == ["runs-table"]


def test_many_runs_come_without_their_own_pictures(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(MOST_ILLUSTRATED + 1):
        write_run(f"runs/{seed}", seed=seed)
    monkeypatch.setattr(report, "of_many", lambda *_: [])
    assert not [
        f for run in every(page_of(tmp_path / "runs"), "details", **{"class": "run"}) for f in every(run, "figure")
    ]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run in"):
        write_report(tmp_path)
