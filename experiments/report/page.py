"""One self-contained ``report.html`` for a run directory or a folder of runs, from their files alone.

Equal files give an equal report: it knows neither the time nor the machine that writes it. The page asks the
network for nothing, and runs no script but those of :data:`SCRIPTS`, which sort, filter, copy and explain; its
own Content-Security-Policy says so. Without them it reads the same. It is well-formed XML too.
"""

import base64
import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2

from experiments.compare.verdict import sentence, verdicts
from experiments.records.differences import MOST_COMPARED, differences
from experiments.records.keys import differing_keys, used, written
from experiments.records.results import COLUMNS, write_results
from experiments.records.runs import Run, find
from experiments.report import facts
from experiments.report.heat import Heat, setups_by_class
from experiments.report.illustrations import Illustration, of_many, of_one
from experiments.report.leakage import Leak, leak
from experiments.report.many import Many
from experiments.report.runview import RunView, view
from experiments.report.sortable import SortableTable, listed, results_table, runs_table, stages_table
from experiments.report.tables import who
from experiments.report.theme import VARIABLES
from fedmerge.progress import steps
from server import RunDirectory

_TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("tables.js", "filters.js", "pictures.js")

MOST_ILLUSTRATED = 6
"""In a folder of more runs than this, the single runs come in brief and without pictures, so the file stays small."""


@dataclass(frozen=True)
class _Page:
    """Everything that the template is given."""

    kind: str
    title: str
    lede: str
    problems: Sequence[str]
    facts: Sequence[facts.Fact]
    runs: Sequence[RunView]
    verdict: Sequence[str] = ()
    several: bool = False
    every_run: SortableTable | None = None
    results: SortableTable | None = None
    stages: SortableTable | None = None
    classes: Heat | None = None
    ranking: str = ""
    pictures: Sequence[Illustration] = ()
    words: Sequence[tuple[str, str]] = ()
    differences: Sequence[Sequence[str]] = ()
    shared: Sequence[tuple[str, str]] = ()
    columns: Sequence[tuple[str, str]] = ()
    leak: Leak | None = None


def write_report(path: str | Path, runs: Sequence[Run] | None = None) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into ``path`` and return the path of the report.

    Beside the report of several runs stand ``results.parquet`` and ``results.csv``, which
    :mod:`experiments.records.results` writes.

    Args:
        path: A run directory, or a folder of them (see :func:`experiments.records.runs.find`). Of a single run the
            page shows everything; of several, first their table over seeds, then each run folded away.
        runs: The runs to report on where they have been read already, or lie elsewhere.

    Raises:
        RunDirectoryError: there is no run, or one that cannot be read.
    """
    path = Path(path)
    runs = find(path) if runs is None else runs
    if len(runs) == 1 and runs[0].path.resolve() == path.resolve():
        page = _single_page(runs[0], path)
    else:
        page = _folder_page(path, runs)
        write_results(path, runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["who"] = who
    html = environment.get_template("report.html.j2").render(page=page, script=_script(), colours=VARIABLES)
    folder = RunDirectory(path)
    folder.write_text("report.html", html)
    return folder.path / "report.html"


@dataclass(frozen=True)
class _Script:
    """The text between the tags, and its hash, by which the page's own policy lets it run and no other."""

    text: str
    hash: str


def _script() -> _Script:
    """The scripts of the page so that HTML and XML both read them as they are."""
    sources = [(_TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS]
    text = f"\n//<![CDATA[\n{''.join(sources)}//]]>\n"
    return _Script(text, "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii"))


def _single_page(run: Run, path: Path) -> _Page:
    again = shlex.join(["fedmerge", "run", str(path / "config.toml")])
    return _Page(
        kind=", ".join(filter(None, [f"Run {run.name}", run.label])),
        title=facts.what(run.config),
        lede=facts.setting(run),
        problems=facts.problems([run]),
        verdict=[sentence(found) for found in verdicts([run])],
        facts=[*facts.headline(run), *facts.effort(run)],
        runs=[view(run, config=list(run.config), pictures=of_one(run, path), again=again)],
        leak=leak(path, ()),
    )


def _folder_page(path: Path, runs: Sequence[Run]) -> _Page:
    many = Many.of(runs)
    differing = differing_keys(runs)
    agreed: dict[str, Any] = {}
    for run in runs:
        agreed = {k: v for k, v in used(run.config).items() if k not in (*differing, "seed")} | agreed
    groups = many.groups
    spread = f"{len(groups)} setups, which differ in {listed(differing)}" if len(groups) > 1 else "one setup"
    illustrated = len(runs) <= MOST_ILLUSTRATED
    return _Page(
        kind=f"{len(runs)} runs in {path.resolve().name}",
        title=facts.what(agreed),
        lede=f"{sum(run.finished for run in runs)} of {len(runs)} runs finished: {spread}, "
        f"{facts.seeds([len(group) for group in groups.values()])}.",
        problems=facts.problems(runs),
        verdict=[sentence(replace(of, setup=of.setup and many.name(of.setup))) for of in verdicts(runs)],
        facts=list(facts.best_setups(many)) if len(groups) > 1 else [],
        runs=[
            view(
                run,
                config=[*differing, *(["seed"] if "seed" in run.config else [])],
                pictures=of_one(run) if illustrated else (),
                brief=not illustrated,
                again=_again(run, path),
                report=_report(run, path),
                setup=many.numbers[many.setup(run)],
            )
            for run in steps("describing runs", runs)
        ],
        several=True,
        every_run=runs_table(many, differing),
        results=None if many.table.empty else results_table(many, differing),
        stages=None if many.table.empty else stages_table(many, differing),
        classes=setups_by_class(many),
        ranking=facts.ranking(runs),
        pictures=list(of_many(path, many)),
        words=[
            (str(title), str(note))
            for title, note in dict.fromkeys(zip(many.table["title"], many.table["note"], strict=True))
            if note
        ],
        differences=[(key, *values) for key, values in differences(runs).items()] if len(runs) <= MOST_COMPARED else (),
        shared=[(key, written(value)) for key, value in agreed.items()],
        columns=list(COLUMNS.items()),
        leak=leak(path, [run.name for run in runs if run.finished]),
    )


def _again(run: Run, path: Path) -> str:
    """The command that repeats ``run``, for the folder in which the report lies."""
    given = Path(os.path.relpath(run.path.resolve(), path.resolve()))
    return shlex.join(["fedmerge", "run", str(given / "config.toml"), "--out", str(Path("again") / given.name)])


def _report(run: Run, path: Path) -> str:
    """The link from the report in ``path`` to that of ``run``; ``""`` where it has none."""
    file = run.path.resolve() / "report.html"
    return quote(Path(os.path.relpath(file, path.resolve())).as_posix()) if file.is_file() else ""
