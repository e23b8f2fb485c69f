"""How much averaging shrinks the deviation of a network's units, followed through its graph from the weights alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fedmerge._graph import LAYERS, Graph, argument, dims, operator
from fedmerge.types import Params

_DEAD = 1e-5
"""A unit of which averaging leaves less than this share is left as it is: nothing says what it was."""
_PASS = {
    "dropout", "feature_dropout", "alpha_dropout", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d",
    "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "contiguous", "clone", "detach", "alias", "upsample_nearest2d",
    "upsample_bilinear2d",
}  # fmt: skip
"""Operators that keep the units where they are and their deviation in proportion."""
_CHANNELS = ("batch_norm", "instance_norm", "group_norm")


@dataclass(frozen=True)
class _Units:
    """The units of a tensor.

    Attributes:
        axis: Where they are.
        squares: Float64 ``(models, units)``: the squared norm of the weights that make each unit, in every model; NaN
            where it is not known.
        layers: The layers that made them.
    """

    axis: int
    squares: Tensor
    layers: frozenset[fx.Node]


class Deviations:
    """Squared deviations of units under the hypothesis of the closed form, for several models of one network.

    If the inputs of a layer are isotropic and alike in all models, the deviation of a unit is in proportion to the
    norm of its weights. A sum of layers is one layer that reads all their inputs; a concatenation holds the units of
    each; a norm makes units of the deviation of its own weight. Pooling, dropout and moving of axes change nothing.
    Behind an activation function, and every other operator, nothing is known.

    Attributes:
        graph: Of the network.
        normalised: The layers from which such units reach a BatchNorm or InstanceNorm with running statistics.
    """

    def __init__(self, graph: Graph, models: Sequence[Params]) -> None:
        self.graph, self.models = graph, models
        self.normalised: set[fx.Node] = set()
        self._units: dict[Any, _Units | None] = {}
        self._seen: dict[tuple[str, ...], list[Tensor | None]] = {}
        for node in graph.nodes:
            self._units[node] = self._of(node) if dims(node) else None
            if operator(node) in ("batch_norm", "instance_norm") and (names := graph.names(argument(node, 4))):
                found = self._units.get(node.args[0])
                fits = found is not None and found.axis == 1
                self._seen.setdefault(names, []).append(found.squares if found is not None and fits else None)
                if found is not None and fits:
                    self.normalised |= found.layers

    def statistics(self, shares: Tensor) -> dict[tuple[str, ...], Tensor]:
        """Names of a running variance -> s of the units that its norm sees, see :func:`shrinkage`; NaN if not known.

        A norm that is called several times keeps the mean of its calls' variances.
        """
        return {
            names: shrinkage(torch.stack([s for s in calls if s is not None]).sum(0), shares)
            for names, calls in self._seen.items()
            if all(squares is not None for squares in calls)
        }

    def layers(self) -> dict[tuple[str, ...], list[fx.Node]]:
        """Names of a weight -> the layers that it is in; of those that can be rescaled by their weight.

        Left out are those before a norm (:attr:`normalised`), before the output, and those whose weight has other uses.
        """
        left = self.normalised | set(self.graph.outputs())
        found: dict[tuple[str, ...], list[fx.Node]] = {}
        for node in self.graph.nodes:
            if operator(node) in LAYERS and (names := self.graph.names(argument(node, 1))):
                found.setdefault(names, []).append(node)
        return {
            names: nodes
            for names, nodes in found.items()
            if len(nodes) == len(self.graph.uses(names)) and not left.intersection(nodes)
        }

    def _of(self, node: fx.Node) -> _Units | None:
        kind = operator(node)
        if kind in LAYERS:
            names = self.graph.names(argument(node, 1))
            axis = dims(node) - LAYERS[kind] - 1
            return _Units(axis, self._squares(names), frozenset([node])) if names else None
        if kind in _CHANNELS or kind == "layer_norm":
            return self._norm(node, kind)
        if kind in _PASS:
            return self._units.get(node.args[0])
        moved = _MOVES.get(kind)
        return moved(self, node) if moved is not None else None

    def _squares(self, names: tuple[str, ...]) -> Tensor:
        """Squared norms of the slices along axis 0. Of a tied tensor the last name counts, as when it is loaded."""
        return torch.stack(
            [m[names[-1]].detach().cpu().double().reshape(len(m[names[-1]]), -1).square().sum(1) for m in self.models]
        )

    def _norm(self, node: fx.Node, kind: str) -> _Units | None:
        if kind == "layer_norm" and len(argument(node, 1)) != 1:
            return None
        axis = dims(node) - 1 if kind == "layer_norm" else 1
        weight = argument(node, 2 if kind in ("layer_norm", "group_norm") else 1)
        names = self.graph.names(weight)
        if weight is not None and not names:
            return None
        ones = torch.ones(len(self.models), node.meta["val"].shape[axis], dtype=torch.float64)
        return _Units(axis, self._squares(names) if names else ones, frozenset())

    def _scaled(self, node: fx.Node) -> _Units | None:
        """Product with a number, or quotient by one."""
        found, factor = self._units.get(node.args[0]), argument(node, 1)
        if found is None or not isinstance(factor, (int, float)) or not factor or not math.isfinite(factor):
            return None
        power = -2 if operator(node).startswith("div") else 2
        return _Units(found.axis, found.squares * float(factor) ** power, found.layers)

    def _sum(self, node: fx.Node) -> _Units | None:
        parts = [(a, self._units.get(a)) for a in node.args[:2]]
        if not isinstance(node.args[1], fx.Node):
            return parts[0][1]
        (_, a), (_, b) = parts
        if a is None or b is None or (a.axis, a.squares.shape) != (b.axis, b.squares.shape):
            return None
        if dims(node.args[0]) != dims(node.args[1]):
            return None
        alpha = float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
        return _Units(a.axis, a.squares + alpha**2 * b.squares, a.layers | b.layers)

    def _concatenation(self, node: fx.Node) -> _Units | None:
        nodes: Any = node.args[0]
        axis = argument(node, 1, 0) % dims(node)
        parts = [self._units.get(n) for n in nodes]
        known = [p for p in parts if p is not None]
        if not known or any(p.axis != axis for p in known):
            return None
        unknown = torch.full((len(self.models), 1), torch.nan, dtype=torch.float64)
        squares = [
            unknown.expand(-1, n.meta["val"].shape[axis]) if p is None else p.squares
            for n, p in zip(nodes, parts, strict=True)
        ]
        return _Units(axis, torch.cat(squares, 1), frozenset().union(*(p.layers for p in known)))

    def _mean(self, node: fx.Node) -> _Units | None:
        found, over = self._units.get(node.args[0]), argument(node, 1)
        count = dims(node.args[0])
        gone = {d % count for d in (over if isinstance(over, (list, tuple)) else range(count))}
        if found is None or found.axis in gone:
            return None
        kept = bool(argument(node, 2, False))
        return _Units(found.axis - (0 if kept else sum(d < found.axis for d in gone)), found.squares, found.layers)

    def _transposed(self, node: fx.Node) -> _Units | None:
        found = self._units.get(node.args[0])
        if found is None:
            return None
        order = list(range(dims(node)))
        if operator(node) == "permute":
            order = [d % len(order) for d in argument(node, 1)]
        else:
            a, b = argument(node, 1) % len(order), argument(node, 2) % len(order)
            order[a], order[b] = b, a
        return _Units(order.index(found.axis), found.squares, found.layers)

    def _reshaped(self, node: fx.Node) -> _Units | None:
        """Axes before the units, or behind them, are cut or joined; or those behind join the units' own."""
        found: Any = self._units.get(node.args[0])
        if found is None:
            return None
        source: Any = node.args[0]
        old, new = source.meta["val"].shape, node.meta["val"].shape
        units, before = old[found.axis], math.prod(old[: found.axis])
        for axis, size in enumerate(new):
            times, rest = divmod(size, units)
            behind = math.prod(new[axis + 1 :])
            if math.prod(new[:axis]) == before and not rest and times * behind == math.prod(old[found.axis + 1 :]):
                return _Units(axis, found.squares.repeat_interleave(times, 1), found.layers)
        return None


_MOVES: dict[str, Callable[[Deviations, fx.Node], _Units | None]] = {
    **dict.fromkeys(("add", "add_", "sub", "sub_"), Deviations._sum),
    **dict.fromkeys(("mul", "mul_", "div", "div_"), Deviations._scaled),
    **dict.fromkeys(("cat", "concat", "concatenate"), Deviations._concatenation),
    **dict.fromkeys(("permute", "transpose"), Deviations._transposed),
    **dict.fromkeys(("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze"), Deviations._reshaped),
    "mean": Deviations._mean,
}


def shrinkage(squares: Tensor, shares: Tensor) -> Tensor:
    """S of each unit: the deviation in the last model over the mean of those in all others; 1 where nothing is left."""
    norms = squares.sqrt()
    goal = (shares[:, None] * norms[:-1]).sum(0)
    return torch.where(norms[-1] <= _DEAD * goal, 1.0, norms[-1] / goal)
