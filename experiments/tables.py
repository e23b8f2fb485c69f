"""Stage tables: of one run, and over the seeds and settings of many runs.

Accuracies are shares in ``[0, 1]`` in the frames; what is shown is percent, and points for differences.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from experiments.keys import METHOD_KEYS, problem, setups
from experiments.paired import holm, paired
from experiments.runs import Failure, Run, Stage

RESULTS = ("retrained", "repaired", "merged", "aggregated")
"""Stages that are a strategy's outcome, the furthest first."""

_MOST_FAILURES = 12


def stage_table(run: Run) -> pd.DataFrame:
    """The stages of one run: ``stage, title, accuracy, sd, loss, note``, a row each, in the order of the run.

    ``sd`` is the standard deviation over clients where the row is a mean over clients, else NaN.
    """
    return pd.DataFrame(
        {
            "stage": [s.stage for s in run.stages],
            "title": [s.title for s in run.stages],
            "accuracy": np.array([s.accuracy for s in run.stages], dtype=float),
            "sd": np.array([math.nan if s.sd is None else s.sd for s in run.stages], dtype=float),
            "loss": np.array([s.loss for s in run.stages], dtype=float),
            "note": [s.note for s in run.stages],
        }
    )


def outcome(run: Run) -> Stage | None:
    """The network that the strategy ends with: the furthest of :data:`RESULTS` that the run has."""
    return next((stage for name in RESULTS if (stage := run.stage(name)) is not None), None)


def full_title(titles: Sequence[str], title: str) -> str:
    """A title that goes on from the row before (``"+ retrain"``) with all that it goes on from."""
    at = titles.index(title)
    first = next((k for k in range(at, -1, -1) if not titles[k].startswith("+")), at)
    return " ".join(titles[first : at + 1])


def compare(runs: Sequence[Run], *, reference: str = "fedavg") -> pd.DataFrame:
    r"""Every stage of every setup, over the seeds whose runs finished.

    A run is paired with the run of the same seed and the same problem (all config keys but
    :data:`METHOD_KEYS`) that has the reference, first of all with itself; of several the one whose method agrees
    in most keys, so that of two initialisations its own is taken. :func:`experiments.paired.paired` says what is
    made of the differences :math:`d_i` in accuracy of these pairs.

    Args:
        runs: Runs to compare; those that did not finish are left out.
        reference: What the others are held against: a stage, or a strategy (``"fedavg"``) whose aggregate it is.

    Returns:
        A row per setup and stage: ``setup, stage, title, n, accuracy, sd, loss, loss_sd, difference,
        difference_sd, low, high, pairs, p, p_holm, wilcoxon, wilcoxon_holm, reference, note``. ``n`` counts
        seeds; standard deviations are those of a sample (``n - 1``), NaN for a single one. ``low`` to ``high``
        is the 95 % confidence interval of ``difference``, ``p`` and ``wilcoxon`` are the p-values of the two
        tests, and those ending in ``_holm`` are corrected for the number of tests in the table. All of
        these are NaN where nothing can be paired and for the reference itself, which ``reference`` repeats.
    """
    rows = []
    groups = setups([run for run in runs if run.finished])
    # What is held against the reference comes first, the reference last.
    groups = dict(sorted(groups.items(), key=lambda g: any(_reference_row(run, reference) is not None for run in g[1])))
    counted = [run for members in groups.values() for run in members]
    for setup, members in groups.items():
        for stage, (title, note) in _stage_order(members).items():
            found = [(run, row) for run in members if (row := run.stage(stage)) is not None]
            pairs = [(row, _counterpart(run, counted, reference)) for run, row in found]
            found_pairs = paired([row.accuracy - o.accuracy for row, o in pairs if o is not None and o is not row])
            rows.append(
                {
                    "setup": setup,
                    "stage": stage,
                    "title": title,
                    "n": len(found),
                    **_mean_sd([row.accuracy for _, row in found], "accuracy", "sd"),
                    **_mean_sd([row.loss for _, row in found], "loss", "loss_sd"),
                    "difference": found_pairs.mean,
                    "difference_sd": found_pairs.sd,
                    "low": found_pairs.low,
                    "high": found_pairs.high,
                    "pairs": found_pairs.n,
                    "p": found_pairs.t,
                    "wilcoxon": found_pairs.wilcoxon,
                    "reference": reference,
                    "note": note,
                }
            )
    return _corrected(pd.DataFrame(rows, columns=_COMPARED))


def outcomes(table: pd.DataFrame) -> pd.DataFrame:
    """Of a table of :func:`compare` the row of each setup's outcome, with the columns of that table.

    The p-values are corrected anew for these rows alone: who asks only how the outcomes stand to the reference has
    asked fewer questions.
    """
    rows = []
    for _, of_setup in table.groupby("setup", sort=False):
        named = of_setup.drop_duplicates("stage").set_index("stage", drop=False)
        rows += [named.loc[name] for name in RESULTS if name in named.index][:1]
    return _corrected(pd.DataFrame(rows, columns=list(table.columns)).reset_index(drop=True))


def _corrected(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(p_holm=holm(table["p"].astype(float)), wilcoxon_holm=holm(table["wilcoxon"].astype(float)))


def render(table: pd.DataFrame, failures: Sequence[Failure] = (), *, title: str | None = None) -> Table:
    """A frame of :func:`stage_table` or :func:`compare` for the terminal, the failures listed under it."""
    shown = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)
    columns = _shown(table, setup=False)
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
    notes = [*_legend(table), *failure_lines(failures)]
    if notes:
        shown.caption, shown.caption_justify, shown.caption_style = escape("\n".join(notes)), "left", "dim"
    return shown


def to_markdown(table: pd.DataFrame, failures: Sequence[Failure] = ()) -> str:
    """The same table as GitHub-flavoured Markdown, columns aligned in the source as well."""
    columns = _shown(table, setup=True)
    cells = [[c.header for c in columns]]
    cells += [[_markdown(c.cell(row)) for c in columns] for _, row in table.iterrows()]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    rule = ["-" * (w - 1) + ":" if c.numeric else "-" * w for c, w in zip(columns, widths, strict=True)]
    lines = [
        "| "
        + " | ".join(
            cell.rjust(w) if c.numeric else cell.ljust(w) for cell, c, w in zip(line, columns, widths, strict=True)
        )
        + " |"
        for line in [cells[0], rule, *cells[1:]]
    ]
    notes = [*_legend(table), *failure_lines(failures)]
    return "\n".join([*lines, *(["", *(f"{note.strip()}  " for note in notes)] if notes else [])]) + "\n"


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


def half_width(row: pd.Series) -> float:
    """Half the confidence interval of a difference, which lies evenly around it; NaN without one."""
    return float(row["high"] - row["low"]) / 2


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


_COMPARED = [
    "setup",
    "stage",
    "title",
    "n",
    "accuracy",
    "sd",
    "loss",
    "loss_sd",
    "difference",
    "difference_sd",
    "low",
    "high",
    "pairs",
    "p",
    "p_holm",
    "wilcoxon",
    "wilcoxon_holm",
    "reference",
    "note",
]


class _Column:
    """How one column is shown."""

    def __init__(self, header: str, cell: Callable[[Any], str], *, numeric: bool) -> None:
        self.header, self.cell, self.numeric = header, cell, numeric


def _shown(table: pd.DataFrame, *, setup: bool) -> list[_Column]:
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
    if setup and table["setup"].astype(bool).any():
        columns.insert(0, _Column("Setup", lambda r: str(r["setup"]), numeric=False))
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
    if tests := int(table["p"].notna().sum()):
        legend.append(f"p: paired t-test, two-sided, corrected for {tests} tests after Holm.")
    return [" ".join(legend)] if legend else []


def _starts_of_setups(table: pd.DataFrame) -> list[bool]:
    """Whether each row is the first of a named setup."""
    if "setup" not in table:
        return [False] * len(table)
    names = list(table["setup"])
    return [bool(name) and name != before for name, before in zip(names, [None, *names], strict=False)]


def _stage_order(runs: Iterable[Run]) -> dict[str, tuple[str, str]]:
    """Stage -> title and note, in the order of the longest table; stages it lacks come at the end."""
    tables = sorted((run.stages for run in runs), key=len, reverse=True)
    order: dict[str, tuple[str, str]] = {}
    for row in (row for table in tables for row in table):
        order.setdefault(row.stage, (row.title, row.note))
    return order


def _reference_row(run: Run, reference: str) -> Stage | None:
    """The row of ``run`` that is the reference: that stage, or what that strategy made of the clients."""
    made_by = str(run.config.get("strategy", ""))
    aggregated = run.stage("aggregated") if made_by in (reference, f"{reference}-retrain") else None
    return run.stage(reference) or aggregated


def _counterpart(run: Run, runs: Sequence[Run], reference: str) -> Stage | None:
    """The reference row for ``run``: its own, else that of the nearest run of its seed and problem."""
    if (own := _reference_row(run, reference)) is not None:
        return own
    asked = problem(run.config)
    same = [
        (other, row)
        for other in runs
        if (row := _reference_row(other, reference)) is not None and problem(other.config) == asked
    ]
    if not same:
        return None

    def nearness(pair: tuple[Run, Stage]) -> tuple[bool, int]:
        agreeing = sum(pair[0].config.get(key) == run.config.get(key) for key in METHOD_KEYS)
        return pair[0].config.get("strategy") == reference, agreeing

    return max(same, key=nearness)[1]


def _mean_sd(values: Sequence[float], mean: str, sd: str) -> dict[str, float]:
    x = np.asarray(values, dtype=float)
    return {
        mean: float(x.mean()) if len(x) else math.nan,
        sd: float(x.std(ddof=1)) if len(x) > 1 and np.isfinite(x).all() else math.nan,
    }


def _markdown(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
