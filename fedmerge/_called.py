"""A network as its owner calls it on a batch."""

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedmerge.errors import ParamsError

Forward = Callable[[nn.Module, Any], Any]
"""``forward(network, batch)``: the answer of the network to a batch."""


def called(model: nn.Module, forward: Forward | None) -> nn.Module:
    """``model`` as a network that takes a batch and answers with ``forward(model, batch)``.

    Without ``forward`` it is ``model`` itself. The result has the modules and tensors of ``model``, under the same
    names, and may be copied, traced and hooked like it. Hooks on ``model`` itself see the batch and what ``forward``
    returns.

    Raises:
        ParamsError: ``model`` is a single layer, or a mere wrapper (``torch.compile``, ``DataParallel``).
    """
    kind = getattr(type(model), "_kind", type(model))  # of a network that is called already, the network's own
    if forward is None:
        return model
    if not list(model.children()) or isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise ParamsError(
            f"forward= calls a network of several modules; this {kind.__name__} is one layer or a wrapper"
        )

    def answer(self: nn.Module, __batch: Any) -> Any:
        # A second object on the same modules and tensors: what it computes is what the network computes at this moment.
        inner = copy.copy(self)
        inner.__class__ = kind
        inner._forward_hooks, inner._forward_pre_hooks = type(self._forward_hooks)(), type(self._forward_pre_hooks)()
        return forward(inner, __batch)

    members = {"forward": answer, "_kind": kind, "__module__": kind.__module__}
    network = copy.copy(model)
    network.__class__ = types.new_class(kind.__name__, (kind,), exec_body=lambda space: space.update(members))
    return network


def lies(model: nn.Module) -> torch.device:
    """Where ``model`` runs: the device of its first tensor."""
    return next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def by_name(model: nn.Module, batch: Any) -> Any:
    """``model`` on several inputs, by their names or in their order; of an answer with logits, those."""
    found = model(**batch) if isinstance(batch, dict) else model(*batch)
    return getattr(found, "logits", found)
