"""What all pictures share: two themes, the style, figures of one width, and bytes that depend on data alone.

Every picture exists for light and for dark paper (:data:`LIGHT`, :data:`DARK`). Colours follow Okabe and Ito
("Color Universal Design", 2008), which all common forms of colour vision tell apart; position, marks or line
styles say the same once more. Object-oriented matplotlib on Agg: no global figure.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 150
WIDTH = 6.6


@dataclass(frozen=True)
class Theme:
    """Colours of the paper, of text, of what is secondary, of rules, of series, and from few to many."""

    page: str
    ink: str
    soft: str
    grid: str
    series: tuple[str, ...]
    ramp: tuple[str, ...]


LIGHT = Theme(
    page="#ffffff",
    ink="#1b1f24",
    soft="#5b636e",
    grid="#e3e6ea",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#757d88"),
    ramp=("#f4f8fb", "#9ecae9", "#2a7ab9", "#083d77"),
)
DARK = Theme(
    page="#161a1f",
    ink="#e8eaed",
    soft="#a2abb6",
    grid="#2d343c",
    series=("#56b4e9", "#f08a3c", "#2fc79a", "#e39cc5", "#f0e442", "#8a9bff", "#929ba6"),
    ramp=("#1c2229", "#1f4e7a", "#3d94d1", "#c5e6fb"),
)

MARKS = "osD^vPX"
MOST_SERIES = 7
P = ParamSpec("P")


@contextmanager
def _style(theme: Theme = LIGHT) -> Iterator[None]:
    """Matplotlib's own defaults, whatever the user's ``matplotlibrc`` says, in the colours of ``theme``."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.size": 10,
                "figure.facecolor": theme.page,
                "axes.facecolor": theme.page,
                "axes.edgecolor": theme.soft,
                "axes.labelcolor": theme.soft,
                "axes.titlecolor": theme.ink,
                "axes.titlelocation": "left",
                "axes.titlesize": 10.5,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.linewidth": 0.8,
                "axes.grid": True,
                "grid.color": theme.grid,
                "grid.linewidth": 0.8,
                "text.color": theme.ink,
                "xtick.color": theme.soft,
                "ytick.color": theme.soft,
                "xtick.labelcolor": theme.ink,
                "ytick.labelcolor": theme.ink,
                "legend.frameon": False,
                "legend.handlelength": 1.6,
                "legend.borderaxespad": 0.2,
                "lines.linewidth": 2.0,
                "lines.markersize": 5.5,
            }
        )
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run ``draw`` in the style of its keyword argument ``theme``."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        theme = kwargs.get("theme", LIGHT)
        assert isinstance(theme, Theme)
        with _style(theme):
            return draw(*args, **kwargs)

    return styled


def png(figure: Figure) -> bytes:
    """``figure`` as PNG without date or version, so that equal data gives equal bytes."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def figures(title: str, height: float, *, rows: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure of the common width, ``height`` inches high, and its axes, one below the other over a common x."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(fig)
    fig.suptitle(title, x=0.008, ha="left", size=12.5, weight="bold")
    return fig, fig.subplots(rows, 1, sharex=True, squeeze=False)[:, 0].tolist()


def figure(title: str, height: float) -> tuple[Figure, Axes]:
    """A figure of the common width, ``height`` inches high, and its one pair of axes."""
    fig, (ax,) = figures(title, height, rows=1)
    return fig, ax


def legend(fig: Figure, handles: Sequence[Artist] | None = None, *, columns: int) -> None:
    """A legend under the axes, of ``handles`` or of everything that has a label."""
    fig.legend(
        handles=fig.axes[0].get_legend_handles_labels()[0] if handles is None else handles,
        loc="outside lower left",
        ncols=columns,
        fontsize=9.5,
        labelspacing=0.35,
        columnspacing=1.6,
    )
