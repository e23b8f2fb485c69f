"""Alignment: the reordering of one network's units that makes it resemble another. One file a method."""

from collections.abc import Callable
from typing import Any

import numpy as np

from fedmerge._registry import Registry
from fedmerge.align._weight_matching import Alignment, weight_matching
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Params

__all__ = ["Aligner", "Alignment", "align", "aligners", "weight_matching"]


Aligner = Callable[..., Alignment]
"""``(params, *, to, spec, rng, **options) -> Alignment``: what every alignment method is."""

_ALIGNERS: Registry[Aligner] = Registry("aligner")
_ALIGNERS.add("weight-matching", weight_matching, "coordinate descent over assignments of weights (Git Re-Basin)")


def aligners() -> dict[str, str]:
    """Name -> one-line summary of every alignment method."""
    return _ALIGNERS.summaries()


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
        options: Further arguments of the method.

    Raises:
        UnknownNameError: No such method.
        ParamsError: State dicts that do not fit.
    """
    return _ALIGNERS[method](params, to=to, spec=spec, rng=rng or np.random.default_rng(0), **options)
