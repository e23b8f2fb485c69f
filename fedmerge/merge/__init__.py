"""Merging: several networks of one architecture combined into one. One file a method."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from fedmerge._arguments import check_arguments, checked
from fedmerge._loading import with_versions
from fedmerge._registry import Registry
from fedmerge.errors import UnknownNameError
from fedmerge.merge._average import average
from fedmerge.merge._cycle_consistent import cycle_consistent
from fedmerge.merge._distillation import ensemble, ensemble_distillation
from fedmerge.merge._fisher import fisher
from fedmerge.merge._fusion import ot_fusion
from fedmerge.merge._hierarchical import hierarchical
from fedmerge.merge._layer_wise import layer_wise, stages
from fedmerge.merge._merge_many import Merge, merge_many
from fedmerge.merge._ordered import ORDERS, in_common_order, ordered
from fedmerge.merge._papa import papa
from fedmerge.merge._regmean import regmean
from fedmerge.merge._soup import greedy_soup
from fedmerge.merge._streaming import EMA, LAWA, SWA, RunningAverage, running_average, running_averages
from fedmerge.merge._task_vectors import task_arithmetic, ties
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Params

__all__ = [
    "EMA",
    "LAWA",
    "ORDERS",
    "SWA",
    "Merge",
    "Merger",
    "RunningAverage",
    "average",
    "ensemble",
    "in_common_order",
    "layer_wise",
    "merge",
    "merge_many",
    "mergers",
    "ordered",
    "papa",
    "running_average",
    "running_averages",
    "stages",
    "takes",
]


Merger = Callable[..., Merge]
"""``(models, *, spec, weights, rng, **options) -> Merge``: what every merging method is."""

_MERGERS: Registry[Merger] = Registry("merger")


_MERGERS.add(
    "average",
    partial(in_common_order, order="average"),
    "the weighted mean of the models, without alignment",
)
_MERGERS.add("merge-many", merge_many, "MergeMany from an alignment of all models to one reference")
_MERGERS.add("merge-many-paper", partial(merge_many, start="paper"), "MergeMany as in the paper, from unaligned models")
_MERGERS.add("cycle-consistent", cycle_consistent, "all models mapped into one universe by Frank-Wolfe (C2M3)")
_MERGERS.add(
    "layer-wise", layer_wise, "all models matched layer by layer from the input on (FedMA, without its growth)"
)
_MERGERS.add("hierarchical", hierarchical, "pairs aligned and averaged, then pairs of those")
_MERGERS.add("fisher", fisher, "mean weighed by each parameter's Fisher information; needs model, data")
_MERGERS.add("regmean", regmean, "layer by layer the regression onto the models' own outputs; needs model, data")
_MERGERS.add("greedy-soup", greedy_soup, "mean of those models that raise held-out accuracy; needs model, data")
_MERGERS.add("task-arithmetic", task_arithmetic, "mean step from a common base, times a factor; needs base")
_MERGERS.add("ties", ties, "steps from a common base, trimmed, with elected signs; needs base")
_MERGERS.add(
    "ensemble-distillation",
    ensemble_distillation,
    "merged, then trained towards the ensemble (FedDF)",
)
_MERGERS.add("ot-fusion", ot_fusion, "units carried by optimal transport; widths may differ (OTFusion)")
_MERGERS.add(
    "ot-fusion-activations",
    partial(ot_fusion, ground="activations"),
    "the same by responses to public images; needs model, data",
)

_ON_REQUEST = {"ot-fusion"}
"""Methods that look at images only where an option asks for it."""


_SHARED = {"models", "spec", "weights", "rng", "options", "_"}


def mergers() -> dict[str, str]:
    """Name -> one-line summary of every merging method."""
    return _MERGERS.summaries()


def takes(method: str) -> frozenset[str]:
    """Names of the arguments that this merger takes: ``data`` is among them if it looks at images.

    Raises:
        UnknownNameError: No such method.
    """
    given = frozenset(inspect.signature(_MERGERS[method]).parameters)
    return given - {"model", "data"} if method in _ON_REQUEST else given


@checked
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

    Methods ignore options of the alignment that they have no use for, so that one set serves all of them.

    Raises:
        UnknownNameError: No such method, or an option that neither it nor :func:`merge_many` has.
        ParamsError: Models or weights that do not fit.
    """
    known = {name for m in (_MERGERS[method], merge_many) for name in inspect.signature(m).parameters}
    for option in options:
        if option not in known - {"options", "_"}:
            raise UnknownNameError(f"option of merger {method}", option, known - _SHARED)
    check_arguments(merge_many, options)
    found = _MERGERS[method](models, spec=spec, weights=weights, rng=rng or np.random.default_rng(0), **options)
    return replace(found, params=with_versions(found.params, models[0]))
