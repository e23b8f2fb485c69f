"""The activations of two networks on images, unit by unit: their graphs are run, and watched where units show."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from fedmerge.align._views import View, find_views
from fedmerge.align.traces import shared
from fedmerge.align.turns import Key
from fedmerge.data import Images
from fedmerge.spec import PermSpec
from fedmerge.spec.trace import trace

Sink = Callable[[Key, Tensor, Tensor], None]
"""``sink(key, a, b)``: units of two networks on the same samples, both float64 ``(n, samples)``."""

Sizes = Mapping[str, int]
"""Group -> number of units."""


class Activations:
    """The activations of two networks on the same images, to be looked at as often as need be.

    The networks are traced once for each size of a batch that occurs, which is at most twice, and run as traced: what
    a layer computes inside counts like what it returns. Traces of ``model`` are taken from where they are shared.
    Held at once: one batch of the first network's observed results, in the network's own precision.

    Args:
        networks: Two networks of one architecture, in eval mode on ``device``.
        spec: The symmetries.
        data: The images.
        batch_size: Images a batch.
        device: Where the networks are.
        sizes: Their numbers of units, which may differ.
        model: What both are copies of, with weights of their own; None where they differ.
    """

    def __init__(
        self,
        networks: tuple[nn.Module, nn.Module],
        spec: PermSpec,
        data: Images,
        *,
        batch_size: int,
        device: torch.device | str,
        sizes: tuple[Sizes, Sizes],
        model: nn.Module | None = None,
    ) -> None:
        self._networks, self._spec, self._data, self._sizes = networks, spec, data, sizes
        self._model = model
        self._batch_size, self._device = batch_size, device
        self._graphs: dict[tuple[int, int], Observed] = {}

    def stream(self, sink: Sink) -> None:
        """Hand ``sink`` all activations, a batch and an operator at a time, in the order of the computation.

        Raises:
            SpecError: The network cannot be traced on these images.
        """
        for images in torch.split(self._data.images, self._batch_size):
            batch = self._data.normalise(images.to(self._device))
            pair = [self._graph(i, batch, len(images)) for i in range(2)]
            with torch.inference_mode():
                self._meet(pair, batch, sink)

    def _meet(self, pair: Sequence["Observed"], batch: Any, sink: Sink) -> None:
        first: deque[tuple[View, Tensor]] = deque()

        def keep(view: View, out: Tensor) -> None:
            first.append((view, out))

        def meet(view: View, out: Tensor) -> None:
            # Networks of one architecture compute in one order, whatever their widths.
            left, other = first.popleft()
            sink(view.key, left.units(other, self._sizes[0]), view.units(out, self._sizes[1]))

        # Copies of the first, because an activation function may work in place.
        pair[0].run(self._networks[0], batch, keep, copies=True)
        pair[1].run(self._networks[1], batch, meet)

    def _graph(self, network: int, batch: Any, rows: int) -> "Observed":
        which = (network if self._sizes[0] != self._sizes[1] else 0, rows)
        if which not in self._graphs:
            self._graphs[which] = self._traced(network, batch)
        return self._graphs[which]

    def _traced(self, network: int, batch: Any) -> "Observed":
        def make() -> Observed:
            return Observed(self._networks[network], self._spec, batch)

        if self._model is None:
            return make()
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in pytree.tree_leaves(batch))
        return shared().once((torch.device(self._device), shapes), (self._model, self._spec), make)


class Observed:
    """A network traced on a batch, which can be run again on batches of that size with any numbers in it.

    Attributes:
        views: Groups whose product numbers the units -> where these show, in the order of the computation.
    """

    def __init__(self, model: nn.Module, spec: PermSpec, batch: Any) -> None:
        traced = trace(model, (batch,))
        self.views = find_views(traced, spec)
        self._graph = traced.program.graph_module
        self._inputs = [(entry.kind, str(entry.target)) for entry in traced.program.graph_signature.input_specs]
        self._constants = {name: value for name, value in traced.program.constants.items() if name not in traced.labels}
        self._of_node: dict[str, list[View]] = {}
        for view in (view for found in self.views.values() for view in found):
            self._of_node.setdefault(view.node, []).append(view)

    def run(self, network: nn.Module, batch: Any, see: Callable[[View, Tensor], None], *, copies: bool = False) -> None:
        """Compute what ``network`` does on ``batch``; ``see`` is handed every result that shows units."""
        tensors: dict[str, Any] = {
            **self._constants,
            **dict(network.named_buffers(remove_duplicate=False)),
            **dict(network.named_parameters(remove_duplicate=False)),
        }
        inputs = iter(pytree.tree_leaves(batch))
        given = [next(inputs) if kind is InputKind.USER_INPUT else tensors[name] for kind, name in self._inputs]
        _Watched(self._graph, self._of_node, see, copies).run(*given, enable_io_processing=False)


class _Watched(fx.Interpreter):
    """Runs a graph, and hands on what shows units."""

    def __init__(
        self, graph: fx.GraphModule, views: Mapping[str, list[View]], see: Callable[[View, Tensor], None], copies: bool
    ) -> None:
        super().__init__(graph)
        self._views, self._see, self._copies = views, see, copies

    def run_node(self, n: fx.Node) -> Any:
        """The result of ``n``."""
        result = super().run_node(n)
        if n.name in self._views:
            shown = result.clone() if self._copies and isinstance(result, Tensor) else result
            for view in self._views[n.name]:
                self._see(view, shown)
        return result
