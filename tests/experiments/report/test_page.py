"""Reports: parsed as XML and as HTML, their numbers held against the files they come from."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import pytest

from experiments.compare.ranks import mean_ranks
from experiments.compare.stages import compare, outcomes
from experiments.compare.verdict import sentence, verdicts
from experiments.records.differences import differences
from experiments.records.runs import Run, find
from experiments.report import page as report
from experiments.report.many import Many, short
from experiments.report.page import MOST_ILLUSTRATED, write_report
from experiments.report.tables import number, percent, points, probability
from fedmerge.errors import RunDirectoryError

WriteRun = Callable[..., Path]
WITHOUT_CURVES: dict[str, Any] = {
    "merges": [],
    "interpolation": None,
    "labels": {},
}  # draws less, where pictures do not matter
XHTML = "{http://www.w3.org/1999/xhtml}"


def _page(path: Path) -> Element:
    return ElementTree.parse(write_report(path)).getroot()


@pytest.fixture(scope="module")
def page(standard_run: Path) -> Element:
    return _page(standard_run)


def _all(root: Element, tag: str, **attributes: str) -> list[Element]:
    return [e for e in root.iter(XHTML + tag) if all(e.get(k) == v for k, v in attributes.items())]


def _text(element: Element) -> str:
    return re.sub(r"\s+", " ", "".join(element.itertext())).strip()


def _stage_rows(root: Element) -> Iterator[list[str]]:
    """Title and cells of each row of the first stage table."""
    table = _all(root, "table", **{"class": "stages"})[0]
    for row in (r for body in _all(table, "tbody") for r in _all(body, "tr")):
        head, *cells = list(row)
        if cells:
            yield [(head.text or "").strip(), *map(_text, cells)]


def test_the_stage_table_has_the_numbers_of_the_summary(standard_run: Path, page: Element) -> None:
    root = page
    stages = json.loads((standard_run / "summary.json").read_text())["stages"]
    assert list(_stage_rows(root)) == [
        [s["title"], percent(s["accuracy"], float("nan") if s["sd"] is None else s["sd"]), number(s["loss"])]
        for s in stages
    ]
    table = _all(root, "table", **{"class": "stages"})[0]
    assert [_text(e) for e in _all(table, "small")] == [s["note"] for s in stages]


def test_the_headline_holds_the_outcome_against_the_yardsticks(standard_run: Path, page: Element) -> None:
    run, root = Run.load(standard_run), page
    facts = {_text(d[0]): _text(d[1]) for facts in _all(root, "dl") for d in _all(facts, "div")}
    accuracy = {s.stage: s.accuracy for s in run.stages}
    assert facts["MergeMany, anchored + repair + retrain"].startswith(percent(accuracy["retrained"]))
    assert facts["against Plain average"].startswith(points(accuracy["retrained"] - accuracy["plain-average"]))
    assert facts["against Best client + retrain"].startswith(
        points(accuracy["retrained"] - accuracy["client-best-retrained"])
    )
    assert facts["Replies"].startswith("15 of 15")
    assert facts["Time"].startswith("41.7 s")
    assert facts["Parameters"].startswith("9,034")
    assert facts["Sent by clients"].startswith("181 kB")
    assert _text(_all(root, "h1")[0]) == "merge-many on digits"
    assert [_text(h) for h in _all(root, "h2")] == [
        "Stages", "Pictures", "By class", "Repeat it", "Configuration and environment"
    ]  # fmt: skip


def test_pictures_are_inside_and_come_with_their_numbers(standard_run: Path, page: Element) -> None:
    path, root = standard_run, page
    figures = _all(root, "figure")
    assert len(figures) == 6
    for figure in figures:
        (image,) = figure.findall("{http://www.w3.org/2000/svg}svg")
        assert image.get("aria-label")
        assert _text(_all(figure, "figcaption")[0])
    captions = [_text(c) for figure in figures for c in _all(figure, "caption")]
    assert captions == ["Accuracy over rounds", "Accuracy by class", "Reliability", "Interpolation", "Merge objective"]
    assert sorted(p.stem for p in (path / "plots").iterdir()) == sorted(
        ["stage-accuracy", "accuracy-over-rounds", "accuracy-by-class", "label-distribution", "reliability",
         "interpolation", "merge-objective"]
    )  # fmt: skip


def _heat(root: Element, title: str) -> list[list[str]]:
    """The cells of a table that is shaded, by a word of its caption."""
    (table,) = [t for t in _all(root, "table", **{"class": "heat"}) if title in _text(_all(t, "caption")[0])]
    return [[cell.get("data-text") or _text(cell) for cell in row] for row in _all(table, "tr")]


def test_clients_by_class_are_their_labels_and_what_their_networks_know(standard_run: Path, page: Element) -> None:
    run, rows = Run.load(standard_run), _heat(page, "Images of each class")
    assert rows[0] == ["Holder", *run.classes, "All"]
    known = {f"client {row.client}": row.accuracy for row in run.client_classes}
    for (holder, counts), row in zip(run.labels.items(), rows[1:], strict=True):
        told = [f"{n:,}" if n else "·" for n in counts]
        if holder in known:
            told = [f"{n} ({100 * a:.0f} %)" for n, a in zip(told, map(float, map(str, known[holder])), strict=True)]
        assert row == [holder, *told, f"{sum(counts):,}"]


def test_confusion_of_the_outcome_comes_first_and_is_that_of_the_summary(standard_run: Path, page: Element) -> None:
    run = Run.load(standard_run)
    (section,) = _all(page, "section", id="classes")
    folded = _all(section, "details")
    assert _text(_all(folded[0], "summary")[0]) == "Confusion: MergeMany, anchored + repair + retrain"
    assert [one.get("open") is not None for one in folded] == [True] + [False] * (len(folded) - 1)
    rows = [[_text(cell) for cell in row] for row in _all(folded[0], "tr")]
    (given,) = [of.confusion for of in run.per_class if of.stage == "retrained"]
    for name, counts, row in zip(run.classes, given, rows[1:], strict=True):
        right = counts[run.classes.index(name)] / sum(counts)
        assert row == [name, *(f"{n:,}" if n else "·" for n in counts), percent(right)]


def test_of_many_classes_the_most_confused_are_listed(write_run: WriteRun) -> None:
    k = 40
    counts = [[9 if i == j else (i if j == i + 1 else 0) for j in range(k)] for i in range(k)]
    summary = {
        **WITHOUT_CURVES,
        "classes": [f"class {i}" for i in range(k)],
        "per_class": [{"stage": "retrained", "split": "test", "confusion": counts}],
        "calibration": [],
    }
    rows = _heat(_page(write_run(summary=summary)), "most often taken")
    assert len(rows) == 1 + 25
    assert rows[1] == ["class 38", "class 39", "38", percent(38 / 47)]


def test_a_run_that_says_nothing_by_class_has_no_such_section(write_run: WriteRun) -> None:
    root = _page(write_run(summary={**WITHOUT_CURVES, "per_class": [], "calibration": [], "client_classes": []}))
    assert _all(root, "section", id="classes") == []
    assert "#classes" not in {link.get("href") for link in _all(root, "a")}


def test_the_contents_list_names_every_section_once(standard_run: Path, page: Element) -> None:
    ids = [section.get("id") for section in _all(page, "section") if section.get("id")]
    (nav,) = _all(page, "nav")
    assert [(link.get("href") or "")[1:] for link in _all(nav, "a")] == ids


def test_the_numbers_of_curves_and_rounds_are_those_of_the_files(standard_run: Path, page: Element) -> None:
    run, root = Run.load(standard_run), page
    tables = {_text(_all(t, "caption")[0]): [[_text(c) for c in r] for r in _all(t, "tr")] for t in _all(root, "table")}
    line = run.interpolation
    assert line is not None
    assert tables["Interpolation"][1][1:3] == [number(line.naive.loss[0]), number(line.aligned.loss[0])]
    assert tables["Interpolation"][-1][4] == percent(line.aligned.accuracy[-1])
    assert tables["Merge objective"][1][:2] == ["merge-many, round 1", f"{run.merges[0].objective[0]:.5g}"]
    merged = run.metrics[(run.metrics["stage"] == "merged") & (run.metrics["round"] == 1)]["accuracy"].item()
    head, *rows = tables["Accuracy over rounds"]
    assert dict(zip(head, next(r for r in rows if r[0] == "1"), strict=True))["MergeMany, anchored"] == percent(merged)


def test_configuration_environment_and_command_are_complete(standard_run: Path, page: Element) -> None:
    run, root = Run.load(standard_run), page
    pairs = {_text(row[0]): _text(row[1]) for table in _all(root, "table", **{"class": "plain pairs"})
             for row in _all(table, "tr")}  # fmt: skip
    assert {key: str(value) for key, value in run.config.items()}.items() <= pairs.items()
    assert pairs["torch"] == "2.14.1"
    assert pairs["commit"] == "0123abcd"
    commands = [_text(pre) for pre in _all(root, "pre")]
    assert commands[:2] == [f"fedmerge run {standard_run}/config.toml", "fedmerge run --strategy merge-many --seed 0"]


@pytest.mark.parametrize("command", [["fedmerge", "run", "a b.toml"], None])
def test_what_repeats_a_run_comes_first_and_commands_are_quoted(write_run: WriteRun, command: object) -> None:
    path = write_run("runs/a b", env={"command": command}, summary=WITHOUT_CURVES)
    shown = [_text(pre) for pre in _all(_page(path), "pre")]
    assert shown[0] == f"fedmerge run '{path}/config.toml'"
    assert ("fedmerge run 'a b.toml'" in shown) == (command is not None)


def test_values_are_escaped(write_run: WriteRun) -> None:
    evil = "<script>alert('&')</script>"
    path = write_run(
        dataset=evil,
        failures=({"round": 1, "client": 0, "reason": evil},),
        env={"command": evil, "device": evil},
        summary=WITHOUT_CURVES,
    )
    root = _page(path)
    assert len(_all(root, "script")) == 1  # ours
    assert evil in _text(_all(root, "h1")[0])
    assert evil in _text(_all(root, "section", id="failures")[0])
    assert evil in map(_text, _all(root, "pre"))


def test_the_page_asks_the_network_for_nothing(standard_run: Path, page: Element) -> None:
    class Links(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.found: list[tuple[str, str]] = []
            self.tags: set[str] = set()

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.add(tag)
            self.found += [(k, v or "") for k, v in attrs if k in ("src", "srcset", "href", "action", "data")]

    text = (standard_run / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert _all(page, "img") == []
    assert all(kind == "href" and target.startswith("#") for kind, target in links.found)
    assert not links.tags & {"link", "iframe", "object", "embed", "form"}
    assert "url(" not in text.replace("url(#", "")  # what is cut off at the edges of a picture names its shape
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_equal_files_give_equal_reports(standard_run: Path, page: Element) -> None:
    before = (standard_run / "report.html").read_bytes()
    assert write_report(standard_run).read_bytes() == before


def test_failures_name_client_and_reason(write_run: WriteRun) -> None:
    failures = tuple({"round": 1, "client": i, "reason": f"reason {i}"} for i in range(101))
    root = _page(write_run(failures=failures, summary=WITHOUT_CURVES))
    section = _all(root, "section", **{"class": "failures"})[0]
    items = [_text(item) for item in _all(section, "li")]
    assert items[3] == "Round 1, client 3: reason 3"
    assert items[-1] == "and 1 more, in summary.json"
    assert "101 client replies were not used, of 5 asked for." in _text(section)


def test_switches_are_written_as_in_toml_and_what_is_unknown_as_a_dash(write_run: WriteRun) -> None:
    path = write_run(env={"commit": None}, summary=WITHOUT_CURVES, keep_clients=True)
    cells = {_text(row[0]): _text(row[1]) for row in _all(_page(path), "tr") if len(row) == 2}
    assert (cells["keep-clients"], cells["commit"]) == ("true", "–")


def test_a_run_without_failures_has_no_such_section(write_run: WriteRun) -> None:
    assert _all(_page(write_run(summary=WITHOUT_CURVES)), "section", **{"class": "failures"}) == []


def test_an_unfinished_run_is_reported_with_what_it_left(write_run: WriteRun) -> None:
    path = write_run(finished=False, rounds=3)
    root = _page(path)
    assert "has not finished (it is still running, or was cut off); what it left reaches round 3." in _text(
        _all(root, "p", role="status")[0]
    )
    assert [row[0] for row in _stage_rows(root)] == [s.title for s in Run.load(path).stages]
    assert len(_all(root, "figure")) == 2


def test_a_run_that_measured_nothing_still_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('strategy = "fedavg"\n[extra]\n')
    root = _page(tmp_path)
    assert _text(_all(root, "h1")[0]) == "fedavg"
    assert _all(root, "figure") == []
    assert "has not finished (it is still running, or was cut off)." in _text(_all(root, "p", role="status")[0])


def _table(root: Element, name: str) -> list[dict[str, str]]:
    """Rows of a table that can be sorted, by the names of its columns."""
    (table,) = _all(root, "table", id=f"{name}-table")
    head, *rows = [[_text(cell) for cell in row] for row in _all(table, "tr")]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_the_verdict_stands_before_everything_but_the_title(
    write_run: WriteRun, write_bench: Callable[[], Path]
) -> None:
    for path in (write_run(), write_bench()):
        (header,) = _all(_page(path), "header")
        (first,) = [_text(p) for p in _all(header, "p", **{"class": "verdict"})]
        folded = [_text(p) for more in _all(header, "details") for p in _all(more, "p")]
        found = verdicts(find(path))
        assert [first, *folded] == [sentence(replace(of, setup=short(of.setup))) for of in found]
        text = _text(header)
        assert text.index(first) < text.index("finished: " if len(found) > 1 else "seed 0.")


def test_several_runs_begin_with_their_results_over_seeds(write_bench: Callable[[], Path]) -> None:
    path = write_bench()
    root = _page(path)
    table = compare(find(path))
    ends = outcomes(table)
    shown = _table(root, "results")
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
    assert "not measured: server seconds and peak memory" in _text(root)
    assert "corrected together for these 8 tests (Holm)" in _text(root)
    assert "12 of 12 runs finished: 4 setups, which differ in init and strategy, 3 seeds each." in _text(root)
    assert (path / "results.parquet").is_file()
    best = ends.sort_values("accuracy", ascending=False, kind="stable").iloc[0]
    assert _text(_all(root, "dt")[0]) == short(best["setup"])


def test_every_stage_of_every_setup_is_a_row_with_its_exact_value(write_bench: Callable[[], Path]) -> None:
    path = write_bench()
    root = _page(path)
    table = Many.of(find(path)).table
    shown = _table(root, "stages")
    assert [row["Accuracy %"] for row in shown] == [percent(r["accuracy"], r["sd"]) for _, r in table.iterrows()]
    (html,) = _all(root, "table", id="stages-table")
    at = [_text(th) for th in _all(html, "th")].index("Accuracy %")
    exact = [float(_all(row, "td")[at].get("data-value", "")) for row in _all(html, "tr")[1:]]
    assert exact == table["accuracy"].tolist()


def test_each_cell_says_how_to_repeat_it_from_the_folder_of_the_report(write_bench: Callable[[], Path]) -> None:
    runs = _all(_page(write_bench()), "details", **{"class": "run"})
    assert len(runs) == 12
    assert all(run.get("open") is None for run in runs)
    name = _text(_all(runs[4], "strong")[0])
    commands = [_text(pre) for pre in _all(runs[4], "pre")]
    assert commands[0] == f"fedmerge run cells/{name}/config.toml --out again/{name}"
    assert commands[1] == "fedmerge run --strategy fedavg --seed 1"


def test_pictures_of_several_runs_carry_their_numbers_as_a_table(write_bench: Callable[[], Path]) -> None:
    path = write_bench()
    root = _page(path)
    found = mean_ranks(find(path))
    assert found is not None
    assert sorted(p.stem for p in (path / "plots").iterdir()) == [
        "outcomes", "ranks", "reliability", "stage-accuracy", "steps"
    ]  # fmt: skip
    figures = {_text(_all(f, "caption")[0]): f for f in _all(root, "figure") if _all(f, "caption")}
    first = [_text(cell) for cell in _all(figures["Mean rank"], "tr")[1]]
    assert first[:2] == [short(found.methods[0]), f"{found.ranks[0]:,.4g}"]
    assert f"Critical difference: {found.critical:.2f} ranks" in _text(root)


def test_setups_by_class_are_means_over_seeds(write_run: WriteRun, tmp_path: Path) -> None:
    for seed, right in enumerate((8, 4)):
        by_class = [{"stage": "retrained", "split": "test", "confusion": [[right, 10 - right], [0, 10]]}]
        write_run(f"runs/{seed}", seed=seed, summary={"classes": ["cat", "dog"], "labels": {}, "per_class": by_class})
    rows = _heat(_page(tmp_path / "runs"), "each setup's outcome")
    assert rows == [["Setup", "Worst class", "cat", "dog"], ["merge-many", "60.00", "60.0", "100.0"]]


def test_configurations_of_a_few_runs_stand_side_by_side(write_run: WriteRun, writer: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", lr=0.1, summary=WITHOUT_CURVES)
    writer(tmp_path / "runs" / "b", lr=0.2, name="faster", tags="thesis", summary=WITHOUT_CURVES)
    root = _page(tmp_path / "runs")
    (section,) = _all(root, "section", id="differences")
    rows = [[_text(cell) for cell in row] for row in _all(section, "tr")]
    assert rows[0] == ["Key", "a", "b"]
    assert rows[1:] == [[key, *values] for key, values in differences(find(tmp_path / "runs")).items()]
    assert ["lr", "0.1", "0.2"] in rows
    assert {row["Run"]: row["Called"] for row in _table(root, "runs")} == {"a": "", "b": "faster (thesis)"}


def test_every_run_is_a_row_that_leads_to_its_details(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/good", summary=WITHOUT_CURVES)
    write_run("runs/bad", seed=1, summary=WITHOUT_CURVES, status="failed: 1 usable reply of 5")
    root = _page(tmp_path / "runs")
    shown = {row["Run"]: row for row in _table(root, "runs")}
    assert (shown["good"]["Status"], shown["bad"]["Status"]) == ("finished", "failed")
    links = [link.get("href") for link in _all(_all(root, "table", id="runs-table")[0], "a")]
    assert sorted(map(str, links)) == ["#run-bad", "#run-good"]
    assert {str(details.get("id")) for details in _all(root, "details", **{"class": "run"})} == {"run-bad", "run-good"}


def test_only_our_script_may_run_and_it_is_the_file(write_bench: Callable[[], Path]) -> None:
    path = write_bench()
    root = _page(path)
    (script,) = _all(root, "script")
    for name in report.SCRIPTS:
        assert (Path(report.__file__).parent / "templates" / name).read_text() in (script.text or "")
    text = (path / "report.html").read_text()
    inline = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert inline is not None
    digest = base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)


def test_one_setup_over_seeds_with_a_failed_run(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/0", seed=0, summary=WITHOUT_CURVES)
    write_run("runs/1", seed=1, summary=WITHOUT_CURVES)
    write_run("runs/2", seed=2, summary=WITHOUT_CURVES, status="failed: 1 usable reply of 5")
    root = _page(tmp_path / "runs")
    assert _text(_all(root, "h1")[0]) == "merge-many on digits"
    assert "2 of 3 runs finished: one setup, 2 seeds each." in _text(root)
    assert "2 failed (1 usable reply of 5)" in _text(_all(root, "p", role="status")[0])
    assert [row["n"] for row in _table(root, "results")] == ["2"]


def test_runs_of_unequal_seeds_and_of_many_kinds_are_counted(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", seed=0, dataset="digits", strategy="fedavg")
    write_run("runs/b", seed=1, dataset="digits", strategy="fedavg")
    write_run("runs/c", seed=0, dataset="mnist", summary=WITHOUT_CURVES)
    text = _text(_page(tmp_path / "runs"))
    assert "2 setups, which differ in dataset and strategy, 1 to 2 seeds each" in text


def test_keys_that_a_run_does_not_use_are_a_dash_and_shared_by_those_that_do(
    write_run: WriteRun, tmp_path: Path
) -> None:
    write_run("runs/f", strategy="fedavg", partition="iid", restarts=9)
    for merger in ("merge-many", "average"):
        write_run(f"runs/{merger}", partition="iid", merger=merger, summary=WITHOUT_CURVES)
    root = _page(tmp_path / "runs")
    shown = {row["strategy"]: row["merger"] for row in _table(root, "results")}
    assert shown["fedavg"] == "–"
    shared = {_text(row[0]): _text(row[1]) for row in _all(root, "tr") if len(row) == 2}
    assert shared["restarts"] == "3"
    assert "partition-alpha" not in shared
    alone = {_text(row[0]): _text(row[1]) for row in _all(_page(tmp_path / "runs" / "f"), "tr") if len(row) == 2}
    assert (alone["merger"], alone["partition-alpha"], alone["init"]) == ("–", "–", "independent")


def test_a_folder_in_which_nothing_finished_is_reported(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", finished=False)
    root = _page(tmp_path / "runs")
    assert "0 of 1 runs finished" in _text(root)
    assert not (tmp_path / "runs" / "plots").exists()
    assert [table.get("id") for table in _all(root, "table", **{"class": "sortable"})] == ["runs-table"]


def test_many_runs_come_without_their_own_pictures(write_run: WriteRun, tmp_path: Path) -> None:
    for seed in range(MOST_ILLUSTRATED + 1):
        write_run(f"runs/{seed}", seed=seed)
    assert not [f for run in _all(_page(tmp_path / "runs"), "details", **{"class": "run"}) for f in _all(run, "figure")]


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no run in"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(5.25, "5.2 s"), (125, "2 min 5 s"), (7300, "2 h 1 min")]
)  # fmt: skip
def test_time_is_readable(write_run: WriteRun, seconds: float, shown: str) -> None:
    assert shown in _text(_page(write_run(env={"seconds": seconds}, summary=WITHOUT_CURVES)))
