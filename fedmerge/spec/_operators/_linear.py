"""Operators that are linear in their tensors: layers, products, attention, embedding."""

from typing import Any

from torch import fx

from fedmerge.spec._operators._interpreter import (
    Interpreter,
    Labels,
    args,
    argument,
    handles,
    name,
    operator_name,
    shape,
    spatial,
    unknown,
)
from fedmerge.spec._symbols import Label


def tie_bias(run: Interpreter, node: fx.Node, out: Label) -> None:
    """The bias, third argument, moves with the output axis."""
    bias = argument(node, 2, "bias")
    if isinstance(bias, fx.Node):
        run.symbols.tie(out, run.label(bias)[0], name(node))


@handles("linear")
def linear(run: Interpreter, node: fx.Node) -> Labels:
    """y[..., o] = sum_i x[..., i] W[o, i] + b[o]."""
    x, weight = run.label(args(node)[0]), run.label(args(node)[1])
    run.symbols.tie(x[-1], weight[1], name(node))
    tie_bias(run, node, weight[0])
    return (*x[:-1], weight[0])


@handles("conv1d", "conv2d", "conv3d")
def convolution(run: Interpreter, node: fx.Node) -> Labels:
    """Convolution: channels like a linear layer; kernel and image positions stay.

    With G groups, y[g U + u] = sum_i W[g U + u, i] x[g I + i]: the input channels are the product (g, i), the
    output channels the product (g, u). Whole groups may move, and so may i and u within them, in all groups
    alike, because the weight has one axis for i.
    """
    x, weight = run.label(args(node)[0]), run.label(args(node)[1])
    channel = len(x) - spatial(node) - 1
    for label in (*x[channel + 1 :], *weight[2:]):
        run.symbols.freeze(label, "a position in an image or a kernel")
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
    tie_bias(run, node, weight[0])
    positions = tuple(run.symbols.fresh(n, "a position in an image") for n in shape(node)[channel + 1 :])
    return (*x[:channel], weight[0], *positions)


@handles("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(run: Interpreter, node: fx.Node) -> Any:
    """As a convolution, with the weight's first two axes exchanged; with groups it is not understood."""
    x, weight = run.label(args(node)[0]), run.label(args(node)[1])
    if int(argument(node, 6, "groups", 1)) != 1:
        return unknown(run, node)
    dims = int(operator_name(node)[-2])
    channel = len(x) - dims - 1
    for label in (*x[channel + 1 :], *weight[2:]):
        run.symbols.freeze(label, "a position in an image or a kernel")
    run.symbols.tie(x[channel], weight[0], name(node))
    tie_bias(run, node, weight[1])
    positions = tuple(run.symbols.fresh(n, "a position in an image") for n in shape(node)[channel + 1 :])
    return (*x[:channel], weight[1], *positions)


@handles("matmul", "bmm", "mm")
def matmul(run: Interpreter, node: fx.Node) -> Any:
    """c[..., i, j] = sum_k a[..., i, k] b[..., k, j]."""
    a, b = (run.label(tensor) for tensor in args(node)[:2])
    if len(a) < 2 or len(b) < 2:
        return unknown(run, node)
    run.symbols.tie(a[-1], b[-2], name(node))
    batch = _broadcast(run, node, [(a[:-2], shape(args(node)[0])[:-2]), (b[:-2], shape(args(node)[1])[:-2])])
    return (*batch, a[-2], b[-1])


def _broadcast(run: Interpreter, node: fx.Node, tensors: list[tuple[Labels, tuple[int, ...]]]) -> Labels:
    """Leading axes of a batched product: those that meet move together."""
    rank = max(len(labels) for labels, _ in tensors)
    result: list[Label] = []
    for i in range(-rank, 0):
        met = [(labels[i], sizes[i]) for labels, sizes in tensors if len(labels) >= -i]
        label, n = max(met, key=lambda pair: pair[1])
        for other, m in met:
            if m == n:
                run.symbols.tie(label, other, name(node))
        result.append(label)
    return tuple(result)


@handles("einsum")
def einsum(run: Interpreter, node: fx.Node) -> Any:
    """A sum of products over lettered axes: axes of one letter move together, summed ones included."""
    equation, operands = str(args(node)[0]).replace(" ", ""), args(node)[1]
    inputs, arrow, output = equation.partition("->")
    if "." in equation or not arrow:
        return unknown(run, node)
    letters: dict[str, tuple[Label, int]] = {}
    for term, tensor in zip(inputs.split(","), operands, strict=True):
        for letter, label, n in zip(term, run.label(tensor), shape(tensor), strict=True):
            known, m = letters.get(letter, (label, n))
            if m == n:
                run.symbols.tie(known, label, name(node))
            letters[letter] = (known, m) if m >= n else (label, n)
    return tuple(letters[letter][0] for letter in output)


@handles("scaled_dot_product_attention")
def attention(run: Interpreter, node: fx.Node) -> Any:
    """y[..., l, e] = sum_s softmax_s(sum_d q[..., l, d] k[..., s, d] + mask[..., l, s]) v[..., s, e]."""
    if node.kwargs.get("enable_gqa", False):
        return unknown(run, node)
    q, k, v = (run.label(tensor) for tensor in args(node)[:3])
    run.symbols.tie(q[-1], k[-1], name(node))
    run.symbols.tie(k[-2], v[-2], name(node))
    stacked = [(labels[:-2], shape(t)[:-2]) for labels, t in zip((q, k, v), args(node)[:3], strict=True)]
    batch = _broadcast(run, node, stacked)
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, fx.Node):
        sizes = (*shape(node)[:-1], shape(args(node)[1])[-2])
        scores = (*batch, q[-2], k[-2])
        for axis in range(-len(shape(mask)), 0):
            if shape(mask)[axis] == sizes[axis]:
                run.symbols.tie(scores[axis], run.label(mask)[axis], name(node))
    if argument(node, 5, "is_causal", False):
        for label in (q[-2], k[-2]):
            run.symbols.freeze(label, f"{name(node)}: a causal mask orders the positions")
    return (*batch, q[-2], v[-1])


@handles("embedding")
def embedding(run: Interpreter, node: fx.Node) -> Labels:
    """y[..., e] = W[x[...], e]: the rows stay, for the input's numbers name them."""
    weight, indices = run.label(args(node)[0]), run.label(args(node)[1])
    run.symbols.freeze(weight[0], f"{name(node)}: rows are named by an index")
    return (*indices, weight[1])
