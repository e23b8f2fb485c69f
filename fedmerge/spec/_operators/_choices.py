"""Operators that read or write positions by their number."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fedmerge.spec._operators._interpreter import (
    Interpreter,
    Labels,
    args,
    argument,
    freeze_all,
    handles,
    meet,
    name,
    operator_name,
    shape,
)
from fedmerge.spec._symbols import Label


def _by_number(run: Interpreter, node: fx.Node, label: Label) -> str:
    reason = f"{name(node)} takes positions by number"
    run.symbols.freeze(label, reason)
    return reason


@handles("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
def index(run: Interpreter, node: fx.Node) -> Any:
    """Positions by tensors of numbers or by masks: those axes stay, the other axes pass.

    The axes of the numbers come where the first of theirs was; at the front where they are not in a row.
    """
    x, given = run.label(args(node)[0]), list(args(node)[1])
    numbers: list[tuple[Labels, Sequence[int]]] = []
    used: list[int] = []
    at = 0
    for entry in given:
        mask = isinstance(entry, fx.Node) and entry.meta["val"].dtype in (torch.bool, torch.uint8)
        width = len(shape(entry)) if mask else 1
        if isinstance(entry, fx.Node):
            for label in x[at : at + width]:
                _by_number(run, node, label)
            used += range(at, at + width)
            if mask:
                run.freeze(run.label(entry), f"{name(node)} takes positions by number")
            else:
                numbers.append((run.label(entry), shape(entry)))
        at += width
    if len(used) == 1 and numbers:
        chosen = numbers[0][0]
    elif numbers and len(numbers) == len(used):
        lengths = torch.broadcast_shapes(*(size for _, size in numbers))
        chosen = meet(run, node, numbers, lengths)
    else:  # with masks: as many positions as they let through
        chosen = tuple(run.symbols.fresh(10_007, f"{name(node)} takes positions by number") for _ in range(1))
    first = used[0] if used and used == list(range(used[0], used[-1] + 1)) else 0
    left = [label for i, label in enumerate(x) if i not in used]
    found = (*left[:first], *chosen, *left[first:])
    if "put" not in operator_name(node):
        masked = len(numbers) < len(used)
        sizes = shape(node)
        return found if not masked else _sized(run, found, sizes, first, f"{name(node)} takes positions by number")
    values = args(node)[2]
    before = shape(args(node)[0])
    rest = [n for i, n in enumerate(before) if i not in used]
    if numbers and len(numbers) == len(used):
        middle = list(torch.broadcast_shapes(*(size for _, size in numbers)))
        meet(run, node, [(found, [*rest[:first], *middle, *rest[first:]]), (run.label(values), shape(values))],
             [*rest[:first], *middle, *rest[first:]])  # fmt: skip
    else:
        for label, n, m in zip(reversed(left), reversed(rest), reversed(shape(values)), strict=False):
            run.symbols.freeze(label, f"{name(node)} takes positions by number") if n != m != 1 else None
        run.freeze(run.label(values), f"{name(node)} writes under a mask")
        run.freeze(x, f"{name(node)} writes under a mask")
    return x


def _sized(run: Interpreter, found: Labels, sizes: Sequence[int], at: int, reason: str) -> Labels:
    return (*found[:at], run.symbols.fresh(sizes[at], reason), *found[at + 1 :])


@handles("index_select")
def index_select(run: Interpreter, node: fx.Node) -> Labels:
    """Positions of one axis by number."""
    x, dim = run.label(args(node)[0]), int(args(node)[1]) % max(1, len(shape(args(node)[0])))
    _by_number(run, node, x[dim])
    return (*x[:dim], *run.label(args(node)[2]), *x[dim + 1 :])


@handles("index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_", "index_reduce",
         "index_reduce_")  # fmt: skip
def index_add(run: Interpreter, node: fx.Node) -> Labels:
    """Slices written to positions of one axis by number."""
    x, dim = run.label(args(node)[0]), int(args(node)[1]) % max(1, len(shape(args(node)[0])))
    _by_number(run, node, x[dim])
    numbers, source = run.label(args(node)[2]), args(node)[3]
    if isinstance(source, fx.Node) and shape(source):
        for i, label in enumerate(run.label(source)):
            run.symbols.tie(label, numbers[0] if i == dim else x[i], name(node))
    return x


@handles("gather", "take_along_dim", "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce",
         "scatter_reduce_")  # fmt: skip
def gather(run: Interpreter, node: fx.Node) -> Any:
    """out[i, j] = x[i, numbers[i, j]] and its counterpart that writes: one axis by number, the others side by side."""
    operator = operator_name(node)
    x, lengths = list(run.label(args(node)[0])), shape(args(node)[0])
    if operator == "take_along_dim":
        numbers, given = args(node)[1], argument(node, 2, "dim")
    else:
        given, numbers = argument(node, 1, "dim"), argument(node, 2, "index")
    if given is None or not lengths:
        return freeze_all(run, node, f"{name(node)} takes positions by number")
    dim = int(given) % len(x)
    _by_number(run, node, x[dim])
    if operator == "take_along_dim":
        out = shape(node)
        operands = [(run.label(numbers), shape(numbers)), (tuple(x), (*lengths[:dim], -1, *lengths[dim + 1 :]))]
        return meet(run, node, operands, out)
    result = _side_by_side(run, node, tuple(x), lengths, numbers, dim)
    if operator == "gather":
        return result
    source = argument(node, 3, "src")
    if isinstance(source, fx.Node) and shape(source):
        # A source is read from its start, as far as the numbers go.
        _side_by_side(run, node, run.label(source), shape(source), numbers, None)
    return tuple(x)


def _side_by_side(
    run: Interpreter, node: fx.Node, x: Labels, lengths: Sequence[int], numbers: fx.Node, dim: int | None
) -> Labels:
    """Tie the axes of ``numbers`` to those of ``x`` that they run beside, all but ``dim``."""
    result = list(run.label(numbers))
    for i, n in enumerate(shape(numbers)):
        if i != dim:
            piece = x[i] if lengths[i] == n else run.symbols.cut(x[i], n, name(node))[0]
            run.symbols.tie(piece, result[i], name(node))
    return tuple(result)


@handles("one_hot")
def one_hot(run: Interpreter, node: fx.Node) -> Labels:
    """A new axis whose positions are numbers."""
    return (*run.label(args(node)[0]), run.symbols.fresh(shape(node)[-1], f"{name(node)} numbers its positions"))


@handles("diagonal", "diag_embed")
def diagonal(run: Interpreter, node: fx.Node) -> Any:
    """The diagonal of two axes, which move together; or a vector as a diagonal."""
    x = run.label(args(node)[0])
    first, second = argument(node, 2, "dim1", 0), argument(node, 3, "dim2", 1)
    if operator_name(node) == "diag_embed":
        first, second = argument(node, 2, "dim1", -2), argument(node, 3, "dim2", -1)
    rank = len(shape(node)) if operator_name(node) == "diag_embed" else len(x)
    i, j = int(first) % rank, int(second) % rank
    if argument(node, 1, "offset", 0):
        return freeze_all(run, node, f"{name(node)} keeps one side of the diagonal")
    if operator_name(node) == "diag_embed":
        rest = list(x[:-1])
        for k in sorted((i, j)):
            rest.insert(k, x[-1])
        return tuple(rest)
    if shape(args(node)[0])[i] != shape(args(node)[0])[j]:
        return freeze_all(run, node, f"{name(node)} keeps one side of the diagonal")
    run.symbols.tie(x[i], x[j], name(node))
    return (*(label for k, label in enumerate(x) if k not in (i, j)), x[i])
