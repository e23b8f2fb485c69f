"""Layers with weights: linear maps, convolutions, embeddings."""

from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    args,
    argument,
    freeze_all,
    handles,
    name,
    shape,
    spatial,
)
from fedmerge.spec.symbols import Label


def tie_bias(run: Interpreter, node: fx.Node, out: Label) -> None:
    """The bias, third argument, moves with the output axis."""
    bias = argument(node, 2, "bias")
    if isinstance(bias, fx.Node) and shape(bias):
        run.symbols.tie(out, run.label(bias)[0], name(node))


@handles("linear")
def linear(run: Interpreter, node: fx.Node) -> Labels:
    """y[..., o] = sum_i x[..., i] W[o, i] + b[o]."""
    x, weight = run.label(args(node)[0]), run.label(args(node)[1])
    run.symbols.tie(x[-1], weight[-1], name(node))
    if len(weight) == 1:  # one output, without an axis for it
        return x[:-1]
    tie_bias(run, node, weight[0])
    return (*x[:-1], weight[0])


@handles("conv1d", "conv2d", "conv3d")
def convolution(run: Interpreter, node: fx.Node) -> Labels:
    """Convolution: channels like a linear layer; kernel and image positions stay.

    With G groups, y[g U + u] = sum_i W[g U + u, i] x[g I + i]: the input channels are the product (g, i), the
    output channels the product (g, u). Whole groups may move, and so may i and u within them, in all groups
    alike, because the weight has one axis for i.
    """
    x, weight, channel = _channels(run, node)
    groups = int(argument(node, 6, "groups", 1))
    within, out = shape(args(node)[1])[1], shape(args(node)[1])[0]
    if groups == 1:
        run.symbols.tie(x[channel], weight[1], name(node))
    elif groups == out and within == 1:  # depthwise
        run.symbols.tie(x[channel], weight[0], name(node))
    else:
        (group,), (output,) = run.symbols.fresh(groups)[0], run.symbols.fresh(out // groups)[0]
        (inner,) = run.symbols.fresh(within)[0]
        run.symbols.tie(x[channel], ((group, inner),), name(node))
        run.symbols.tie(weight[1], ((inner,),), name(node))
        run.symbols.tie(weight[0], ((group, output),), name(node))
    return _convolved(run, node, x, weight[0], channel)


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(run: Interpreter, node: fx.Node) -> Labels:
    """As a convolution, with the weight's axes (g, i) and o: with groups, the output channels are (g, o)."""
    x, weight, channel = _channels(run, node)
    groups = int(argument(node, 6, "groups", 1))
    run.symbols.tie(x[channel], weight[0], name(node))
    out = weight[1]
    if groups > 1:
        inputs, outputs = shape(args(node)[1])[:2]
        (group,), (inner,) = run.symbols.fresh(groups)[0], run.symbols.fresh(inputs // groups)[0]
        (output,) = run.symbols.fresh(outputs)[0]
        run.symbols.tie(weight[0], ((group, inner),), name(node))
        run.symbols.tie(weight[1], ((output,),), name(node))
        out = ((group, output),)
    return _convolved(run, node, x, out, channel)


@handles("torchvision.deform_conv2d")
def deformable_convolution(run: Interpreter, node: fx.Node) -> Any:
    """A convolution that reads each place where an offset says: the axes of the offsets stay.

    With O groups of offsets, the channels of a group move among themselves.
    """
    groups, offsets = int(args(node)[11]), int(args(node)[12])
    if groups > 1:
        return freeze_all(run, node, f"{name(node)} reads groups of channels at places of their own")
    x, weight = run.label(args(node)[0]), run.label(args(node)[1])
    places = f"{name(node)} reads positions by their place"
    run.symbols.tie(x[1], weight[1], name(node))
    if offsets > 1:
        each = shape(args(node)[0])[1] // offsets
        (group,), (within,) = run.symbols.fresh(offsets, places)[0], run.symbols.fresh(each)[0]
        run.symbols.tie(x[1], ((group, within),), name(node))
    run.freeze(weight[2:], "a position in an image or a kernel")
    for labels in (x[2:], *(run.label(given)[1:] for given in args(node)[2:4])):
        run.freeze(labels, places)
    run.symbols.tie(weight[0], run.label(args(node)[4])[0], name(node))
    return (x[0], weight[0], *(run.symbols.fresh(n, "a position in an image") for n in shape(node)[2:]))


def _channels(run: Interpreter, node: fx.Node) -> tuple[Labels, Labels, int]:
    """Input and weight, whose positions stay, and the axis of the channels."""
    x, weight = run.label(args(node)[0]), run.label(args(node)[1])
    channel = len(x) - spatial(node) - 1
    for label in x[channel + 1 :]:
        run.symbols.freeze(label, f"{name(node)} reads its positions with their neighbours")
    for label in weight[2:]:
        run.symbols.freeze(label, "a position in an image or a kernel")
    return x, weight, channel


def _convolved(run: Interpreter, node: fx.Node, x: Labels, out: Label, channel: int) -> Labels:
    tie_bias(run, node, out)
    positions = tuple(run.symbols.fresh(n, "a position in an image") for n in shape(node)[channel + 1 :])
    return (*x[:channel], out, *positions)


@handles("embedding")
def embedding(run: Interpreter, node: fx.Node) -> Labels:
    """y[..., e] = W[x[...], e]: the rows stay, for the input's numbers name them."""
    weight, indices = run.label(args(node)[0]), run.label(args(node)[1])
    run.symbols.freeze(weight[0], f"{name(node)}: rows are named by an index")
    return (*indices, weight[1])


@handles("embedding_bag")
def embedding_bag(run: Interpreter, node: fx.Node) -> Any:
    """Sums of rows of a table: its rows stay, and so do the bags."""
    weight = run.label(args(node)[0])
    reason = f"{name(node)}: rows are named by an index"
    run.symbols.freeze(weight[0], reason)
    for given in node.all_input_nodes:
        if given is not args(node)[0]:
            run.freeze(run.env[given], reason)
    bags, *others = run.like(node, reason)
    return [(bags[0], weight[1]), *others]
