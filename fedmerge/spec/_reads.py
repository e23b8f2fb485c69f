"""Which axes of a weight read units: those that an operator sums over. The others make units."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx

from fedmerge.spec.operators.interpreter import argument, axes, operator_name, shape, tensors
from fedmerge.spec.operators.products import spelled
from fedmerge.spec.traced import Traced

_SUMMED: dict[str, dict[int, tuple[int, ...]]] = {
    "linear": {1: (1,)},
    **{f"conv{d}d": {1: (1,)} for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": {1: (0,)} for d in (1, 2, 3)},
    **{name: {0: (-1,), 1: (-2,)} for name in ("matmul", "linalg_matmul", "mm", "bmm")},
    **{name: {1: (-1,), 2: (-2,)} for name in ("addmm", "baddbmm")},
    "addbmm": {1: (0, -1), 2: (0, -2)},
    **{name: {0: (-1,), 1: (-1,)} for name in ("mv", "dot", "vdot", "inner", "cdist")},
    "addmv": {1: (-1,), 2: (-1,)},
    "bilinear": {2: (1, 2)},
}
"""Operator -> position of an argument -> the axes of that argument over which it sums."""
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def reads(traced: Traced, state: Mapping[str, Tensor]) -> dict[str, frozenset[int]]:
    """Tensor of ``state`` that the network uses -> its axes that read units.

    A linear map sums over axis 1 of its weight, a transposed convolution over axis 0, and ``x @ w`` over the axis that
    ``w`` has first; a bias and an embedding are summed over nowhere. The weight may be transposed or cut on the way.
    """
    of_inputs = traced.of_inputs()
    names = {node: name for name, node in traced.tensors().items()}
    found: dict[str, set[int]] = {name: set() for name in names.values()}
    for node in traced.program.graph.nodes:
        for weight, over in _summed(node) if node.op == "call_function" else ():
            labels = traced.env.get(weight)
            if weight in of_inputs or not isinstance(labels, tuple):
                continue
            summed = [labels[a] for a in over]
            resolved = [traced.resolve(label) for label in summed]
            for name in (names[source] for source in _sources(weight) if source in names):
                own = traced.labels[name]
                # The very unknown of the axis, if it came this far; else whatever moves with what is summed over.
                exact = {a for a, label in enumerate(own) if label in summed}
                found[name] |= exact or {a for a, label in enumerate(own) if traced.resolve(label) in resolved}
    of_tensor = {id(state[name]): frozenset(axes) for name, axes in found.items() if name in state}
    return {name: of_tensor[id(tensor)] for name, tensor in state.items() if id(tensor) in of_tensor}


def _summed(node: fx.Node) -> list[tuple[fx.Node, tuple[int, ...]]]:
    """Arguments of ``node``, and the axes of each over which it sums."""
    operator, args = operator_name(node), node.args
    found: list[tuple[Any, tuple[int, ...]]]
    if operator == "einsum":
        operands, output = spelled(node)
        found = [(t, tuple(a for a, letter in enumerate(letters) if letter not in output)) for t, letters in operands]
    elif operator == "tensordot":
        found = [(args[i], tuple(args[2 + i])) for i in range(2)]  # type: ignore[arg-type]
    elif operator == "linalg_multi_dot":
        found = [(t, (0,) if i else (-1,)) for i, t in enumerate(tensors(node))]
    elif operator in ("sum", "mean") and operator_name(product := node.all_input_nodes[0]) == "mul":
        gone = axes(argument(node, 1, "dim"), rank := len(shape(product)))
        found = [
            (t, tuple(a for a in range(-len(shape(t)), 0) if a + rank in gone and shape(t)[a] > 1))
            for t in tensors(product)
        ]
    elif operator.startswith(_RECURRENT):
        found = [(n, (1,)) for n in node.all_input_nodes if len(shape(n)) == 2]
    else:
        found = [(args[i], over) for i, over in _SUMMED.get(operator, {}).items() if i < len(args)]
        found = [(t, over if isinstance(t, fx.Node) and len(shape(t)) > 1 else (0,)) for t, over in found]
    return [(operand, over) for operand, over in found if isinstance(operand, fx.Node)]


def _sources(node: fx.Node) -> set[fx.Node]:
    """All nodes that ``node`` is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        n = waiting.pop()
        if n not in found:
            found.add(n)
            waiting += n.all_input_nodes
    return found
