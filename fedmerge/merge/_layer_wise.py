"""Layer-wise matching of all networks at once, after FedMA (Wang et al., ICLR 2020, arXiv:2002.06440)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge._check import check_params, check_weights, position
from fedmerge.align.climb import Climb, assign
from fedmerge.align.turns import turns
from fedmerge.errors import UnknownNameError
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge, Reordered
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.types import Params

_RTOL = 1e-12


@checked
def layer_wise(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    reference: int = 0,
    settled: Sequence[str] = (),
    max_sweeps: int = 20,
    **_: Any,
) -> Merge:
    r"""Match the units of all models layer by layer, from the input on, and average.

    A group's units are described by the weights whose other groups are settled: :math:`X_i`, of shape ``(n, d)``, holds
    what feeds them in model i (weights, bias, scale), the inputs already in the common order, and what they feed where
    that has an order already (the classes, a residual stream). Group by group in graph order, with one permutation
    :math:`P_i` and one weight :math:`w_i` a model, climbs

    .. math:: J = \Big\| \sum_i w_i P_i X_i \Big\|^2
              = c - \sum_{i < j} w_i w_j \| P_i X_i - P_j X_j \|^2 .

    The reference's units come first; the other models, by falling weight, are each matched to the mean of those before
    them. Then each is matched again to the mean of all others until J stops rising. A group that was passed is not
    looked at again: this is what sets the method apart from :func:`fedmerge.merge_many`, which comes back to see what
    the later layers make of it.

    Groups that share an axis and wait for each other, heads of attention and the units within them, cannot be compared
    with a mean before either has an order: the first of them is matched model by model to the reference, each pair of
    heads by the best order of their units, and adds nothing to J; the others follow as above. A group that no settled
    weight describes keeps its order, and the merge names it as ``left``.

    Where this is not the paper's matching: its global layers grow, for its Beta-Bernoulli process (BBP-MAP) makes a
    unit that is unlike all others a new one, and its cost comes from that process; here widths stay, and the cost
    is the squared distance. Its clients retrain between two layers: that is strategy ``fedma``. It describes units by
    what feeds them alone.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model; equal if None.
        rng: Not used; the method draws nothing.
        reference: Position of the model that keeps its order.
        settled: Groups whose units are in one order already; they stay.
        max_sweeps: Bound on the passes over the models, for each group.

    Raises:
        ParamsError: Models or weights that do not fit.

    Returns:
        The merge; its objective is the sum of J over the groups, ``history`` that after the first matching and at
        the end.

    Cost: per group of n units on d weights and sweep, one product of O(n^2 d) and one assignment of O(n^3) a model.
    Memory: the group's :math:`X_i` of all models in float64, and n x n.
    """
    check_params(models, spec)
    shares = check_weights(weights, len(models)).tolist()
    reference = position(reference, len(models))
    for group in settled:
        if group not in spec.groups:
            raise UnknownNameError("group", group, spec.groups)
    climbs = [Climb(m, models[reference], spec) for m in models]
    perms = [spec.identity(m) for m in models]
    order = [reference, *sorted((i for i in range(len(models)) if i != reference), key=lambda i: (-shares[i], i))]
    begun = ended = 0.0
    sweeps, converged = 0, True
    left: list[str] = []
    for turn in steps("matching layers", turns(spec, incoming=False)):
        group = turn.group
        if group in settled:
            continue
        if not turn.places:
            left += [group] if climbs[0].sizes[group] > 1 else []
        elif any(turn.open(spec, place) for place in turn.places):
            for i in order[1:]:
                perms[i][group] = assign(-climbs[i].costs(turn, perms[i], lambda a, b: -(a @ b.T)).cpu().numpy())
        else:
            units = [
                w * torch.cat([climb.units(climb.b[o.name], o, p) for o in turn.places], 1)
                for climb, w, p in zip(climbs, shares, perms, strict=True)
            ]
            found = _match(units, order, max_sweeps)
            for perm, own in zip(perms, found.perms, strict=True):
                perm[group] = own
            begun, ended = begun + found.begun, ended + found.ended
            sweeps, converged = max(sweeps, found.sweeps), converged and found.converged
    merged = average([Reordered(m, p, spec) for m, p in zip(models, perms, strict=True)], shares)
    return Merge(merged, tuple(perms), ended, (begun, ended), sweeps, converged, left=tuple(left))


def stages(spec: PermSpec, params: Params) -> list[tuple[str, frozenset[str]]]:
    """Group -> the parameters that can be fixed once it is matched, in graph order.

    They are those whose groups are all matched by then. Parameters whose outputs are in no group, the classifier's,
    come last, under the name ``""``.
    """
    climb = Climb(params, params, spec)
    left = {name: groups for name, groups in climb.groups_of.items() if spec.axes[name] and spec.axes[name][0]}
    found: list[tuple[str, frozenset[str]]] = []
    settled: set[str] = set()
    for turn in turns(spec, incoming=False):
        settled.add(turn.group)
        done = frozenset(name for name, groups in left.items() if groups <= settled)
        found.append((turn.group, done))
        left = {name: groups for name, groups in left.items() if name not in done}
    last = frozenset(climb.groups_of) - frozenset().union(*(done for _, done in found))
    return [*found, ("", last)] if last else found


class _Match:
    """Permutations of one group for each model, and J before and after the sweeps."""

    def __init__(self, perms: list[Tensor], begun: float, ended: float, sweeps: int, converged: bool) -> None:
        self.perms, self.begun, self.ended, self.sweeps, self.converged = perms, begun, ended, sweeps, converged


def _match(units: Sequence[Tensor], order: Sequence[int], max_sweeps: int) -> _Match:
    """Match the rows of all ``units`` (n, d), which are weighed already, to each other."""
    n = len(units[0])
    perms = [torch.arange(n) for _ in units]
    total = units[order[0]].clone()
    for i in order[1:]:
        perms[i] = assign((total @ units[i].T).cpu().numpy())
        total += units[i][perms[i]]
    begun = float((total * total).sum())
    waiting = set(order) if len(order) > 1 else set()
    sweeps = 0
    while waiting and sweeps < max_sweeps:
        sweeps += 1
        for i in order[1:]:  # the reference keeps its order; only relative orders count
            if i not in waiting:
                continue
            others = total - units[i][perms[i]]
            gain = (others @ units[i].T).cpu().numpy()
            new = assign(gain)
            at = np.arange(n)
            rise = gain[at, new.numpy()].sum() - gain[at, perms[i].numpy()].sum()
            waiting.discard(i)
            if rise > _RTOL * n * abs(gain).max():
                perms[i] = new
                waiting |= set(order) - {i}
            total = others + units[i][perms[i]]
        waiting.discard(order[0])
    return _Match(perms, begun, float((total * total).sum()), sweeps, not waiting)
