"""Operators that act on each element, or on each position of an axis alike."""

from typing import Any

from torch import Tensor, fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    Stack,
    args,
    argument,
    freeze_all,
    handles,
    keeps_alike,
    meet,
    name,
    shape,
    tensors,
    without,
)


@handles("getitem")
def getitem(run: Interpreter, node: fx.Node) -> Any:
    """One result of an operator that has several."""
    return run.env[args(node)[0]][args(node)[1]]


@handles("dropout", "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout", "alpha_dropout_",
         "feature_alpha_dropout", "clone", "contiguous", "detach", "detach_", "alias", "to", "zero_", "_to_copy",
         "lift_fresh_copy", "real", "imag", "conj", "_conj", "conj_physical", "resolve_conj", "resolve_neg",
         "type_as")  # fmt: skip
@keeps_alike
def same(run: Interpreter, node: fx.Node) -> Any:
    """Operators that act on each element alone and keep the shape."""
    return run.env[args(node)[0]] if isinstance(node.meta.get("val"), Tensor) else ()


@handles("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size", "sym_numel", "sym_constrain_range",
         "sym_constrain_range_for_size", "_set_grad_enabled", "numel")  # fmt: skip
def nothing(run: Interpreter, node: fx.Node) -> Any:
    """What returns no tensor and looks at no number."""
    return ()


@handles("softmax", "log_softmax", "_softmax", "_log_softmax", "_safe_softmax")
def softmax(run: Interpreter, node: fx.Node) -> Labels:
    """Over one axis, symmetric in its positions; slices of a stack that it runs over meet unit by unit."""
    return run.label(args(node)[0])


@handles("pointwise", "where", "fill_", "copy_", "masked_fill", "masked_fill_", "rsub", "log_sigmoid",
         "hardswish", "hardswish_", "mish", "mish_", "relu6", "relu6_", "threshold", "threshold_", "_weight_norm",
         "complex", "polar")  # fmt: skip
@keeps_alike
def pointwise(run: Interpreter, node: fx.Node) -> Any:
    """Elementwise operators with broadcasting: axes that meet move together.

    Operators that PyTorch tags as pointwise come here by their tag; the names are those that it leaves out. The
    scale of a weight norm has one position on the axes that it is taken over.
    """
    if isinstance(node.meta["val"], (tuple, list)):  # where(condition) alone
        return freeze_all(run, node, f"{name(node)} goes through its positions in order")
    inputs, out = tensors(node), shape(node)
    stacks = [run.env[t].dim - len(shape(t)) for t in inputs if isinstance(run.env[t], Stack)]
    if stacks and all(_numbered(run, t, stacks[0]) for t in inputs):
        dim, rest = stacks[0] + len(out), without(out, stacks[0] + len(out))
        slices = []
        for k in range(out[dim]):
            parts = [_slice(run, t, stacks[0], k) for t in inputs]
            slices.append(meet(run, node, parts, rest))
        return Stack(dim, tuple(slices))
    return meet(run, node, [(run.label(t), shape(t)) for t in inputs], out)


def _numbered(run: Interpreter, tensor: fx.Node, axis: int) -> bool:
    """Whether the axis ``axis`` (from the right) of a tensor numbers slices, or all slices share what it holds."""
    value, lengths = run.env[tensor], shape(tensor)
    if isinstance(value, Stack):
        return bool(value.dim - len(lengths) == axis)
    return len(lengths) < -axis or lengths[axis] == 1


def _slice(run: Interpreter, tensor: fx.Node, axis: int, k: int) -> tuple[Labels, tuple[int, ...]]:
    value, lengths = run.env[tensor], shape(tensor)
    if len(lengths) < -axis:
        return run.label(tensor), lengths
    labels = value.slices[k] if isinstance(value, Stack) else without(value, axis + len(lengths))
    return labels, without(lengths, axis + len(lengths))


@handles("prelu")
def prelu(run: Interpreter, node: fx.Node) -> Labels:
    """One slope for all channels, or one a channel that moves with it."""
    x, slope = run.label(args(node)[0]), run.label(args(node)[1])
    if shape(args(node)[1]) != (1,):
        run.symbols.tie(x[1] if len(x) > 1 else x[0], slope[0], name(node))
    return x


@handles("glu")
def glu(run: Interpreter, node: fx.Node) -> Labels:
    """Half of an axis times the sigmoid of its other half: unit i of one meets unit i of the other."""
    x = list(run.label(args(node)[0]))
    dim = int(argument(node, 1, "dim", -1)) % len(x)
    left, right = run.symbols.cut(x[dim], shape(node)[dim], name(node))
    run.symbols.tie(left, right, name(node))
    x[dim] = left
    return tuple(x)


@handles("constant", "zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like",
         "ones_like", "full_like", "empty_like", "scalar_tensor")  # fmt: skip
def constant(run: Interpreter, node: fx.Node) -> Labels:
    """One number everywhere: alike at every position, so it follows whatever it meets."""
    return tuple(run.symbols.fresh(n) for n in shape(node))
