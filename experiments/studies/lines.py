"""Barriers of lines that were written as rows, and how both are drawn."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from experiments.report.theme import INK

MEASURES = ("train_loss", "train_error", "test_loss", "test_error")


def barriers(rows: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """A row a line: of each of :data:`MEASURES` the largest height over the chord between the ends of the line.

    Of a line that is below its chord wherever it was sampled between the ends, it is the largest depth, as a negative
    number. Other columns are those of its first point.
    """
    found = []
    for key, line in rows.groupby(list(by), sort=False):
        first = line.drop(columns=["alpha", *MEASURES]).iloc[0].to_dict()
        found.append(
            {
                **first,
                **dict(zip(by, key, strict=True)),
                **{measure: _barrier(gap(line, measure)[1:-1]) for measure in MEASURES},
                **{
                    f"{measure}_ends": float((line[measure].iloc[0] + line[measure].iloc[-1]) / 2)
                    for measure in MEASURES
                },
            }
        )
    return pd.DataFrame(found)


def _barrier(heights: np.ndarray) -> float:
    return float(heights.max() if heights.max() >= 0 else heights.min())


def gap(line: pd.DataFrame, measure: str) -> np.ndarray:
    """The height of a line over its chord at each of its points."""
    values, alphas = line[measure].to_numpy(float), line["alpha"].to_numpy(float)
    return np.asarray(values - (1 - alphas) * values[0] - alphas * values[-1])


def heat(ax: Axes, table: pd.DataFrame, title: str, largest: float, shown: str = "{:.2f}") -> None:
    """A table as shades, red above 0 and blue below, with its numbers; what is NaN stays empty."""
    values = table.to_numpy(float)
    ax.imshow(values, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            dark = abs(value) > 0.6 * largest
            ax.text(j, i, shown.format(value), ha="center", va="center", size=8, color="#ffffff" if dark else INK)
    ax.set_title(title, size=9.5)
    ax.set_xticks(range(table.shape[1]), [str(c) for c in table.columns])
    ax.set_yticks(range(table.shape[0]), [str(r) for r in table.index])
    ax.set(xlabel=str(table.columns.name), ylabel=str(table.index.name))
    ax.grid(visible=False)
