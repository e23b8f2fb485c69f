"""Sums of products: matrix products in all their forms, einsum, attention, distances."""

from collections.abc import Hashable, Sequence
from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    args,
    argument,
    axes,
    handles,
    meet,
    name,
    operator_name,
    shape,
)
from fedmerge.spec.symbols import Label, Symbols

Letters = tuple[Hashable, ...]


def contract(run: Interpreter, node: fx.Node, operands: Sequence[tuple[Any, Letters]], out: Letters) -> Labels:
    """A sum of products over lettered axes: axes of one letter move together, summed ones included."""
    known: dict[Hashable, tuple[Label, int]] = {}
    for tensor, letters in operands:
        for letter, label, n in zip(letters, run.label(tensor), shape(tensor), strict=True):
            before, m = known.get(letter, (label, n))
            if m == n:
                run.symbols.tie(before, label, name(node))
            known[letter] = (before, m) if m >= n else (label, n)
    return tuple(known[letter][0] for letter in out)


def _batch(rank: int) -> Letters:
    """Letters of ``rank`` leading axes, which meet from the right."""
    return tuple(range(-rank, 0))


def product(run: Interpreter, node: fx.Node, a: fx.Node, b: fx.Node) -> Labels:
    """c[..., i, j] = sum_k a[..., i, k] b[..., k, j]; a vector lacks i or j."""
    before, after = len(shape(a)), len(shape(b))
    left: Letters = (*_batch(before - 2), "i", "k") if before > 1 else ("k",)
    right: Letters = (*_batch(after - 2), "k", "j") if after > 1 else ("k",)
    rows, columns = left[-2:-1], right[-1:] if after > 1 else ()
    return contract(run, node, [(a, left), (b, right)], (*_batch(max(before, after) - 2), *rows, *columns))


@handles("matmul", "bmm", "mm", "mv", "dot", "vdot", "linalg_matmul")
def matmul(run: Interpreter, node: fx.Node) -> Labels:
    """A product of matrices or vectors."""
    return product(run, node, args(node)[0], args(node)[1])


@handles("addmm", "addmv", "baddbmm", "addmm_", "addmv_", "baddbmm_")
def added_product(run: Interpreter, node: fx.Node) -> Labels:
    """A product of matrices or vectors, and a term that is broadcast to it."""
    term, a, b = args(node)[:3]
    operands = [(product(run, node, a, b), shape(node)), (run.label(term), shape(term))]
    return meet(run, node, operands, shape(node))


@handles("addbmm", "addbmm_")
def added_products(run: Interpreter, node: fx.Node) -> Labels:
    """The sum over a batch of products of matrices, and a term that is broadcast to it."""
    term, a, b = args(node)[:3]
    summed = contract(run, node, [(a, ("n", "i", "k")), (b, ("n", "k", "j"))], ("i", "j"))
    return meet(run, node, [(summed, shape(node)), (run.label(term), shape(term))], shape(node))


@handles("inner", "outer", "ger", "bilinear", "cdist", "_cdist_forward", "_euclidean_dist")
def lettered(run: Interpreter, node: fx.Node) -> Labels:
    """Products and distances of two tensors whose axes are told by their place."""
    a, b, *rest = args(node)
    before, after = len(shape(a)), len(shape(b))
    left: Letters = tuple(f"a{i}" for i in range(before - 1))
    right: Letters = tuple(f"b{i}" for i in range(after - 1))
    operator = operator_name(node)
    if operator == "inner":
        return contract(run, node, [(a, (*left, "k")), (b, (*right, "k"))], (*left, *right))
    if operator in ("outer", "ger"):
        return contract(run, node, [(a, ("i",)), (b, ("j",))], ("i", "j"))
    if operator == "bilinear":  # y[..., o] = sum_ij a[..., i] W[o, i, j] b[..., j] + bias[o]
        result = contract(run, node, [(a, (*left, "i")), (b, (*left, "j")), (rest[0], ("o", "i", "j"))], (*left, "o"))
        bias = argument(node, 3, "bias")
        if isinstance(bias, fx.Node):
            run.symbols.tie(result[-1], run.label(bias)[0], name(node))
        return result
    rows, columns = (*_batch(before - 2), "i"), (*_batch(after - 2), "j")
    return contract(run, node, [(a, (*rows, "k")), (b, (*columns, "k"))], (*_batch(max(before, after) - 2), "i", "j"))


@handles("tensordot")
def tensordot(run: Interpreter, node: fx.Node) -> Labels:
    """Summed over pairs of axes; those that are left follow each other."""
    (a, b), ranks = args(node)[:2], [len(shape(t)) for t in args(node)[:2]]
    left: list[Hashable] = [f"a{i}" for i in range(ranks[0])]
    right: list[Hashable] = [f"b{i}" for i in range(ranks[1])]
    for i, j in zip(axes(args(node)[2], ranks[0]), axes(args(node)[3], ranks[1]), strict=True):
        left[i] = right[j] = ("summed", i)
    out = tuple(letter for letter in (*left, *right) if isinstance(letter, str))
    return contract(run, node, [(a, tuple(left)), (b, tuple(right))], out)


@handles("einsum")
def einsum(run: Interpreter, node: fx.Node) -> Labels:
    """A sum of products over lettered axes; ``...`` stands for the axes that are left, which meet from the right."""
    return contract(run, node, *spelled(node))


def spelled(node: fx.Node) -> tuple[list[tuple[Any, Letters]], Letters]:
    """The operands of an einsum with the letters of their axes, and the letters of its result."""
    equation = str(args(node)[0]).replace(" ", "")
    operands = args(node)[1]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if not arrow:  # without an output: the letters that occur once, in alphabetical order
        once = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
        output = ("..." if "..." in inputs else "") + "".join(once)
    ranks = [len(shape(t)) - len(term.replace("...", "")) for term, t in zip(terms, operands, strict=True)]
    rest = max((n for n, term in zip(ranks, terms, strict=True) if "..." in term), default=0)
    lettered = [(t, _spelled(term, n)) for t, term, n in zip(operands, terms, ranks, strict=True)]
    return lettered, _spelled(output, rest)


def _spelled(term: str, rank: int) -> Letters:
    """The letters of ``term``, with ``rank`` axes for its ``...``."""
    before, dots, after = term.partition("...")
    return (*before, *(_batch(rank) if dots else ()), *after)


def interleaved(symbols: Symbols, label: Label, times: int) -> Label:
    """Every position of ``label`` that many times in a row: the copies are alike, and so follow what they meet."""
    if times == 1:
        return label
    return tuple((*segment, symbols.fresh(times)[0][0]) for segment in symbols.resolve(label))


@handles("scaled_dot_product_attention")
def attention(run: Interpreter, node: fx.Node) -> Labels:
    """y[..., l, e] = sum_s softmax_s(sum_d q[..., l, d] k[..., s, d] + mask[..., l, s]) v[..., s, e].

    With ``enable_gqa`` a head of k and v serves so many heads of q in a row: heads of q are the product
    (head of k, query of that head).
    """
    tensors = args(node)[:3]
    q, k, v = (run.label(tensor) for tensor in tensors)
    run.symbols.tie(q[-1], k[-1], name(node))
    run.symbols.tie(k[-2], v[-2], name(node))
    heads = []
    for labels, tensor in zip((q, k, v), tensors, strict=True):
        batch, lengths = list(labels[:-2]), list(shape(tensor)[:-2])
        if node.kwargs.get("enable_gqa", False):
            times = shape(tensors[0])[-3] // lengths[-1]
            batch[-1], lengths[-1] = interleaved(run.symbols, batch[-1], times), lengths[-1] * times
        heads.append((tuple(batch), lengths))
    batch_labels = meet(run, node, heads, shape(node)[:-2])
    scores = (*batch_labels, q[-2], k[-2])
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        lengths = [*shape(node)[:-1], shape(tensors[1])[-2]]
        meet(run, node, [(scores, lengths), (run.label(mask), shape(mask))], lengths)
    if argument(node, 5, "is_causal", False):
        for label in (q[-2], k[-2]):
            run.symbols.freeze(label, f"{name(node)}: a causal mask orders the positions")
    return (*batch_labels, q[-2], v[-1])
