"""The interpreter that runs a traced graph on labels of axes instead of numbers."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fedmerge.spec.symbols import Label, Symbols

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
        read: Pieces of axes that slices took.
        left: Pieces that they left out of the network's own tensors.
        alike: Nodes that hold one number everywhere and are never written into: whoever reads one gets axes of his
            own, for what is alike everywhere follows each of them (zeros that start all layers of an LSTM, say).
    """

    def __init__(self, symbols: Symbols, stacks: Mapping[str, int] | None = None) -> None:
        self.symbols = symbols
        self.env: dict[fx.Node, Any] = {}
        self.stacks = dict(stacks or {})
        self.picked: dict[str, int] = {}
        self.origins: dict[int, tuple[str, int]] = {}
        self.read: list[Label] = []
        self.left: list[Label] = []
        self.alike: set[fx.Node] = set()

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

    def freeze_unread(self) -> None:
        """Freeze what slices left out and nothing else reads, once the whole graph has spoken.

        That shows for this example alone: positions beyond its length, in a table that is cut to it, are read on
        longer ones, and there each is one of its own.
        """
        symbols = self.symbols
        read = {symbols.root(part.symbol) for label in self.read for part in symbols.parts(label)}
        for label in self.left:
            for part in symbols.parts(label):
                if symbols.root(part.symbol) not in read and not symbols.ties(part.symbol):
                    symbols.freeze(((part,),), "not read on this example")

    def fixed(self, value: Tensor, reason: str) -> Labels:
        """Frozen labels for a tensor of the shape of ``value``."""
        return tuple(self.symbols.fresh(n, reason) for n in sizes(value))

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
        handler = HANDLERS.get(operator_name(node))
        if handler is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            handler = HANDLERS["pointwise"]
        for given in node.all_input_nodes:
            if given in self.alike:
                self.env[given] = tuple(self.symbols.fresh(n) for n in shape(given))
        if self._alike(node, handler):
            self.alike.add(node)
        return (handler or HANDLERS["unknown"])(self, node)

    def _alike(self, node: fx.Node, handler: Handler | None) -> bool:
        """Whether ``node`` is a constant of one number that is never written into, or is made of such alone."""
        given = tensors(node)
        made = handler is HANDLERS["constant"] and operator_name(node) not in ("empty", "new_empty", "empty_like")
        kept = bool(given) and all(n in self.alike for n in given) and (handler in _KEEPING or is_view(node))
        return (made or kept) and isinstance(node.meta.get("val"), Tensor) and not written(node)

    def inline(self, graph: fx.Graph, inputs: Sequence[Any], of: fx.Node) -> Any:
        """Run ``graph``, which stands for the one node ``of``, on what its nodes or values ``inputs`` hold."""
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        for node, given in zip(placeholders, inputs, strict=True):
            self.env[node] = self.env[given] if isinstance(given, fx.Node) else ()
            if given in self.alike:
                self.alike.add(node)
        for node in graph.nodes:
            node.meta["of"] = of.meta.get("of", of.name)
            if node.op == "output":
                results = node.args[0]
                value = of.meta.get("val")
                if isinstance(value, (tuple, list)):
                    return [self.env[n] if isinstance(n, fx.Node) else () for n in results]
                (result,) = results if isinstance(results, (tuple, list)) else (results,)
                return self.env[result]
            if node.op != "placeholder":
                self.env[node] = self.run(node)
        raise AssertionError("a graph without an output")


def keeps_alike(handler: Handler) -> Handler:
    """Mark an operator whose result is one number everywhere if its tensors are."""
    _KEEPING.add(handler)
    return handler


_KEEPING: set[Handler] = set()


def freeze_all(run: Interpreter, node: fx.Node, reason: str) -> Any:
    """Nothing that enters ``node`` or leaves it may move."""
    for argument in node.all_input_nodes:
        run.freeze(run.env[argument], reason)
    return run.like(node, reason)


def _aliases(node: fx.Node) -> list[bool]:
    """For every argument whose memory ``node`` returns or writes to: whether it writes."""
    schema = getattr(node.target, "_schema", None)
    return [] if schema is None else [a.alias_info.is_write for a in schema.arguments if a.alias_info is not None]


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` returns (a part of) the memory of its argument without writing to it."""
    found = _aliases(node)
    return bool(found) and not any(found)


def writes(node: fx.Node) -> bool:
    """Whether ``node`` writes into the memory of an argument."""
    return any(_aliases(node))


def written(node: fx.Node) -> bool:
    """Whether an operator writes into the memory of ``node``, directly or through a view of it, or may do so."""
    for user in node.users:
        if user.op != "call_function" or user.target is operator.getitem:
            if written(user):
                return True
            continue
        schema = getattr(user.target, "_schema", None)
        if schema is None:  # an operator that runs a graph of its own
            return True
        for position, argument in enumerate(schema.arguments):
            given = user.args[position] if position < len(user.args) else user.kwargs.get(argument.name)
            holds = given is node or (isinstance(given, (tuple, list)) and node in given)
            if holds and argument.alias_info is not None and argument.alias_info.is_write:
                return True
        if is_view(user) and written(user):
            return True
    return False


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
    return sizes(node.meta["val"])


def sizes(value: Tensor) -> tuple[int, ...]:
    """Shape of ``value``; a length that depends on the data (tokens sent to an expert) is a large prime of its own."""
    return tuple(n if isinstance(n, int) else _length(n) for n in value.shape)


def _length(n: Any) -> int:
    expression = n.node.expr
    numbers = {symbol: _PRIMES[int(re.sub(r"\D", "", str(symbol)) or 0) % len(_PRIMES)]
               for symbol in expression.free_symbols}  # fmt: skip
    return int(expression.subs(numbers))


_PRIMES = [n for n in range(10_007, 20_000, 2) if all(n % d for d in range(3, 142, 2))]


def name(node: fx.Node) -> str:
    """Name of ``node`` in the network's graph, for reasons and ties."""
    return str(node.meta.get("of", node.name))


def key(node: fx.Node) -> str:
    """What tells ``node`` from every other, in every run over the graph."""
    return f"{node.meta['of']}/{node.name}" if "of" in node.meta else node.name


def spatial(node: fx.Node) -> int:
    """Number of image axes of a convolution or pooling, from the ``1d``, ``2d`` or ``3d`` of its name."""
    found = re.search(r"([123])d", operator_name(node))
    assert found is not None
    return int(found[1])


def along(run: Interpreter, node: fx.Node, labels: Sequence[Label], dims: Iterable[int], reason: str) -> Labels:
    """``labels`` whose axes ``dims`` stay, before and in the result of ``node``."""
    x = list(labels)
    for d in dims:
        run.symbols.freeze(x[d], f"{name(node)} {reason}")
        x[d] = run.symbols.fresh(shape(node)[d], f"{name(node)} {reason}")
    return tuple(x)


def axes(given: Any, rank: int) -> list[int]:
    """The axes that an argument ``dim`` names, from 0; all of them without one."""
    if given is None or isinstance(given, bool) or (isinstance(given, (tuple, list)) and not given):
        return list(range(rank))
    return [int(d) % max(1, rank) for d in ([given] if isinstance(given, int) else given)]


def meet(
    run: Interpreter, node: fx.Node, operands: Iterable[tuple[Labels, Sequence[int]]], out: Sequence[int]
) -> Labels:
    """Broadcasting: of ``operands``, each labels and sizes, the axes that meet move together."""
    result: list[Label | None] = [None] * len(out)
    for labels, lengths in operands:
        offset = len(out) - len(labels)
        for i, label in enumerate(labels):
            if lengths[i] != out[offset + i]:
                continue  # broadcast from one position
            known = result[offset + i]
            if known is None:
                result[offset + i] = label
            else:
                run.symbols.tie(known, label, name(node))
    return tuple(run.symbols.fresh(n) if known is None else known for n, known in zip(out, result, strict=True))


def without(items: Sequence[Any], position: int) -> tuple[Any, ...]:
    """``items`` without the one at ``position``."""
    return (*items[:position], *items[position + 1 :])
