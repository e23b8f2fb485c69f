"""One self-contained ``report.html`` for a run directory or a folder of runs, from their files alone.

Equal files give an equal report: it knows neither the time nor the machine that writes it. The page has no
script and asks the network for nothing; its own Content-Security-Policy says so. It is well-formed XML too.
"""

import base64
import math
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from experiments import plots
from experiments.results import write_results
from experiments.runs import Failure, Run, find
from experiments.tables import (
    RESULTS,
    compare,
    differing_keys,
    number,
    outcome,
    percent,
    points,
    probability,
    reference_name,
    setups,
    stage_table,
    who,
)

MOST_ILLUSTRATED = 6
"""In a folder of more runs than this, the single runs come without pictures, so that the file stays small."""

YARDSTICKS = (("aggregated", "plain-average"), ("client-best-retrained", "client-best"), ("ensemble",))
"""Stages that the outcome is held against in the headline; of each group the first that there is."""


@dataclass(frozen=True)
class _Row:
    """A row of a stage table as text; ``share`` is the length of its bar in percent."""

    title: str
    note: str
    share: str
    accuracy: str
    loss: str
    n: str = ""
    difference: str = ""
    p: str = ""


@dataclass(frozen=True)
class _Group:
    """The rows of one setup."""

    name: str
    rows: Sequence[_Row]


@dataclass(frozen=True)
class _Compared:
    """The table over seeds: which optional columns it has, its groups, and the number of its columns."""

    caption: str
    differences: bool
    tests: bool
    width: int
    groups: Sequence[_Group]


@dataclass(frozen=True)
class _Fact:
    """A headline number."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class _Picture:
    """A PNG in base64, light and perhaps dark, with its size in CSS pixels and its numbers as a table."""

    title: str
    caption: str
    light: str
    dark: str
    width: int
    height: int
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


@dataclass(frozen=True)
class _RunView:
    """What the page shows of one run."""

    name: str
    remark: str
    rows: Sequence[_Row]
    sd: bool
    failures: Sequence[Failure]
    asked: int | None
    pictures: Sequence[_Picture]
    command: str
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
    compared: _Compared | None = None
    pictures: Sequence[_Picture] = ()
    words: Sequence[tuple[str, str]] = ()
    shared: Sequence[tuple[str, str]] = ()


def write_report(path: str | Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into ``path`` and return the path of the report.

    Beside the report of several runs stand ``results.parquet`` and ``results.csv``, see :mod:`experiments.results`.

    Args:
        path: A run directory, or a folder of them (see :func:`experiments.runs.find`). Of a single run the
            page shows everything; of several, first their table over seeds, then each run folded away.

    Raises:
        RunDirectoryError: there is no run, or one that cannot be read.
    """
    path = Path(path)
    runs = find(path)
    alone = (path / "config.toml").is_file()
    if alone:
        page = _single_page(runs[0], plots.draw_all(runs[0], path / "plots"))
    else:
        overview = path / "plots" / "stage-accuracy.png"
        if any(run.finished and run.stages for run in runs):
            overview.parent.mkdir(exist_ok=True)
            overview.write_bytes(plots.png(plots.stage_accuracy(runs)))
        page = _folder_page(path, runs, overview)
        write_results(path, runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["who"] = who
    report = path / "report.html"
    report.write_text(environment.get_template("report.html.j2").render(page=page), encoding="utf-8")
    return report


def _single_page(run: Run, drawn: Sequence[Path]) -> _Page:
    return _Page(
        kind=f"Run {run.path.resolve().name}",
        title=_what(run.config),
        lede=_setting(run),
        problems=_problems([run]),
        facts=[*_headline(run), *_effort(run)],
        runs=[_view(run, config=list(run.config), pictures=_drawn(run, drawn))],
    )


def _folder_page(path: Path, runs: Sequence[Run], overview: Path) -> _Page:
    finished = [run for run in runs if run.finished]
    differing = differing_keys(runs)
    groups = setups(finished)
    table = compare(runs)
    agreed = [key for key in runs[0].config if key not in differing and key != "seed"]
    spread = f"{len(groups)} setups, which differ in {_and(differing)}" if len(groups) > 1 else "one setup"
    return _Page(
        kind=f"{len(runs)} runs in {path.resolve().name}",
        title=_what({key: runs[0].config[key] for key in agreed}),
        lede=f"{len(finished)} of {len(runs)} runs finished: {spread}, "
        f"{_seeds([len(group) for group in groups.values()])}.",
        problems=_problems(runs),
        facts=list(_best_setups(table)) if len(groups) > 1 else [],
        runs=[
            _view(
                run,
                config=[*differing, *(["seed"] if "seed" in run.config else [])],
                pictures=_light_only(run) if len(runs) <= MOST_ILLUSTRATED else (),
            )
            for run in runs
        ],
        compared=_compared(table),
        pictures=[] if table.empty else [_over_seeds(runs, overview)],
        words=[
            (str(title), str(note))
            for title, note in dict.fromkeys(zip(table["title"], table["note"], strict=True))
            if note
        ],
        shared=[(key, _text(runs[0].config[key])) for key in agreed],
    )


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
        uses_alpha = "dirichlet" in str(c["partition"]) and "partition-alpha" in c
        alpha = f" (α = {c['partition-alpha']})" if uses_alpha else ""
        parts.append(f"{c['partition']} partition{alpha}")
    if "init" in c:
        parts.append(f"{c['init']} initialisation")
    if "rounds" in c:
        parts.append(f"{c['rounds']} round{'s' if c['rounds'] != 1 else ''}")
    return ", ".join([*parts, f"seed {run.seed}"]) + "."


def _problems(runs: Sequence[Run]) -> list[str]:
    """A line for each run that did not finish."""
    lines = []
    for run in runs:
        if not run.finished:
            where = "This run" if len(runs) == 1 else run.path.name
            left = f"; what it left reaches round {run.rounds}" if run.rounds else ""
            lines.append(f"{where} did not finish ({run.status}){left}.")
    return lines


def _headline(run: Run) -> Iterator[_Fact]:
    """The outcome, and how it stands to the yardsticks that the run has."""
    result = outcome(run)
    if result is None:
        return
    yield _Fact(
        _full_title([s.title for s in run.stages], result.title),
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


def _full_title(titles: Sequence[str], title: str) -> str:
    """A title that goes on from the row before (``"+ retrain"``) with all that it goes on from."""
    at = titles.index(title)
    first = next((k for k in range(at, -1, -1) if not titles[k].startswith("+")), at)
    return " ".join(titles[first : at + 1])


def _best_setups(table: pd.DataFrame) -> Iterator[_Fact]:
    """The outcome of each setup, best first, at most six."""
    outcomes = []
    for name, rows in table.groupby("setup", sort=False):
        by_stage = rows.set_index("stage")
        result = next((stage for stage in RESULTS if stage in by_stage.index), None)
        if result is not None:
            row = by_stage.loc[result]
            title = _full_title(list(rows["title"]), str(row["title"]))
            outcomes.append((float(row["accuracy"]), str(name), row, title))
    for _, name, row, title in sorted(outcomes, key=lambda o: -np.nan_to_num(o[0], nan=-1.0))[:6]:
        spread = f"± {percent(row['sd'])}, " if np.isfinite(row["sd"]) else ""
        yield _Fact(name, f"{percent(row['accuracy'])} %", f"{spread}n = {row['n']}, {title}")


def _view(run: Run, *, config: Sequence[str], pictures: Iterable[_Picture]) -> _RunView:
    env = run.env or {}
    plain = [(key, env[key]) for key in _SURROUNDINGS if key in env]
    table = stage_table(run)
    return _RunView(
        name=run.path.resolve().name,
        remark=f"seed {run.seed}, {run.status}",
        rows=[_row(row) for _, row in table.iterrows()],
        sd=bool(table["sd"].notna().any()),
        failures=run.failures,
        asked=run.asked,
        pictures=list(pictures),
        command=_command(env.get("command")),
        config=[(key, _text(run.config.get(key))) for key in config],
        environment=[(key, _text(value)) for key, value in plain],
        versions=[(str(name), str(version)) for name, version in (env.get("versions") or {}).items()],
    )


def _row(row: pd.Series) -> _Row:
    """A row of either table."""
    compared = "n" in row.index
    share = float(np.nan_to_num(row["accuracy"]))
    return _Row(
        title=str(row["title"]),
        note=str(row["note"]),
        share=f"{100 * min(max(share, 0.0), 1.0):.1f}",
        accuracy=percent(row["accuracy"], row["sd"]),
        loss=number(row["loss"], row["loss_sd"]) if compared else number(row["loss"]),
        n=str(row["n"]) if compared else "",
        difference=points(row["difference"], row["difference_sd"]) if compared else "",
        p=probability(row["p"]) if compared else "",
    )


def _compared(table: pd.DataFrame) -> _Compared:
    differences, tests = bool(table["difference"].notna().any()), bool(table["p"].notna().any())
    caption = "Mean ± standard deviation over seeds, on the test split."
    if differences:
        caption += f" Δ: difference in accuracy to {reference_name(table)}, paired by seed."
    if tests:
        caption += " p: paired t-test, two-sided, not corrected for the number of rows."
    return _Compared(
        caption=caption,
        differences=differences,
        tests=tests,
        width=4 + differences + tests,
        groups=[
            _Group(str(name), [_row(row) for _, row in rows.iterrows()])
            for name, rows in table.groupby("setup", sort=False)
        ],
    )


def _over_seeds(runs: Sequence[Run], overview: Path) -> _Picture:
    return _embedded(
        "Accuracy of each stage",
        "Test accuracy of each stage, mean ± standard deviation over seeds, as in the table above.",
        overview.read_bytes(),
        plots.png(plots.stage_accuracy(runs, theme=plots.DARK)),
    )


def _drawn(run: Run, files: Sequence[Path]) -> Iterator[_Picture]:
    """The pictures in ``files``, and the same for dark paper."""
    light = {file.stem: file.read_bytes() for file in files}
    for picture in plots.PICTURES:
        if picture.name in light:
            dark = plots.png(picture.draw(run, plots.DARK))
            yield _with_numbers(run, picture, light[picture.name], dark)


def _light_only(run: Run) -> Iterator[_Picture]:
    for picture in plots.PICTURES:
        if picture.there(run):
            yield _with_numbers(run, picture, plots.png(picture.draw(run, plots.LIGHT)), None)


def _with_numbers(run: Run, picture: plots.Picture, light: bytes, dark: bytes | None) -> _Picture:
    columns, rows = _NUMBERS[picture.name](run)
    title = picture.name.replace("-", " ").capitalize()
    return _embedded(title, picture.caption, light, dark, columns, rows)


def _embedded(
    title: str,
    caption: str,
    light: bytes,
    dark: bytes | None,
    columns: Sequence[str] = (),
    rows: Sequence[Sequence[str]] = (),
) -> _Picture:
    width, height = struct.unpack(">II", light[16:24])  # the IHDR chunk comes first in every PNG
    return _Picture(title, caption, _base64(light), "" if dark is None else _base64(dark), width, height, columns, rows)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


_SURROUNDINGS = ("device", "cpus", "threads", "commit", "started", "seconds")
_Numbers = tuple[list[str], list[list[str]]]


def _no_numbers(run: Run) -> _Numbers:
    """The stage table above the picture already has them."""
    return [], []


def _label_numbers(run: Run) -> _Numbers:
    rows = [[holder, *(f"{c:,}" for c in counts), f"{sum(counts):,}"] for holder, counts in run.labels.items()]
    return ["Holder", *run.classes, "All"], rows


def _line_numbers(run: Run) -> _Numbers:
    line = run.interpolation
    assert line is not None
    columns = ["α", "Loss, as they came", "Loss, aligned", "Accuracy %, as they came", "Accuracy %, aligned"]
    return columns, [
        [f"{alpha:.3f}", number(a), number(b), percent(c), percent(d)]
        for alpha, a, b, c, d in zip(
            line.alphas,
            line.naive.loss,
            line.aligned.loss,
            line.naive.accuracy,
            line.aligned.accuracy,
            strict=True,
        )
    ]


def _climb_numbers(run: Run) -> _Numbers:
    climbs = [climb for climb in run.merges if climb.objective]
    longest = max(len(climb.objective) for climb in climbs)
    rows = [
        [
            f"{climb.name}, round {climb.round}",
            *(f"{value:.5g}" for value in climb.objective),
            *[""] * (longest - len(climb.objective)),
        ]
        for climb in climbs
    ]
    return ["Merge", *(f"Sweep {k}" for k in range(1, longest + 1))], rows


def _round_numbers(run: Run) -> _Numbers:
    test = run.metrics[run.metrics["split"] == "test"]
    by_round = test.pivot_table("accuracy", "round", "stage", aggfunc="mean", sort=False).sort_index()
    titles = {stage.stage: stage.title for stage in run.stages}
    columns = ["Round", *(titles.get(str(stage), str(stage)) for stage in by_round.columns)]
    return columns, [[str(r), *map(percent, row)] for r, row in zip(by_round.index, by_round.to_numpy(), strict=True)]


_NUMBERS = {
    "stage-accuracy": _no_numbers,
    "accuracy-over-rounds": _round_numbers,
    "label-distribution": _label_numbers,
    "interpolation": _line_numbers,
    "merge-objective": _climb_numbers,
}


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


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


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
