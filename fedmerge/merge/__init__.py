"""Merging: several networks of one architecture combined into one. One file a method."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fedmerge._registry import Registry
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge, merge_many
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Params

__all__ = ["Merge", "Merger", "average", "merge", "merge_many", "mergers"]


Merger = Callable[..., Merge]
"""``(models, *, spec, weights, rng, **options) -> Merge``: what every merging method is."""

_MERGERS: Registry[Merger] = Registry("merger")


@_MERGERS.register("average", "the weighted mean of the models as they are, without alignment")
def _plain(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None,
    rng: np.random.Generator,
    **_: Any,
) -> Merge:
    return Merge(average(models, weights), tuple(spec.identity(m) for m in models), 0.0, (), 0, True)


_MERGERS.add("merge-many", merge_many, "MergeMany from an alignment of all models to one reference")
_MERGERS.add("merge-many-paper", partial(merge_many, start="paper"), "MergeMany as in the paper, from unaligned models")


def mergers() -> dict[str, str]:
    """Name -> one-line summary of every merging method."""
    return _MERGERS.summaries()


def merge(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    method: str = "merge-many",
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Merge:
    """Combine ``models`` by the method of that name (see :func:`mergers`); options go to the method.

    Raises:
        UnknownNameError: No such method.
        ParamsError: Models or weights that do not fit.
    """
    return _MERGERS[method](models, spec=spec, weights=weights, rng=rng or np.random.default_rng(0), **options)
