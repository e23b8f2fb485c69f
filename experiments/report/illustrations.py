"""Pictures as a page holds them: SVG in the page's own colours, with the numbers behind them as a table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.records.runs import Run
from experiments.report import classes, overviews, plots
from experiments.report.many import Many
from experiments.report.tables import number, percent, points
from experiments.report.theme import png, svg
from fedmerge.progress import steps
from server import RunDirectory


@dataclass(frozen=True)
class Illustration:
    """An ``<svg>`` element with its numbers as a table."""

    title: str
    caption: str
    svg: Markup
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    name: str = ""


def of_many(path: Path, many: Many) -> Iterator[Illustration]:
    """The pictures that these runs have something for, with their tables; as PNG they are written to ``plots/``."""
    for overview in steps("drawing pictures", overviews.OVERVIEWS):
        found = overview.data(many)
        if found.empty:
            continue
        figure = overview.draw(many, found)
        RunDirectory(path).write_bytes(f"plots/{overview.name}.png", png(figure))
        data = found.means.loc[:, found.means.notna().any() & ~((found.means == "").all())]
        rows = [[_shown(column, row[column], many) for column in data.columns] for _, row in data.iterrows()]
        element = _element(figure, overview.title, overview.name)
        yield Illustration(
            overview.title, overview.caption, element, [str(c) for c in data.columns], rows, name=overview.name
        )


def _shown(column: str, value: Any, many: Many) -> str:
    """A value of the table behind a picture."""
    if column in ("accuracy", "sd", "gain", "confidence", "ece"):
        return points(value) if column == "gain" else percent(value)
    if column in ("setup", "method"):
        return many.name(value)
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def of_one(run: Run, path: Path | None = None) -> Iterator[Illustration]:
    """The pictures that ``run`` has something for; with ``path``, all as PNG too, in its folder ``plots/``.

    Who holds which labels is a table in the page and so only drawn as a file.
    """
    for picture in steps("drawing pictures", plots.PICTURES):
        shown = picture.name in _NUMBERS
        if not picture.there(run) or (path is None and not shown):
            continue
        figure = picture.draw(run)
        if path is not None:
            RunDirectory(path).write_bytes(f"plots/{picture.name}.png", png(figure))
        if shown:
            title, name = picture.name.replace("-", " ").capitalize(), f"{run.name}-{picture.name}"
            element = _element(figure, title, name)
            yield Illustration(title, picture.caption, element, *_NUMBERS[picture.name](run), name=name)


def illustrated(figure: Figure, title: str, caption: str, *, name: str) -> Illustration:
    """A picture whose numbers stand beside it."""
    return Illustration(title, caption, _element(figure, title, name), name=name)


def _element(figure: Figure, title: str, name: str) -> Markup:
    return Markup(svg(figure, f"{title}; the numbers follow as a table.", name=name))


_Numbers = tuple[list[str], list[list[str]]]


def _no_numbers(run: Run) -> _Numbers:
    """The stage table above the picture already has them."""
    return [], []


def _class_numbers(run: Run) -> _Numbers:
    found = {title: classes.recalls(matrix) for title, matrix in classes.confusions(run).items()}
    shares = zip(run.classes, *found.values(), strict=True)
    return ["Class", *found], [[name, *map(percent, of_class)] for name, *of_class in shares]


def _sure_numbers(run: Run) -> _Numbers:
    titles = classes.networks(run)
    rows = [
        [titles[of.stage], percent(b.confidence), percent(b.accuracy), f"{b.examples:,}"]
        for of in run.calibration
        if of.stage in titles
        for b in of.bins
    ]
    return ["Network", "Confidence %", "Right %", "Images"], rows


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
    "accuracy-by-class": _class_numbers,
    "reliability": _sure_numbers,
    "interpolation": _line_numbers,
    "merge-objective": _climb_numbers,
}
