"""What mergers share that combine networks whose units are in one order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._loading import with_versions
from fedmerge.errors import ParamsError, UnknownNameError
from fedmerge.merge._average import average
from fedmerge.merge._carry import carry
from fedmerge.merge._merge_many import Merge, merge_many
from fedmerge.spec import PermSpec, permute
from fedmerge.types import Params

ORDERS = ("merge-many", "merge-many-paper", "average")


@checked
def in_common_order(
    models: Sequence[Params],
    *,
    order: str,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    **options: Any,
) -> Merge:
    """The merge by ``order``, whose permutations bring the models into one order.

    Args:
        models: State dicts of one architecture.
        order: ``"merge-many"``, ``"merge-many-paper"``, or ``"average"``, which leaves the models as they are.
        spec: The symmetries.
        weights: One non-negative number a model; equal if None.
        rng: Randomness of the alignment.
        options: Of the alignment.

    Raises:
        UnknownNameError: No such order.
        ParamsError: Models or weights that do not fit.
    """
    if order not in ORDERS:
        raise UnknownNameError("order", order, ORDERS)
    if order == "average":
        check_params(models, spec)
        return Merge(average(models, weights), tuple(spec.identity(m) for m in models), 0.0, (), 0, True)
    options = {"start": "anchored" if order == "merge-many" else "paper", **options}
    return merge_many(models, spec=spec, weights=weights, rng=rng, **options)


@checked
def ordered(models: Sequence[Params], found: Merge, *, spec: PermSpec) -> list[dict[str, Tensor]]:
    """The models with their units where ``found`` put them: what it averaged.

    Raises:
        ParamsError: Other models than those that were merged.
    """
    moves = found.maps or found.perms
    if len(models) != len(moves):
        raise ParamsError(
            f"{len(models)} models were given, but the merge is of {len(moves)}; give those that it merged"
        )
    if found.maps:
        carried = [
            carry(m, plans, spec=spec, carrying=found.carrying) for m, plans in zip(models, found.maps, strict=True)
        ]
        return [with_versions(params, m) for params, m in zip(carried, models, strict=True)]
    return [permute(m, p, spec=spec) for m, p in zip(models, found.perms, strict=True)]
