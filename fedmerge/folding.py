"""BatchNorm folded into the weights before it: the same function in eval mode, from ordinary weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from fedmerge.spec._export import export
from fedmerge.spec._network import example
from fedmerge.spec._spec import Params

_DIMENSIONS = {"linear": 2, "conv1d": 3, "conv2d": 4, "conv3d": 5}
"""Layers whose units lie on axis 1 of an output of that many dimensions, where BatchNorm looks for them."""
_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")


@dataclass(frozen=True)
class Folding:
    """A network after folding.

    Attributes:
        params: Its state dict, of the same architecture.
        folded: BatchNorm layers that now pass their input on.
        partly: BatchNorm layer -> what is left in it: a shift per unit, a sign, or both.
        kept: BatchNorm layer -> why it is as it was.
    """

    params: dict[str, Tensor]
    folded: tuple[str, ...]
    partly: dict[str, str]
    kept: dict[str, str]


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

    Cost: one ``torch.export``, linear in the number of operators; no image is looked at.
    """
    program, network = export(model, example(model, example_input))
    targets = {spec.arg.name: str(spec.target) for spec in program.graph_signature.input_specs if spec.target}
    tied = _tied(network)
    found: dict[str, Tensor] = {name: tensor.clone() for name, tensor in params.items()}
    folded: list[str] = []
    partly: dict[str, str] = {}
    kept: dict[str, str] = {}
    for norm in program.graph.nodes:
        if _operator(norm) != "batch_norm":
            continue
        name = _name(norm, targets)
        layer, pooled = _producer(norm)
        reason = _obstacle(norm, layer, targets, tied)
        if reason is not None:
            kept[name] = reason
            continue
        left = _fold(found, norm, layer, targets, pooled)
        if left:
            partly[name] = left
        else:
            folded.append(name)
    return Folding(found, tuple(folded), partly, kept)


def _operator(node: fx.Node) -> str:
    return node.target._schema.name.split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def _name(norm: fx.Node, targets: Mapping[str, str]) -> str:
    tensors = [targets[a.name] for a in norm.args[1:5] if isinstance(a, fx.Node) and a.name in targets]
    return tensors[-1].rpartition(".")[0] if tensors else norm.name


def _tied(network: nn.Module) -> set[str]:
    """Names of tensors that are one tensor under several names."""
    state = network.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _producer(norm: fx.Node) -> tuple[fx.Node, bool]:
    """What a BatchNorm normalises, seen through max pooling (then True) and dropout, which rests in eval mode."""
    node, pooled = norm.args[0], False
    assert isinstance(node, fx.Node)
    while _operator(node) in (*_POOLS, "dropout") and len(node.users) == 1:
        pooled |= _operator(node) in _POOLS
        node = node.args[0]
        assert isinstance(node, fx.Node)
    return node, pooled


def _obstacle(norm: fx.Node, layer: fx.Node, targets: Mapping[str, str], tied: set[str]) -> str | None:
    """Why this BatchNorm cannot be folded; None if it can."""
    if norm.args[5] or norm.args[3] is None:
        return "it normalises by the batch, also in eval mode"
    if _operator(layer) not in _DIMENSIONS:
        return "no linear or convolution layer is right before it"
    if layer.meta["val"].dim() != _DIMENSIONS[_operator(layer)]:
        return "it does not normalise the units of the layer before it"
    if len(layer.users) > 1:
        return "others read the output of the layer before it too"
    for tensor in (*layer.args[1:3], *norm.args[1:5]):
        if isinstance(tensor, fx.Node):
            if tensor.name not in targets:
                return "its tensors, or those of the layer before it, are computed from others"
            if len(tensor.users) > 1 or targets[tensor.name] in tied:
                return "its tensors, or those of the layer before it, are used more than once"
    return None


def _fold(found: dict[str, Tensor], norm: fx.Node, layer: fx.Node, targets: Mapping[str, str], pooled: bool) -> str:
    """Change ``found``, from what it holds in float64; returns what is left in the BatchNorm, "" for nothing."""

    def name(node: Any) -> str | None:
        return targets[node.name] if isinstance(node, fx.Node) else None

    weight, bias = name(layer.args[1]), name(layer.args[2]) if len(layer.args) > 2 else None
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
    for key, value in values.items():
        found[key] = value.to(found[key].dtype)
    left = []
    if bias is None and bool(rest.any()):
        left.append("the shift: the layer before it has no bias")
    if bool((sign < 0).any()):
        left.append("the sign of some units: max pooling is in between")
    return "; ".join(left)
