"""The tables of a report that a reader can sort and filter, with the numbers behind them as CSV."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.compare.stages import full_title, outcomes
from experiments.records.keys import used, written
from experiments.records.results import COLUMNS, COSTS, costs
from experiments.records.runs import Run
from experiments.report.tables import half_width, number, percent, points, probability, reference_name, tests_note


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
class SortableTable:
    """A table that can be sorted and filtered, and its numbers at full precision as a CSV file in base64."""

    name: str
    caption: str
    columns: Sequence[_Column]
    rows: Sequence[Sequence[_Cell]]
    csv: str


def row_title(table: pd.DataFrame, row: pd.Series) -> str:
    """The whole title of a row of ``table``."""
    return full_title(list(table.loc[table["setup"] == row["setup"], "title"]), str(row["title"]))


def share_of(accuracy: float) -> str:
    """An accuracy as the length of a bar, in %."""
    return f"{100 * min(max(float(np.nan_to_num(accuracy)), 0.0), 1.0):.1f}"


def results_table(table: pd.DataFrame, groups: Mapping[str, Sequence[Run]], keys: Sequence[str]) -> SortableTable:
    """A row per setup: what it ends with, how that stands to the reference, what it took."""
    ends = outcomes(table)
    took = pd.DataFrame([_mean_costs(groups[setup]) for setup in ends["setup"]], columns=list(COSTS))
    known = [name for name in COSTS if took[name].notna().any()]
    ends = ends.assign(**{name: took[name].to_numpy() for name in known})
    unknown = [name.replace("_", " ") for name in COSTS if name not in known]
    caption = (
        f"What each setup ends with, on the test split. {_legend(ends)} Costs are means over seeds, for a whole run"
    )
    caption += f"; not measured: {listed(unknown)}." if unknown else "."
    costs_shown = [(_Column(f"{_COSTS[n][0]}, {_COSTS[n][1]}", numeric=True, hint=COLUMNS[n]), n) for n in known]
    return _table("results", caption, table, ends, groups, keys, costs_shown)


def stages_table(table: pd.DataFrame, groups: Mapping[str, Sequence[Run]], keys: Sequence[str]) -> SortableTable:
    """A row per setup and stage."""
    return _table(
        "stages", f"Every network on the way, on the test split. {_legend(table)}", table, table, groups, keys, []
    )


def _table(
    name: str, caption: str, table: pd.DataFrame, shown: pd.DataFrame, groups: Mapping[str, Sequence[Run]],
    keys: Sequence[str], extra: Sequence[tuple[_Column, str]],
) -> SortableTable:  # fmt: skip
    """The rows ``shown`` of ``table``, with the columns that say something in one of them."""
    contrasts = [(column, key) for column, key in _CONTRASTS if shown[key].notna().any()]
    network = _Column("Network", choose=name == "stages")
    setup = [_Column(key, choose=True) for key in keys]
    columns = [network, *setup] if name == "stages" else setup
    columns += [_Column("Accuracy %", numeric=True, falling=True)]
    columns += [column for column, _ in contrasts]
    columns += [_Column("n", numeric=True, hint="seeds"), _Column("Loss", numeric=True)]
    columns += [network] * (name != "stages")
    rows = []
    for _, row in shown.iterrows():
        config = used(groups[row["setup"]][0].config)
        network_cell = [_Cell(row_title(table, row))]
        cells = network_cell * (name == "stages") + [_Cell(written(config.get(key))) for key in keys]
        cells += [_Cell(percent(row["accuracy"], row["sd"]), _exact(row["accuracy"]), share_of(row["accuracy"]))]
        cells += [_contrast(row, key) for _, key in contrasts]
        cells += [_Cell(str(row["n"]), str(row["n"])), _Cell(number(row["loss"], row["loss_sd"]), _exact(row["loss"]))]
        cells += network_cell * (name != "stages")
        cells += [_Cell(_amount(column, row[column]), _exact(row[column])) for _, column in extra]
        rows.append(cells)
    return SortableTable(name, caption, [*columns, *(column for column, _ in extra)], rows, as_csv(shown))


_CONTRASTS = (
    (_Column("Δ points", numeric=True, falling=True), "difference"),
    (_Column("p", numeric=True, hint="paired t-test after Holm"), "p_holm"),
    (_Column("Wilcoxon p", numeric=True, hint="signed-rank test after Holm"), "wilcoxon_holm"),
    (_Column("Δ to control", numeric=True, falling=True, hint="to best client + retrain"), "control_difference"),
    (_Column("p, control", numeric=True, hint="paired t-test after Holm"), "control_p_holm"),
    (_Column("Wilcoxon p, control", numeric=True, hint="signed-rank test after Holm"), "control_wilcoxon_holm"),
)


def _contrast(row: pd.Series, key: str) -> _Cell:
    if not key.endswith("difference"):
        return _Cell(probability(row[key]), _exact(row[key]))
    return _Cell(points(row[key], half_width(row, key.removesuffix("difference"))), _exact(row[key]))


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
}


def _amount(cost: str, value: float) -> str:
    """Seconds, or bytes as MB."""
    if not math.isfinite(value):
        return "–"
    value = value / 1e6 if _COSTS[cost][1] == "MB" else value
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _exact(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


def as_csv(table: pd.DataFrame) -> str:
    """The table as CSV, in base64 for a link that holds it."""
    return encoded(table.to_csv(index=False, lineterminator="\n").encode())


def encoded(content: bytes) -> str:
    """Bytes in base64."""
    return base64.b64encode(content).decode("ascii")


def listed(words: Sequence[str]) -> str:
    """Words in a row, with "and" before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
