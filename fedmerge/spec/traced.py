"""What tracing leaves: a network's graph with the unknowns of its axes solved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fedmerge.spec.symbols import Label, Part, Symbols


@dataclass(frozen=True)
class Traced:
    """A network's graph, and the unknowns that the axes of its tensors are made of, solved.

    Attributes:
        program: The exported network; it holds no weights.
        labels: Parameter or buffer -> one label an axis.
        env: Node of the graph -> labels of its result: a tuple where the result is one tensor.
        symbols: The unknowns.
    """

    program: ExportedProgram
    labels: dict[str, tuple[Label, ...]]
    env: dict[fx.Node, Any]
    symbols: Symbols

    def resolve(self, label: Label) -> Label:
        """``label`` in unknowns of which no two are one, without factors of one position."""
        return tuple(
            tuple(Part(self.symbols.root(part.symbol), part.size) for part in product)
            for product in self.symbols.trim(label)
        )

    def tensors(self) -> dict[str, fx.Node]:
        """Parameter or buffer -> its node."""
        inputs = {entry.arg.name: str(entry.target) for entry in self.program.graph_signature.input_specs}
        nodes = (node for node in self.program.graph.nodes if node.op == "placeholder")
        return {inputs[node.name]: node for node in nodes if inputs[node.name] in self.labels}

    def of_inputs(self) -> dict[fx.Node, None]:
        """The nodes whose results depend on the network's inputs, in the order of the computation."""
        return self._of(lambda kind: kind is InputKind.USER_INPUT, constants=False)

    def of_constants(self) -> dict[fx.Node, None]:
        """The nodes whose results depend on anything but parameters: an input, a buffer, numbers made on the way."""
        return self._of(lambda kind: kind is not InputKind.PARAMETER, constants=True)

    def _of(self, starts: Callable[[InputKind], bool], *, constants: bool) -> dict[fx.Node, None]:
        kinds = {entry.arg.name: entry.kind for entry in self.program.graph_signature.input_specs}
        found: dict[fx.Node, None] = {}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                begins = starts(kinds[node.name])
            else:
                begins = constants and node.op != "output" and not node.all_input_nodes
            if begins or (node.op == "call_function" and any(n in found for n in node.all_input_nodes)):
                found[node] = None
        return found
