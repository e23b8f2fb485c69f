"""In which order methods that go layer by layer look at the groups, and what they compare when a group's turn comes."""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmerge.align._swaps import bound
from fedmerge.spec import PermSpec
from fedmerge.spec.axes import Axis, Occurrence

Key = tuple[str, ...]
"""Groups whose product numbers the rows of a comparison, slowest first."""
_ROWS = 2**13
"""Units, numbered by a group and those that wait with it, that are compared with as many: half a gigabyte."""
_STEPS = 10**9
"""Steps of the assignments that compare groups across axes: (units of the group)^2 (of the other)^3."""


class Turn(NamedTuple):
    """A group, and the places whose other axes are in a common order by then.

    Attributes:
        group: The group.
        places: Where its units are compared; none if nothing describes them yet.
        settled: The groups that came before.
    """

    group: str
    places: tuple[Occurrence, ...]
    settled: frozenset[str]

    def open(self, spec: PermSpec, place: Occurrence) -> tuple[Occurrence, ...]:
        """Where groups whose order is not known yet number the units of the place along with this one."""
        return tuple(o for o in _beside(spec, place) if _group(spec, o) not in self.settled)


def turns(spec: PermSpec, *, incoming: bool) -> list[Turn]:
    """The groups in graph order, each with the tensors by which its units are known; see :func:`next_turn`."""
    found: list[Turn] = []
    waiting = list(spec.groups)
    while waiting:
        found.append(next_turn(spec, waiting, {turn.group for turn in found}, incoming=incoming))
        waiting.remove(found[-1].group)
    return found


def next_turn(spec: PermSpec, waiting: Sequence[str], settled: Collection[str], *, incoming: bool) -> Turn:
    """The first of the ``waiting`` groups that something describes.

    A tensor counts when all other groups that it has are settled, and a bias or the like, one number a unit, only
    beside a weight: where that is not ready yet, others go first. Where no group has such a tensor, one is taken
    that is known by a piece of a tensor, as the values of attention are by the last third of a packed projection. The
    next resort is a group that shares an axis with others which are not settled either, as the heads of attention
    do with the units within a head, or, last, that shares a tensor with others on its other axes: such groups wait for
    each other, and :func:`least` compares them all the same, where they are not too many. A group that even
    then nothing describes comes without places.

    Args:
        spec: The symmetries.
        waiting: The groups to choose from, in the order of preference.
        settled: Groups whose units are in a common order.
        incoming: Look at the tensors that make the units first, and at others only where no group is known by
            those; if false, at all alike.
    """

    def whole(group: str, place: Occurrence) -> bool:
        return all(_groups(axis) <= {*settled, group} for axis in spec.axes[place.name])

    def nested(group: str, place: Occurrence) -> bool:
        return all(_groups(axis) <= {*settled} for a, axis in enumerate(spec.axes[place.name]) if a != place.axis)

    def apart(group: str, place: Occurrence) -> bool:
        segment = spec.axes[place.name][place.axis][place.segment]
        return nested(group, place) and {f.group for f in segment} <= {*settled, group, None}

    def open_sizes(place: Occurrence) -> list[int]:
        return [sizes[_group(spec, o)] for o in _beside(spec, place) if _group(spec, o) not in settled]

    def waits(group: str, place: Occurrence) -> bool:
        return nested(group, place) and sizes[group] * math.prod(open_sizes(place)) <= _ROWS

    def across(group: str, place: Occurrence) -> bool:
        others = [o for o in _beside(spec, place) if _group(spec, o) not in settled]
        several = any(len(spec.axes[place.name][o.axis]) > 1 for o in others if o.axis != place.axis)
        names, (*outer, last) = [group, *(_group(spec, o) for o in others)], [1, *open_sizes(place)]
        cost = sizes[group] ** 2 * math.prod(outer) ** 2 * last**3
        return not several and cost <= _STEPS and len(set(names)) == len(names)

    def described(group: str, *, makes: bool) -> list[Occurrence]:
        # A group that stands at two places of one product is not compared by it: each would need the other.
        return [
            place
            for place in spec.occurrences(group)
            if place.name in spec.parameters
            and (not makes or spec.makes(place.name, place.axis))
            and not any(bound(place, other) for other in spec.occurrences(group))
        ]

    def thin(group: str, places: Collection[Occurrence]) -> bool:
        return not any(map(several, places)) and any(map(several, described(group, makes=incoming)))

    def several(place: Occurrence) -> bool:
        return sum(length > 1 for length in spec.shapes[place.name]) > 1

    sizes = spec.sizes()
    for patient, steps in itertools.product((True, False), ((whole, apart, waits), (across,))):
        for makes, fits in itertools.product((True, False) if incoming else (False,), steps):
            for group in waiting:
                places = tuple(place for place in described(group, makes=makes) if fits(group, place))
                if places and not (patient and thin(group, places)):
                    return Turn(group, places, frozenset(settled))
    return Turn(waiting[0], (), frozenset(settled))


def _beside(spec: PermSpec, place: Occurrence) -> list[Occurrence]:
    """The other groups of the place's segment, and all of the tensor's other axes."""
    return [
        Occurrence(place.name, a, s, k)
        for a, axis in enumerate(spec.axes[place.name])
        for s, segment in enumerate(axis)
        for k, factor in enumerate(segment)
        if factor.group is not None
        and (a != place.axis or s == place.segment)
        and (a, s, k) != (place.axis, place.segment, place.factor)
    ]


def _group(spec: PermSpec, place: Occurrence) -> str:
    return str(spec.axes[place.name][place.axis][place.segment][place.factor].group)


def _groups(axis: Axis) -> set[str]:
    return {factor.group for segment in axis for factor in segment if factor.group is not None}


def length(axis: Axis, sizes: Mapping[str, int]) -> int:
    """Positions of an axis whose groups have these numbers of units."""
    return sum(math.prod(f.size if f.group is None else sizes[f.group] for f in segment) for segment in axis)


def spread(
    tensor: Tensor, axes: Sequence[Axis], sizes: Mapping[str, int], place: Occurrence, others: Sequence[Occurrence]
) -> Tensor:
    """``tensor`` as ``(units, *sizes of others, rest)``: the units at ``place``, and the other factors given."""
    at = dict.fromkeys((place, *others), 0)
    for dim in sorted({o.axis for o in at}, reverse=True):  # from the last axis on: a reshape moves none to come
        segment = next(o.segment for o in at if o.axis == dim)
        factors = [f.size if f.group is None else sizes[f.group] for f in axes[dim][segment]]
        tensor = tensor.narrow(dim, length(axes[dim][:segment], sizes), length((axes[dim][segment],), sizes))
        tensor = tensor.reshape(*tensor.shape[:dim], *factors, *tensor.shape[dim + 1 :])
        at = {o: dim + o.factor if o.axis == dim else n + (len(factors) - 1) * (o.axis > dim) for o, n in at.items()}
    tensor = tensor.movedim(list(at.values()), list(range(len(at))))
    return tensor.flatten(len(at)) if tensor.dim() > len(at) else tensor[..., None]


class Supports(NamedTuple):
    """What describes the units of a group at its turn: rows of weights, of it and of the groups that wait with it.

    Attributes:
        rows: The groups that number the rows, this one first -> ``(rows, d)``.
        sizes: The same -> the numbers of units of these groups.
    """

    rows: dict[Key, Tensor]
    sizes: dict[Key, tuple[int, ...]]

    def own(self, n: int) -> Tensor:
        """All that describes each of the group's ``n`` units, ``(n, d)``."""
        empty = torch.zeros(n, 0, dtype=torch.float64)
        return torch.cat([rows.reshape(n, -1) for rows in self.rows.values()], 1) if self.rows else empty


def supports(tensors: Sequence[Tensor], turn: Turn, spec: PermSpec, sizes: Mapping[str, int]) -> Supports:
    """The rows at the places of ``turn``, of whose ``tensors`` all that is settled is in a common order."""
    found: dict[Key, list[Tensor]] = {}
    for place, tensor in zip(turn.places, tensors, strict=True):
        others = turn.open(spec, place)
        key = (turn.group, *(_group(spec, o) for o in others))
        found.setdefault(key, []).append(spread(tensor, spec.axes[place.name], sizes, place, others))
    rows = {key: torch.cat(units, -1).flatten(0, -2) for key, units in found.items()}
    return Supports(rows, {key: tuple(units[0].shape[:-1]) for key, units in found.items()})


def between(a: Supports, b: Supports, costs: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Costs ``(n, m)`` between the units of a group in two networks, over the best order of what is not settled."""
    found = [
        least(costs(rows, b.rows[key]), a.sizes[key], b.sizes[key], [None] * (len(key) - 1))
        for key, rows in a.rows.items()
    ]
    return sum(found[1:], found[0])


def least(costs: Tensor, left: Sequence[int], right: Sequence[int], order: Sequence[Tensor | None]) -> Tensor:
    """Costs ``(n, m)`` of the first factor of units that are numbered by several, over the best order of the others.

    Two heads of attention are as far apart as their units are when they are paired up as well as can be: the transport
    cost between them, and so on inwards.

    Args:
        costs: Costs between all composite units, ``(prod(left), prod(right))``.
        left: Sizes of the factors of one side, the group in question first.
        right: Those of the other.
        order: For each further factor its plan ``(n_k, m_k)``, whose pairs are then averaged, or None: not known.

    Cost: an assignment for each pair of units of the factors around it.
    """
    k = len(left)
    costs = costs.cpu().reshape(*left, *right)
    costs = costs.permute([axis for pair in zip(range(k), range(k, 2 * k), strict=True) for axis in pair])
    for i in range(k - 1, 0, -1):  # those that are known; what is left has the same order of factors
        plan = order[i - 1]
        if plan is not None:
            costs = torch.tensordot(costs, (plan / plan.sum()).to(costs), ([2 * i, 2 * i + 1], [0, 1]))
    while costs.dim() > 2:
        inner = costs.reshape(-1, *costs.shape[-2:]).numpy()
        best = [matrix[linear_sum_assignment(matrix)].mean() for matrix in inner]
        costs = torch.from_numpy(np.asarray(best, dtype=np.float64)).reshape(costs.shape[:-2])
    return costs


class Compared:
    """Costs between the units of two networks by what they show, not by their weights: they wait for no other group.

    Args:
        costs: Groups that number the rows -> costs between the (composite) units of both networks.
        sizes: Group -> number of units, of both networks.
    """

    def __init__(self, costs: Mapping[Key, Tensor], sizes: tuple[Mapping[str, int], Mapping[str, int]]) -> None:
        self._costs, self._sizes = costs, sizes

    def order(self, groups: Sequence[str]) -> list[str]:
        """The groups that show alone, then those that only show as a product with others; the rest is left out."""
        keys = {g: self._keys(g) for g in groups}
        waiting = [g for g in groups if keys[g]]
        found: list[str] = []
        while waiting:
            ready = (g for g in waiting if all(set(key) <= {g, *found} for key in keys[g]))
            found.append(next(ready, waiting[0]))
            waiting.remove(found[-1])
        return found

    def of(self, group: str, plans: Mapping[str, Tensor]) -> Tensor:
        """Costs ``(n, m)`` between the units of ``group``, others in the order of ``plans`` where they are given."""
        found: list[Tensor] = []
        for key in self._keys(group):
            left, right = ([sizes[g] for g in key] for sizes in self._sizes)
            at, k = key.index(group), len(key)
            costs = self._costs[key].reshape(*left, *right).movedim((at, k + at), (0, k))
            others = [i for i in range(k) if i != at]
            order = [plans.get(key[i]) for i in others]
            found.append(least(costs, [left[i] for i in (at, *others)], [right[i] for i in (at, *others)], order))
        return sum(found[1:], found[0])

    def _keys(self, group: str) -> list[Key]:
        return [(group,)] if (group,) in self._costs else [key for key in self._costs if group in key]
