"""What an audit found, as a page shows it: a table by the best attack on each network, and the ROC."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from experiments.records.audits import AttackRow, Audit, best, read_audit
from experiments.report.illustrations import Illustration, illustrated
from experiments.report.sortable import listed
from experiments.report.tables import percent
from experiments.report.theme import (
    INK,
    MARKS,
    MOST_SERIES,
    SERIES,
    SOFT,
    figure,
    legend,
    logarithmic,
    mark,
    png,
    styled,
)
from server import RunDirectory

COLUMNS = ("Network", "Attack", "Accuracy %", "AUC", "Found at 1 %", "Found at 0.1 %", "Members", "Others")
CAPTION = (
    "Can a member be told from an image of its class that the network never saw? By the best of the attacks on each, "
    "with 95 % intervals; found: members, in %, at that rate of false alarms. *: too few non-members to measure that "
    "rate."
)


@dataclass(frozen=True)
class Leak:
    """The section of a page: its answer, its table, whose a member was, whose risk rises, and the pictures."""

    sentence: str
    rows: Sequence[Sequence[str]]
    sources: Sequence[Sequence[str]]
    risks: Sequence[Sequence[str]]
    pictures: Sequence[Illustration]
    columns: Sequence[str] = COLUMNS
    caption: str = CAPTION


def leak(path: Path, runs: Sequence[str]) -> Leak | None:
    """The section of the audit in ``path``, whose pictures are drawn to ``plots/``; None where there was none.

    It says which of ``runs``, those of the page, it is not about.
    """
    found = read_audit(path)
    if found is None:
        return None
    pictures = []
    for called, title, draw, caption in PICTURES:
        drawn = draw(found)
        RunDirectory(path).write_bytes(f"plots/{called}.png", png(drawn))
        pictures.append(illustrated(drawn, title, caption, name=called))
    sources = [
        (name(row.setup, row.view), percent(row.value), interval(row.low, row.high), percent(row.chance), f"{row.of:,}")
        for row in found.sources
    ]
    risks = [
        (
            name(row.setup, row.title), f"{row.after:.2f}", f"{row.before:.2f}", percent(row.rises),
            interval(row.rises_low, row.rises_high), percent(row.surely_rises), percent(row.surely_falls),
            f"{row.of:,}",
        )
        for row in found.risks
    ]  # fmt: skip
    others = [run for run in runs if run not in found.runs]
    sentence = found.sentence + (f" Not attacked, so it says nothing of them: {listed(others)}." if others else "")
    return Leak(sentence, list(map(cells, leaders(found))), sources, risks, pictures)


def leaders(found: Audit) -> list[AttackRow]:
    """The best attack on each network, in the order of the stages."""
    stages = dict.fromkeys((row.setup, row.stage) for row in found.rows)
    return [best(found.rows, setup, stage) for setup, stage in stages]


def table(found: Audit) -> Table:
    """The same for the terminal, without accuracies and counts."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=CAPTION, caption_justify="left", caption_style="dim")
    narrow = [COLUMNS.index(column) for column in ("Network", "Attack", "AUC", "Found at 1 %", "Found at 0.1 %")]
    for i in narrow:
        shown.add_column(COLUMNS[i], justify="left" if i < 2 else "right", no_wrap=i > 0)
    for row in leaders(found):
        shown.add_row(*(escape(cells(row)[i]) for i in narrow))
    return shown


def name(setup: str, title: str) -> str:
    """What a row is called among those of other setups."""
    return f"{setup}: {title}" if setup else title


def cells(row: AttackRow) -> tuple[str, ...]:
    """A row of the table, by :data:`COLUMNS`."""
    rates = (
        (row.tpr_1, row.tpr_1_low, row.tpr_1_high, row.enough_1),
        (row.tpr_01, row.tpr_01_low, row.tpr_01_high, row.enough_01),
    )
    return (
        name(row.setup, row.title), row.attack, percent(row.accuracy),
        f"{row.auc:.3f} ({row.auc_low:.3f}–{row.auc_high:.3f})",
        *(f"{100 * value:.1f} ({interval(low, high)}){'' if enough else '*'}" for value, low, high, enough in rates),
        f"{row.members:,}", f"{row.outsiders:,}",
    )  # fmt: skip


def interval(low: float, high: float) -> str:
    """The ends of an interval of a share, in %."""
    return f"{100 * low:.1f}–{100 * high:.1f}"


@styled
def roc(found: Audit) -> Figure:
    """Members found against false alarms, on logarithmic axes, a line a network by the best attack on it."""
    fig, ax = figure("What the networks leak", 4.6)
    shown = leaders(found)
    lowest = min(min(curve.false) for curve in found.curves)
    for k, row in enumerate(shown):
        curve = next(c for c in found.curves if (c.setup, c.stage, c.attack) == (row.setup, row.stage, row.attack))
        points = [(x, y) for x, y in zip(curve.false, curve.true, strict=True) if y > 0]
        called = name(row.setup, row.title)
        style = ("-", "--", ":")[k // MOST_SERIES % 3]
        drawn = ax.plot(
            [x for x, _ in points], [y for _, y in points], style, color=SERIES[k % MOST_SERIES], linewidth=1.6,
            marker=MARKS[k % len(MARKS)], markevery=12, markersize=4, label=f"{called} ({row.attack})",
        )  # fmt: skip
        mark(*drawn, tip=f"{called}, {row.attack}: area {row.auc:.3f}", series=f"{called} ({row.attack})")
    ax.plot([lowest, 1], [lowest, 1], color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), label="guessing")
    ax.axvline(0.01, color=INK, linewidth=0.6)
    ax.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.1))
    ax.set(xlabel="false alarms, share of the non-members", ylabel="found, share of the members")
    logarithmic(ax.xaxis, lowest, 1)
    logarithmic(ax.yaxis, lowest, 1)
    legend(fig, columns=1 if len(shown) < 5 else 2)
    return fig


@styled
def traded(found: Audit) -> Figure:
    """What each network can do against what it tells, by the best attack on it."""
    fig, ax = figure("Accuracy against leakage", 4.6)
    shown = leaders(found)
    for k, row in enumerate(shown):
        called, accuracy = name(row.setup, row.title), 100 * row.accuracy
        drawn = ax.errorbar(
            row.auc, accuracy, xerr=[[row.auc - row.auc_low], [row.auc_high - row.auc]], fmt=MARKS[k % len(MARKS)],
            color=SERIES[k % MOST_SERIES], capsize=2.5, markersize=7, label=called,
        )  # fmt: skip
        tip = f"{called}: {accuracy:.2f} % accuracy, area {row.auc:.3f} ({row.attack})"
        mark(*drawn.get_children(), tip=tip, series=called)
    ax.axvline(0.5, color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)))
    ax.set(xlabel="area under the ROC of the best attack, 95 %; dashed: guessing", ylabel="test accuracy, %")
    legend(fig, columns=1 if len(shown) < 5 else 2)
    return fig


PICTURES = (
    ("audit-roc", "What the networks leak", roc,
     "Members found against false alarms, on logarithmic axes, by the best attack on each network."),
    ("audit-accuracy", "Accuracy against leakage", traded,
     "Left and high is what one wants: accurate, and members are told from others by chance only."),
)  # fmt: skip
"""File, title, how it is drawn, caption."""
