"""Stage tables: of one run, and over the seeds and settings of many runs.

Accuracies are shares in ``[0, 1]`` in the frames; what is shown is percent, and points for differences.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.compare.stages import tests_of
from experiments.records.runs import Failure, Run

_MOST_FAILURES = 12


def render(
    table: pd.DataFrame, failures: Sequence[Failure] = (), *, title: str | None = None, notes: Sequence[str] = ()
) -> Table:
    """A frame of :func:`stage_table` or :func:`compare` for the terminal, notes and failures listed under it."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    columns = _shown(table)
    for column in columns:
        shown.add_column(
            column.header,
            justify="right" if column.numeric else "left",
            no_wrap=column.numeric,
            style="dim" if column.header == "Note" else None,
        )
    for i, (new, (_, row)) in enumerate(zip(_starts_of_setups(table), table.iterrows(), strict=True)):
        if new:
            if i:
                shown.add_section()
            shown.add_row(Text(row["setup"], style="bold"))
        shown.add_row(*(escape(column.cell(row)) for column in columns))
    lines = [*_legend(table), *notes, *failure_lines(failures)]
    if lines:
        shown.caption, shown.caption_justify, shown.caption_style = escape("\n".join(lines)), "left", "dim"
    return shown


def side_by_side(differences: Mapping[str, Sequence[str]], names: Sequence[str]) -> Table:
    """What :func:`experiments.records.differences.differences` finds, for the terminal: a row a key, a column a run."""
    shown = Table(
        "Key", *map(escape, names), box=box.SIMPLE_HEAD, title="Configurations differ in", title_justify="left"
    )
    for key, values in differences.items():
        shown.add_row(key, *map(escape, values))
    if not differences:
        shown.title = "Configurations are the same"
    return shown


_UNITS = {
    "image": ("An image of a client", "over all rounds (DP-SGD)"),
    "client": ("A client with all its images", "by the global networks of all rounds, not by clients' own (central)"),
}


def privacy_lines(runs: Sequence[Run]) -> list[str]:
    """A line on what clients spent of their privacy, in the run or the runs that spent most and least; one a unit."""
    lines = []
    for unit, (who, how) in _UNITS.items():
        private = [run for run in runs if run.privacy and run.privacy.unit == unit]
        if not private:
            continue
        bounds = sorted(math.inf if run.epsilon is None else run.epsilon for run in private)
        shown = [f"{bound:.2f}" if math.isfinite(bound) else "∞ (no noise)" for bound in dict.fromkeys(bounds)]
        deltas = sorted({run.privacy.delta for run in private if run.privacy})
        lines.append(
            f"{who} is private to ε ≤ {shown[0]}{f' to {shown[-1]}' if len(shown) > 1 else ''} at δ = "
            f"{' to '.join(f'{delta:g}' for delta in deltas[:: max(1, len(deltas) - 1)])}, {how}."
        )
    return lines


def failure_lines(failures: Sequence[Failure]) -> list[str]:
    """A head line and a line per failure naming round, client and reason; long lists end in a count."""
    if not failures:
        return []
    lines = [f"{len(failures)} client {'reply was' if len(failures) == 1 else 'replies were'} not used:"]
    lines += [f"  round {f.round}, {who(f)}: {f.reason}" for f in failures[:_MOST_FAILURES]]
    if len(failures) > _MOST_FAILURES:
        lines.append(f"  and {len(failures) - _MOST_FAILURES} more")
    return lines


def who(failure: Failure) -> str:
    """The client that a failure names."""
    return "an unknown client" if failure.client is None else f"client {failure.client}"


def reference_name(table: pd.DataFrame) -> str:
    """What a table of :func:`compare` is held against, as it is written: ``"FedAvg"``."""
    name = str(table["reference"].iloc[0])
    return {"fedavg": "FedAvg"}.get(name, name)


def tests_note(table: pd.DataFrame) -> str:
    """Which family of tests the p-values of a table of :func:`compare` belong to; ``""`` without any."""
    tests = tests_of(table)
    if not tests:
        return ""
    corrected = f", corrected together for these {tests} tests (Holm)" if tests > 1 else ""
    return (
        f"p: paired t-test, two-sided, of what each setup ends with against {reference_name(table)} and against best "
        f"client + retrain, decided beforehand{corrected}."
    )


def percent(share: float, sd: float = math.nan) -> str:
    """``0.9361, 0.0042`` -> ``"93.61 ± 0.42"``; an en dash for what was not measured."""
    if not math.isfinite(share):
        return "–"
    return f"{100 * share:.2f}" + (f" ± {100 * sd:.2f}" if math.isfinite(sd) else "")


def points(difference: float, sd: float = math.nan) -> str:
    """A difference of two accuracies in points, always signed."""
    if not math.isfinite(difference):
        return "–"
    sign = "−" if round(100 * difference, 2) < 0 else "+"
    return sign + percent(abs(difference), sd)


def half_width(row: pd.Series, of: str = "") -> float:
    """Half the confidence interval of a difference, which lies evenly around it; NaN without one.

    ``of`` is what stands before the names of its columns: ``"control_"`` for that to the control.
    """
    return float(row[f"{of}high"] - row[f"{of}low"]) / 2


def number(value: float, sd: float = math.nan) -> str:
    """A loss: three decimals, or scientific where those say nothing."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.3f}" if abs(value) < 1e4 else f"{value:.2e}"
    return text + (f" ± {sd:.3f}" if math.isfinite(sd) else "")


def probability(p: float) -> str:
    """A p-value; below a thousandth only that."""
    return "–" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


class _Column:
    """How one column is shown."""

    def __init__(self, header: str, cell: Callable[[Any], str], *, numeric: bool) -> None:
        self.header, self.cell, self.numeric = header, cell, numeric


def _shown(table: pd.DataFrame) -> list[_Column]:
    """The columns worth showing: those that say something in at least one row."""
    columns = [
        _Column("Stage", lambda r: str(r["title"]), numeric=False),
        _Column("Accuracy %", lambda r: percent(r["accuracy"], r["sd"]), numeric=True),
        _Column("Loss", lambda r: number(r["loss"]), numeric=True),
    ]
    if "n" not in table:
        if table["note"].astype(bool).any():
            columns.append(_Column("Note", lambda r: str(r["note"]), numeric=False))
        return columns
    loss = columns.pop()
    if table["difference"].notna().any():
        columns.append(_Column("Δ points", lambda r: points(r["difference"], half_width(r)), numeric=True))
    if table["p"].notna().any():
        columns.append(_Column("p (Holm)", lambda r: probability(r["p_holm"]), numeric=True))
    columns += [_Column("Seeds", lambda r: str(r["n"]), numeric=True), loss]
    return columns


def _legend(table: pd.DataFrame) -> list[str]:
    """What the columns mean, for those that are shown."""
    if "n" not in table:
        return ["± is the standard deviation over clients."] if table["sd"].notna().any() else []
    legend = ["± is the standard deviation over seeds."] if table["sd"].notna().any() else []
    if table["difference"].notna().any():
        legend.append(f"Δ: difference in accuracy to {reference_name(table)}, paired by seed")
        legend[-1] += ", ± half its 95 % confidence interval (t)." if table["low"].notna().any() else "."
    text = " ".join(filter(None, [*legend, tests_note(table)]))
    return [text] if text else []


def _starts_of_setups(table: pd.DataFrame) -> list[bool]:
    """Whether each row is the first of a named setup."""
    if "setup" not in table:
        return [False] * len(table)
    names = list(table["setup"])
    return [bool(name) and name != before for name, before in zip(names, [None, *names], strict=False)]
