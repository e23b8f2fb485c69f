"""The tables of a report that a reader can sort and filter: setups, their stages, and runs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from experiments.compare.stages import full_title, outcome, outcomes
from experiments.records.keys import used, written
from experiments.records.results import COLUMNS, COSTS, costs
from experiments.records.runs import Run
from experiments.report.many import Many
from experiments.report.tables import half_width, number, percent, points, probability, reference_name, tests_note


@dataclass(frozen=True)
class _Column:
    """A column of a table that can be sorted; ``choose``: also filtered by its values; ``key``: one of a config."""

    name: str
    numeric: bool = False
    choose: bool = False
    falling: bool = False
    hint: str = ""
    key: bool = False


@dataclass(frozen=True)
class _Cell:
    """What is shown, and for numbers what is sorted by (``""``: not measured), its spread and the length of a bar."""

    text: str
    value: str = ""
    spread: str = ""
    share: str = ""
    link: str = ""


@dataclass(frozen=True)
class _Line:
    """A row, the number of its setup, and its seed where it is of one."""

    cells: Sequence[_Cell]
    setup: int
    seed: str = ""


@dataclass(frozen=True)
class SortableTable:
    """A table that can be sorted and filtered; its first two columns stay in sight."""

    name: str
    caption: str
    columns: Sequence[_Column]
    rows: Sequence[_Line]


_Part = tuple[_Column, Callable[[Any], _Cell]]
_ACCURACY = _Column("Accuracy %", numeric=True, falling=True)


def row_title(table: pd.DataFrame, row: pd.Series) -> str:
    """The whole title of a row of ``table``."""
    return full_title(list(table.loc[table["setup"] == row["setup"], "title"]), str(row["title"]))


def share_of(accuracy: float) -> str:
    """An accuracy as the length of a bar, in %."""
    return f"{100 * min(max(float(np.nan_to_num(accuracy)), 0.0), 1.0):.1f}"


def results_table(many: Many, keys: Sequence[str]) -> SortableTable:
    """A row per setup, best first: what it ends with, how that stands to the reference, what it took."""
    table = many.table
    ends = outcomes(table)
    took = pd.DataFrame([_mean_costs(many.groups[setup]) for setup in ends["setup"]], columns=list(COSTS))
    known = [name for name in COSTS if took[name].notna().any()]
    ends = ends.assign(**{name: took[name].to_numpy() for name in known})
    unknown = [name.replace("_", " ") for name in COSTS if name not in (*known, "epsilon")]
    caption = f"What each setup ends with, on the test split, best first. {_legend(ends)} Costs are means over seeds, "
    caption += "for a whole run" + (f"; not measured: {listed(unknown)}." if unknown else ".")
    parts = [
        _setup(many),
        _accuracy(),
        *_tests(ends),
        _seeds(),
        _loss(),
        _network(table, choose=False),
        *_keys(many, keys),
    ]
    parts += [(_Column(f"{_COSTS[n][0]}, {_COSTS[n][1]}", numeric=True, hint=COLUMNS[n]), _cost(n)) for n in known]
    return _table("results", caption, many, ends, parts)


def stages_table(many: Many, keys: Sequence[str]) -> SortableTable:
    """A row per setup and stage."""
    caption = f"Every network on the way, on the test split; the best setup first. {_legend(many.table)}"
    parts = [_network(many.table, choose=True), _accuracy(), _setup(many), *_tests(many.table), _seeds(), _loss()]
    return _table("stages", caption, many, many.table, [*parts, *_keys(many, keys)])


def runs_table(many: Many, keys: Sequence[str]) -> SortableTable:
    """A row per run, finished or not; what filters go by."""
    labelled = any(run.label for run in many.runs)
    columns = [_Column("Run"), _ACCURACY, *[_Column("Called")] * labelled, _Column("Setup")]
    columns += [_Column("Seed", numeric=True, choose=True)]
    columns += [_Column("Status", choose=True), *(_Column(key, choose=True, key=True) for key in keys)]
    columns += [_Column("Start to end, s", numeric=True, hint=COLUMNS["wall_seconds"])]
    rows = []
    for run in many.runs:
        result, config, setup = outcome(run), used(run.config), many.setup(run)
        accuracy = result.accuracy if result is not None else math.nan
        name, seconds = run.name, costs(run)["wall_seconds"]
        cells = [
            _Cell(name, link=f"#run-{name}"),
            _Cell(percent(accuracy), _exact(accuracy), share=share_of(accuracy)),
            *[_Cell(run.label)] * labelled,
            _Cell(many.name(setup)),
            _Cell(str(run.seed), str(run.seed)),
            _Cell(run.status.split(":")[0]),
            *(_Cell(written(config.get(key))) for key in keys),
            _Cell(_amount("wall_seconds", math.nan if seconds is None else seconds), _exact(seconds or math.nan)),
        ]
        rows.append(_Line(cells, many.numbers[setup], str(run.seed)))
    return SortableTable("runs", "Every run, and what its network ends with on the test split.", columns, rows)


def _table(name: str, caption: str, many: Many, shown: pd.DataFrame, parts: Sequence[_Part]) -> SortableTable:
    rows = [_Line([cell(row) for _, cell in parts], many.numbers[row["setup"]]) for _, row in shown.iterrows()]
    return SortableTable(name, caption, [column for column, _ in parts], rows)


def _setup(many: Many) -> _Part:
    return _Column("Setup"), lambda row: _Cell(many.name(row["setup"]))


def _network(table: pd.DataFrame, *, choose: bool) -> _Part:
    return _Column("Network", choose=choose), lambda row: _Cell(row_title(table, row))


def _accuracy() -> _Part:
    return _ACCURACY, lambda row: _Cell(
        percent(row["accuracy"], row["sd"]), _exact(row["accuracy"]), _exact(row["sd"]), share_of(row["accuracy"])
    )


def _seeds() -> _Part:
    return _Column("n", numeric=True, hint="seeds"), lambda row: _Cell(str(row["n"]), str(row["n"]))


def _loss() -> _Part:
    return _Column("Loss", numeric=True), lambda row: _Cell(
        number(row["loss"], row["loss_sd"]), _exact(row["loss"]), _exact(row["loss_sd"])
    )


def _keys(many: Many, keys: Sequence[str]) -> list[_Part]:
    """A column per key in which setups differ."""

    def cell(key: str) -> Callable[[Any], _Cell]:
        return lambda row: _Cell(written(used(many.groups[row["setup"]][0].config).get(key)))

    return [(_Column(key, key=True), cell(key)) for key in keys]


def _cost(name: str) -> Callable[[Any], _Cell]:
    return lambda row: _Cell(_amount(name, row[name]), _exact(row[name]))


_CONTRASTS = {
    "difference": _Column("Δ points", numeric=True, falling=True),
    "p_holm": _Column("p", numeric=True, hint="paired t-test after Holm"),
    "wilcoxon_holm": _Column("Wilcoxon p", numeric=True, hint="signed-rank test after Holm"),
    "control_difference": _Column("Δ to control", numeric=True, falling=True, hint="to best client + retrain"),
    "control_p_holm": _Column("p, control", numeric=True, hint="paired t-test after Holm"),
    "control_wilcoxon_holm": _Column("Wilcoxon p, control", numeric=True, hint="signed-rank test after Holm"),
}


def _tests(shown: pd.DataFrame) -> list[_Part]:
    """Differences to the reference and to the control, and their tests, as far as one row has them."""

    def cell(key: str) -> Callable[[Any], _Cell]:
        if not key.endswith("difference"):
            return lambda row: _Cell(probability(row[key]), _exact(row[key]))
        of = key.removesuffix("difference")
        return lambda row: _Cell(points(row[key], half_width(row, of)), _exact(row[key]), _exact(half_width(row, of)))

    return [(column, cell(key)) for key, column in _CONTRASTS.items() if shown[key].notna().any()]


def _legend(table: pd.DataFrame) -> str:
    """What ± and the columns of differences and tests mean, as far as they are there."""
    parts = ["± is the standard deviation over n seeds."] if table["sd"].notna().any() else []
    if table["difference"].notna().any():
        between = ", ± half its 95 % confidence interval (t)" if table["low"].notna().any() else ""
        parts.append(
            f"Δ: difference in accuracy to {reference_name(table)} of the same seed, data and, where it was run, "
            f"initialisation{between}."
        )
    parts += [note] if (note := tests_note(table)) else []
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
    "epsilon": ("Privacy", "ε"),
}


def _amount(cost: str, value: float) -> str:
    """Seconds, bytes as MB, or what was spent of the clients' privacy."""
    if not math.isfinite(value):
        return "–"
    value = value / 1e6 if _COSTS[cost][1] == "MB" else value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _exact(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def listed(words: Sequence[str]) -> str:
    """Words in a row, with "and" before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
