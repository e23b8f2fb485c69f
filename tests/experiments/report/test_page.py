"""Reports: parsed as XML and as HTML, their numbers held against the files they come from."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import Element

import pytest
from pages import WITHOUT_CURVES, WriteRun, every, page_of, shades_of, text_of

from experiments.records.runs import Run
from experiments.report.page import write_report
from experiments.report.tables import number, percent, points


@pytest.fixture(scope="module")
def page(standard_run: Path) -> Element:
    return page_of(standard_run)


def _stage_rows(root: Element) -> Iterator[list[str]]:
    """Title and cells of each row of the first stage table."""
    table = every(root, "table", **{"class": "stages"})[0]
    for row in (r for body in every(table, "tbody") for r in every(body, "tr")):
        head, *cells = list(row)
        if cells:
            yield [(head.text or "").strip(), *map(text_of, cells)]


def test_the_stage_table_has_the_numbers_of_the_summary(standard_run: Path, page: Element) -> None:
    root = page
    stages = json.loads((standard_run / "summary.json").read_text())["stages"]
    assert list(_stage_rows(root)) == [
        [s["title"], percent(s["accuracy"], float("nan") if s["sd"] is None else s["sd"]), number(s["loss"])]
        for s in stages
    ]
    table = every(root, "table", **{"class": "stages"})[0]
    assert [text_of(e) for e in every(table, "small")] == [s["note"] for s in stages]


def test_the_headline_holds_the_outcome_against_the_yardsticks(standard_run: Path, page: Element) -> None:
    run, root = Run.load(standard_run), page
    facts = {text_of(d[0]): text_of(d[1]) for facts in every(root, "dl") for d in every(facts, "div")}
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
    assert text_of(every(root, "h1")[0]) == "merge-many on digits"
    assert [text_of(h) for h in every(root, "h2")] == [
        "Stages", "Pictures", "By class", "Repeat it", "Configuration and environment"
    ]  # fmt: skip


def test_pictures_are_inside_and_come_with_their_numbers(standard_run: Path, page: Element) -> None:
    path, root = standard_run, page
    figures = every(root, "figure")
    assert len(figures) == 6
    for figure in figures:
        (image,) = figure.findall("{http://www.w3.org/2000/svg}svg")
        assert image.get("aria-label")
        assert text_of(every(figure, "figcaption")[0])
    captions = [text_of(c) for figure in figures for c in every(figure, "caption")]
    assert captions == ["Accuracy over rounds", "Accuracy by class", "Reliability", "Interpolation", "Merge objective"]
    assert sorted(p.stem for p in (path / "plots").iterdir()) == sorted(
        ["stage-accuracy", "accuracy-over-rounds", "accuracy-by-class", "label-distribution", "reliability",
         "interpolation", "merge-objective"]
    )  # fmt: skip


def test_clients_by_class_are_their_labels_and_what_their_networks_know(standard_run: Path, page: Element) -> None:
    run, rows = Run.load(standard_run), shades_of(page, "Images of each class")
    assert rows[0] == ["Holder", *run.classes, "All"]
    known = {f"client {row.client}": row.accuracy for row in run.client_classes}
    for (holder, counts), row in zip(run.labels.items(), rows[1:], strict=True):
        told = [f"{n:,}" if n else "·" for n in counts]
        if holder in known:
            told = [f"{n} ({100 * a:.0f} %)" for n, a in zip(told, map(float, map(str, known[holder])), strict=True)]
        assert row == [holder, *told, f"{sum(counts):,}"]


def test_confusion_of_the_outcome_comes_first_and_is_that_of_the_summary(standard_run: Path, page: Element) -> None:
    run = Run.load(standard_run)
    (section,) = every(page, "section", id="classes")
    folded = every(section, "details")
    assert text_of(every(folded[0], "summary")[0]) == "Confusion: MergeMany, anchored + repair + retrain"
    assert [one.get("open") is not None for one in folded] == [True] + [False] * (len(folded) - 1)
    rows = [[text_of(cell) for cell in row] for row in every(folded[0], "tr")]
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
    rows = shades_of(page_of(write_run(summary=summary)), "most often taken")
    assert len(rows) == 1 + 25
    assert rows[1] == ["class 38", "class 39", "38", percent(38 / 47)]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_says_nothing_by_class_has_no_such_section(write_run: WriteRun) -> None:
    root = page_of(write_run(summary={**WITHOUT_CURVES, "per_class": [], "calibration": [], "client_classes": []}))
    assert every(root, "section", id="classes") == []
    assert "#classes" not in {link.get("href") for link in every(root, "a")}


def test_the_contents_list_names_every_section_once(standard_run: Path, page: Element) -> None:
    ids = [section.get("id") for section in every(page, "section") if section.get("id")]
    (nav,) = every(page, "nav")
    assert [(link.get("href") or "")[1:] for link in every(nav, "a")] == ids


def test_the_numbers_of_curves_and_rounds_are_those_of_the_files(standard_run: Path, page: Element) -> None:
    run, root = Run.load(standard_run), page
    tables = {
        text_of(every(t, "caption")[0]): [[text_of(c) for c in r] for r in every(t, "tr")] for t in every(root, "table")
    }
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
    pairs = {text_of(row[0]): text_of(row[1]) for table in every(root, "table", **{"class": "plain pairs"})
             for row in every(table, "tr")}  # fmt: skip
    assert {key: str(value) for key, value in run.config.items()}.items() <= pairs.items()
    assert pairs["torch"] == "2.14.1"
    assert pairs["commit"] == "0123abcd"
    commands = [text_of(pre) for pre in every(root, "pre")]
    assert commands[:2] == [f"fedmerge run {standard_run}/config.toml", "fedmerge run --strategy merge-many --seed 0"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", [["fedmerge", "run", "a b.toml"], None])
def test_what_repeats_a_run_comes_first_and_commands_are_quoted(write_run: WriteRun, command: object) -> None:
    path = write_run("runs/a b", env={"command": command}, summary=WITHOUT_CURVES)
    shown = [text_of(pre) for pre in every(page_of(path), "pre")]
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
    root = page_of(path)
    assert len(every(root, "script")) == 1  # ours
    assert evil in text_of(every(root, "h1")[0])
    assert evil in text_of(every(root, "section", id="failures")[0])
    assert evil in map(text_of, every(root, "pre"))


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
    assert every(page, "img") == []
    assert all(kind == "href" and target.startswith("#") for kind, target in links.found)
    assert not links.tags & {"link", "iframe", "object", "embed", "form"}
    assert "url(" not in text.replace("url(#", "")  # what is cut off at the edges of a picture names its shape
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_equal_files_give_equal_reports(standard_run: Path, page: Element) -> None:
    before = (standard_run / "report.html").read_bytes()
    assert write_report(standard_run).read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_failures_name_client_and_reason(write_run: WriteRun) -> None:
    failures = tuple({"round": 1, "client": i, "reason": f"reason {i}"} for i in range(101))
    root = page_of(write_run(failures=failures, summary=WITHOUT_CURVES))
    section = every(root, "section", **{"class": "failures"})[0]
    items = [text_of(item) for item in every(section, "li")]
    assert items[3] == "Round 1, client 3: reason 3"
    assert items[-1] == "and 1 more, in summary.json"
    assert "101 client replies were not used, of 5 asked for." in text_of(section)


@pytest.mark.usefixtures("undrawn")
def test_switches_are_written_as_in_toml_and_what_is_unknown_as_a_dash(write_run: WriteRun) -> None:
    path = write_run(env={"commit": None}, summary=WITHOUT_CURVES, keep_clients=True)
    cells = {text_of(row[0]): text_of(row[1]) for row in every(page_of(path), "tr") if len(row) == 2}
    assert (cells["keep-clients"], cells["commit"]) == ("true", "–")


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_failures_has_no_such_section(write_run: WriteRun) -> None:
    assert every(page_of(write_run(summary=WITHOUT_CURVES)), "section", **{"class": "failures"}) == []


def test_an_unfinished_run_is_reported_with_what_it_left(write_run: WriteRun) -> None:
    path = write_run(finished=False, rounds=3)
    root = page_of(path)
    assert "has not finished (it is still running, or was cut off); what it left reaches round 3." in text_of(
        every(root, "p", role="status")[0]
    )
    assert [row[0] for row in _stage_rows(root)] == [s.title for s in Run.load(path).stages]
    assert len(every(root, "figure")) == 2


def test_a_run_that_measured_nothing_still_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('strategy = "fedavg"\n[extra]\n')
    root = page_of(tmp_path)
    assert text_of(every(root, "h1")[0]) == "fedavg"
    assert every(root, "figure") == []
    assert "has not finished (it is still running, or was cut off)." in text_of(every(root, "p", role="status")[0])


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("seconds", "shown"), [(5.25, "5.2 s"), (125, "2 min 5 s"), (7300, "2 h 1 min")]
)  # fmt: skip
def test_time_is_readable(write_run: WriteRun, seconds: float, shown: str) -> None:
    assert shown in text_of(page_of(write_run(env={"seconds": seconds}, summary=WITHOUT_CURVES)))
