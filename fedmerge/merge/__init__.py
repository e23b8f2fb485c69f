"""Merging: several networks of one architecture combined into one. One file a method."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from fedmerge._arguments import check_arguments, checked
from fedmerge._loading import on_one_device, with_versions
from fedmerge.errors import UnknownNameError
from fedmerge.merge._average import average
from fedmerge.merge._coefficients import learned_coefficients
from fedmerge.merge._cycle_consistent import cycle_consistent
from fedmerge.merge._dare import dare
from fedmerge.merge._distillation import ensemble, ensemble_distillation
from fedmerge.merge._fisher import fisher
from fedmerge.merge._fs_merge import foldable, fs_merge
from fedmerge.merge._fusion import ot_fusion
from fedmerge.merge._hierarchical import hierarchical
from fedmerge.merge._layer_wise import layer_wise, stages
from fedmerge.merge._merge_many import Merge, merge_many
from fedmerge.merge._model_stock import model_stock
from fedmerge.merge._ordered import ORDERS, in_common_order, ordered
from fedmerge.merge._papa import papa
from fedmerge.merge._regmean import regmean
from fedmerge.merge._slerp import slerp
from fedmerge.merge._soup import greedy_soup
from fedmerge.merge._streaming import EMA, LAWA, SWA, RunningAverage, running_average, running_averages
from fedmerge.merge._task_vectors import task_arithmetic, ties
from fedmerge.registry import Entry, Registry, keywords_of, listed, returned, summary_of
from fedmerge.spec import PermSpec
from fedmerge.types import Params

__all__ = [
    "EMA",
    "LAWA",
    "MERGERS",
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


_ALIGNMENT = frozenset({"aligner", "reference", "restarts"})
_IMAGES = frozenset({"model", "data"})
_MANY = ("start", "reference", "restarts", "aligner", "aligner_options", "max_sweeps", "workers")
_FUSION = (
    "reference", "solver", "regularisation", "marginal_relaxation", "mass", "metric", "normalise", "squared", "centre",
    "cost_scale", "clip", "correction", "past_correction", "batch_size", "device",
)  # fmt: skip


@dataclass(frozen=True)
class Merger(Entry):
    """A merging method: ``make(models, *, spec, weights, rng, **options) -> Merge``.

    It ignores options of an alignment that it has no use for.

    Attributes:
        reads: Those of ``aligner``, ``reference`` and ``restarts`` that change what it returns.
        judges: Whether it chooses between networks by the images that it sees, which are then those for choices.
        check: Raises a ``SpecError`` for a network of layers that it does not know, before anything is trained.
    """

    make: Callable[..., Merge]
    _: KW_ONLY
    reads: frozenset[str] = frozenset()
    judges: bool = False
    check: Callable[[nn.Module], object] = lambda model: None

    can_need = frozenset({"model", "data", "base", "recipe", "epochs"})
    called = ("models", "spec weights rng reference restarts aligner aligner_options")

    def problem(self) -> str:
        """As of every entry; and what it reads must be steps of an alignment."""
        if unknown := self.reads - _ALIGNMENT:
            return f"it reads {listed(unknown)}; steps of an alignment are {listed(_ALIGNMENT)}"
        if self.judges and "data" not in self.needs:
            return "it judges by images and needs no data; name data among its needs"
        return super().problem()


def _of_function(name: str, make: Any) -> Merger:
    options = [p.name for p in keywords_of(make, Merger)]
    # It is given all of an alignment, and may read it: runs that differ in that are not taken for the same.
    return Merger(name, make, summary_of(make, name), options=options, reads=_ALIGNMENT)


MERGERS: Registry[Merger] = Registry("merger", Merger, "mergers", _of_function)
"""The merging methods."""

MERGERS.add(
    Merger(
        "average",
        partial(in_common_order, order="average"),
        "the weighted mean of the models, without alignment",
        title="Plain average",
        options=("order",),
    ),
    Merger(
        "merge-many",
        merge_many,
        "MergeMany from an alignment of all models to one reference",
        title="MergeMany, anchored",
        reads=_ALIGNMENT,
        options=_MANY,
    ),
    Merger(
        "merge-many-paper",
        partial(merge_many, start="paper"),
        "MergeMany as in the paper, from unaligned models",
        title="MergeMany, paper's start",
        options=_MANY,
    ),
    Merger(
        "cycle-consistent",
        cycle_consistent,
        "all models mapped into one universe by Frank-Wolfe (C2M3)",
        reads=frozenset({"reference"}),
        options=("reference", "max_steps", "tolerance", "polish"),
    ),
    Merger(
        "layer-wise",
        layer_wise,
        "all models matched layer by layer from the input on (FedMA, without its growth)",
        reads=frozenset({"reference"}),
        options=("reference", "settled", "max_sweeps"),
    ),
    Merger(
        "hierarchical",
        hierarchical,
        "pairs aligned and averaged, then pairs of those",
        reads=frozenset({"aligner", "restarts"}),
        options=("restarts", "aligner", "aligner_options"),
    ),
    Merger(
        "fisher",
        fisher,
        "mean weighed by each parameter's Fisher information; needs model, data",
        needs=_IMAGES,
        reads=_ALIGNMENT,
        options=("order", "floor", "normalise", "device"),
    ),
    Merger(
        "regmean",
        regmean,
        "layer by layer the regression onto the models' own outputs; needs model, data",
        needs=_IMAGES,
        reads=_ALIGNMENT,
        options=("order", "scale", "device"),
    ),
    Merger(
        "greedy-soup",
        greedy_soup,
        "mean of those models that raise held-out accuracy; needs model, data",
        needs=_IMAGES,
        reads=_ALIGNMENT,
        judges=True,
        options=("order", "statistics", "device"),
    ),
    Merger(
        "task-arithmetic",
        task_arithmetic,
        "mean step from a common base, times a factor; needs base",
        needs=frozenset({"base"}),
        options=("scale",),
    ),
    Merger(
        "ties",
        ties,
        "steps from a common base, trimmed, with elected signs; needs base",
        needs=frozenset({"base", "model"}),
        options=("density", "scale"),
    ),
    Merger(
        "dare",
        dare,
        "steps from a common base, dropped at random and rescaled (DARE; elect: DARE-TIES); needs base",
        needs=frozenset({"base", "model"}),
        options=("density", "elect", "scale"),
    ),
    Merger(
        "model-stock",
        model_stock,
        "between base and mean, as far as the models' steps agree (Model Stock); needs base",
        needs=frozenset({"base"}),
    ),
    Merger(
        "slerp",
        slerp,
        "on the arc between the models, tensor by tensor, in place of the chord",
        reads=_ALIGNMENT,
        options=("order",),
    ),
    Merger(
        "ensemble-distillation",
        ensemble_distillation,
        "merged, then trained towards the ensemble (FedDF)",
        needs=_IMAGES | {"recipe", "epochs"},
        reads=_ALIGNMENT,
        options=("order", "device"),
    ),
    Merger(
        "learned-coefficients",
        learned_coefficients,
        "mixed by a coefficient for each model and tensor, learned on the ensemble's answers; needs model, data",
        title="Learned coefficients",
        needs=_IMAGES,
        reads=_ALIGNMENT,
        options=("order", "target", "max_steps", "lr", "batch_size", "device"),
    ),
    Merger(
        "fs-merge",
        fs_merge,
        "folded by matrices that are learned to rebuild the models' features (FS-Merge); needs model, data",
        title="FS-Merge",
        needs=_IMAGES,
        reads=_ALIGNMENT,
        check=foldable,
        options=("order", "target", "max_steps", "lr", "batch_size", "device"),
    ),
    Merger(
        "ot-fusion",
        ot_fusion,
        "units carried by optimal transport; widths may differ (OTFusion)",
        reads=frozenset({"reference"}),
        options=(*_FUSION, "ground", "model", "data"),
    ),
    Merger(
        "ot-fusion-activations",
        partial(ot_fusion, ground="activations"),
        "the same by responses to public images; needs model, data",
        needs=_IMAGES,
        reads=frozenset({"reference"}),
        options=(*_FUSION, "ground"),
    ),
)


def mergers() -> dict[str, str]:
    """Name -> one-line summary of every merging method.

    Example:
        >>> "regmean" in fm.mergers()
        True
    """
    return MERGERS.summaries()


def takes(method: str) -> frozenset[str]:
    """Names of the arguments that this merger takes: ``data`` is among them if it cannot do without images.

    Raises:
        UnknownNameError: No such method.
    """
    return MERGERS[method].needs | set(MERGERS[method].options) - _IMAGES


@checked
def merge(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    method: str | Callable[..., Merge] = "merge-many",
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Merge:
    """Combine ``models`` by the method of that name (see :func:`mergers`); options go to the method.

    Methods ignore options of the alignment that they have no use for, so that one set serves all of them. A method of
    your own is given as ``module:function``, or as a function with the arguments of :class:`Merger`. The result is on
    the device of the first model, wherever the others are.

    Raises:
        UnknownNameError: No such method, or an option that neither it nor :func:`merge_many` has.
        ConfigError: A method of your own that does not take what it is called with, or returns no :class:`Merge`.
        ParamsError: Models or weights that do not fit.

    Example:
        >>> a, b = {"w": torch.tensor([0.0, 2.0])}, {"w": torch.tensor([4.0, 2.0])}
        >>> spec = fm.PermSpec(axes={"w": ((),)}, shapes={"w": (2,)}, parameters=frozenset({"w"}))  # nothing moves
        >>> fm.merge([a, b], spec=spec, method="average", weights=[3, 1]).params["w"]
        tensor([1., 2.])
    """
    merger = MERGERS.find(method)
    known = {*merger.needs, *merger.options, *_MANY}
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of merger {merger.name}", option, known)
    check_arguments(merge_many, options)
    if isinstance(models, (list, tuple)):
        *models, base = on_one_device([*models, options.get("base")])
        options |= {"base": base} if "base" in options else {}
    found = merger.make(models, spec=spec, weights=weights, rng=rng or np.random.default_rng(0), **options)
    found = returned(f"merger {merger.name!r}", found, Merge)
    _, params = on_one_device([models[0], found.params])
    return replace(found, params=with_versions(params, models[0]))
