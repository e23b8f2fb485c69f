"""Operators made of others: what is not understood as it stands is understood by its parts, if they are."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fedmerge.spec.operators.interpreter import Interpreter, freeze_all, handles, meet, sizes, writes


@handles("unknown")
def unknown(run: Interpreter, node: fx.Node) -> Any:
    """An operator without a handler: run on the operators that it is made of; if there are none, all of it stays."""
    if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
        return ()  # a length or a number read off a tensor says nothing about which unit is where
    if not any(isinstance(n.meta.get("val"), Tensor | tuple | list) for n in node.all_input_nodes):
        return run.like(node, "a constant of the network")
    inner = _parts(node)
    if inner is None:
        return freeze_all(run, node, f"operator {getattr(node.target, '__name__', node.target)} is not understood")
    return run.inline(*inner, node)


def _parts(node: fx.Node) -> tuple[fx.Graph, list[fx.Node]] | None:
    """The graph of what ``node`` is made of, and the nodes that enter it; None if it is made of nothing else.

    What writes into its argument is not taken apart: the argument would keep the axes that it had.
    """
    inputs, target = node.all_input_nodes, node.target
    if (
        not isinstance(target, torch._ops.OpOverload)
        or writes(node)
        or any(
            not isinstance(n.meta.get("val"), Tensor) or not all(isinstance(d, int) for d in n.meta["val"].shape)
            for n in inputs
        )
    ):
        return None

    def call(*values: Tensor) -> Any:
        tensors = dict(zip(inputs, values, strict=True))
        given, named = fx.map_arg((node.args, node.kwargs), lambda n: tensors[n])
        return target(*given, **named)

    values = [n.meta["val"] for n in inputs]
    fake = torch._guards.detect_fake_mode(values)
    if fake is None:
        return None
    known = torch._decomp.core_aten_decompositions()
    table = {target: known[target]} if target in known else {}
    try:
        with fake, torch.no_grad():
            graph = make_fx(call, decomposition_table=table)(*values).graph
    except Exception:  # whatever is raised by an operator that cannot be traced alone
        return None
    functions = [n.target for n in graph.nodes if n.op == "call_function"]
    return None if target in functions else (graph, inputs)


@handles("wrap_with_set_grad_enabled", "wrap_with_autocast")
def section(run: Interpreter, node: fx.Node) -> Any:
    """A section of the network under ``no_grad`` or ``autocast``: the graph within."""
    at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
    inside = getattr(node.graph.owning_module, str(node.args[at].target))  # type: ignore[union-attr]
    return run.inline(inside.graph, node.args[at + 1 :], node)


@handles("cond")
def branches(run: Interpreter, node: fx.Node) -> Any:
    """One of two graphs, as a number decides: what they return moves as both of them let it."""
    operands = tuple(node.args[3])  # type: ignore[arg-type]
    graphs = [getattr(node.graph.owning_module, str(branch.target)).graph for branch in node.args[1:3]]  # type: ignore[union-attr]
    first, second = (run.inline(graph, operands, node) for graph in graphs)
    results = []
    for a, b, value in zip(first, second, node.meta["val"], strict=True):
        results.append(meet(run, node, [(a, sizes(value)), (b, sizes(value))], sizes(value)))
    return results
