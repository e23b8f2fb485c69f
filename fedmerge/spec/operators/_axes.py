"""Operators that reorder, repeat or shift whole axes."""

from collections.abc import Sequence
from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    Stack,
    args,
    argument,
    freeze_all,
    handles,
    name,
    operator_name,
    shape,
)
from fedmerge.spec.operators.products import interleaved


def _reorder(value: Any, order: Sequence[int]) -> Any:
    """Axis i of the result is axis ``order[i]`` of ``value``."""
    if not isinstance(value, Stack):
        return tuple(value[d] for d in order)
    rest = [d - (d > value.dim) for d in order if d != value.dim]
    return Stack(list(order).index(value.dim), tuple(tuple(labels[d] for d in rest) for labels in value.slices))


@handles("permute")
def permute_axes(run: Interpreter, node: fx.Node) -> Any:
    """Axes in another order."""
    rank = len(shape(args(node)[0]))
    return _reorder(run.env[args(node)[0]], [int(d) % rank for d in args(node)[1]])


@handles("transpose", "swapaxes", "swapdims", "t", "numpy_T")
def transpose(run: Interpreter, node: fx.Node) -> Any:
    """Two axes exchanged."""
    rank = len(shape(args(node)[0]))
    order = list(range(rank))
    if len(args(node)) > 2:
        a, b = (int(d) % rank for d in args(node)[1:3])
        order[a], order[b] = b, a
    else:
        order.reverse()
    return _reorder(run.env[args(node)[0]], order)


@handles("expand", "expand_as")
def expand(run: Interpreter, node: fx.Node) -> Labels:
    """Axes of one position repeated: alike at every position, so they follow whatever they meet."""
    x, out = run.label(args(node)[0]), shape(node)
    before = shape(args(node)[0])
    offset = len(out) - len(x)
    return tuple(
        x[i - offset] if i >= offset and before[i - offset] == n else run.symbols.fresh(n) for i, n in enumerate(out)
    )


@handles("repeat")
def repeat(run: Interpreter, node: fx.Node) -> Labels:
    """Whole axes laid end to end, several times: the copies are alike, and their number follows what it meets."""
    x, times = list(run.label(args(node)[0])), [int(n) for n in args(node)[1]]
    x = [*(run.symbols.fresh(1) for _ in range(len(times) - len(x))), *x]
    for i, n in enumerate(times):
        label = run.symbols.trim(x[i])
        if n > 1 and label in ((), ((),)):
            x[i] = run.symbols.fresh(n)
        elif n > 1:
            x[i] = ((*run.symbols.fresh(n)[0], *label[0]),) if len(label) == 1 else label * n
    return tuple(x)


@handles("repeat_interleave")
def repeat_interleave(run: Interpreter, node: fx.Node) -> Any:
    """Every position of an axis several times in a row; with a number for each, the axis stays."""
    x, times, dim = run.label(args(node)[0]), args(node)[1], argument(node, 2, "dim")
    if dim is None or not isinstance(times, int):
        return freeze_all(run, node, f"{name(node)} repeats each position as often as a number says")
    i = int(dim) % len(x)
    return (*x[:i], interleaved(run.symbols, x[i], times), *x[i + 1 :])


@handles("roll", "flip")
def shifted(run: Interpreter, node: fx.Node) -> Labels:
    """Positions moved along some axes, which then stay; the others pass."""
    x = list(run.label(args(node)[0]))
    dims = argument(node, 2 if operator_name(node) == "roll" else 1, "dims")
    for d in dims or range(len(x)):  # without axes, all are rolled as one
        i = int(d) % len(x)
        run.symbols.freeze(x[i], f"{name(node)} moves its positions")
        x[i] = run.symbols.fresh(shape(node)[i], f"{name(node)} moves its positions")
    return tuple(x)


@handles("pad", "constant_pad_nd")
def pad(run: Interpreter, node: fx.Node) -> Labels:
    """Positions added around some axes; a constant border is alike everywhere and follows what it meets."""
    x = list(run.label(args(node)[0]))
    widths, mode = [int(n) for n in args(node)[1]], argument(node, 2, "mode", "constant")
    for k, (before, after) in enumerate(zip(widths[::2], widths[1::2], strict=True)):
        i = len(x) - 1 - k
        if before == after == 0:
            continue
        if mode != "constant" or min(before, after) < 0:
            run.symbols.freeze(x[i], f"{name(node)} reads its positions")
            x[i] = run.symbols.fresh(shape(node)[i], f"{name(node)} reads its positions")
        else:
            borders = [run.symbols.fresh(n) if n else () for n in (before, after)]
            x[i] = (*borders[0], *run.symbols.resolve(x[i]), *borders[1])
    return tuple(x)
