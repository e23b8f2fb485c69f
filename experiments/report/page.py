"""One self-contained ``report.html`` for a run directory or a folder of runs, from their files alone.

Equal files give an equal report: it knows neither the time nor the machine that writes it. The page asks the
network for nothing, and runs no script but the few lines of ``templates/tables.js`` that sort and filter tables; its
own Content-Security-Policy says so. Without them it reads the same. It is well-formed XML too.
"""

import hashlib
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from experiments.compare.ranks import mean_ranks
from experiments.compare.stages import compare, full_title, outcome, outcomes, stage_table
from experiments.records.keys import differing_keys, setups, used
from experiments.records.results import COLUMNS, write_results
from experiments.records.runs import Failure, Run, find
from experiments.report.illustrations import Illustration, of_many, of_one
from experiments.report.overviews import short
from experiments.report.sortable import (
    SortableTable,
    encoded,
    listed,
    results_table,
    row_title,
    share_of,
    stages_table,
)
from experiments.report.tables import number, percent, points, probability, who
from experiments.report.theme import VARIABLES
from server import RunDirectory

_TEMPLATES = Path(__file__).parent / "templates"

MOST_ILLUSTRATED = 6
"""In a folder of more runs than this, the single runs come without pictures, so that the file stays small."""

YARDSTICKS = (("aggregated", "plain-average"), ("client-best-retrained", "client-best"), ("ensemble",))
"""Stages that the outcome is held against in the headline; of each group the first that there is."""


@dataclass(frozen=True)
class _Row:
    """A row of the stage table of one run as text; ``share`` is the length of its bar in percent."""

    title: str
    note: str
    share: str
    accuracy: str
    loss: str


@dataclass(frozen=True)
class _Fact:
    """A headline number."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class _RunView:
    """What the page shows of one run."""

    name: str
    remark: str
    rows: Sequence[_Row]
    sd: bool
    failures: Sequence[Failure]
    asked: int | None
    pictures: Sequence[Illustration]
    command: str
    again: str
    config: Sequence[tuple[str, str]]
    environment: Sequence[tuple[str, str]]
    versions: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class _Page:
    """Everything that the template is given."""

    kind: str
    title: str
    lede: str
    problems: Sequence[str]
    facts: Sequence[_Fact]
    runs: Sequence[_RunView]
    several: bool = False
    results: SortableTable | None = None
    stages: SortableTable | None = None
    ranking: str = ""
    pictures: Sequence[Illustration] = ()
    words: Sequence[tuple[str, str]] = ()
    shared: Sequence[tuple[str, str]] = ()
    columns: Sequence[tuple[str, str]] = ()


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
    script = (_TEMPLATES / "tables.js").read_text(encoding="utf-8") if page.several else ""
    text = environment.get_template("report.html.j2").render(page=page, script=_script(script), colours=VARIABLES)
    folder = RunDirectory(path)
    folder.write_text("report.html", text)
    return folder.path / "report.html"


@dataclass(frozen=True)
class _Script:
    """The text between the tags, and its hash, by which the page's own policy lets it run and no other."""

    text: str
    hash: str


def _script(source: str) -> _Script | None:
    """``source`` so that HTML and XML both read it as it is."""
    if not source:
        return None
    text = f"\n//<![CDATA[\n{source}//]]>\n"
    return _Script(text, "sha256-" + encoded(hashlib.sha256(text.encode()).digest()))


def _single_page(run: Run, path: Path) -> _Page:
    return _Page(
        kind=f"Run {run.name}",
        title=_what(run.config),
        lede=_setting(run),
        problems=_problems([run]),
        facts=[*_headline(run), *_effort(run)],
        runs=[_view(run, config=list(run.config), pictures=of_one(run, path), again="fedmerge run config.toml")],
    )


def _folder_page(path: Path, runs: Sequence[Run]) -> _Page:
    finished = [run for run in runs if run.finished]
    differing = differing_keys(runs)
    groups = setups(finished)
    table = compare(runs)
    agreed: dict[str, Any] = {}
    for run in runs:
        agreed = {k: v for k, v in used(run.config).items() if k not in (*differing, "seed")} | agreed
    spread = f"{len(groups)} setups, which differ in {listed(differing)}" if len(groups) > 1 else "one setup"
    return _Page(
        kind=f"{len(runs)} runs in {path.resolve().name}",
        title=_what(agreed),
        lede=f"{len(finished)} of {len(runs)} runs finished: {spread}, "
        f"{_seeds([len(group) for group in groups.values()])}.",
        problems=_problems(runs),
        facts=list(_best_setups(table)) if len(groups) > 1 else [],
        runs=[
            _view(
                run,
                config=[*differing, *(["seed"] if "seed" in run.config else [])],
                pictures=of_one(run) if len(runs) <= MOST_ILLUSTRATED else (),
                again=_again(run, path),
            )
            for run in runs
        ],
        several=True,
        results=None if table.empty else results_table(table, groups, differing),
        stages=None if table.empty else stages_table(table, groups, differing),
        ranking=_ranking(runs),
        pictures=list(of_many(path, runs)),
        words=[
            (str(title), str(note))
            for title, note in dict.fromkeys(zip(table["title"], table["note"], strict=True))
            if note
        ],
        shared=[(key, _text(value)) for key, value in agreed.items()],
        columns=list(COLUMNS.items()),
    )


def _again(run: Run, path: Path) -> str:
    """The command that repeats ``run``, for the folder in which the report lies."""
    given = Path(os.path.relpath(run.path.resolve(), path.resolve()))
    return shlex.join(["fedmerge", "run", str(given / "config.toml"), "--out", str(Path("again") / given.name)])


def _what(config: Mapping[str, Any]) -> str:
    """What was run on what, as far as all runs agree."""
    doer, data = config.get("strategy"), config.get("dataset")
    return f"{doer or 'Strategies'} on {data}" if data else str(doer or "Runs")


def _setting(run: Run) -> str:
    """The problem in one sentence."""
    c = run.config
    parts = [str(c["model"])] if "model" in c else []
    if "clients" in c:
        parts.append(f"{c['clients']} clients")
    if "partition" in c:
        alpha = f" (α = {c['partition-alpha']})" if "partition-alpha" in used(c) else ""
        parts.append(f"{c['partition']} partition{alpha}")
    if "init" in c:
        parts.append(f"{c['init']} initialisation")
    if "rounds" in c:
        parts.append(f"{c['rounds']} round{'s' if c['rounds'] != 1 else ''}")
    return ", ".join([*parts, f"seed {run.seed}"]) + "."


def _problems(runs: Sequence[Run]) -> list[str]:
    """A line for each run that did not finish."""
    return [f"{'This run' if len(runs) == 1 else run.name} {run.problem}." for run in runs if not run.finished]


def _headline(run: Run) -> Iterator[_Fact]:
    """The outcome, and how it stands to the yardsticks that the run has."""
    result = outcome(run)
    if result is None:
        return
    yield _Fact(
        full_title([s.title for s in run.stages], result.title),
        f"{percent(result.accuracy)} %",
        "accuracy on the test split",
    )
    for names in YARDSTICKS:
        others = (other for name in names if (other := run.stage(name)) not in (None, result))
        if (other := next(others, None)) is not None:
            yield _Fact(
                f"against {other.title}",
                f"{points(result.accuracy - other.accuracy)}",
                f"points; it has {percent(other.accuracy)} %",
            )


def _effort(run: Run) -> Iterator[_Fact]:
    """Replies, time and size, as far as known."""
    if run.asked is not None and run.answered is not None:
        yield _Fact("Replies", f"{run.answered} of {run.asked}", "of what clients were asked for")
    if run.env and isinstance(run.env.get("seconds"), int | float):
        yield _Fact("Time", _duration(float(run.env["seconds"])), f"on {run.env.get('device', 'unknown')}")
    sizes = (run.summary or {}).get("sizes") or {}
    if "parameters" in sizes:
        share = sizes.get("aligned_share")
        remark = "" if share is None else f"{100 * share:.0f} % of them can be aligned"
        yield _Fact("Parameters", f"{sizes['parameters']:,}", remark)
    if "bytes_up" in sizes and "bytes_down" in sizes:
        down = _bytes(sizes["bytes_down"])
        yield _Fact("Sent by clients", _bytes(sizes["bytes_up"]), f"and {down} sent to them")


def _best_setups(table: pd.DataFrame) -> Iterator[_Fact]:
    """The outcome of each setup, best first, at most six."""
    ends = outcomes(table).sort_values("accuracy", ascending=False, kind="stable", na_position="last")
    for _, row in ends.head(6).iterrows():
        spread = f"± {percent(row['sd'])}, " if np.isfinite(row["sd"]) else ""
        yield _Fact(
            short(row["setup"]), f"{percent(row['accuracy'])} %", f"{spread}n = {row['n']}, {row_title(table, row)}"
        )


def _view(run: Run, *, config: Sequence[str], pictures: Iterable[Illustration], again: str) -> _RunView:
    env = run.env or {}
    plain = [(key, env[key]) for key in _SURROUNDINGS if key in env]
    table = stage_table(run)
    return _RunView(
        name=run.name,
        remark=", ".join(filter(None, [run.label, f"seed {run.seed}", run.status])),
        rows=[_row(row) for _, row in table.iterrows()],
        sd=bool(table["sd"].notna().any()),
        failures=run.failures,
        asked=run.asked,
        pictures=list(pictures),
        command=_command(env.get("command")),
        again=again,
        config=[(key, _text(used(run.config).get(key))) for key in config],
        environment=[(key, _text(value)) for key, value in plain],
        versions=[(str(name), str(version)) for name, version in (env.get("versions") or {}).items()],
    )


def _row(row: pd.Series) -> _Row:
    """A row of the table of one run."""
    return _Row(
        title=str(row["title"]),
        note=str(row["note"]),
        share=share_of(row["accuracy"]),
        accuracy=percent(row["accuracy"], row["sd"]),
        loss=number(row["loss"]),
    )


def _ranking(runs: Sequence[Run]) -> str:
    """What the picture of ranks rests on, in words."""
    found = mean_ranks(runs)
    if found is None:
        return ""
    text = f"Ranks over {found.blocks} block{'s' if found.blocks != 1 else ''} of one problem and one seed each"
    text += f"; {found.left_out} more lack a method and do not count" if found.left_out else ""
    text += (
        f". Friedman's test that all methods rank alike: p = {probability(found.p)}" if math.isfinite(found.p) else ""
    )
    text += f". Critical difference: {found.critical:.2f} ranks" if math.isfinite(found.critical) else ""
    return text + "."


_SURROUNDINGS = ("device", "cpus", "threads", "commit", "started", "seconds", "server_seconds", "peak_memory")


def _command(given: Any) -> str:
    """The command line that made the run, ``""`` where it was not kept."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return shlex.join(map(str, given))
    return str(given or "")


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _seeds(counts: Sequence[int]) -> str:
    """``[3, 3]`` -> ``"3 seeds each"``, ``[2, 3]`` -> ``"2 to 3 seeds each"``."""
    low, high = min(counts, default=0), max(counts, default=0)
    return f"{low} to {high} seeds each" if low != high else f"{high} seed{'s' if high != 1 else ''} each"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _bytes(count: float) -> str:
    power = min(int(math.log10(max(count, 1)) // 3), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
