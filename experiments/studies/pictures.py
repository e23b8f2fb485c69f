"""Lines of a study: panels beside each other, a line a name, mean and deviation over seeds."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.report.theme import MARKS, SERIES, legend, styled


@styled
def lines(
    panels: Mapping[str, pd.DataFrame], *, x: str, y: str, by: str, label: tuple[str, str], marks: bool = True,
    columns: int = 3, shared: bool = True,
) -> Figure:  # fmt: skip
    """A panel a table: ``y`` over ``x``, a line for each value of ``by``, with a band of one deviation over seeds.

    Args:
        panels: Title -> rows.
        x: A column of numbers.
        y: The column that is averaged.
        by: The column that names the lines; the same name has the same colour in all panels.
        label: Of both axes.
        marks: Whether points have marks.
        columns: Panels in a row.
        shared: Whether panels of a row have one scale.
    """
    names: Sequence[str] = list(dict.fromkeys(name for rows in panels.values() for name in rows[by]))
    wide = min(columns, len(panels))
    deep = -(-len(panels) // wide)
    beside = min(2, wide)  # names in a row of the legend: one panel is too narrow for two
    fig = Figure(figsize=(1.2 + 3.1 * wide, 2.7 * deep + 0.4 + 0.24 * -(-len(names) // beside)), layout="constrained")
    axes = fig.subplots(deep, wide, sharey="row" if shared else False, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    handles = {}
    for ax, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        for i, name in enumerate(names):
            found = rows[rows[by] == name].groupby(x)[y].agg(["mean", "std"])
            if found.empty:
                continue
            colour, style = SERIES[i % len(SERIES)], "-" if i < len(SERIES) else "--"
            handles[name] = ax.plot(
                found.index, found["mean"], style, color=colour, label=name, marker=MARKS[i % len(MARKS)] * marks,
                markersize=4, linewidth=1.5,
            )[0]  # fmt: skip
            sd = found["std"].fillna(0)
            ax.fill_between(found.index, found["mean"] - sd, found["mean"] + sd, color=colour, alpha=0.12, linewidth=0)
        ax.set(title=title, xlabel=label[0])
        if rows[x].dtype.kind == "i":
            ax.set_xticks(sorted(rows[x].unique()))
    for ax in axes[:, 0]:
        ax.set_ylabel(label[1])
    legend(fig, list(handles.values()), columns=beside)
    return fig
