"""Operators that lay tensors end to end, or take pieces out of them."""

from itertools import accumulate
from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    Stack,
    args,
    argument,
    handles,
    name,
    shape,
    sizes,
    without,
)
from fedmerge.spec.symbols import Label


@handles("cat", "concat", "concatenate")
def concatenation(run: Interpreter, node: fx.Node) -> Labels:
    """Axes laid end to end."""
    tensors = [run.label(t) for t in args(node)[0]]
    dim = int(argument(node, 1, "dim", 0)) % len(tensors[0])
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], other, strict=True)):
            if i != dim:
                run.symbols.tie(a, b, name(node))
    joined = tuple(product for t in tensors for product in run.symbols.resolve(t[dim]))
    return (*tensors[0][:dim], joined, *tensors[0][dim + 1 :])


@handles("stack")
def stack(run: Interpreter, node: fx.Node) -> Stack:
    """Tensors as the slices of a new axis."""
    tensors = tuple(run.label(t) for t in args(node)[0])
    return Stack(int(argument(node, 1, "dim", 0)) % len(shape(node)), tensors)


@handles("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def chunk(run: Interpreter, node: fx.Node) -> list[Any]:
    """An axis cut into pieces: units move within their piece; of a stack, its slices."""
    value = run.env[args(node)[0]]
    dim = int(argument(node, 2, "dim", 0)) % len(shape(args(node)[0]))
    widths = [sizes(piece)[dim] for piece in node.meta["val"]]
    if isinstance(value, Stack) and value.dim == dim:
        ends = list(accumulate(widths))
        return [Stack(dim, value.slices[end - n : end]) for end, n in zip(ends, widths, strict=True)]
    x = run.label(args(node)[0])
    if all(n == 1 for n in widths):
        _note(run, x[dim])
    rest, pieces = x[dim], []
    for n in widths:
        piece, rest = run.symbols.cut(rest, n, name(node))
        pieces.append((*x[:dim], piece, *x[dim + 1 :]))
    return pieces


@handles("slice", "narrow")
def slice_of_axis(run: Interpreter, node: fx.Node) -> Any:
    """A piece of one axis: units move within it and within what is left out; with a stride the axis stays."""
    value = run.env[args(node)[0]]
    if isinstance(value, Stack):
        return _slice_of_stack(run, node, value)
    x, before, after = list(run.label(args(node)[0])), shape(args(node)[0]), shape(node)
    dim = int(argument(node, 1, "dim", 0)) % len(x)
    start, n = argument(node, 2, "start", 0) or 0, before[dim]
    if not isinstance(start, int):
        return _strided(run, node, x, dim)
    start = min(max(start + n if start < 0 else start, 0), n)
    if after[dim] == n:
        return tuple(x)
    if argument(node, 4, "step", 1) != 1 or after[dim] == 0:
        return _strided(run, node, x, dim)
    before_it, right = run.symbols.cut(x[dim], start, name(node))
    x[dim], after_it = run.symbols.cut(right, after[dim], name(node))
    run.read.append(x[dim])
    if _of_a_table(node):
        run.left += [before_it, after_it]
    return tuple(x)


def _of_a_table(node: fx.Node) -> bool:
    """Whether ``node`` takes a piece of a tensor that is the network's own, not of what was computed on an input."""
    while len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.op == "placeholder"


def _slice_of_stack(run: Interpreter, node: fx.Node, value: Stack) -> Any:
    dim = int(argument(node, 1, "dim", 0)) % len(shape(node))
    if dim == value.dim:
        start, n = argument(node, 2, "start", 0) or 0, len(value.slices)
        start = min(max(start + n if start < 0 else start, 0), n)
        return Stack(dim, value.slices[start :: argument(node, 4, "step", 1)][: shape(node)[dim]])
    if shape(node) == shape(args(node)[0]):
        return value
    run.env[args(node)[0]] = run.label(args(node)[0])
    return slice_of_axis(run, node)


def _strided(run: Interpreter, node: fx.Node, x: list[Label], dim: int) -> Labels:
    run.symbols.freeze(x[dim], f"{name(node)} takes a piece of it")
    x[dim] = run.symbols.fresh(shape(node)[dim], f"{name(node)} takes a piece of it")
    return tuple(x)


@handles("select", "unbind")
def select(run: Interpreter, node: fx.Node) -> Any:
    """One position of an axis, or each: of a stack its slice; any other axis stays."""
    value = run.env[args(node)[0]]
    dim = int(argument(node, 1, "dim", 0)) % len(shape(args(node)[0]))
    every = isinstance(node.meta["val"], (tuple, list))
    if isinstance(value, Stack) and value.dim == dim:
        return list(value.slices) if every else value.slices[int(args(node)[2])]
    x = run.label(args(node)[0])
    _note(run, x[dim])
    run.symbols.freeze(x[dim], f"{name(node)} takes a position of it")
    rest = without(x, dim)
    return [rest] * len(node.meta["val"]) if every else rest


def _note(run: Interpreter, label: Label) -> None:
    """Note that the positions of ``label`` are picked one by one, for the next run."""
    if len(label) == 1 and len(label[0]) == 1:
        root = run.symbols.root(label[0][0].symbol)
        run.picked.update(place for symbol, place in run.origins.items() if run.symbols.root(symbol) == root)
