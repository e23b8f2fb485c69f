"""A :class:`~fedmerge.spec.PermSpec` as a picture: groups as lanes, weights as arrows between them.

Object-oriented matplotlib on Agg, so no global figure. Lengths are inches and the axes fill the page: data
coordinates are inches too, and the page is as large as the network needs.
"""

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, Patch, Polygon, Rectangle
from matplotlib.patheffects import withStroke

from fedmerge.spec._table import plain, read_axis

if TYPE_CHECKING:
    from fedmerge.spec.axes import PermSpec

# Okabe and Ito, "Color Universal Design", 2008, darkened where text on white needs it.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9")
_INK, _SOFT, _GREY = "#1b1f24", "#5b636e", "#a9b0b8"
_PITCH = 0.42  # inches between two columns, and between two lanes
_LOOSEST = 0.7  # the same in a small network, which has the room
_ANGLE = 58  # degrees of the names of weights; a name then runs between those of its neighbours
_LARGEST = 60.0  # inches of columns; a larger network is drawn smaller
_NARROWEST = 9.0  # inches of the page: the title needs them
_LONGEST = 44  # characters of a label
_ONE_UNIT = "a single unit"


@dataclass(frozen=True)
class _Lane:
    """A group of units, or (``group`` is False) units that stay for the reason ``name``."""

    name: str
    group: bool = True


@dataclass(frozen=True)
class _Weight:
    """A tensor that reads the units of some lanes and writes those of others."""

    name: str
    reads: tuple[_Lane, ...]
    writes: tuple[_Lane, ...]


@dataclass(frozen=True)
class _Vectors:
    """A module of vectors (normalisation, say) that moves with some lanes, after ``before`` weights."""

    before: int
    lanes: tuple[_Lane, ...]


def picture(spec: "PermSpec", title: str = "") -> Figure:
    """Groups as horizontal lanes, each weight as an arrow from the lane that it reads to the one that it writes.

    Time runs to the right in the order of the state dict. A lane begins at the first weight that touches it
    and ends at the last, so that a residual stream is a long lane with many arrows, and a weight from a stream
    to itself is a loop. Biases belong to their weight; other vectors (normalisation, positions) are strokes
    across the lanes that they move with. What stays is grey.

    Every artist of a weight, group or vector carries ``edge:name``, ``group:name`` or ``vector`` as its gid.
    """
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({"font.size": 9.0, "text.color": _INK})
        return _drawn(spec, title)


def _contents(spec: "PermSpec") -> tuple[list[_Weight], list[_Vectors]]:
    """The weights in the order of the state dict, and the vectors between them."""
    reasons = {(f.name, f.axis): plain(f.reason) for f in spec.frozen}
    weights: list[_Weight] = []
    vectors: dict[str, _Vectors] = {}
    written: set[_Lane] = set()
    for name, axes in spec.axes.items():
        lanes: list[tuple[_Lane, ...]] = []
        for a, axis in enumerate(axes):
            groups = dict.fromkeys(f.group for segment in axis for f in segment if f.group is not None)
            stays = (name, a) in reasons and not groups
            lanes.append((_Lane(reasons[name, a], False),) if stays else tuple(_Lane(g) for g in groups))
        reading = read_axis(spec, name)
        touched = tuple(dict.fromkeys(itertools.chain.from_iterable(lanes)))
        if reading is None or not (lanes[1 - reading] or any(lane.group for lane in lanes[reading])):
            module = name.rpartition(".")[0] or name
            of_weight = any(w.name.rpartition(".")[0] == module for w in weights)
            moving = tuple(lane for lane in touched if lane.group) or touched
            if moving and not of_weight and module not in vectors:
                vectors[module] = _Vectors(len(weights), moving)
            continue
        reads = lanes[reading]
        writes = tuple(dict.fromkeys(lane for a, entry in enumerate(lanes) if a != reading for lane in entry))
        if not reads and not set(writes) <= written:
            reads = (_Lane(_ONE_UNIT, False),)  # one channel enters; a depthwise kernel finds its lanes written
        weights.append(_Weight(name, reads, writes or (_Lane(_ONE_UNIT, False),)))
        written |= set(writes)
    return weights, list(vectors.values())


def _drawn(spec: "PermSpec", title: str) -> Figure:
    weights, vectors = _contents(spec)
    sheet = _Sheet(spec, weights, vectors)
    for lane in sheet.y:
        sheet.lane(lane, spec)
    for entry in vectors:
        sheet.vectors(entry)
    for column, weight in enumerate(weights):
        sheet.weight(weight, column)
    _frame(sheet, spec, title)
    return sheet.fig


class _Sheet:
    """The page: where each lane lies, and the box (left, right, bottom, top) that is drawn on so far."""

    def __init__(self, spec: "PermSpec", weights: list[_Weight], vectors: list[_Vectors]) -> None:
        lanes = [lane for weight in weights for lane in (*weight.reads, *weight.writes)]
        lanes = list(dict.fromkeys([*lanes, *(lane for entry in vectors for lane in entry.lanes)]))
        room = max(1, len(weights), len(lanes))
        self.pitch = min(_LOOSEST, max(_PITCH, 5 / room), _LARGEST / room)
        self.mark = min(1.0, self.pitch / _PITCH)  # scale of heads and dots
        self.size = min(8.5, self.pitch * 72 * 0.42)  # points of the labels
        self.y = {lane: -self.pitch * i for i, lane in enumerate(lanes)}
        self.span = dict.fromkeys(lanes, (math.inf, -math.inf))
        for column, weight in enumerate(weights):
            self._reach((*weight.reads, *weight.writes), column)
        for entry in vectors:
            self._reach(entry.lanes, entry.before - 0.5)
        units = spec.sizes()  # more units, a thicker lane, by the logarithm
        thick = {lane: 0.16 + 0.03 * math.log2(units[lane.name]) if lane.group else 0.14 for lane in lanes}
        self.half = {lane: 0.5 * _PITCH * self.mark * height for lane, height in thick.items()}
        self.colour = dict.fromkeys(lanes, _GREY)
        self.colour |= dict(zip((lane for lane in lanes if lane.group), itertools.cycle(_COLOURS)))
        self.left, self.right, self.bottom, self.top = 0.0, 0.0, -self.pitch * len(lanes), 0.0
        self.fig = Figure()
        FigureCanvasAgg(self.fig)
        self.ax = self.fig.add_axes((0.0, 0.0, 1.0, 1.0))
        self.ax.set_axis_off()

    def _reach(self, lanes: tuple[_Lane, ...], column: float) -> None:
        for lane in lanes:
            start, end = self.span[lane]
            self.span[lane] = (min(start, column), max(end, column))

    def lane(self, lane: _Lane, spec: "PermSpec") -> None:
        """A bar from the first to the last column that touches it, and its name before it."""
        start, end = (self.pitch * column for column in self.span[lane])
        start, end = start - 0.3 * self.pitch, end + 0.3 * self.pitch
        corner, height = (start, self.y[lane] - self.half[lane]), 2 * self.half[lane]
        gid = f"{'group' if lane.group else 'stays'}:{lane.name}"
        self.ax.add_patch(Rectangle(corner, end - start, height, facecolor=self.colour[lane], gid=gid))
        if lane.group:
            text, colour = f"{_short(lane.name)}  {spec.sizes()[lane.name]} units", _INK
        else:
            text, colour = f"stays: {_short(lane.name, 'start')}", _SOFT
        at = start - 0.06
        self.ax.text(at, self.y[lane], text, ha="right", va="center_baseline", size=self.size, color=colour)
        self.left = min(self.left, at - _inches(text, self.size))

    def vectors(self, entry: _Vectors) -> None:
        """A stroke across each lane."""
        x = self.pitch * (entry.before - 0.5)
        for lane in entry.lanes:
            y, reach = self.y[lane], self.half[lane] + 0.03
            self.ax.plot([x, x], [y - reach, y + reach], color=_INK, linewidth=1.3 * self.mark, gid="vector")

    def weight(self, weight: _Weight, column: int) -> None:
        """An arrow: a dot in each lane that the weight reads, a head at each that it writes, its name on top."""
        x, gid, colour = self.pitch * column, f"edge:{weight.name}", self.colour[weight.writes[0]]
        if not weight.reads or set(weight.reads) == set(weight.writes):
            upper = self._loop(x, max(weight.writes, key=lambda lane: self.y[lane]), gid)
        else:
            ends = [self.y[lane] for lane in (*weight.reads, *weight.writes)]
            upper = max(ends)
            self.ax.plot([x, x], [min(ends), upper], color=colour, linewidth=1.6 * self.mark, gid=gid, zorder=3)
            for lane in weight.reads:
                self.ax.plot(
                    [x], [self.y[lane]], marker="o", markersize=5 * self.mark, markerfacecolor="white",
                    markeredgecolor=colour, markeredgewidth=1.3 * self.mark, zorder=4,
                )  # fmt: skip
            above = max(self.y[lane] for lane in weight.reads)
            for lane in weight.writes:
                self._head(x, lane, 1 if self.y[lane] < above else -1, colour)
        name = _short(weight.name.removesuffix(".weight"))
        at = upper + 0.26 * self.pitch
        self.ax.text(
            x, at, name, rotation=_ANGLE, rotation_mode="anchor", ha="left", va="center", size=self.size, color=_SOFT,
            path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=6,
        )  # fmt: skip
        length, angle = _inches(name, self.size), math.radians(_ANGLE)
        self.top = max(self.top, at + length * math.sin(angle) + 0.15)
        self.right = max(self.right, x + length * math.cos(angle) + 0.3)

    def _head(self, x: float, lane: _Lane, side: int, colour: str) -> None:
        """A triangle whose tip touches ``lane`` from above (``side`` 1) or below (-1)."""
        reach = 0.2 * _PITCH * self.mark
        tip = self.y[lane] + side * self.half[lane]
        corners = [(x, tip), (x - 0.55 * reach, tip + side * reach), (x + 0.55 * reach, tip + side * reach)]
        self.ax.add_patch(Polygon(corners, facecolor=colour, edgecolor="white", linewidth=0.5 * self.mark, zorder=5))

    def _loop(self, x: float, lane: _Lane, gid: str) -> float:
        """An arrow from ``lane`` to itself; its top."""
        y, reach = self.y[lane] + self.half[lane], 0.28 * _PITCH * self.mark
        loop = FancyArrowPatch(
            (x - reach, y), (x + reach, y), connectionstyle="arc3,rad=-1.1", arrowstyle="-|>", gid=gid,
            mutation_scale=9 * self.mark, linewidth=1.6 * self.mark, color=self.colour[lane], shrinkA=0, shrinkB=0,
        )  # fmt: skip
        self.ax.add_patch(loop)
        return y + reach


def _frame(sheet: _Sheet, spec: "PermSpec", title: str) -> None:
    """Title above and legend below the drawing, and the size of the page."""
    left = sheet.left - 0.15
    right = max(sheet.right, left + _NARROWEST)
    groups = "1 group" if len(spec.groups) == 1 else f"{len(spec.groups)} groups"
    power = rf"$\mathbf{{10^{{{spec.log10_symmetries():.0f}}}}}$"
    head = f"{title}: " * bool(title) + f"{groups} of units, {power} permutations that keep the function"
    share = f"{100 * spec.permutable_share():.1f} % of the parameters move; {len(spec.frozen)} axes stay"
    below = f"Each arrow is a weight, from the units that it reads to those that it writes. {share}."
    sheet.ax.text(left + 0.15, sheet.top + 0.6, head, size=13, weight="bold", va="center")
    sheet.ax.text(left + 0.15, sheet.top + 0.3, below, color=_SOFT, va="center")
    handles: list[Any] = [
        Patch(facecolor=_COLOURS[0], label="group: its units move together in all that touches the bar"),
        Patch(facecolor=_GREY, label="units that stay, and why"),
        _handle("o", "weight reads these units (input axis)", markerfacecolor="white"),
        _handle("v", "weight writes these units (output axis, bias)"),
        _handle("|", "vector that moves along (normalisation, statistics, position)", color=_INK, markersize=11),
    ]
    sheet.fig.legend(handles=handles, loc="lower left", ncols=2, frameon=False, fontsize=8.5)
    bottom, top = sheet.bottom - 0.75, sheet.top + 0.9
    sheet.ax.set_xlim(left, right)
    sheet.ax.set_ylim(bottom, top)
    sheet.fig.set_size_inches(right - left, top - bottom)


def _handle(marker: str, label: str, color: str = _COLOURS[1], **kwargs: Any) -> Line2D:
    return Line2D([], [], linestyle="", marker=marker, color=color, label=label, **{"markersize": 7, **kwargs})


def _short(text: str, keep: str = "end") -> str:
    """``text``, cut where it is long: names differ at their end, reasons at their start."""
    if len(text) <= _LONGEST:
        return text
    return f"\u2026{text[1 - _LONGEST :]}" if keep == "end" else f"{text[: _LONGEST - 1]}\u2026"


def _inches(text: str, size: float) -> float:
    """About the width of ``text``: DejaVu Sans at ``size`` points."""
    return len(text) * size * 0.58 / 72
