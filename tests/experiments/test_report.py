"""`fedmerge report`: runs from anywhere, and what a crash, another version or an editor left of one, said in a line."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

import pytest
import short_run

from experiments import cli
from experiments.records.runs import find


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as fedmerge writes it; not to be changed."""
    path = tmp_path_factory.mktemp("real") / "run"
    short_run.run(path, clients=2, local_epochs=1, retrain="none", controls="none")
    return path


def _truncated(name: str) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[: len(content) // 2])

    return damage


def _without(*names: str) -> Callable[[Path], None]:
    return lambda run: [(run / name).unlink() for name in names] and None


def _changed(name: str, change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        found = json.loads((run / name).read_text())
        change(found)
        (run / name).write_text(json.dumps(found))

    return damage


def _replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(re.sub(old, new, (run / name).read_text(), flags=re.M)) and None


def _being_written(run: Path) -> None:
    _without("summary.json", "env.json", "model.safetensors")(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 2, "stage": "cli')


def _just_begun(run: Path) -> None:
    _without("summary.json", "env.json", "metrics.jsonl")(run)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a summary": (_truncated("summary.json"), r"cannot be read \(summary.json is not JSON: .*\); what it left"),
    "half a line": (_truncated("metrics.jsonl"), r"cannot be read \(metrics.jsonl, line \d+ is not JSON"),
    "half an env": (_truncated("env.json"), r"cannot be read \(env.json is not JSON"),
    "an empty summary": (lambda run: (run / "summary.json").write_text(""), r"cannot be read \(summary.json is not JSON"),
    "a broken config": (_replaced("config.toml", '^strategy = ".*', "strategy = "), r"cannot be read \(config.toml is not TOML"),
    "no config": (_without("config.toml"), r"cannot be read \(.* it has no config.toml"),
    "a seed of letters": (_replaced("config.toml", "^seed = .*", 'seed = "x"'), r"config.toml: seed is 'x', expected a whole"),
    "more than 64 bits": (_replaced("config.toml", "^clients = .*", f"clients = {2**70}"), r"config.toml: clients is 1180"),
    "a round of 71 bits": (
        _replaced("metrics.jsonl", '^{"round": 1', f'{{"round": {2**70}'), r"metrics.jsonl, line 1: round is 1180.*, expected"
    ),
    "a table in the config": (_replaced("config.toml", "^aligner = .*", "aligner = {}"), r"config.toml: aligner is \{\}"),
    "seconds as text": (_changed("env.json", lambda e: e.update(seconds="4.5")), r"env.json makes no sense \(seconds: "),
    "a summary without status": (_changed("summary.json", lambda s: s.pop("status")), "summary.json has no key 'status'"),
    "stages of another version": (
        _changed("summary.json", lambda s: s.update(stages={"merged": 0.9})), r"summary.json makes no sense \(stages: "
    ),
    "seconds in words": (_changed("env.json", lambda e: e.update(seconds="long")), r"env.json makes no sense \(seconds: "),
    "a list for a summary": (lambda run: (run / "summary.json").write_text("[]"), "summary.json holds a list"),
    "a folder for a file": (
        lambda run: ((run / "env.json").unlink(), (run / "env.json").mkdir()), "env.json cannot be read: Is a directory"
    ),
    "being written": (_being_written, r"has not finished \(it is still running, or was cut off\); what it left reaches round 1"),
    "just begun": (_just_begun, r"has not finished \(it is still running, or was cut off\)$"),
    "failed": (
        _changed("summary.json", lambda s: s.update(status="failed: 1 usable reply of 5")), r"failed \(1 usable reply of 5\)"
    ),
}  # fmt: skip


def call(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    patch.setattr("sys.argv", ["fedmerge", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def _damaged(real: Path, folder: Path, name: str) -> Path:
    shutil.copytree(real, folder / name)
    DAMAGES[name][0](folder / name)
    return folder / name


def test_a_folder_of_damaged_runs_is_reported_with_a_line_for_each(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(real, tmp_path / "whole")
    for name in DAMAGES:
        _damaged(real, tmp_path, name)
    assert call(monkeypatch, "report", tmp_path) == 0
    said = capsys.readouterr()
    lines = said.err.strip().splitlines()
    assert len(lines) == len(DAMAGES)
    page = " ".join((tmp_path / "report.html").read_text().split())
    for name, (_, reason) in DAMAGES.items():
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert re.search(reason, line), line
        assert f"{name} cannot be read" in page or f"{name} failed" in page or f"{name} has not finished" in page
    assert "MergeMany" in said.out  # of the run that is whole


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", DAMAGES)
def test_by_itself_each_ends_in_one_line(
    name: str, real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _damaged(real, tmp_path, name)
    unfinished = name in ("being written", "just begun")
    assert call(monkeypatch, "report", path) == (0 if unfinished else 1 if name == "failed" else 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    if unfinished:
        assert "has not finished" in lines[0]
    if name == "failed":
        assert "failed failed (1 usable reply of 5)" in lines[0]
        assert "1 usable reply of 5" in (path / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_an_older_version_is_compared_with_what_it_has(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(real, tmp_path / "new")
    old = shutil.copytree(real, tmp_path / "old")
    _replaced("config.toml", "^(server-average|test-fraction|restarts|rounds|tags|client-images).*\n", "")(old)
    newer = ("asked", "answered", "interpolation", "sizes", "per_class", "calibration", "client_classes", "merges")
    _changed("summary.json", lambda s: [s.pop(key) for key in newer])(old)
    (old / "env.json").write_text('{"commit": "0123abcd", "command": ["fedmerge", "run", "a b"]}')
    assert call(monkeypatch, "report", tmp_path) == 0
    assert capsys.readouterr().err == ""
    assert [run.status for run in find(tmp_path)] == ["finished", "finished"]


@pytest.mark.usefixtures("undrawn")
def test_the_report_of_several_runs_leads_to_the_reports_of_each(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a", "over there/b #2"):
        shutil.copytree(real, tmp_path / folder)
    (tmp_path / "over there" / "b #2" / "report.html").write_text("its own")
    given = [tmp_path / "a", tmp_path / "over there"]
    assert call(monkeypatch, "report", *given, "--out", tmp_path / "both" / "page") == 0
    page = tmp_path / "both" / "page" / "report.html"
    (link,) = re.findall(r'<a href="(\.\.[^"]*)">', page.read_text())
    assert (page.parent / unquote(link)).read_text() == "its own"


@pytest.mark.usefixtures("undrawn")
def test_two_runs_of_one_name_are_told_apart_and_each_is_read_once(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        shutil.copytree(real, tmp_path / folder / "run")
    _replaced("config.toml", "^seed = .*", "seed = 3")(tmp_path / "b" / "run")
    given = [tmp_path / "a", tmp_path / "b" / "run", tmp_path / "a" / "run"]
    assert [run.name for run in find(*given)] == ["a/run", "b/run"]
    assert call(monkeypatch, "report", *given, "--out", tmp_path / "both") == 0
    said = capsys.readouterr().out
    assert re.search(r"Configurations differ in.*Key +a/run +b/run.*seed +0 +3", said, re.DOTALL)
    table = (tmp_path / "both" / "results.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in table[1:]} == {"a/run", "b/run"}


def test_a_run_is_not_written_over_by_a_report_of_others(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        shutil.copytree(real, tmp_path / name)
    assert call(monkeypatch, "report", tmp_path, "--out", tmp_path / "a") == 2
    assert "a is a run with a report of its own; give another folder" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a" / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_runs_of_which_none_finished_are_reported_and_that_is_an_error(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("failed", "half a line"):
        _damaged(real, tmp_path, name)
    assert call(monkeypatch, "report", tmp_path) == 1
    assert "none of the 2 runs finished" in capsys.readouterr().err
    assert (tmp_path / "report.html").exists()
