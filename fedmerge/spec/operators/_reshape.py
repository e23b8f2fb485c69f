"""Reshaping: axes merged into products (flatten after convolution) or cut out of them (attention heads)."""

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    Stack,
    args,
    freeze_all,
    handles,
    key,
    name,
    shape,
    without,
)
from fedmerge.spec.symbols import Label, Part, Symbols, length

_MAX_SLICES = 16


@handles("flatten", "view", "reshape", "unflatten", "_unsafe_view", "squeeze", "unsqueeze", "view_as", "reshape_as")
def reshape(run: Interpreter, node: fx.Node) -> Any:
    """The same elements in the same order, under other axes.

    An axis that is cut into slices which the network later picks one by one (queries, keys and values), and a
    concatenation that is cut into its pieces, become a :class:`Stack`; other factors move as products.
    """
    value = run.env[args(node)[0]]
    before, after = shape(args(node)[0]), shape(node)
    if 0 in before:
        return freeze_all(run, node, f"{name(node)}: a tensor without positions")
    if isinstance(value, Stack):
        result = _of_stack(run, node, value, before, after)
        if result is not None:
            return result
    x = run.label(args(node)[0])
    for source, target in runs(before, after):
        wide, cut = [i for i in source if before[i] > 1], [j for j in target if after[j] > 1]
        if len(wide) != 1 or len(cut) < 2 or run.symbols.frozen(x[wide[0]]):
            continue
        many = len(run.symbols.trim(x[wide[0]])) > 1 and after[cut[0]] <= _MAX_SLICES
        if many or run.stacks.get(key(node)) == cut[0]:
            return _to_stack(run, node, x, wide[0], cut[0])
    result = _plain(run, node, x, before, after)
    for source, target in runs(before, after):
        cut = [j for j in target if after[j] > 1]
        if len(cut) > 1 and sum(before[i] > 1 for i in source) == 1:
            run.origins.update((part.symbol, (key(node), cut[0])) for part in result[cut[0]][0][:1])
    return result


def runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes of two shapes that hold equally many positions, in order."""
    result: list[tuple[list[int], list[int]]] = []
    i = o = 0
    while i < len(before) or o < len(after):
        source, target, have, want = [], [], 1, 1
        if i < len(before):
            source.append(i)
            have, i = before[i], i + 1
        if o < len(after):
            target.append(o)
            want, o = after[o], o + 1
        while have != want:
            if have < want:
                source.append(i)
                have, i = have * before[i], i + 1
            else:
                target.append(o)
                want, o = want * after[o], o + 1
        result.append((source, target))
    return result


def _plain(run: Interpreter, node: fx.Node, x: Labels, before: Sequence[int], after: Sequence[int]) -> Labels:
    """Labels of the reshaped tensor, run by run."""
    result: list[Label] = []
    for source, target in runs(before, after):
        result += _regroup(run.symbols, [x[i] for i in source], [after[j] for j in target], name(node))
    return tuple(result)


def _to_stack(run: Interpreter, node: fx.Node, x: Labels, axis: int, dim: int) -> Stack:
    """Cut ``axis`` into equal slices, numbered by axis ``dim`` of the result."""
    before, after = shape(args(node)[0]), shape(node)
    n, rest = after[dim], x[axis]
    each, slices = before[axis] // n, []
    for _ in range(n):
        piece, rest = run.symbols.cut(rest, each, name(node))
        inner = (*x[:axis], piece, *x[axis + 1 :])
        slices.append(_plain(run, node, inner, (*before[:axis], each, *before[axis + 1 :]), without(after, dim)))
    return Stack(dim, tuple(slices))


def _of_stack(run: Interpreter, node: fx.Node, value: Stack, before: Sequence[int], after: Sequence[int]) -> Any:
    """Reshape a stack: slice by slice, or laid end to end again; None when its axis is mixed with others."""
    source, target = next(pair for pair in runs(before, after) if value.dim in pair[0])
    wide, cut = [i for i in source if before[i] > 1], [j for j in target if after[j] > 1]
    if len(cut) != 1 or wide[0] != value.dim:
        return None
    dim, n = cut[0], len(value.slices)
    inner = without(before, value.dim)
    if wide == [value.dim]:
        rest = without(after, dim)
        return Stack(dim, tuple(_plain(run, node, labels, inner, rest) for labels in value.slices))
    parts = (*after[:dim], after[dim] // n, *after[dim + 1 :])
    slices = [_plain(run, node, labels, inner, parts) for labels in value.slices]
    for other in slices[1:]:
        for i, (a, b) in enumerate(zip(slices[0], other, strict=True)):
            if i != dim:
                run.symbols.tie(a, b, name(node))
    joined = tuple(product for labels in slices for product in run.symbols.resolve(labels[dim]))
    return (*slices[0][:dim], joined, *slices[0][dim + 1 :])


def _regroup(symbols: Symbols, taken: Sequence[Label], wanted: Sequence[int], operator: str) -> list[Label]:
    """Labels of ``wanted`` axes that together hold the positions of ``taken`` axes, in order."""
    if len(taken) == 1 and list(wanted) == [length(taken[0])]:
        return [taken[0]]
    big = [label for label in taken if length(label) > 1]
    if len(big) <= 1 and math.prod(wanted) == max(wanted, default=1):  # only axes of one position come or go
        moved = iter(big)
        return [next(moved) if n > 1 else symbols.fresh(1) for n in wanted]
    big = [symbols.trim(label) for label in big]
    if all(symbols.frozen(label) for label in big):
        reason = symbols.why(tuple(product for label in big for product in label))
        return [symbols.fresh(n, reason) for n in wanted]
    if len(wanted) == 1 and all(len(label) == 1 for label in big[1:]):
        tail = [part for label in big[1:] for part in label[0]]
        return [tuple((*product, *tail) for product in big[0])]
    if any(len(label) > 1 for label in big):
        for label in big:
            symbols.freeze(label, f"{operator}: a concatenation is reshaped")
        return [symbols.fresh(n, f"{operator}: a concatenation is reshaped") for n in wanted]
    return _distribute(symbols, [part for label in big for part in label[0]], wanted, operator)


def _distribute(symbols: Symbols, parts: list[Part], wanted: Sequence[int], operator: str) -> list[Label]:
    """Deal the factors ``parts`` out to ``wanted`` axes, cutting factors where an axis ends within one."""
    whole, result = list(parts), []
    for n in wanted:
        product: list[Part] = []
        room = n
        while room > 1:
            part = parts.pop(0)
            common = math.gcd(part.size, room)
            if part.size > room == common:
                part, rest = symbols.split(part, (room, part.size // room))
                parts.insert(0, rest)
            elif part.size != common:
                return _uneven(symbols, whole, wanted, operator)
            product.append(part)
            room //= part.size
        result.append((tuple(product),) if product else symbols.fresh(1))
    return result


def _uneven(symbols: Symbols, parts: list[Part], wanted: Sequence[int], operator: str) -> list[Label]:
    reason = f"{operator}: axes are cut unevenly"
    symbols.freeze((tuple(parts),), reason)
    return [symbols.fresh(n, reason) for n in wanted]
