"""Normalisations: which axes share statistics, and the weights that move with them."""

from torch import fx

from fedmerge.spec._operators._interpreter import Interpreter, Labels, args, argument, handles, name, shape
from fedmerge.spec._symbols import Label


def _tie_channels(run: Interpreter, node: fx.Node, channels: Label, parameters: tuple[object, ...]) -> None:
    for parameter in parameters:
        if isinstance(parameter, fx.Node):
            run.symbols.tie(channels, run.label(parameter)[0], name(node))


@handles("batch_norm", "_native_batch_norm_legit_no_training", "instance_norm")
def batch_norm(run: Interpreter, node: fx.Node) -> Labels:
    """Per-channel normalisation: weight, bias and running statistics move with the channels."""
    x = run.label(args(node)[0])
    _tie_channels(run, node, x[1], args(node)[1:5])
    return x


def statistics(node: fx.Node) -> bool:
    """Whether ``node``, a buffer, holds running statistics: only normalisations read it, as mean or variance."""
    names = ("batch_norm", "instance_norm")
    return bool(node.users) and all(
        any(n in str(user.target) for n in names) and node in user.args[3:5] for user in node.users
    )


@handles("group_norm")
def group_norm(run: Interpreter, node: fx.Node) -> Labels:
    """Normalisation over the channels of a group: channels are the product (group, channel within)."""
    x = list(run.label(args(node)[0]))
    groups, channels = int(args(node)[1]), shape(args(node)[0])[1]
    if 1 < groups < channels:
        (group,), (within,) = run.symbols.fresh(groups)[0], run.symbols.fresh(channels // groups)[0]
        run.symbols.tie(x[1], ((group, within),), name(node))
    _tie_channels(run, node, x[1], (argument(node, 2, "weight"), argument(node, 3, "bias")))
    return tuple(x)


@handles("layer_norm", "rms_norm")
def layer_norm(run: Interpreter, node: fx.Node) -> Labels:
    """Normalisation over the last axes, symmetric in their positions; weight and bias move along."""
    x = run.label(args(node)[0])
    for parameter in args(node)[2:4]:
        if isinstance(parameter, fx.Node):
            weight = run.label(parameter)
            for a, b in zip(x[-len(weight) :], weight, strict=True):
                run.symbols.tie(a, b, name(node))
    return x
