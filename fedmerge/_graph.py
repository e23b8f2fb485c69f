"""The traced graph of a network, and which tensors of its state dict every operator reads."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fedmerge.spec.export import export
from fedmerge.spec.network import example, untouched

LAYERS = {"linear": 0, "conv1d": 1, "conv2d": 2, "conv3d": 3}
"""Operators whose units are the rows of their weight -> how many axes lie behind the units in their output."""


class Graph:
    """The operators of a network in eval mode.

    Attributes:
        nodes: In the order in which they run.
    """

    def __init__(self, model: nn.Module, example_input: Tensor | tuple[Any, ...]) -> None:
        """Trace ``model``; :class:`SpecError` if that fails."""
        with untouched():
            program, network = export(model, example(model, example_input))
        self.nodes = tuple(program.graph.nodes)
        state = network.state_dict(keep_vars=True)
        same: dict[int, list[str]] = {}
        for name, tensor in state.items():
            same.setdefault(id(tensor), []).append(name)
        found = {s.arg.name: str(s.target) for s in program.graph_signature.input_specs if s.target in state}
        self._names = {node: tuple(same[id(state[target])]) for node, target in found.items()}
        self._uses: dict[tuple[str, ...], list[fx.Node]] = {}
        for node in self.nodes:
            if node.name in self._names:
                self._uses.setdefault(self._names[node.name], []).extend(node.users)

    def names(self, node: Any) -> tuple[str, ...]:
        """The names of the tensor that ``node`` is, several where it is tied; none if it is computed from others."""
        return self._names.get(node.name, ()) if isinstance(node, fx.Node) else ()

    def uses(self, names: tuple[str, ...]) -> list[fx.Node]:
        """The operators that read the tensor of these names, under whichever of them."""
        return self._uses.get(names, [])

    def outputs(self) -> Iterator[fx.Node]:
        """The layers from whose output the network's is computed without another layer in between."""
        waiting = [node for node in self.nodes if node.op == "output"]
        seen: set[fx.Node] = set(waiting)
        while waiting:
            for node in waiting.pop().all_input_nodes:
                if node not in seen:
                    seen.add(node)
                    if operator(node) in LAYERS:
                        yield node
                    else:
                        waiting.append(node)


def operator(node: fx.Node) -> str:
    """The operator of ``node``, without ``aten::`` and overload; "" if it is none."""
    return str(node.target._schema.name).split("::")[1] if isinstance(node.target, torch._ops.OpOverload) else ""


def argument(node: fx.Node, position: int, default: Any = None) -> Any:
    """One argument of ``node`` by its position, given so or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.kwargs.get(node.target._schema.arguments[position].name, default)


def dims(node: Any) -> int:
    """Number of axes of the tensor that ``node`` returns; 0 if it returns something else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value.dim() if isinstance(value, Tensor) else 0
