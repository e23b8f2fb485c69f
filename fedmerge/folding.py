"""BatchNorm folded into the weights before it: the same function in eval mode, from ordinary weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._graph import LAYERS, Graph, argument, dims, operator
from fedmerge._loading import check_state, with_versions
from fedmerge.types import Params

_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")


@dataclass(frozen=True)
class Folding:
    """A network after folding.

    Attributes:
        params: Its state dict, of the same architecture.
        folded: BatchNorm layers that now pass their input on.
        partly: BatchNorm layer -> what is left in it: a shift per unit, a sign, or both.
        kept: BatchNorm layer -> why it is as it was.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
        >>> fm.fold_norms(model, model.state_dict(), torch.zeros(1, 1, 4, 4)).folded
        ('1',)
    """

    params: dict[str, Tensor]
    folded: tuple[str, ...]
    partly: dict[str, str]
    kept: dict[str, str]


@checked
def fold_norms(model: nn.Module, params: Params, example_input: Tensor | tuple[Any, ...]) -> Folding:
    r"""Carry what each BatchNorm does in eval mode into the Linear or convolution layer right before it.

    With weight :math:`\gamma`, bias :math:`\beta` and running statistics :math:`\mu, \sigma^2` of the BatchNorm,

    .. math:: \gamma \frac{W x + b - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta = s W x + (s (b - \mu) + \beta),
              \qquad s = \gamma / \sqrt{\sigma^2 + \epsilon},

    so the layer gets weight sW and bias :math:`s(b - \mu) + \beta` (``torch.nn.utils.fusion``), and the BatchNorm
    statistics and weights under which it passes its input on. The result is a state dict of the same architecture:
    a layer without bias cannot hold the shift, which then stays in the BatchNorm (in its bias, or its running mean
    if it has none). Max pooling in between lets a positive s and any shift pass, but not a negative s: there
    :math:`|s|` is folded and the sign stays as the BatchNorm's weight, -1.

    For inference only: in training mode BatchNorm normalises by the batch, folded or not, and the old weight
    :math:`\gamma` is then lost. Parameters that the model freezes are folded like others.

    Args:
        model: The architecture; not modified.
        params: Its state dict, for example the result of :func:`fedmerge.repair`.
        example_input: A tensor, or a tuple of positional arguments, of the shapes that the model takes.

    Raises:
        SpecError: The model cannot be traced with this input.
        ParamsError: ``params`` is not a state dict of ``model``.

    Cost: one ``torch.export``, linear in the number of operators; no image is looked at.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2)).eval()
        >>> x = torch.randn(3, 1, 4, 4)
        >>> before = model(x)
        >>> _ = model.load_state_dict(fm.fold_norms(model, model.state_dict(), x).params)
        >>> torch.allclose(model(x), before, atol=1e-5)
        True
    """
    graph = Graph(model, example_input)
    check_state(model, params)
    check_params([params])
    found: dict[str, Tensor] = {name: tensor.clone() for name, tensor in params.items()}
    folded: list[str] = []
    partly: dict[str, str] = {}
    kept: dict[str, str] = {}
    for norm in graph.nodes:
        if operator(norm) != "batch_norm":
            continue
        name = _name(norm, graph)
        layer, pooled = _producer(norm)
        reason = _obstacle(norm, layer, graph)
        if reason is not None:
            kept[name] = reason
            continue
        left = _fold(found, norm, layer, graph, pooled)
        if left:
            partly[name] = left
        else:
            folded.append(name)
    return Folding(with_versions(found, params), tuple(folded), partly, kept)


def _name(norm: fx.Node, graph: Graph) -> str:
    tensors = [names[0] for a in norm.args[1:5] if (names := graph.names(a))]
    return tensors[-1].rpartition(".")[0] if tensors else norm.name


def _producer(norm: fx.Node) -> tuple[fx.Node, bool]:
    """What a BatchNorm normalises, seen through max pooling (then True) and dropout, which rests in eval mode."""
    node, pooled = norm.args[0], False
    assert isinstance(node, fx.Node)
    while operator(node) in (*_POOLS, "dropout") and len(node.users) == 1:
        pooled |= operator(node) in _POOLS
        node = node.args[0]
        assert isinstance(node, fx.Node)
    return node, pooled


def _obstacle(norm: fx.Node, layer: fx.Node, graph: Graph) -> str | None:
    """Why this BatchNorm cannot be folded; None if it can."""
    if norm.args[5] or norm.args[3] is None:
        return "it normalises by the batch, also in eval mode"
    if operator(layer) not in LAYERS:
        return "no linear or convolution layer is right before it"
    if dims(layer) != LAYERS[operator(layer)] + 2:
        return "it does not normalise the units of the layer before it"
    if len(layer.users) > 1:
        return "others read the output of the layer before it too"
    for tensor in (argument(layer, 1), argument(layer, 2), *norm.args[1:5]):
        if isinstance(tensor, fx.Node):
            if not graph.names(tensor):
                return "its tensors, or those of the layer before it, are computed from others"
            if len(graph.uses(graph.names(tensor))) > 1:
                return "its tensors, or those of the layer before it, are used more than once"
    return None


def _fold(found: dict[str, Tensor], norm: fx.Node, layer: fx.Node, graph: Graph, pooled: bool) -> str:
    """Change ``found``, from what it holds in float64; returns what is left in the BatchNorm, "" for nothing.

    A tensor of several names is one: the last counts, as when it is loaded, and all get the result.
    """

    def name(node: Any) -> str | None:
        return graph.names(node)[-1] if isinstance(node, fx.Node) else None

    weight, bias = name(argument(layer, 1)), name(argument(layer, 2))
    gamma, beta, mean, variance = (name(a) for a in norm.args[1:5])
    eps: Any = norm.args[7]
    assert weight is not None
    assert mean is not None
    assert variance is not None
    scale, shift = (None if key is None else found[key].double() for key in (gamma, beta))
    sign = torch.where(scale < 0, -1.0, 1.0) if pooled and scale is not None else torch.ones_like(found[mean]).double()
    fused = fuse_conv_bn_weights(
        found[weight].double(),
        None if bias is None else found[bias].double(),
        found[mean].double(),
        found[variance].double(),
        eps,
        None if scale is None else sign * scale,
        None if shift is None else sign * shift,
    )
    new_weight, new_bias = (t.detach() for t in fused)
    # What a layer without bias cannot hold; the BatchNorm adds it behind the sign.
    rest = torch.zeros_like(new_bias) if bias is not None else sign * new_bias
    values = {weight: new_weight, mean: torch.zeros_like(rest), variance: torch.full_like(rest, 1 - eps)}
    if bias is not None:
        values[bias] = new_bias
    if gamma is not None:
        values[gamma] = sign
    if beta is not None:
        values[beta] = rest
    else:
        values[mean] = -rest
    for node in (argument(layer, 1), argument(layer, 2), *norm.args[1:5]):
        for key in graph.names(node):
            if (value := values.get(graph.names(node)[-1])) is not None:
                found[key] = value.to(found[key].dtype, copy=True)
    left = []
    if bias is None and bool(rest.any()):
        left.append("the shift: the layer before it has no bias")
    if bool((sign < 0).any()):
        left.append("the sign of some units: max pooling is in between")
    return "; ".join(left)
