"""Operators that read or write positions by their number."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from fedmerge.spec.operators.interpreter import (
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
from fedmerge.spec.symbols import Label


def _by_number(run: Interpreter, node: fx.Node, label: Label) -> str:
    reason = f"{name(node)} takes positions by number"
    run.symbols.freeze(label, reason)
    return reason


@handles("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put")
def index(run: Interpreter, node: fx.Node) -> Any:
    """Positions by tensors of numbers or by masks: those axes stay, the other axes pass.

    The axes of the numbers come where the first of theirs was; at the front where they are not in a row.
    """
    x, lengths = run.label(args(node)[0]), shape(args(node)[0])
    numbers: list[tuple[Labels, Sequence[int]]] = []
    used: list[int] = []
    at = 0
    for entry in args(node)[1]:
        if not isinstance(entry, fx.Node):
            at += 1
            continue
        mask = entry.meta["val"].dtype in (torch.bool, torch.uint8)
        places = range(at, at + (len(shape(entry)) if mask else 1))
        for label in [x[i] for i in places] + list(run.label(entry) if mask else ()):
            _by_number(run, node, label)
        if not mask:
            numbers.append((run.label(entry), shape(entry)))
        used += places
        at = places.stop
    if len(numbers) < len(used):  # as many positions as a mask lets through
        return _masked(run, node, x, used)
    chosen_lengths = list(_broadcast([size for _, size in numbers]))
    chosen = meet(run, node, numbers, chosen_lengths)
    first = used[0] if used == list(range(used[0], used[-1] + 1)) else 0
    left = [i for i in range(len(x)) if i not in used]
    found = (*(x[i] for i in left[:first]), *chosen, *(x[i] for i in left[first:]))
    if "put" not in operator_name(node):
        return found
    values, out = (
        args(node)[2],
        [*(lengths[i] for i in left[:first]), *chosen_lengths, *(lengths[i] for i in left[first:])],
    )
    meet(run, node, [(found, out), (run.label(values), shape(values))], out)
    return x


def _broadcast(lengths: Sequence[Sequence[int]]) -> list[int]:
    rank = max(len(size) for size in lengths)
    return [max(size[i] for size in lengths if len(size) >= -i) for i in range(-rank, 0)]


def _masked(run: Interpreter, node: fx.Node, x: Labels, used: Sequence[int]) -> Labels:
    """Reading or writing where a mask, on neighbouring axes from ``used[0]`` on, says so."""
    first, last = used[0], used[-1] + 1
    reason = f"{name(node)} takes positions by number"
    if list(used) != list(range(first, last)):
        return tuple(freeze_all(run, node, reason))
    if "put" not in operator_name(node):
        return (*x[:first], run.symbols.fresh(shape(node)[first], reason), *x[last:])
    values = args(node)[2]
    chosen = run.symbols.fresh(shape(values)[-1 - len(x) + last] if len(shape(values)) > len(x) - last else 1, reason)
    written = (*x[:first], chosen, *x[last:])
    operands = [run.label(values), written]
    for a, b, n in zip(*(reversed(labels) for labels in operands), reversed(shape(values)), strict=False):
        if n > 1:
            run.symbols.tie(a, b, name(node))
    return x


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


@handles("nonzero", "nonzero_numpy", "masked_select", "masked_scatter", "masked_scatter_")
def nonzero(run: Interpreter, node: fx.Node) -> Any:
    """Where something is, or what is there, in the order of the positions."""
    return freeze_all(run, node, f"{name(node)} goes through its positions in order")


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
