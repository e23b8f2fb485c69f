"""What a swap of two units changes where their group indexes several axes of one tensor, so that J is not linear."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, product

import torch
from torch import Tensor

from fedmerge.align._tensors import SLICE
from fedmerge.spec.axes import Axis, Occurrence


def bound(one: Occurrence, other: Occurrence) -> bool:
    """Whether two places of a group meet in one product: not in segments that lie end to end on one axis."""
    return one.name == other.name and one != other and (one.axis != other.axis or one.segment == other.segment)


def cubic(places: Sequence[Occurrence]) -> bool:
    """Whether some three places of a group meet in one product: every swap then changes what every other one gains."""
    return any(all(bound(one, other) for one, other in combinations(some, 2)) for some in combinations(places, 3))


def joint(
    a: Tensor,
    b: Tensor,
    axes: Sequence[Axis],
    places: Sequence[Occurrence],
    sizes: Mapping[str, int],
    rows: Tensor,
) -> Tensor:
    r"""The part of the rise of :math:`\langle A, B \rangle` by a swap that is not the sum over its places.

    With u the difference of the unit vectors of two units, their swap is :math:`I - u u^\top` on each axis at which
    they stand. Multiplied out over the places T of the group, the terms of one place are the linear gains, and this is
    the rest:

    .. math:: \sum_{|T| \ge 2} (-1)^{|T|} \langle u_T^\top A,\; u_T^\top B \rangle

    where :math:`u_T` contracts every place in T. Places in different segments of one axis never move together.

    Args:
        a: The reference's tensor.
        b: The other network's, in its present order.
        axes: What the axes of both hold.
        places: Where the group stands.
        sizes: Units of each group.
        rows: Units, int64 ``(m,)``, that are swapped with every unit.

    Returns:
        float64 ``(m, n)``.

    Cost: O(m n d) for each set of places, where d numbers belong to a pair of units.
    """
    n = sizes[str(axes[places[0].axis][places[0].segment][places[0].factor].group)]
    total = torch.zeros(len(rows), n, dtype=torch.float64, device=a.device)
    for number in range(2, len(places) + 1):
        for some in combinations(places, number):
            if not all(bound(one, other) for one, other in combinations(some, 2)):
                continue
            left, right = (_at(tensor, axes, some, sizes) for tensor in (a, b))
            step = max(1, SLICE // (n * left.shape[-1]))
            for first in range(0, len(rows), step):
                here = rows[first : first + step].to(a.device)
                term = (_differences(left, here) * _differences(right, here)).sum(-1)
                total[first : first + step] += (-1) ** number * term
    return total


def _at(tensor: Tensor, axes: Sequence[Axis], places: Sequence[Occurrence], sizes: Mapping[str, int]) -> Tensor:
    """``tensor`` as ``(n, ..., n, d)``: an axis a place, then the rest."""
    shape: list[int] = []
    dims: list[int] = []
    for i, axis in enumerate(axes):
        here = [place for place in places if place.axis == i]
        if not here:
            shape.append(tensor.shape[i])
            continue
        lengths = [[f.size if f.group is None else sizes[f.group] for f in segment] for segment in axis]
        chosen = here[0].segment
        before, length = sum(map(math.prod, lengths[:chosen])), math.prod(lengths[chosen])
        tensor = tensor.narrow(i, before, length)
        dims += [len(shape) + place.factor for place in here]
        shape += lengths[chosen]
    tensor = tensor.reshape(shape).movedim(dims, list(range(len(dims))))
    return tensor.reshape(*tensor.shape[: len(dims)], -1)


def _differences(units: Tensor, rows: Tensor) -> Tensor:
    """The differences of ``rows`` from all units along every axis but the last: ``(m, n, d)``."""
    pair = rows[:, None], torch.arange(len(units), device=rows.device)[None, :]
    total = torch.zeros(len(rows), len(units), units.shape[-1], dtype=torch.float64, device=units.device)
    for chosen in product((0, 1), repeat=units.dim() - 1):
        total += (-1) ** sum(chosen) * units[tuple(pair[k] for k in chosen)].double()
    return total
