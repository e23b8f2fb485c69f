"""Tables whose cells are shaded by their size: clients by class, confusion matrices, setups by class."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.compare.stages import outcome
from experiments.records.runs import Run
from experiments.report.classes import Matrix, confusions, recalls
from experiments.report.many import Many
from experiments.report.tables import percent

MOST_CLASSES = 25
"""Of more classes the confusion matrix is a list of what is confused most often."""


@dataclass(frozen=True)
class Cell:
    """A number, the darkness of its paper in percent, and what stands small under it."""

    text: str
    share: str = "0"
    small: str = ""

    @property
    def strong(self) -> bool:
        """Whether its paper is so dark that its text must be light."""
        return float(self.share) > 55


@dataclass(frozen=True)
class Line:
    """A row, and the setup that it shows, where it is one's."""

    title: str
    cells: Sequence[Cell]
    setups: Sequence[int] = ()


@dataclass(frozen=True)
class Heat:
    """A table of shaded cells; ``columns`` names the first column too."""

    name: str
    title: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Line]


def clients_by_class(run: Run) -> Heat | None:
    """Images of each class that each holder has and, under them, how much of that class the client's network knows."""
    if not run.labels:
        return None
    known = {f"client {row.client}": row.accuracy for row in run.client_classes}
    rows = []
    for holder, counts in run.labels.items():
        total, accuracy = sum(counts), known.get(holder, (None,) * len(counts))
        cells = [
            _counted(n, total, "" if a is None else f"{100 * a:.0f} %") for n, a in zip(counts, accuracy, strict=True)
        ]
        rows.append(Line(holder, [*cells, Cell(f"{total:,}")]))
    under = " Under it: how much of the class's test images the client's own network gets right." if known else ""
    return Heat(
        f"{run.name}-clients",
        "Clients by class",
        f"Images of each class, shaded by the class's share of the holder's images.{under}",
        ["Holder", *run.classes, "All"],
        rows,
    )


def confusion_tables(run: Run) -> Iterator[Heat]:
    """A table per network, the outcome's first: rows are true classes, columns what they are taken for."""
    found = confusions(run)
    for k, title in enumerate(found):
        name = f"{run.name}-confusion-{k}"
        if len(run.classes) > MOST_CLASSES:
            yield _most_confused(name, title, found[title], run.classes)
            continue
        totals = found[title].sum(axis=1)
        yield Heat(
            name,
            f"Confusion: {title}",
            "Test images of each class (rows) by what they are taken for (columns), shaded by the share of the row.",
            ["True class", *run.classes, "Right %"],
            [
                Line(of, [*(_counted(int(n), total) for n in row), Cell(percent(right))])
                for of, row, total, right in zip(run.classes, found[title], totals, recalls(found[title]), strict=True)
            ],
        )


def _most_confused(name: str, title: str, matrix: Matrix, classes: Sequence[str]) -> Heat:
    """The pairs of classes that are confused most often."""
    totals, wrong = matrix.sum(axis=1), matrix * (1 - np.eye(len(matrix)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_CLASSES]
    pairs = [divmod(int(at), len(matrix)) for at in order if wrong.flat[at]]
    return Heat(
        name,
        f"Most confused: {title}",
        "The classes that are most often taken for another, in test images.",
        ["True class", "taken for", "Images", "of its images %"],
        [
            Line(
                classes[i],
                [Cell(classes[j]), _counted(int(wrong[i, j]), totals[i]), Cell(percent(wrong[i, j] / totals[i]))],
            )
            for i, j in pairs
        ],
    )


def setups_by_class(many: Many) -> Heat | None:
    """Of each setup what its outcome gets right of each class, mean over seeds."""
    rows = []
    names: tuple[str, ...] = ()
    for setup, runs in many.groups.items():
        found = [recalls(matrix) for run in runs if (matrix := _of_outcome(run)) is not None]
        if found and len({len(accuracy) for accuracy in found}) == 1:
            names = names or runs[0].classes
            accuracy = np.mean(found, axis=0)
            worst = Cell(percent(float(np.nanmin(accuracy))))
            cells = [Cell(f"{100 * a:.1f}" if math.isfinite(a) else "–", _shade(a)) for a in accuracy]
            if len(cells) == len(names):
                rows.append(Line(many.name(setup), [worst, *cells], many.of_names([setup])))
    if not rows:
        return None
    return Heat(
        "classes",
        "Accuracy by class",
        "Share of each class's test images that each setup's outcome gets right, in percent, mean over seeds; shaded "
        "the more it misses.",
        ["Setup", "Worst class", *names],
        rows,
    )


def _of_outcome(run: Run) -> Matrix | None:
    end = outcome(run)
    return next((np.array(of.confusion, dtype=float) for of in run.per_class if end and of.stage == end.stage), None)


def _counted(count: int, total: float, small: str = "") -> Cell:
    return Cell(f"{count:,}" if count else "·", f"{100 * count / total:.0f}" if count and total else "0", small)


def _shade(accuracy: float) -> str:
    return f"{100 * (1 - accuracy):.0f}" if math.isfinite(accuracy) else "0"
