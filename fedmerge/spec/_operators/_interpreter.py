"""The interpreter that runs a traced graph on labels of axes instead of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fedmerge.spec._symbols import Label, Symbols

Labels = tuple[Label, ...]
"""A tensor: one label an axis."""

Handler = Callable[["Interpreter", fx.Node], Any]
HANDLERS: dict[str, Handler] = {}


@dataclass(frozen=True)
class Stack:
    """A tensor whose axis ``dim`` stays and whose slices along it have labels of their own.

    A packed projection cut into queries, keys and values is one: its three slices need not move together.

    Attributes:
        dim: The axis that numbers the slices.
        slices: Labels of each slice, without axis ``dim``.
    """

    dim: int
    slices: tuple[Labels, ...]


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen operators, named without ``aten.`` and overload.

    In-place forms (with a last ``_``) are named apart: those that change a shape would leave old labels behind.
    """

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Interpreter:
    """Runs a graph on labels instead of numbers.

    Whether the factors that a reshape cuts out of an axis move together, or are slices that are picked one by
    one, shows only further down the graph. So a run notes the slices that were picked in ``picked``, and the
    next run begins with them as ``stacks``.

    Attributes:
        symbols: The unknowns.
        env: Node -> :data:`Labels`, a :class:`Stack`, or a list of them for an operator of several results.
        stacks: Name of a reshape -> the axis of its result whose positions are picked one by one.
        picked: The same, found by this run.
        origins: Symbol -> the reshape and the axis of its result that created it.
    """

    def __init__(self, symbols: Symbols, stacks: Mapping[str, int] | None = None) -> None:
        self.symbols = symbols
        self.env: dict[fx.Node, Any] = {}
        self.stacks = dict(stacks or {})
        self.picked: dict[str, int] = {}
        self.origins: dict[int, tuple[str, int]] = {}

    def label(self, node: Any) -> Labels:
        """Labels of a tensor argument, one an axis; the slices of a stack are tied to each other."""
        value = self.env[node]
        if isinstance(value, Stack):
            first = value.slices[0]
            for other in value.slices[1:]:
                for a, b in zip(first, other, strict=True):
                    self.symbols.tie(a, b, name(node))
            stays = self.symbols.fresh(len(value.slices), "numbers the parts of a packed tensor")
            value = self.env[node] = (*first[: value.dim], stays, *first[value.dim :])
        labels: Labels = value
        return labels

    def fixed(self, value: Tensor, reason: str) -> Labels:
        """Frozen labels for a tensor of the shape of ``value``."""
        return tuple(self.symbols.fresh(int(n), reason) for n in value.shape)

    def like(self, node: fx.Node, reason: str) -> Any:
        """Frozen labels for whatever ``node`` returns: a tensor, several, or none."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return [self.fixed(v, reason) if isinstance(v, Tensor) else () for v in value]
        return self.fixed(value, reason) if isinstance(value, Tensor) else ()

    def freeze(self, value: Any, reason: str) -> None:
        """Freeze every axis of what a node returned."""
        if isinstance(value, list):
            for entry in value:
                self.freeze(entry, reason)
        elif isinstance(value, Stack):
            for labels in value.slices:
                self.freeze(labels, reason)
        else:
            for label in value:
                self.symbols.freeze(label, reason)

    def run(self, node: fx.Node) -> Any:
        """Labels of the result of ``node``."""
        operator = operator_name(node)
        handler = HANDLERS.get(operator)
        if handler is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            handler = HANDLERS["pointwise"]
        return (handler or unknown)(self, node)


def unknown(run: Interpreter, node: fx.Node) -> Any:
    """An operator that is not understood: nothing that enters it may move."""
    reason = f"operator {getattr(node.target, '__name__', node.target)} is not understood"
    for argument in node.all_input_nodes:
        run.freeze(run.env[argument], reason)
    return run.like(node, reason)


def operator_name(node: fx.Node) -> str:
    """The operator of ``node``, without ``aten.`` and overload."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet).removeprefix("aten.") if packet is not None else getattr(node.target, "__name__", "?")


def args(node: fx.Node) -> tuple[Any, ...]:
    """Positional arguments of ``node``."""
    return node.args


def argument(node: fx.Node, position: int, keyword: str, default: Any = None) -> Any:
    """One argument of ``node``, given by position or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


def tensors(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of ``node``, in order and with repetitions."""
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) if isinstance(n.meta.get("val"), Tensor) else None)
    return found


def shape(node: Any) -> tuple[int, ...]:
    """Shape of the tensor that ``node`` returns."""
    return tuple(int(n) for n in node.meta["val"].shape)


def name(node: fx.Node) -> str:
    """Name of ``node`` in the graph, for reasons and ties."""
    return node.name


def spatial(node: fx.Node) -> int:
    """Number of image axes of a convolution or pooling, from the ``1d``, ``2d`` or ``3d`` of its name."""
    return int(operator_name(node).partition("d_with")[0].removesuffix("d")[-1])


def without(items: Sequence[Any], position: int) -> tuple[Any, ...]:
    """``items`` without the one at ``position``."""
    return (*items[:position], *items[position + 1 :])
