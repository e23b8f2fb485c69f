"""Every study runs in its quick size, goes on where it was stopped, and its page says what its rows say."""

import json
import os
import re
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from experiments.benchmarks.rows import Rows
from experiments.commands import study
from experiments.studies import STUDIES, runner
from experiments.studies.page import mean_ci, page, table
from experiments.studies.study import Cell, Config, Study, Work
from fedmerge.errors import ConfigError, DataError

RESULTS = Path(__file__).parents[3] / "docs" / "results"
DISTINCT = {(study.make, study.sizes["quick"]): name for name, study in STUDIES.items()}.values()
PUBLISHED = [name for name in STUDIES if (RESULTS / f"{name}.md").is_file()]


@dataclass(frozen=True)
class Counting(Config):
    last: int = 3


class Stopped(Exception):
    """As a process that is killed."""


def counted(measured: list[int], stop: int = 0) -> Study:
    """The squares of 1 to ``last``, and a process that ends before ``stop``."""

    def cells(config: Counting, work: Work) -> Iterator[Cell]:
        for seed in config.seeds:
            for i in range(1, config.last + 1):

                def measure(seed: int = seed, i: int = i) -> list[dict[str, object]]:
                    if i == stop:
                        raise Stopped
                    measured.append(i)
                    return [{"seed": seed, "i": i, "power": power, "value": i**power} for power in (2, 3)]

                yield Cell({"seed": seed, "i": i}, measure)

    return Study(
        "squares", cells, "squares", source="Euclid", question="What are they?", cost="nothing",
        sizes={"quick": Counting(last=1), "default": Counting()}, answer=lambda rows: f"They add up to {rows.value.sum()}.",
        theirs="1", ours=lambda rows: table(["i", "value"], rows[["i", "value"]].to_numpy()), explains="nothing",
        draw=lambda rows: Figure(),
    )  # fmt: skip


@pytest.mark.parametrize("name", DISTINCT)
def test_every_study_runs_in_its_quick_size_and_answers(name: str, tmp_path: Path) -> None:
    study = STUDIES[name]
    assert study.sizes["quick"].dataset in ("", "digits")
    written = runner.run(study, study.config("quick"), tmp_path, size="quick", say=lambda line: None)
    text = written.read_text()
    headings = [line for line in text.splitlines() if line.startswith("#")]
    parts = ("Set-up", "Theirs", "Ours", "What explains the difference")
    assert headings == [f"# {study.title}", *(f"## {part}" for part in parts)]
    answer = text.split("\n\n")[1]
    assert 1 <= len(re.findall(r"[.:]( |$)", answer.replace("\n", " "))) <= 5
    assert not re.search(r"\bnan\b", text)
    assert (tmp_path / f"{name}.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_page_says_what_its_rows_say(name: str) -> None:
    rows = pd.read_csv(RESULTS / f"{name}.csv", keep_default_na=False)
    record = json.loads((RESULTS / f"{name}.json").read_text())
    assert page(STUDIES[name], record, rows) == (RESULTS / f"{name}.md").read_text()
    assert (RESULTS / f"{name}.png").is_file()
    here = json.loads(json.dumps(STUDIES[name].sizes[record["size"]].__dict__))
    assert {**here, "seeds": record["config"]["seeds"]} == record["config"]  # what was run is still that size


def test_a_page_leaves_out_the_one_width_of_a_study_of_several() -> None:
    record = {"size": "default", "config": {"width": 7, "widths": [1, 2], "points": 3}, "versions": {}, "device": "CPU"}
    written = page(counted([]), {**record, "threads": 1}, pd.DataFrame({"i": [1], "value": [1], "cpu_seconds": [0.0]}))
    assert "| widths | 1, 2 |" in written
    assert "| points | 3 |" in written
    assert "| width | 7 |" not in written


def test_a_mean_of_differences_has_an_interval_from_two_seeds_on() -> None:
    assert mean_ci([0.1]) == "+10.0"
    assert mean_ci([-0.02, -0.01]) == "-1.5 (-7.9 to +4.9)"  # 12.706 * 0.5


def test_a_study_that_was_stopped_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    measured: list[int] = []
    with pytest.raises(Stopped):
        runner.run(counted(measured, stop=3), Counting(), tmp_path, size="default")
    assert measured == [1, 2]
    before = (tmp_path / "rows.csv").read_bytes()
    written = runner.run(counted(measured), Counting(), tmp_path, size="default", resume=True)
    assert measured == [1, 2, 3]
    assert (tmp_path / "rows.csv").read_bytes().startswith(before)
    assert "They add up to 50." in written.read_text()
    runner.run(counted(measured), Counting(seeds=(7,)), tmp_path, size="default", resume=True)
    assert measured == [1, 2, 3, 1, 2, 3]
    assert "| seeds | 0, 7 |" in written.read_text()


def test_processes_that_share_a_study_keep_what_one_of_them_would_even_if_another_fails(tmp_path: Path) -> None:
    config = Counting(seeds=(1, 0))
    runner.run(counted([]), config, tmp_path / "one", size="default", say=lambda line: None)
    rows, alone = (Rows(tmp_path / name / "rows.csv", ("seed", "i")) for name in ("two", "one"))
    with pytest.raises(Stopped):
        runner.run(counted([], stop=2), config, tmp_path / "two", size="default", jobs=2, say=lambda line: None)
    measured = rows.read()
    assert set(measured["i"]) == {1}
    runner.run(counted([]), config, tmp_path / "two", size="default", resume=True, jobs=2, say=lambda line: None)
    pd.testing.assert_frame_equal(*(file.read().drop(columns="cpu_seconds") for file in (rows, alone)))
    with pytest.raises(ConfigError, match="--jobs is 0; give how many"):
        runner.run(counted([]), config, tmp_path / "three", size="default", jobs=0)


def test_a_folder_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    study = counted([])
    runner.run(study, Counting(), tmp_path / "a", size="default")
    with pytest.raises(ConfigError, match=r"holds study squares; --resume goes on with it"):
        runner.run(study, Counting(), tmp_path / "a", size="default")
    with pytest.raises(ConfigError, match=r"size default, not squares at quick \(they differ in last\)"):
        runner.run(study, Counting(last=1), tmp_path / "a", size="quick", resume=True)
    begun = json.loads((tmp_path / "a" / "study.json").read_text())
    (tmp_path / "a" / "study.json").write_text(json.dumps({**begun, "data": "others"}))
    with pytest.raises(ConfigError, match=r"begun on other images of .* than there are now; put those back"):
        runner.run(study, Counting(), tmp_path / "a", size="default", resume=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty and holds no study"):
        runner.run(study, Counting(), tmp_path / "b", size="default", resume=True)
    assert os.listdir(tmp_path / "b") == ["letter.txt"]
    with pytest.raises(ConfigError, match=r"letter.txt is a file; give a folder with --out"):
        runner.run(study, Counting(), tmp_path / "b" / "letter.txt", size="default")


def test_absent_data_are_named_and_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "nowhere"))
    study = counted([])
    for dataset, place in (("tiny-imagenet", "unknown data set"), (str(tmp_path / "images"), "no folder")):
        with pytest.raises(DataError, match=rf"needs the data set '.*': {place}.*give --dataset"):
            runner.run(study, Counting(dataset=dataset), tmp_path / "out", size="default")
    assert not (tmp_path / "out").exists()


def test_a_size_a_seed_or_a_data_set_that_makes_no_sense_is_refused() -> None:
    study = counted([])
    with pytest.raises(ConfigError, match="no size 'full'; it has quick, default"):
        study.config("full")
    with pytest.raises(ConfigError, match="a seed is given twice"):
        study.config("quick", [1, 1])
    with pytest.raises(ConfigError, match="looks at no images"):
        study.config("quick", dataset="digits")
    with pytest.raises(ConfigError, match="study counterexample draws nothing; leave --seeds 1,2 out"):
        STUDIES["counterexample"].config("quick", [1, 2])


def test_an_entry_that_says_too_little_is_refused() -> None:
    study = counted([])
    for change, problem in (({"source": ""}, "does not say its source"), ({"sizes": {}}, "it has the sizes none")):
        with pytest.raises(ValueError, match=problem):
            STUDIES.add(replace(study, **change))


def test_rows_of_a_full_disk_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    rows = Rows(tmp_path / "rows.csv", ("i",))
    rows.add(i=0, value=1)
    before, limit = rows.path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3, limit[1]))
    try:
        with pytest.raises(OSError, match="no space for a whole row"):
            rows.add(i=1, value=123456)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert rows.path.read_bytes() == before
    assert not rows.has(i=1)


def test_rows_that_end_within_one_are_refused_and_an_empty_file_is_begun(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.touch()
    Rows(path, ("i",)).add(i=0, value=1)
    assert path.read_text() == "i,value\n0,1\n"
    path.write_text("i,value\n0,1\n1")
    with pytest.raises(ConfigError, match=r"rows.csv is damaged \(it ends within a row\); take that line off"):
        Rows(path, ("i",))
    path.write_text("i,value\n0,1,2\n0,1\n0,1,2,3\n")
    with pytest.raises(ConfigError, match="rows.csv is damaged"):
        Rows(path, ("i",))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("rows.csv", lambda t: t.replace(",i,", ",j,", 1), "has no column i; mend it"),
        ("rows.csv", lambda t: t.replace("value", "cube", 1), "does not hold what study squares writes"),
        ("rows.csv", lambda t: t[: t.rindex(",")] + ",slow\n", "does not hold what study squares writes"),
        ("study.json", lambda t: t.replace('"threads"', '"treads"'), "or study.json beside it does not hold what study squ"),
    ],
)  # fmt: skip
def test_what_is_no_longer_as_the_study_wrote_it_is_named(
    file: str, damage: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    runner.run(counted([]), Counting(), tmp_path, size="default")
    (tmp_path / file).write_text(damage((tmp_path / file).read_text()))
    with pytest.raises(ConfigError, match=said) as refused:
        runner.run(counted([]), Counting(), tmp_path, size="default", resume=True, say=lambda line: None)
    assert "\n" not in str(refused.value)


def test_a_data_set_of_too_few_images_is_named(tmp_path: Path) -> None:
    study = STUDIES["barrier-width"]
    config = replace(study.config("quick"), images=5000)
    with pytest.raises(
        DataError, match=r"barrier-width at size quick does not fit the 1797 images of 'digits' \(.*--dataset"
    ):
        runner.run(study, config, tmp_path, size="quick", say=lambda line: None)


def test_a_study_of_other_seeds_goes_on_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    runs = {"squares": counted(measured, stop=3)}
    monkeypatch.setattr("experiments.studies.STUDIES", runs)
    command = {"out": tmp_path / "a", "dataset": "", "quick": False, "full": False}
    with pytest.raises(Stopped):
        study("squares", seeds="7,8", resume=False, **command)
    runs["squares"] = counted(measured)
    study("squares", seeds="", resume=True, **command)
    found = Rows(tmp_path / "a" / "rows.csv", ("seed", "i")).read()
    assert sorted(set(zip(found["seed"], found["i"], strict=True))) == [(s, i) for s in (7, 8) for i in (1, 2, 3)]
    assert measured == [1, 2, 3, 1, 2, 3]
    assert "| seeds | 7, 8 |" in (tmp_path / "a" / "squares.md").read_text()


def test_what_was_begun_outlives_a_disk_that_is_full_when_it_goes_on(tmp_path: Path) -> None:
    runner.run(counted([]), Counting(), tmp_path, size="default")
    before, limit = (tmp_path / "study.json").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            runner.run(counted([]), Counting(seeds=(7,)), tmp_path, size="default", resume=True, say=lambda line: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert (tmp_path / "study.json").read_bytes() == before
