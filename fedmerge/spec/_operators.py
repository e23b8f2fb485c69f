"""What each ATen operator does to the axes of its tensors.

One handler an operator family. A handler receives the tracer, the graph node and the labels of the
node's tensor arguments, ties or freezes their axes, and returns the labels of the result. An operator
without a handler freezes everything that enters it: unknown means unpermuted, never wrong.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fedmerge.spec._symbols import Label, Part, Symbols

Labels = tuple[Label, ...]
Handler = Callable[["Interpreter", fx.Node], Any]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler for ATen operators, named without ``aten.`` and overload."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


class Interpreter:
    """Runs a graph on labels instead of numbers."""

    def __init__(self, symbols: Symbols) -> None:
        self.symbols = symbols
        self.env: dict[fx.Node, Any] = {}

    def label(self, node: Any) -> Labels:
        """Labels of a tensor argument, one an axis."""
        labels: Labels = self.env[node]
        return labels

    def fixed(self, value: Tensor, reason: str) -> Labels:
        """Frozen labels for a tensor of the shape of ``value``."""
        return tuple(self.symbols.fresh(int(n), reason) for n in value.shape)

    def like(self, node: fx.Node, reason: str) -> Any:
        """Frozen labels for whatever ``node`` returns: a tensor, several, or none."""
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            return tuple(self.fixed(v, reason) if isinstance(v, Tensor) else () for v in value)
        return self.fixed(value, reason) if isinstance(value, Tensor) else ()

    def run(self, node: fx.Node) -> Any:
        """Labels of the result of ``node``."""
        packet = getattr(node.target, "overloadpacket", None)
        name = str(packet).removeprefix("aten.") if packet is not None else getattr(node.target, "__name__", "?")
        handler = HANDLERS.get(name) or HANDLERS.get(name.removesuffix("_"))
        if handler is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            handler = pointwise
        return (handler or unknown)(self, node)


def _args(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _tensors(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((_args(node), node.kwargs), lambda n: found.append(n) if isinstance(n.meta.get("val"), Tensor) else None)
    return found


def _shape(node: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


def _name(node: fx.Node) -> str:
    return node.name


def unknown(run: Interpreter, node: fx.Node) -> Any:
    """An operator that is not understood: nothing that enters it may move."""
    reason = f"operator {getattr(node.target, '__name__', node.target)} is not understood"
    for argument in node.all_input_nodes:
        labels = run.env[argument]
        for label in _flat(labels):
            run.symbols.freeze(label, reason)
    return run.like(node, reason)


def _flat(labels: Any) -> list[Label]:
    """All axis labels of a tensor's labels or of a tuple of tensors' labels."""
    flat: list[Label] = []
    for entry in labels:
        is_axis = bool(entry) and bool(entry[0]) and isinstance(entry[0][0], Part)
        flat += [entry] if is_axis else _flat(entry)
    return flat


@handles("getitem")
def getitem(run: Interpreter, node: fx.Node) -> Any:
    """One result of an operator that has several."""
    return run.env[_args(node)[0]][_args(node)[1]]


@handles("dropout", "feature_dropout", "alpha_dropout", "clone", "contiguous", "detach", "alias", "to",
         "_to_copy", "lift_fresh_copy", "softmax", "log_softmax", "_softmax", "_assert_tensor_metadata")  # fmt: skip
def same(run: Interpreter, node: fx.Node) -> Any:
    """Operators that treat all units alike and keep the shape."""
    return run.label(_args(node)[0]) if isinstance(node.meta.get("val"), Tensor) else ()


def pointwise(run: Interpreter, node: fx.Node) -> Labels:
    """Elementwise operators with broadcasting: axes that meet move together."""
    shape = _shape(node)
    result: list[Label | None] = [None] * len(shape)
    for argument in _tensors(node):
        labels = run.label(argument)
        offset = len(shape) - len(labels)
        for i, label in enumerate(labels):
            if _shape(argument)[i] != shape[offset + i]:
                continue  # broadcast from one position
            known = result[offset + i]
            if known is None:
                result[offset + i] = label
            else:
                run.symbols.tie(known, label, _name(node))
    return tuple(
        run.symbols.fresh(n, "broadcast") if known is None else known for n, known in zip(shape, result, strict=True)
    )


HANDLERS["where"] = pointwise


@handles("linear")
def linear(run: Interpreter, node: fx.Node) -> Labels:
    """y[..., o] = sum_i x[..., i] W[o, i] + b[o]."""
    x, weight = run.label(_args(node)[0]), run.label(_args(node)[1])
    run.symbols.tie(x[-1], weight[1], _name(node))
    _tie_bias(run, node, 2, weight[0])
    return (*x[:-1], weight[0])


def _tie_bias(run: Interpreter, node: fx.Node, position: int, out: Label) -> None:
    bias = _args(node)[position] if len(_args(node)) > position else node.kwargs.get("bias")
    if isinstance(bias, fx.Node):
        run.symbols.tie(out, run.label(bias)[0], _name(node))


@handles("conv1d", "conv2d", "conv3d", "convolution")
def convolution(run: Interpreter, node: fx.Node) -> Labels:
    """Convolution: channels like a linear layer; kernel and image positions stay."""
    x, weight = run.label(_args(node)[0]), run.label(_args(node)[1])
    for label in (*x[2:], *weight[2:]):
        run.symbols.freeze(label, "a position in an image or a kernel")
    groups = _args(node)[6] if len(_args(node)) > 6 else node.kwargs.get("groups", 1)
    out = weight[0]
    if groups == 1:
        run.symbols.tie(x[1], weight[1], _name(node))
    elif groups == _shape(_args(node)[0])[1] == _shape(_args(node)[1])[0]:
        run.symbols.tie(x[1], out, _name(node))
    else:
        for label in (x[1], out, weight[1]):
            run.symbols.freeze(label, f"{_name(node)}: a convolution of {groups} groups")
    _tie_bias(run, node, 2, out)
    positions = tuple(run.symbols.fresh(n, "a position in an image") for n in _shape(node)[2:])
    return (x[0], out, *positions)


@handles("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def batch_norm(run: Interpreter, node: fx.Node) -> Labels:
    """Per-channel normalisation: weight, bias and running statistics move with the channels."""
    x = run.label(_args(node)[0])
    for argument in _args(node)[1:5]:
        if isinstance(argument, fx.Node):
            run.symbols.tie(x[1], run.label(argument)[0], _name(node))
    return x


@handles("layer_norm")
def layer_norm(run: Interpreter, node: fx.Node) -> Labels:
    """Normalisation over the last axes, symmetric in their positions; weight and bias move along."""
    x = run.label(_args(node)[0])
    for argument in _args(node)[2:4]:
        if isinstance(argument, fx.Node):
            weight = run.label(argument)
            for a, b in zip(x[-len(weight) :], weight, strict=True):
                run.symbols.tie(a, b, _name(node))
    return x


@handles("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
         "adaptive_max_pool1d", "adaptive_max_pool2d", "upsample_nearest2d", "upsample_bilinear2d", "pad")  # fmt: skip
def pooling(run: Interpreter, node: fx.Node) -> Any:
    """Each channel by itself: channels pass, image positions stay."""
    x = run.label(_args(node)[0])
    values = node.meta["val"]
    first = values[0] if isinstance(values, (tuple, list)) else values
    changed = [i for i, n in enumerate(first.shape) if i >= 2 or int(n) != _shape(_args(node)[0])[i]]
    labels = list(x)
    for i in changed:
        run.symbols.freeze(x[i], "a position in an image")
        labels[i] = run.symbols.fresh(int(first.shape[i]), "a position in an image")
    return (tuple(labels),) * len(values) if isinstance(values, (tuple, list)) else tuple(labels)


@handles("mean", "sum", "amax", "amin", "logsumexp", "norm", "linalg_vector_norm", "max", "min")
def reduction(run: Interpreter, node: fx.Node) -> Any:
    """A symmetric function of the positions of an axis: that axis may move freely."""
    x = run.label(_args(node)[0])
    name = str(getattr(node.target, "overloadpacket", node.target)).removeprefix("aten.")
    if name in ("max", "min") and len(_tensors(node)) > 1:
        return pointwise(run, node)
    dims: Any = (
        _args(node)[2] if "norm" in name and len(_args(node)) > 2 else _args(node)[1] if len(_args(node)) > 1 else None
    )
    dims = node.kwargs.get("dim", dims)
    if dims is None:
        dims = list(range(len(x)))
    gone = {int(d) % len(x) for d in ([dims] if isinstance(dims, int) else dims)}
    values = node.meta["val"]
    first = values[0] if isinstance(values, (tuple, list)) else values
    keep = first.dim() == len(x)
    kept = [run.symbols.fresh(1) if i in gone else label for i, label in enumerate(x) if keep or i not in gone]
    if not isinstance(values, (tuple, list)):
        return tuple(kept)
    for i in gone:  # the index of the maximum says where it was
        run.symbols.freeze(x[i], f"{_name(node)} returns a position")
    return (tuple(kept),) * len(values)


@handles("flatten", "view", "reshape", "unflatten", "_unsafe_view", "squeeze", "unsqueeze")
def reshape(run: Interpreter, node: fx.Node) -> Labels:
    """Axes merged into products (flatten after convolution) or cut out of them (attention heads)."""
    source, shape = list(run.label(_args(node)[0])), _shape(node)
    result: list[Label] = []
    i = 0
    o = 0
    while o < len(shape) or i < len(source):
        # The shortest runs of input and output axes that hold equally many positions.
        taken, wanted = [], []
        have = want = 1
        if i < len(source):
            taken.append(source[i])
            have, i = _length(source[i]), i + 1
        if o < len(shape):
            wanted.append(shape[o])
            want, o = shape[o], o + 1
        while have != want:
            if have < want:
                taken.append(source[i])
                have, i = have * _length(source[i]), i + 1
            else:
                wanted.append(shape[o])
                want, o = want * shape[o], o + 1
        result += _regroup(run.symbols, taken, wanted, _name(node))
    return tuple(result)


def _length(label: Label) -> int:
    return sum(math.prod(p.size for p in product) for product in label)


def _regroup(symbols: Symbols, taken: Sequence[Label], wanted: Sequence[int], operator: str) -> list[Label]:
    """Labels of ``wanted`` axes that together hold the positions of ``taken`` axes, in order."""
    taken = [symbols.resolve(label) for label in taken]
    if len(taken) == 1 and list(wanted) == [_length(taken[0])]:
        return [taken[0]]
    big = [label for label in taken if _length(label) > 1]
    if len(big) <= 1 and math.prod(wanted) == max(wanted, default=1):  # only axes of one position come or go
        moved = iter(big)
        return [next(moved) if n > 1 else symbols.fresh(1) for n in wanted]
    if any(len(label) > 1 for label in big[1:]) or (len(wanted) > 1 and len(big[0]) > 1):
        for label in taken:
            symbols.freeze(label, f"{operator}: a concatenation is reshaped")
        return [symbols.fresh(n, operator) for n in wanted]
    heads = big[0] if big else ((),)
    tail = [part for label in big[1:] for part in label[0]]
    if len(wanted) == 1:
        return [tuple((*product, *tail) for product in heads)]
    parts = [*heads[0], *tail]
    result: list[Label] = []
    for n in wanted:
        product: list[Part] = []
        while math.prod(p.size for p in product) < n:
            part = parts.pop(0)
            room = n // math.prod(p.size for p in product)
            if part.size > room:
                if part.size % room:
                    for p in (part, *product, *parts):
                        symbols.freeze(((p,),), f"{operator}: axes are cut unevenly")
                    part, rest = (symbols.fresh(k, operator)[0][0] for k in (room, math.ceil(part.size / room)))
                else:
                    part, rest = symbols.split(part, (room, part.size // room))
                parts.insert(0, rest)
            product.append(part)
        if math.prod(p.size for p in product) != n:
            for p in (*product, *parts):
                symbols.freeze(((p,),), f"{operator}: axes are cut unevenly")
            return [symbols.fresh(k, operator) for k in wanted]
        result.append((tuple(product),) if product else symbols.fresh(1))
    return result


@handles("permute")
def permute_axes(run: Interpreter, node: fx.Node) -> Labels:
    """Axes in another order."""
    x = run.label(_args(node)[0])
    return tuple(x[int(d)] for d in _args(node)[1])


@handles("transpose", "t", "numpy_T")
def transpose(run: Interpreter, node: fx.Node) -> Labels:
    """Two axes exchanged."""
    x = list(run.label(_args(node)[0]))
    a, b = (int(d) for d in _args(node)[1:3]) if len(_args(node)) > 2 else (0, len(x) - 1)
    x[a], x[b] = x[b], x[a]
    return tuple(x)


@handles("cat", "concat")
def concatenation(run: Interpreter, node: fx.Node) -> Labels:
    """Axes laid end to end."""
    tensors = [run.label(t) for t in _args(node)[0]]
    dim: Any = _args(node)[1] if len(_args(node)) > 1 else node.kwargs.get("dim", 0)
    dim = int(dim) % len(tensors[0])
    for other in tensors[1:]:
        for i, (a, b) in enumerate(zip(tensors[0], other, strict=True)):
            if i != dim:
                run.symbols.tie(a, b, _name(node))
    joined = tuple(product for t in tensors for product in run.symbols.resolve(t[dim]))
    return (*tensors[0][:dim], joined, *tensors[0][dim + 1 :])


@handles("expand")
def expand(run: Interpreter, node: fx.Node) -> Labels:
    """Axes of one position repeated."""
    x, shape = run.label(_args(node)[0]), _shape(node)
    before = _shape(_args(node)[0])
    offset = len(shape) - len(x)
    return tuple(
        x[i - offset] if i >= offset and before[i - offset] == n else run.symbols.fresh(n, "broadcast")
        for i, n in enumerate(shape)
    )


@handles("slice", "select", "narrow")
def part_of_axis(run: Interpreter, node: fx.Node) -> Labels:
    """A piece of one axis: that axis stays, the others pass."""
    x, shape = list(run.label(_args(node)[0])), _shape(node)
    dim = int(_args(node)[1] if len(_args(node)) > 1 else 0) % len(x)
    if len(shape) == len(x) and shape == _shape(_args(node)[0]):
        return tuple(x)
    run.symbols.freeze(x[dim], f"{_name(node)} takes a piece of it")
    piece = [] if len(shape) < len(x) else [run.symbols.fresh(shape[dim], f"{_name(node)} takes a piece")]
    return (*x[:dim], *piece, *x[dim + 1 :])


@handles("matmul", "bmm", "mm")
def matmul(run: Interpreter, node: fx.Node) -> Labels:
    """c[..., i, j] = sum_k a[..., i, k] b[..., k, j]."""
    a, b = (run.label(argument) for argument in _args(node)[:2])
    if len(a) < 2 or len(b) < 2 or len(a) != len(b):
        result: Labels = unknown(run, node)
        return result
    run.symbols.tie(a[-1], b[-2], _name(node))
    for left, right in zip(a[:-2], b[:-2], strict=True):
        if _length(left) == _length(right):
            run.symbols.tie(left, right, _name(node))
    batch = (left if _length(left) >= _length(right) else right for left, right in zip(a[:-2], b[:-2], strict=True))
    return (*batch, a[-2], b[-1])
