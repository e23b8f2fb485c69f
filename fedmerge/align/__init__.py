"""Alignment: the reordering of one network's units that makes it resemble another. One file a method."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from fedmerge._arguments import checked
from fedmerge._registry import Registry
from fedmerge.align._activation_matching import activation_matching
from fedmerge.align._activations import Observed
from fedmerge.align._forward_greedy import forward_greedy
from fedmerge.align._frank_wolfe import frank_wolfe
from fedmerge.align._optimal_transport import optimal_transport
from fedmerge.align._sinkhorn import sinkhorn_rebasin
from fedmerge.align._straight_through import straight_through
from fedmerge.align._weight_matching import Alignment, weight_matching
from fedmerge.data import Images
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Params

__all__ = [
    "Aligner",
    "Alignment",
    "activation_matching",
    "align",
    "aligners",
    "check_observable",
    "forward_greedy",
    "frank_wolfe",
    "needs_images",
    "optimal_transport",
    "sinkhorn_rebasin",
    "straight_through",
    "weight_matching",
]


Aligner = Callable[..., Alignment]
"""``(params, *, to, spec, rng, **options) -> Alignment``: what every alignment method is."""

_ALIGNERS: Registry[Aligner] = Registry("aligner")
_ALIGNERS.add("weight-matching", weight_matching, "coordinate descent over assignments of weights (Git Re-Basin)")
_ALIGNERS.add("forward-greedy", forward_greedy, "one assignment a group in graph order; the start of weight matching")
_ALIGNERS.add("frank-wolfe", frank_wolfe, "all groups at once over doubly stochastic matrices (C2M3, for two networks)")
_ALIGNERS.add("optimal-transport", optimal_transport, "incoming weights transported layer by layer (OTFusion)")
_ALIGNERS.add(
    "optimal-transport-activations",
    partial(optimal_transport, ground="activations"),
    "responses to public images transported (OTFusion); needs model, data",
)
_ALIGNERS.add(
    "activation-matching", activation_matching, "units that respond alike to public images; needs model, data"
)
_ALIGNERS.add("ste", straight_through, "permutations learned by gradient on public images; needs model, data")
_ALIGNERS.add("sinkhorn-rebasin", sinkhorn_rebasin, "mixtures of permutations learned by gradient (Sinkhorn re-basin)")
_ALIGNERS.add(
    "sinkhorn-rebasin-midpoint",
    partial(sinkhorn_rebasin, cost="midpoint"),
    "the same for the loss of the network halfway between, on public images; needs model, data",
)

_ON_REQUEST = {"optimal-transport", "sinkhorn-rebasin"}
"""Methods that look at images only where an option asks for it."""


_OBSERVING = {"optimal-transport-activations", "activation-matching"}
"""Methods that compare what units show while the networks compute."""


def aligners() -> dict[str, str]:
    """Name -> one-line summary of every alignment method."""
    return _ALIGNERS.summaries()


def needs_images(method: str) -> bool:
    """Whether that method looks at images: it then takes ``model`` and ``data`` (the public split).

    Raises:
        UnknownNameError: No such method.
    """
    return "data" in inspect.signature(_ALIGNERS[method]).parameters and method not in _ON_REQUEST


def check_observable(
    method: str, model: nn.Module, spec: PermSpec, data: Images, device: str = "cpu"
) -> tuple[str, ...]:
    """Say before anything is trained what an alignment by ``method`` would say at its end.

    Returns:
        The groups that it would leave in their order, because their units show in no activation; none for a method
        that looks at weights.

    Raises:
        SpecError: The method compares activations, and the network cannot be traced on such images.
    """
    if method not in _OBSERVING:
        return ()
    shown = Observed(model.to(device).eval(), spec, data.normalise(data.images[:2].to(device))).views
    seen = {group for key in shown for group in key}
    return tuple(group for group, n in spec.sizes().items() if group not in seen and n > 1)


@checked
def align(
    params: Params,
    to: Params,
    *,
    spec: PermSpec,
    method: str = "weight-matching",
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Alignment:
    """Find the permutation of the units of ``params`` that brings it close to ``to``.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        method: A name from :func:`aligners`.
        rng: Randomness of the method; by default a generator seeded with 0.
        options: Further arguments of the method; all take ``restarts``, and all but weight matching ``polish``.
            Methods that look at images need ``model`` (the network) and ``data`` (public images).

    Raises:
        UnknownNameError: No such method.
        ParamsError: State dicts that do not fit, or a method without the model or images that it needs.
    """
    return _ALIGNERS[method](params, to=to, spec=spec, rng=rng or np.random.default_rng(0), **options)
