"""Pictures as a page holds them: PNG in base64, light and dark, with the numbers behind them as a table."""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.records.runs import Run
from experiments.report import overviews, plots
from experiments.report.overviews import short
from experiments.report.sortable import as_csv, encoded
from experiments.report.tables import number, percent, points
from experiments.report.theme import DARK, LIGHT, png
from server import RunDirectory


@dataclass(frozen=True)
class Illustration:
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


def of_many(path: Path, runs: Sequence[Run]) -> Iterator[Illustration]:
    """The pictures that these runs have something for, drawn into ``plots/`` and embedded with their tables."""
    for overview in overviews.OVERVIEWS:
        data = overview.data(runs)
        if data.empty:
            continue
        light = png(overview.draw(runs, LIGHT))
        RunDirectory(path).write_bytes(f"plots/{overview.name}.png", light)
        data = data.loc[:, data.notna().any() & ~((data == "").all())]
        rows = [[_shown(column, row[column]) for column in data.columns] for _, row in data.iterrows()]
        dark = png(overview.draw(runs, DARK))
        yield replace(
            _embedded(overview.title, overview.caption, light, dark, [str(c) for c in data.columns], rows),
            name=overview.name,
            csv=as_csv(data),
        )


def _shown(column: str, value: Any) -> str:
    """A value of the table behind a picture."""
    if column in ("accuracy", "sd", "gain"):
        return points(value) if column == "gain" else percent(value)
    if column in ("setup", "method"):
        return short(value)
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def of_one(run: Run, files: Sequence[Path]) -> Iterator[Illustration]:
    """The pictures in ``files``, and the same for dark paper."""
    light = {file.stem: file.read_bytes() for file in files}
    for picture in plots.PICTURES:
        if picture.name in light:
            dark = png(picture.draw(run, DARK))
            yield _with_numbers(run, picture, light[picture.name], dark)


def light_only(run: Run) -> Iterator[Illustration]:
    """The pictures of ``run`` for light paper, drawn now."""
    for picture in plots.PICTURES:
        if picture.there(run):
            yield _with_numbers(run, picture, png(picture.draw(run, LIGHT)), None)


def _with_numbers(run: Run, picture: plots.Picture, light: bytes, dark: bytes | None) -> Illustration:
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
) -> Illustration:
    width, height = struct.unpack(">II", light[16:24])  # the IHDR chunk comes first in every PNG
    return Illustration(
        title, caption, encoded(light), "" if dark is None else encoded(dark), width, height, columns, rows
    )


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
