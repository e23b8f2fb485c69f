"""One self-contained ``report.html`` for a run directory or a folder of runs, from their files alone.

Equal files give an equal report: it knows neither the time nor the machine that writes it. The page asks the
network for nothing, and runs no script but the few lines of ``templates/tables.js`` that sort and filter tables; its
own Content-Security-Policy says so. Without them it reads the same. It is well-formed XML too.
"""

import base64
import hashlib
import math
import shlex
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from experiments import overviews, plots
from experiments.overviews import short
from experiments.ranks import mean_ranks
from experiments.results import COLUMNS, COSTS, costs, write_results
from experiments.runs import Failure, Run, find
from experiments.tables import (
    compare,
    differing_keys,
    full_title,
    half_width,
    number,
    outcome,
    outcomes,
    percent,
    points,
    probability,
    reference_name,
    setups,
    stage_table,
    who,
    written,
)
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
class _Column:
    """A column of a table that can be sorted; ``choose``: also filtered by its values."""

    name: str
    numeric: bool = False
    choose: bool = False
    falling: bool = False
    hint: str = ""


@dataclass(frozen=True)
class _Cell:
    """What is shown, and for numbers what is sorted by (``""``: not measured) and the length of a bar in percent."""

    text: str
    value: str = ""
    share: str = ""


@dataclass(frozen=True)
class _Table:
    """A table that can be sorted and filtered, and its numbers at full precision as a CSV file in base64."""

    name: str
    caption: str
    columns: Sequence[_Column]
    rows: Sequence[Sequence[_Cell]]
    csv: str


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
    name: str = ""
    csv: str = ""


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
    results: _Table | None = None
    stages: _Table | None = None
    ranking: str = ""
    pictures: Sequence[_Picture] = ()
    words: Sequence[tuple[str, str]] = ()
    shared: Sequence[tuple[str, str]] = ()
    columns: Sequence[tuple[str, str]] = ()


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
    text = environment.get_template("report.html.j2").render(page=page, script=_script(script))
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
    return _Script(text, "sha256-" + _base64(hashlib.sha256(text.encode()).digest()))


def _single_page(run: Run, drawn: Sequence[Path]) -> _Page:
    return _Page(
        kind=f"Run {run.path.resolve().name}",
        title=_what(run.config),
        lede=_setting(run),
        problems=_problems([run]),
        facts=[*_headline(run), *_effort(run)],
        runs=[_view(run, config=list(run.config), pictures=_drawn(run, drawn), again="fedmerge run config.toml")],
    )


def _folder_page(path: Path, runs: Sequence[Run]) -> _Page:
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
                again=_again(run, path),
            )
            for run in runs
        ],
        several=True,
        results=None if table.empty else _results(table, groups, differing),
        stages=None if table.empty else _stages(table, groups, differing),
        ranking=_ranking(runs),
        pictures=list(_overviews(path, runs)),
        words=[
            (str(title), str(note))
            for title, note in dict.fromkeys(zip(table["title"], table["note"], strict=True))
            if note
        ],
        shared=[(key, _text(runs[0].config[key])) for key in agreed],
        columns=list(COLUMNS.items()),
    )


def _again(run: Run, path: Path) -> str:
    """The command that repeats ``run``, for the folder in which the report lies."""
    given = run.path.resolve().relative_to(path.resolve())
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
            short(row["setup"]), f"{percent(row['accuracy'])} %", f"{spread}n = {row['n']}, {_title(table, row)}"
        )


def _title(table: pd.DataFrame, row: pd.Series) -> str:
    """The whole title of a row of ``table``."""
    return full_title(list(table.loc[table["setup"] == row["setup"], "title"]), str(row["title"]))


def _view(run: Run, *, config: Sequence[str], pictures: Iterable[_Picture], again: str) -> _RunView:
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
        again=again,
        config=[(key, _text(run.config.get(key))) for key in config],
        environment=[(key, _text(value)) for key, value in plain],
        versions=[(str(name), str(version)) for name, version in (env.get("versions") or {}).items()],
    )


def _row(row: pd.Series) -> _Row:
    """A row of the table of one run."""
    return _Row(
        title=str(row["title"]),
        note=str(row["note"]),
        share=_share(row["accuracy"]),
        accuracy=percent(row["accuracy"], row["sd"]),
        loss=number(row["loss"]),
    )


def _share(accuracy: float) -> str:
    return f"{100 * min(max(float(np.nan_to_num(accuracy)), 0.0), 1.0):.1f}"


def _results(table: pd.DataFrame, groups: Mapping[str, Sequence[Run]], keys: Sequence[str]) -> _Table:
    """A row per setup: what it ends with, how that stands to the reference, what it took."""
    ends = outcomes(table)
    took = pd.DataFrame([_mean_costs(groups[setup]) for setup in ends["setup"]], columns=list(COSTS))
    known = [name for name in COSTS if took[name].notna().any()]
    ends = ends.assign(**{name: took[name].to_numpy() for name in known})
    unknown = [name.replace("_", " ") for name in COSTS if name not in known]
    caption = (
        f"What each setup ends with, on the test split. {_legend(ends)} Costs are means over seeds, for a whole run"
    )
    caption += f"; not measured: {_and(unknown)}." if unknown else "."
    costs_shown = [(_Column(f"{_COSTS[n][0]}, {_COSTS[n][1]}", numeric=True, hint=COLUMNS[n]), n) for n in known]
    return _table("results", caption, table, ends, groups, keys, costs_shown)


def _stages(table: pd.DataFrame, groups: Mapping[str, Sequence[Run]], keys: Sequence[str]) -> _Table:
    """A row per setup and stage."""
    return _table(
        "stages", f"Every network on the way, on the test split. {_legend(table)}", table, table, groups, keys, []
    )


def _table(
    name: str, caption: str, table: pd.DataFrame, shown: pd.DataFrame, groups: Mapping[str, Sequence[Run]],
    keys: Sequence[str], extra: Sequence[tuple[_Column, str]],
) -> _Table:  # fmt: skip
    """The rows ``shown`` of ``table``, with the columns that say something in one of them."""
    has = {column: bool(shown[column].notna().any()) for column in ("difference", "p_holm", "wilcoxon_holm")}
    network = _Column("Network", choose=name == "stages")
    setup = [_Column(key, choose=True) for key in keys]
    columns = [network, *setup] if name == "stages" else setup
    columns += [_Column("Accuracy %", numeric=True, falling=True)]
    columns += [_Column("Δ points", numeric=True, falling=True)] * has["difference"]
    columns += [_Column("p", numeric=True, hint="paired t-test after Holm")] * has["p_holm"]
    columns += [_Column("Wilcoxon p", numeric=True, hint="signed-rank test after Holm")] * has["wilcoxon_holm"]
    columns += [_Column("n", numeric=True, hint="seeds"), _Column("Loss", numeric=True)]
    columns += [network] * (name != "stages")
    rows = []
    for _, row in shown.iterrows():
        config = groups[row["setup"]][0].config
        network_cell = [_Cell(_title(table, row))]
        cells = network_cell * (name == "stages") + [_Cell(written(config.get(key))) for key in keys]
        cells += [_Cell(percent(row["accuracy"], row["sd"]), _exact(row["accuracy"]), _share(row["accuracy"]))]
        cells += [_Cell(points(row["difference"], half_width(row)), _exact(row["difference"]))] * has["difference"]
        cells += [_Cell(probability(row["p_holm"]), _exact(row["p_holm"]))] * has["p_holm"]
        cells += [_Cell(probability(row["wilcoxon_holm"]), _exact(row["wilcoxon_holm"]))] * has["wilcoxon_holm"]
        cells += [_Cell(str(row["n"]), str(row["n"])), _Cell(number(row["loss"], row["loss_sd"]), _exact(row["loss"]))]
        cells += network_cell * (name != "stages")
        cells += [_Cell(_amount(column, row[column]), _exact(row[column])) for _, column in extra]
        rows.append(cells)
    return _Table(name, caption, [*columns, *(column for column, _ in extra)], rows, _csv(shown))


def _legend(table: pd.DataFrame) -> str:
    """What ± and the columns of differences and tests mean, as far as they are there."""
    parts = ["± is the standard deviation over n seeds."] if table["sd"].notna().any() else []
    if table["difference"].notna().any():
        between = ", ± half its 95 % confidence interval (t)" if table["low"].notna().any() else ""
        parts.append(
            f"Δ: difference in accuracy to {reference_name(table)} of the same seed, data and, where it was run, "
            f"initialisation{between}."
        )
    if tests := int(table["p"].notna().sum()):
        corrected = f", corrected for the {tests} tests of this table (Holm)" if tests > 1 else ""
        parts.append(f"p: paired t-test, two-sided{corrected}.")
    if table["wilcoxon"].notna().any():
        parts.append("Wilcoxon p: signed-rank test, corrected likewise.")
    return " ".join(parts)


def _mean_costs(runs: Sequence[Run]) -> dict[str, float]:
    """Means over ``runs``, NaN for a cost that one of them does not know."""
    took = [costs(run) for run in runs]
    return {
        name: math.nan if any(t[name] is None for t in took) else float(np.mean([t[name] for t in took]))
        for name in COSTS
    }


_COSTS = {
    "client_seconds": ("Clients", "s"),
    "server_seconds": ("Server", "s"),
    "wall_seconds": ("Start to end", "s"),
    "bytes_up": ("Up", "MB"),
    "bytes_down": ("Down", "MB"),
    "peak_memory": ("Peak memory", "MB"),
}


def _amount(cost: str, value: float) -> str:
    """Seconds, or bytes as MB."""
    if not math.isfinite(value):
        return "–"
    value = value / 1e6 if _COSTS[cost][1] == "MB" else value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _exact(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def _csv(table: pd.DataFrame) -> str:
    return _base64(table.to_csv(index=False, lineterminator="\n").encode())


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


def _overviews(path: Path, runs: Sequence[Run]) -> Iterator[_Picture]:
    """The pictures that these runs have something for, drawn into ``plots/`` and embedded with their tables."""
    for overview in overviews.OVERVIEWS:
        data = overview.data(runs)
        if data.empty:
            continue
        light = plots.png(overview.draw(runs, plots.LIGHT))
        RunDirectory(path).write_bytes(f"plots/{overview.name}.png", light)
        data = data.loc[:, data.notna().any() & ~((data == "").all())]
        rows = [[_shown(column, row[column]) for column in data.columns] for _, row in data.iterrows()]
        dark = plots.png(overview.draw(runs, plots.DARK))
        yield replace(
            _embedded(overview.title, overview.caption, light, dark, [str(c) for c in data.columns], rows),
            name=overview.name,
            csv=_csv(data),
        )


def _shown(column: str, value: Any) -> str:
    """A value of the table behind a picture."""
    if column in ("accuracy", "sd", "gain"):
        return points(value) if column == "gain" else percent(value)
    if column in ("setup", "method"):
        return short(value)
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


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
