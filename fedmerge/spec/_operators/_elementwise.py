"""Operators that act on each element, or on each position of an axis alike."""

from typing import Any

from torch import Tensor, fx

from fedmerge.spec._operators._interpreter import (
    Interpreter,
    Labels,
    Stack,
    args,
    argument,
    handles,
    name,
    operator_name,
    shape,
    spatial,
    tensors,
)
from fedmerge.spec._symbols import Label


@handles("getitem")
def getitem(run: Interpreter, node: fx.Node) -> Any:
    """One result of an operator that has several."""
    return run.env[args(node)[0]][args(node)[1]]


@handles("dropout", "dropout_", "feature_dropout", "feature_dropout_", "alpha_dropout", "alpha_dropout_", "clone",
         "contiguous", "detach", "detach_", "alias", "to", "zero_", "_to_copy", "lift_fresh_copy",
         "_assert_tensor_metadata")  # fmt: skip
def same(run: Interpreter, node: fx.Node) -> Any:
    """Operators that act on each element alone and keep the shape."""
    return run.env[args(node)[0]] if isinstance(node.meta.get("val"), Tensor) else ()


@handles("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(run: Interpreter, node: fx.Node) -> Labels:
    """Over one axis, symmetric in its positions; slices of a stack that it runs over meet unit by unit."""
    return run.label(args(node)[0])


@handles("pointwise", "where", "fill_", "copy_", "masked_fill", "masked_fill_", "rsub", "log_sigmoid",
         "hardswish", "hardswish_", "mish", "mish_", "relu6", "relu6_", "threshold", "threshold_")  # fmt: skip
def pointwise(run: Interpreter, node: fx.Node) -> Any:
    """Elementwise operators with broadcasting: axes that meet move together.

    Operators that PyTorch tags as pointwise come here by their tag; the names are those that it leaves out.
    """
    inputs = tensors(node)
    if len(inputs) == 1 and isinstance(run.env[inputs[0]], Stack):
        return run.env[inputs[0]]
    out = shape(node)
    result: list[Label | None] = [None] * len(out)
    for tensor in inputs:
        labels = run.label(tensor)
        offset = len(out) - len(labels)
        for i, label in enumerate(labels):
            if shape(tensor)[i] != out[offset + i]:
                continue  # broadcast from one position
            known = result[offset + i]
            if known is None:
                result[offset + i] = label
            else:
                run.symbols.tie(known, label, name(node))
    return tuple(run.symbols.fresh(n) if known is None else known for n, known in zip(out, result, strict=True))


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


@handles("mean", "sum", "amax", "amin", "logsumexp", "norm", "linalg_vector_norm", "max", "min", "var", "std")
def reduction(run: Interpreter, node: fx.Node) -> Any:
    """A symmetric function of the positions of an axis: that axis may move freely."""
    operator = operator_name(node)
    if operator in ("max", "min") and len(tensors(node)) > 1:
        return pointwise(run, node)
    x = run.label(args(node)[0])
    dims: Any = argument(node, 2 if "norm" in operator else 1, "dim")
    if dims is None or isinstance(dims, bool) or dims == []:
        dims = list(range(len(x)))
    gone = {int(d) % len(x) for d in ([dims] if isinstance(dims, int) else dims)}
    values = node.meta["val"]
    first = values[0] if isinstance(values, (tuple, list)) else values
    keep = first.dim() == len(x)
    kept = [run.symbols.fresh(1) if i in gone else label for i, label in enumerate(x) if keep or i not in gone]
    if not isinstance(values, (tuple, list)):
        return tuple(kept)
    for i in gone:  # the index of the maximum says where it was
        run.symbols.freeze(x[i], f"{name(node)} returns a position")
    return [tuple(kept)] * len(values)


@handles("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "avg_pool1d", "avg_pool2d",
         "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
         "adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d")  # fmt: skip
def pooling(run: Interpreter, node: fx.Node) -> Any:
    """Each channel by itself: channels pass, image positions stay."""
    x = list(run.label(args(node)[0]))
    values = node.meta["val"]
    first = values[0] if isinstance(values, (tuple, list)) else values
    for i in range(len(x) - spatial(node), len(x)):
        run.symbols.freeze(x[i], "a position in an image")
        x[i] = run.symbols.fresh(int(first.shape[i]), "a position in an image")
    return [tuple(x)] * len(values) if isinstance(values, (tuple, list)) else tuple(x)


@handles("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "zeros_like",
         "ones_like", "full_like", "empty_like")  # fmt: skip
def constant(run: Interpreter, node: fx.Node) -> Labels:
    """One number everywhere: alike at every position, so it follows whatever it meets."""
    return tuple(run.symbols.fresh(n) for n in shape(node))


@handles("arange", "linspace", "eye", "scalar_tensor")
def ordered(run: Interpreter, node: fx.Node) -> Any:
    """Numbers that say where they stand: they stay."""
    return run.like(node, "a constant of the network")
