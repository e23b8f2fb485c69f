"""What a swap of two units changes where their group indexes several axes of one tensor, so that J is not linear."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import issparse
from torch import Tensor

from fedmerge.align._tensors import SLICE, ordered
from fedmerge.spec.axes import Axis, Occurrence, axis_index
from fedmerge.types import Perms

if TYPE_CHECKING:
    from fedmerge.align.climb import Climb


def swap_units(climb: "Climb", perms: dict[str, Tensor], group: str, least: float) -> float:
    """Swap those two units of a group by which J rises most, as long as it rises by more than ``least``.

    Returns:
        By how much J rose; ``perms[group]`` is replaced.
    """
    everyone = torch.arange(climb.sizes[group])
    beyond, far = beyond_gains(climb, perms, group, everyone), cubic(climb.places[group])
    moving = [o for o in climb.places[group] if o.name in climb.tied[group]]
    still = climb._gain(perms, group, [o for o in climb.places[group] if o not in moving])
    rise = 0.0
    while True:
        gain = still + climb._gain(perms, group, moving)
        gain = (gain.toarray() if issparse(gain) else gain)[:, perms[group].numpy()]
        own = gain.diagonal()
        rises = gain + gain.T - own[:, None] - own + beyond
        pair = [int(k) for k in np.unravel_index(rises.argmax(), rises.shape)]
        if rises[*pair] <= least:
            return rise
        rise += float(rises[*pair])
        perms[group] = perms[group].clone()
        perms[group][pair] = perms[group][pair[::-1]]
        if far:
            beyond = beyond_gains(climb, perms, group, everyone)
        else:  # the other pairs stand as they stood
            beyond[pair] = beyond_gains(climb, perms, group, torch.tensor(pair))
            beyond[:, pair] = beyond[pair].T


def beyond_gains(climb: "Climb", perms: Perms, group: str, rows: Tensor) -> Any:
    """[i, k] = what J gains by the swap of units ``rows[i]`` and k beyond the gains at its single places, float64."""
    total = np.zeros((len(rows), climb.sizes[group]))
    for name in sorted(climb.tied[group]):
        axes = climb.spec.axes[name]
        order = {i: axis_index(axis, perms) for i, axis in enumerate(axes) if axis}
        pair = climb.a.given(name), ordered(climb.b.given(name), order)
        places = [o for o in climb.places[group] if o.name == name]
        total += joint(*pair, axes, places, climb.sizes, rows).cpu().numpy()
    return total


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
