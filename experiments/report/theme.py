"""What all pictures share: colours, the style, figures of one width, and bytes that depend on data alone.

A picture is drawn once. As PNG it is for light paper; in a page it is SVG whose colours are CSS variables, so that
the page gives it those of its own paper. Colours follow Okabe and Ito ("Color Universal Design", 2008), which all
common forms of colour vision tell apart; position, marks or line styles say the same once more. Object-oriented
matplotlib: no global figure.

What a reader may ask of a part of a picture travels with it: :func:`mark` says what it is, and in the page that
becomes its tooltip and what filters and the legend go by.
"""

import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from html import escape
from typing import Any, ParamSpec
from urllib.parse import quote, unquote

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

DPI = 150
WIDTH = 6.0

PAGE, INK, SOFT, GRID = "#ffffff", "#1b1f24", "#5b636e", "#e3e6ea"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#757d88")
SHADE = "#083d77"
"""Of the paper, of text, of what is secondary, of rules; of series; and what is more or less dense."""

_SERIES_ON_DARK = ("#56b4e9", "#f08a3c", "#2fc79a", "#e39cc5", "#f0e442", "#8a9bff", "#929ba6")
VARIABLES = {
    "page": (PAGE, "#161a1f"),
    "ink": (INK, "#e8eaed"),
    "soft": (SOFT, "#a2abb6"),
    "rule": (GRID, "#2d343c"),
    "shade": (SHADE, "#c5e6fb"),
    **{f"series-{k}": pair for k, pair in enumerate(zip(SERIES, _SERIES_ON_DARK, strict=True), 1)},
}
"""CSS variable -> its colour on light and on dark paper. A picture names the light one, :func:`svg` the variable."""

MARKS = "osD^vPX"
MOST_SERIES = 7
P = ParamSpec("P")


@contextmanager
def _style() -> Iterator[None]:
    """Matplotlib's own defaults, whatever the user's ``matplotlibrc`` says, in our colours."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(
            {
                "font.size": 10.5,
                "font.sans-serif": ["DejaVu Sans"],
                "figure.facecolor": PAGE,
                "axes.facecolor": PAGE,
                "axes.edgecolor": SOFT,
                "axes.labelcolor": SOFT,
                "axes.titlecolor": INK,
                "axes.titlelocation": "left",
                "axes.titlesize": 10,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.axisbelow": True,
                "axes.linewidth": 0.8,
                "axes.grid": True,
                "grid.color": GRID,
                "grid.linewidth": 0.8,
                "text.color": INK,
                "xtick.color": SOFT,
                "ytick.color": SOFT,
                "xtick.labelcolor": INK,
                "ytick.labelcolor": INK,
                "legend.frameon": False,
                "legend.handlelength": 1.6,
                "legend.borderaxespad": 0.2,
                "lines.linewidth": 2.0,
                "lines.markersize": 5.5,
                "svg.fonttype": "none",
            }
        )
        yield


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Run ``draw`` in the common style."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with _style():
            return draw(*args, **kwargs)

    return styled


def png(figure: Figure) -> bytes:
    """``figure`` as PNG without date or version, so that equal data gives equal bytes."""
    buffer = io.BytesIO()
    with _style():
        figure.savefig(buffer, format="png", dpi=DPI, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()


def mark(
    *artists: Artist, tip: str = "", series: str = "", setups: Iterable[int] = (), seed: int | None = None
) -> None:
    """Say what ``artists`` are, for the page that shows them.

    Args:
        artists: Parts of one thing.
        tip: Read out and shown over them.
        series: The label of their legend, by which they are switched off together.
        setups: Numbers of the setups that they show; a filter that leaves none of them hides the artists.
        seed: The one seed that they show, where they are no mean.
    """
    said = {"series": series, "setups": " ".join(map(str, setups)), "seed": "" if seed is None else str(seed)}
    for artist in artists:
        artist.set_gid(_MARK + quote(json.dumps({key: value for key, value in said.items() if value} | {"tip": tip})))


_MARK = "mark:"


def _marked(match: re.Match[str]) -> str:
    """What :func:`mark` said, as attributes and a title of its SVG group."""
    said: dict[str, Any] = json.loads(unquote(match[1]))
    tip = said.pop("tip")
    attributes = "".join(f' data-{key}="{escape(value, quote=True)}"' for key, value in said.items())
    return f"<g{attributes}>" + (f"<title>{escape(tip)}</title>" if tip else "")


def svg(figure: Figure, label: str, *, name: str) -> str:
    """``figure`` as an ``<svg>`` element for a page that gives :data:`VARIABLES` their values.

    Text stays text. Equal data gives equal bytes.

    Args:
        figure: The picture.
        label: What is read out in its place.
        name: Tells its internal references from those of other pictures on the page.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with _style():
        mpl.rcParams["svg.hashsalt"] = name
        figure.savefig(buffer, format="svg", facecolor="none", metadata=nothing)
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    inside = text[text.index("<defs>") :]
    inside = re.sub(rf'<g id="{_MARK}([^"]*)">', _marked, inside)
    inside = re.sub(r"<style.*?</style>|<!--.*?-->\s*|(?<=<g) id=\"[^\"]*\"", "", inside, flags=re.DOTALL)
    for variable, (colour, _) in VARIABLES.items():
        inside = inside.replace(colour, f"var(--{variable})")
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    said = f'role="img" aria-label="{escape(label, quote=True)}" data-name="{escape(name, quote=True)}"'
    return f"<svg {box[0]} {spaces} {said}>{inside}"


def figures(title: str, height: float, *, rows: int) -> tuple[Figure, Sequence[Axes]]:
    """A figure of the common width, ``height`` inches high, and its axes, one below the other over a common x."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    fig.suptitle(title, x=0.008, ha="left", size=13, weight="bold")
    return fig, fig.subplots(rows, 1, sharex=True, squeeze=False)[:, 0].tolist()


def figure(title: str, height: float) -> tuple[Figure, Axes]:
    """A figure of the common width, ``height`` inches high, and its one pair of axes."""
    fig, (ax,) = figures(title, height, rows=1)
    return fig, ax


def wrapped(name: str, width: int = 30) -> str:
    """A name over as many lines as it needs."""
    return "\n".join(textwrap.wrap(name, width, break_on_hyphens=False))


def height_of(titles: Sequence[str], *, row: float) -> float:
    """Inches that rows with these titles need, each as high as ``row`` and its further lines."""
    return sum(row + 0.16 * wrapped(title).count("\n") for title in titles)


def rows(ax: Axes, titles: Sequence[str], setups: Sequence[Iterable[int]] = ()) -> None:
    """Name the rows of a picture, from its top; ``setups``: those that each row shows."""
    ax.set_yticks(range(len(titles)), [wrapped(title) for title in titles], size=9.5)
    ax.set_ylim(len(titles) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(visible=False, axis="y")
    for label, numbers in zip(ax.get_yticklabels(), setups, strict=False):
        mark(label, setups=numbers)


def diagonal(ax: Axes) -> list[Artist]:
    """Axes from 0 to 100 %, confidence to the right and what is right upwards, and where both agree; for the legend."""
    line = ax.plot(
        [0, 100], [0, 100], color=SOFT, linewidth=1.0, linestyle=(0, (4, 3)), label="as often right as it says"
    )
    ax.set(xlim=(0, 102), ylim=(0, 102), xlabel="confidence in the prediction, %", ylabel="of these right, %")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MultipleLocator(20))
    return list(line)


def logarithmic(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis, with their values: at most about seven between ``low`` and ``high``."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low / 1.6 <= tick <= high * 1.6]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def legend(fig: Figure, handles: Sequence[Any] | None = None, *, columns: int) -> None:
    """A legend under the axes, of ``handles`` or of everything that has a label; it switches series of its labels."""
    drawn = fig.legend(
        handles=fig.axes[0].get_legend_handles_labels()[0] if handles is None else handles,
        loc="outside lower left",
        ncols=columns,
        fontsize=10,
        labelspacing=0.35,
        columnspacing=1.6,
    )
    for handle, text in zip(drawn.legend_handles, drawn.get_texts(), strict=True):
        for part in (handle, text):
            if part is not None:
                part.set_gid(_MARK + quote(json.dumps({"legend": text.get_text(), "tip": ""})))
