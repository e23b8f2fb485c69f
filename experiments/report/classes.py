"""Pictures by class: who holds how much of which, what a network gets right of each, how sure it is of itself."""

import math

import numpy as np
import numpy.typing as npt
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure

from experiments.compare.stages import full_title, outcome
from experiments.records.runs import Run
from experiments.report.tables import percent
from experiments.report.theme import (
    GRID,
    INK,
    MARKS,
    MOST_SERIES,
    PAGE,
    SERIES,
    SHADE,
    SOFT,
    diagonal,
    figure,
    legend,
    mark,
    rows,
    styled,
)
from fedmerge.errors import RunDirectoryError

Matrix = npt.NDArray[np.float64]
_MOST_ROWS = 40
_YARDSTICKS = frozenset({"fedavg", "aggregated", "client-best-retrained", "ensemble", "public-only", "centralised"})


def known(run: Run) -> bool:
    """Whether ``run`` says what its networks make of each class."""
    return bool(run.per_class)


def networks(run: Run) -> dict[str, str]:
    """Stage -> whole title of the networks that pictures by class show: the outcome, and what it is held against."""
    end, titles = outcome(run), [stage.title for stage in run.stages]
    found = [] if end is None else [end.stage]
    found += [stage.stage for stage in run.stages if stage.stage in _YARDSTICKS and stage.stage not in found]
    whole = {stage.stage: full_title(titles, stage.title) for stage in run.stages}
    return {stage: whole[stage] for stage in found or whole}


def confusions(run: Run) -> dict[str, Matrix]:
    """Title of a network -> its confusion matrix: rows are true classes, columns predicted ones; the outcome first."""
    given = {of.stage: np.array(of.confusion, dtype=float) for of in run.per_class}
    return {title: given[stage] for stage, title in networks(run).items() if stage in given}


def recalls(confusion: Matrix) -> Matrix:
    """The share of each true class that is predicted right; NaN for a class without images."""
    counts = confusion.sum(axis=1)
    return np.asarray(np.divide(confusion.diagonal(), counts, out=np.full(len(counts), math.nan), where=counts > 0))


@styled
def accuracy_by_class(run: Run) -> Figure:
    """A row per class with a dot per network, in the order of the outcome's accuracy, the worst first.

    Raises:
        RunDirectoryError: the run does not say what its networks make of each class.
    """
    found = {title: recalls(matrix) for title, matrix in list(confusions(run).items())[:MOST_SERIES]}
    if not found:
        raise RunDirectoryError(f"{run.path} does not say what its networks make of each class")
    order = np.argsort(np.nan_to_num(next(iter(found.values())), nan=2.0), kind="stable")[:_MOST_ROWS]
    fig, ax = figure("Accuracy by class", 1.3 + 0.27 * len(order) + 0.2 * math.ceil(len(found) / 2))
    for k, (title, accuracy) in enumerate(found.items()):
        for y, c in enumerate(order):
            dot = ax.plot(100 * accuracy[c], y, MARKS[k], color=SERIES[k], alpha=0.9)
            mark(*dot, tip=f"{title}, class {run.classes[c]}: {percent(accuracy[c])} %", series=title)
    values = np.array([accuracy[order] for accuracy in found.values()])
    for y, of_class in enumerate(values.T):
        ax.plot([100 * np.nanmin(of_class), 100 * np.nanmax(of_class)], [y, y], color=GRID, linewidth=2.5, zorder=0)
    rows(ax, [run.classes[c] for c in order])
    cut = len(run.classes) - len(order)
    ax.set_xlabel(
        f"accuracy on the test split, %{f'; the worst {len(order)} of {len(run.classes)} classes' if cut else ''}"
    )
    ax.set_xlim(right=101)
    legend(fig, [ax.plot([], [], MARKS[k], color=SERIES[k], label=t)[0] for k, t in enumerate(found)], columns=2)
    return fig


@styled
def reliability(run: Run) -> Figure:
    """Share of right predictions over their confidence, a line per network; a mark's size says how many images.

    Raises:
        RunDirectoryError: the run does not say how sure its networks are.
    """
    if not run.calibration:
        raise RunDirectoryError(f"{run.path} does not say how sure its networks are")
    given, titles = {of.stage: of for of in run.calibration}, networks(run)
    shown = [given[stage] for stage in titles if stage in given][:MOST_SERIES]
    fig, ax = figure("How sure, and how often right", 4.4 + 0.2 * len(shown))
    diagonal(ax)
    for k, measured in enumerate(shown):
        bins = [b for b in measured.bins if b.examples]
        title = f"{titles[measured.stage]}: ECE {100 * measured.ece:.2f} points"
        line = ax.plot([100 * b.confidence for b in bins], [100 * b.accuracy for b in bins], color=SERIES[k],
                       linewidth=1.4)  # fmt: skip
        mark(*line, tip=title, series=title)
        most = max((b.examples for b in bins), default=1)
        for b in bins:
            dot = ax.plot(100 * b.confidence, 100 * b.accuracy, MARKS[k], color=SERIES[k],
                          markersize=3 + 6 * math.sqrt(b.examples / most))  # fmt: skip
            tip = f"{title}; {b.examples:,} images at {100 * b.confidence:.1f} %: {100 * b.accuracy:.1f} % right"
            mark(*dot, tip=tip, series=title)
        ax.plot([], [], color=SERIES[k], marker=MARKS[k], linewidth=1.4, label=title)
    legend(fig, columns=1)
    return fig


@styled
def label_distribution(run: Run) -> Figure:
    """Who holds how many images of which class: a row per holder, shaded by the class's share of that row.

    Raises:
        RunDirectoryError: the run has not said who holds what.
    """
    if not run.labels:
        raise RunDirectoryError(f"{run.path} does not say who holds which labels")
    holders, counts = list(run.labels), np.array(list(run.labels.values()))
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    rows, classes = counts.shape
    written = classes <= 12 and rows <= 30
    fig, ax = figure("Who holds which labels", 1.2 + (0.3 * rows if rows <= 40 else 6.0))
    # More or less of one colour, in shapes and not in an image: so a page can exchange it.
    ramp = ListedColormap([to_rgba(SHADE, level) for level in np.linspace(0, 1, 41)])
    top = max(float(share.max()), min(1.0, 3 / classes))  # equal shares stay pale
    image = ax.pcolormesh(range(classes), range(rows), share, cmap=ramp, vmin=0, vmax=top, linewidth=0)
    ax.invert_yaxis()
    if written:
        for (i, j), count in np.ndenumerate(counts):
            colour = SOFT if not count else INK if share[i, j] < 0.55 * top else PAGE
            ax.text(j, i, f"{count:,}" if count else "·", ha="center", va="center", size=8.5, color=colour)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    names = run.classes if classes <= 12 else [str(c) for c in range(classes)]
    longest = max(map(len, names))
    step = max(1, math.ceil(classes / 20))
    ax.set_xticks(range(0, classes, step), names[::step], rotation=30 if longest > 5 and step == 1 else 0,
                  ha="right" if longest > 5 and step == 1 else "center")  # fmt: skip
    step = max(1, math.ceil(rows / 40))
    totals = counts.sum(axis=1)
    ax.set_yticks(range(0, rows, step), [f"{holders[i]}  ({totals[i]:,})" for i in range(0, rows, step)])
    ax.set_xlabel("class" if written else "class (its number)")
    bar = fig.colorbar(image, ax=ax, fraction=0.03, pad=0.02, format=lambda v, _: f"{100 * v:.0f} %")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5)
    bar.set_label("share of the holder's images", size=9)
    return fig
