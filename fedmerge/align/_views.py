"""Where the units of each group show while a network computes: results of the traced graph, by what their axes are."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx

from fedmerge.align.turns import Key, length
from fedmerge.spec import PermSpec
from fedmerge.spec.axes import Axis, Factor, Segment
from fedmerge.spec.operators.interpreter import Labels, Stack, operator_name
from fedmerge.spec.symbols import Label, Part
from fedmerge.spec.traced import Traced

_NORMS = {"batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm"}
_MAKERS = _NORMS | {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "matmul", "linalg_matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "einsum", "tensordot", "inner",
    "outer", "bilinear", "cdist", "embedding",
}  # fmt: skip
"""Operators through which a weight makes units."""
_MOVES = {"permute", "transpose", "movedim", "contiguous", "squeeze", "unsqueeze", "t"}
"""Operators that put axes into another order, and change no value."""


class Piece(NamedTuple):
    """A segment of what axis ``dim`` of a result is made of."""

    dim: int
    axis: Axis
    segment: int

    @property
    def groups(self) -> Key:
        """Its groups, slowest first."""
        return tuple(f.group for f in self.axis[self.segment] if f.group is not None)


@dataclass(frozen=True)
class View:
    """The units of a group, or of a product of groups, in what an operator of the network computes.

    Attributes:
        node: Name of the operator's result in the traced graph.
        pieces: What of its axes holds units: one piece but where several axes do.
        part: Of several results, and of the slices along the first axis of one, those that show them; None: it is one.
    """

    node: str
    pieces: tuple[Piece, ...]
    part: tuple[int, int] | None = None

    @property
    def key(self) -> Key:
        """The groups whose product numbers the units: one but where they show together, as heads and units within."""
        return tuple(group for piece in self.pieces for group in piece.groups)

    def units(self, out: Tensor | Sequence[Tensor], sizes: Mapping[str, int]) -> Tensor:
        """``out`` as float64 ``(n, samples)``: whatever is not one of the groups is a sample.

        ``sizes`` are the numbers of units of the network that made it.
        """
        if not isinstance(out, Tensor):
            assert self.part is not None
            out = out[self.part[0]][self.part[1]]
        moving: list[int] = []
        for piece in reversed(self.pieces):  # from the last axis on, so that a reshape moves none that is to come
            segment = piece.axis[piece.segment]
            factors = [f.size if f.group is None else sizes[f.group] for f in segment]
            if len(piece.axis) > 1:
                start = length(piece.axis[: piece.segment], sizes)
                out = out.narrow(piece.dim, start, length((segment,), sizes))
            if len(factors) > 1:
                out = out.reshape(*out.shape[: piece.dim], *factors, *out.shape[piece.dim + 1 :])
            moving = [at + len(factors) - 1 for at in moving]
            moving = [piece.dim + k for k, f in enumerate(segment) if f.group is not None] + moving
        out = out.movedim(moving, list(range(len(moving)))).flatten(0, len(moving) - 1)
        return out.flatten(1).double() if out.dim() > 1 else out[:, None].double()


def find_views(traced: Traced, spec: PermSpec) -> dict[Key, list[View]]:
    """Groups -> where their units show, before the activation function: the results of all that makes them.

    An operator makes the units that lie on an axis of its weight and of its result: a linear map, a convolution, an
    embedding, a norm, whether a layer calls it or the network itself. Those that add to one residual stream all show
    its group, and all count. What goes straight into a norm of the same groups is seen after that norm. A group that
    no weight makes in this sense, but a parameter that is multiplied or added, is seen where it first shows, and one
    that no image reaches (a network over the positions of a window, say) in what it computes of constants. The inner
    layers of a recurrent network, which is one operator, are seen in their last states.
    """
    of_inputs = traced.of_inputs()
    axes = _Axes(traced, spec)
    made: list[tuple[fx.Node, View]] = []
    others: list[View] = []
    for node in of_inputs:
        shown = axes.views(node)
        makes = operator_name(node) in _MAKERS
        weights = axes.of([n for n in node.all_input_nodes if n not in of_inputs]) if makes else frozenset()
        for view in shown:
            if any(piece.axis in weights for piece in view.pieces):
                made.append((node, view))
            else:
                others.append(view)
    shows: dict[fx.Node, set[str]] = {}
    for node, view in made:
        shows.setdefault(node, set()).update(view.key)
    found: dict[Key, list[View]] = {}
    for node, view in made:
        if not any(shows[node] <= shows.get(norm, set()) for norm in _norms_after(node)):
            found.setdefault(view.key, []).append(view)
    of_constants = (node for node in traced.of_constants() if node not in of_inputs)
    states = (view for node in of_inputs for view in axes.states(node))
    for view in (*others, *states, *(view for node in of_constants for view in axes.views(node))):
        if not set(view.key) <= {group for key in found for group in key}:
            found[view.key] = [view]
    return found


def _norms_after(node: fx.Node) -> list[fx.Node]:
    """The norms whose input is what ``node`` computes."""
    found: list[fx.Node] = []
    for user in node.users:
        operator = operator_name(user)
        if operator in _NORMS and user.args[0] is node:
            found.append(user)
        elif operator in _MOVES:
            found += _norms_after(user)
    return found


class _Axes:
    """What the axes of results are made of, in the groups of a spec.

    The trace knows axes by its own unknowns. Those of the parameters say which groups of the spec they are: first as
    whole axes, then as segments, then one by one.
    """

    def __init__(self, traced: Traced, spec: PermSpec) -> None:
        self._traced = traced
        self._axes: dict[Any, Axis] = {}
        self._segments: dict[Any, Segment] = {}
        self._groups: dict[int, str] = {}
        for name, entry in traced.labels.items():
            for label, axis in zip(entry, spec.axes.get(name, ()), strict=False):
                resolved = traced.resolve(label)
                if not axis:
                    continue
                self._axes.setdefault(resolved, axis)
                if len(resolved) != len(axis):
                    continue
                for product, segment in zip(resolved, axis, strict=True):
                    self._segments.setdefault(product, segment)
                    units = [(traced.symbols.reason(part.symbol) is None, part.size) for part in product]
                    if _pattern(units) == _pattern([(f.group is not None, f.size) for f in segment]):
                        parts = (part for part in product if traced.symbols.reason(part.symbol) is None)
                        groups = (factor.group for factor in segment if factor.group is not None)
                        self._groups |= {p.symbol: g for p, g in zip(parts, groups, strict=True)}

    def views(self, node: fx.Node) -> list[View]:
        """The units that ``node`` shows: one view but where an axis is made of segments."""
        labels = self._traced.env.get(node)
        if not isinstance(labels, tuple):  # several results, or a packed one: they are seen when they are taken apart
            return []
        return self._views(node.name, labels, None)

    def states(self, node: fx.Node) -> list[View]:
        """The units that the packed ones of several results of ``node`` show, slice by slice."""
        results = self._traced.env.get(node)
        return [
            view
            for i, result in enumerate(results if isinstance(results, list) else [])
            if isinstance(result, Stack) and result.dim == 0
            for k, labels in enumerate(result.slices)
            for view in self._views(node.name, labels, (i, k))
        ]

    def _views(self, node: str, labels: Labels, part: tuple[int, int] | None) -> list[View]:
        choices: list[list[Piece]] = []
        for dim, label in enumerate(labels):
            axis = self._axis(label)
            pieces = [Piece(dim, axis, s) for s in range(len(axis))]
            pieces = [piece for piece in pieces if piece.groups]
            if pieces:
                choices.append(pieces)
        found = [View(node, pieces, part) for pieces in itertools.product(*choices)] if choices else []
        return [view for view in found if len(set(view.key)) == len(view.key)]

    def of(self, nodes: Iterable[fx.Node]) -> frozenset[Axis]:
        """What the axes of these results are made of."""
        labels = [self._traced.env.get(node) for node in nodes]
        return frozenset(self._axis(label) for entry in labels if isinstance(entry, tuple) for label in entry)

    def _axis(self, label: Label) -> Axis:
        resolved = self._traced.resolve(label)
        if resolved in self._axes:
            return self._axes[resolved]
        return tuple(self._segments.get(product) or tuple(map(self._factor, product)) for product in resolved)

    def _factor(self, part: Part) -> Factor:
        return Factor(self._groups.get(part.symbol), part.size)


def _pattern(factors: Iterable[tuple[bool, int]]) -> list[int | None]:
    """Which factors move (None), and how many positions lie between those that do: widths do not count."""
    found: list[int | None] = [1]
    for moves, size in factors:
        if moves:
            found += [None, 1]
        else:
            found[-1] = (found[-1] or 1) * size
    return found
