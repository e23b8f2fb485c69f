"""Normalisations: which axes share statistics, and the weights that move with them."""

from typing import Any

from torch import fx

from fedmerge.spec.operators.interpreter import (
    Interpreter,
    Labels,
    args,
    argument,
    handles,
    name,
    operator_name,
    shape,
)
from fedmerge.spec.symbols import Label


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
    """Whether the buffer ``node`` is an estimate that belongs to units, and so moves with them.

    Means and variances that only normalisations read are; so are the vectors u and v of a spectral norm, which are
    multiplied with the weight W and with each other (u . W v), and with nothing else.
    """
    norms = ("batch_norm", "instance_norm")
    if node.users and all(any(n in str(u.target) for n in norms) and node in u.args[3:5] for u in node.users):
        return True
    uses = list(node.users)
    for user in uses:  # a copy is used like the original
        if operator_name(user) in ("clone", "detach"):
            uses += user.users
    products = [user for user in uses if operator_name(user) not in ("clone", "detach")]
    return bool(products) and len(shape(node)) == 1 and all(_singular(user) for user in products)


def _singular(node: fx.Node) -> bool:
    """Whether ``node`` is W v or u . W v, of a parameter W."""
    if operator_name(node) in ("dot", "vdot"):
        return any(operator_name(n) == "mv" and _singular(n) for n in node.all_input_nodes)
    return operator_name(node) == "mv" and _of_parameter(args(node)[0])


def _of_parameter(node: Any) -> bool:
    """Whether ``node`` is a parameter, or computed from parameters alone (a weight under weight norm, say)."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_function":
        return bool(node.all_input_nodes) and all(map(_of_parameter, node.all_input_nodes))
    return node.op == "placeholder" and node.name.startswith("p_")


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
