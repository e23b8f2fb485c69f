"""Alignment: the reordering of one network's units that makes it resemble another. One file a method."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from fedmerge._arguments import checked
from fedmerge._copies import duplicate
from fedmerge.align._activation_matching import activation_matching
from fedmerge.align._activations import Observed
from fedmerge.align._forward_greedy import forward_greedy
from fedmerge.align._frank_wolfe import frank_wolfe
from fedmerge.align._optimal_transport import optimal_transport
from fedmerge.align._sinkhorn import sinkhorn_rebasin
from fedmerge.align._straight_through import straight_through
from fedmerge.align._weight_matching import weight_matching
from fedmerge.align.climb import Alignment
from fedmerge.data import Images
from fedmerge.registry import Entry, Registry, returned
from fedmerge.spec import PermSpec
from fedmerge.types import Params

__all__ = [
    "ALIGNERS",
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


def _unseen(model: nn.Module, spec: PermSpec, data: Images, device: str) -> tuple[str, ...]:
    """Groups of which no activation shows the units, for the methods that compare activations."""
    shown = Observed(model.to(device).eval(), spec, data.normalise(data.images[:2].to(device))).views
    seen = {group for key in shown for group in key}
    return tuple(group for group, n in spec.sizes().items() if group not in seen and n > 1)


@dataclass(frozen=True)
class Aligner(Entry):
    """An alignment method: ``make(params, *, to, spec, rng, **options) -> Alignment``.

    Its options are ``restarts`` and, if it needs images, ``device``.

    Attributes:
        check: From the network, its spec, public images and a device, the groups that the method would leave in their
            order; :class:`SpecError` if it cannot work on that network.
    """

    make: Callable[..., Alignment]
    _: KW_ONLY
    check: Callable[[nn.Module, PermSpec, Images, str], tuple[str, ...]] = lambda model, spec, data, device: ()

    can_need = frozenset({"model", "data"})
    called = ("params", "to spec rng restarts")

    def problem(self) -> str:
        """As of every entry; and one that looks at images must take the device on which it does."""
        return super().problem() or (self.uncallable("device") if self.needs else "")


ALIGNERS: Registry[Aligner] = Registry("aligner", Aligner, "aligners")
"""The alignment methods."""

ALIGNERS.add(
    Aligner("weight-matching", weight_matching, "coordinate descent over assignments of weights (Git Re-Basin)"),
    Aligner("forward-greedy", forward_greedy, "one assignment a group in graph order; the start of weight matching"),
    Aligner("frank-wolfe", frank_wolfe, "all groups at once over doubly stochastic matrices (C2M3, for two networks)"),
    Aligner("optimal-transport", optimal_transport, "incoming weights transported layer by layer (OTFusion)"),
    Aligner(
        "optimal-transport-activations",
        partial(optimal_transport, ground="activations"),
        "responses to public images transported (OTFusion); needs model, data",
        needs=Aligner.can_need,
        check=_unseen,
    ),
    Aligner(
        "activation-matching",
        activation_matching,
        "units that respond alike to public images; needs model, data",
        needs=Aligner.can_need,
        check=_unseen,
    ),
    Aligner(
        "ste",
        straight_through,
        "permutations learned by gradient on public images; needs model, data",
        needs=Aligner.can_need,
    ),
    Aligner("sinkhorn-rebasin", sinkhorn_rebasin, "mixtures of permutations learned by gradient (Sinkhorn re-basin)"),
    Aligner(
        "sinkhorn-rebasin-midpoint",
        partial(sinkhorn_rebasin, cost="midpoint"),
        "the same for the loss of the network halfway between, on public images; needs model, data",
        needs=Aligner.can_need,
    ),
)


def aligners() -> dict[str, str]:
    """Name -> one-line summary of every alignment method.

    Example:
        >>> fm.aligners()["weight-matching"]
        'coordinate descent over assignments of weights (Git Re-Basin)'
    """
    return ALIGNERS.summaries()


def needs_images(method: str) -> bool:
    """Whether that method looks at images: it then takes ``model`` and ``data`` (the public split).

    Raises:
        UnknownNameError: No such method.
    """
    return "data" in ALIGNERS[method].needs


def check_observable(
    method: str, model: nn.Module, spec: PermSpec, data: Images, device: str = "cpu"
) -> tuple[str, ...]:
    """Say before anything is trained what an alignment by ``method`` would say at its end.

    Returns:
        The groups that it would leave in their order, because their units show in no activation; none for a method
        that looks at weights.

    Raises:
        ParamsError: The network cannot be copied.
        SpecError: The method compares activations, and the network cannot be traced on such images.
    """
    return ALIGNERS[method].check(duplicate(model), spec, data, device)


@checked
def align(
    params: Params,
    to: Params,
    *,
    spec: PermSpec,
    method: str | Callable[..., Alignment] = "weight-matching",
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Alignment:
    """Find the permutation of the units of ``params`` that brings it close to ``to``.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        method: A name from :func:`aligners`, ``module:function``, or a function with the arguments of :class:`Aligner`.
        rng: Randomness of the method; by default a generator seeded with 0.
        options: Further arguments of the method; all take ``restarts``, and all but weight matching ``polish``.
            Methods that look at images need ``model`` (the network) and ``data`` (public images).

    Raises:
        UnknownNameError: No such method.
        ConfigError: A method of your own that does not take what it is called with, or returns no alignment.
        ParamsError: State dicts that do not fit, or a method without the model or images that it needs.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spec, a = fm.perm_spec(model, torch.zeros(1, 4)), model.state_dict()
        >>> b = fm.permute(a, {"0": torch.arange(7, -1, -1)}, spec=spec)
        >>> fm.align(b, to=a, spec=spec).perms["0"].tolist()
        [7, 6, 5, 4, 3, 2, 1, 0]
    """
    aligner = ALIGNERS.find(method)
    found = aligner.make(params, to=to, spec=spec, rng=rng or np.random.default_rng(0), **options)
    return returned(f"aligner {aligner.name!r}", found, Alignment)
