"""Optimal transport (Singh, Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, arXiv:1910.05653, Alg. 1)."""

import numpy as np
import torch
from torch import Tensor

from fedmerge._check import check_params
from fedmerge.align._finish import best_of, finish
from fedmerge.align._weight_matching import Alignment, Climb, assign
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Occurrence, Params


def optimal_transport(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    normalise: bool = False,
    squared: bool = False,
    restarts: int = 1,
    polish: bool = False,
) -> Alignment:
    r"""Reorder the hidden units of ``params`` by transporting each layer's units to those of ``to``.

    A unit is the vector of its incoming weights, bias included, after the maps of the layers before have been
    applied. With :math:`D_{ij}` the Euclidean distance of unit i of ``to`` to unit j of ``params``, solves for
    each group in graph order

    .. math:: \min_{T \ge 0} \langle D, T \rangle \quad \text{s.t.} \quad T 1 = T^\top 1 = 1 / n .

    With equal widths and mass 1/n a unit a vertex of this polytope is a permutation divided by n (Birkhoff), so
    the transport is solved as an assignment, and the paper's correction by the marginals, which multiplies by n,
    makes the map that permutation. Networks of different widths, whose maps are not permutations, are refused.

    Incoming are, as torch stores linear maps and convolutions, the tensors that a group indexes on axis 0. On a
    residual stream, which several layers feed, those count whose own inputs are settled. Unlike forward-greedy
    matching, which maximises inner products, the distance weighs the norms of units, and outgoing weights have
    no say.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: Order of the groups in the polish.
        normalise: Divide each unit's incoming weights by their norm, so that the distance is of direction.
        squared: Take the squared distance (the 2-Wasserstein cost).
        restarts: Number of polishes, each in its own order; the best objective wins.
        polish: Climb on by weight matching.

    Returns:
        The alignment; its objective is that of weight matching, so that methods compare.

    Raises:
        ParamsError: State dicts that do not fit each other (also in width) or hold non-finite values.

    Cost: per group of n units of d incoming weights O(n^2 d + n^3), in float64.
    """
    check_params([to, params], spec)
    climb = Climb(params, to, spec)
    perms = {group: torch.arange(n) for group, n in climb.sizes.items()}
    settled: set[str] = set()
    waiting = list(perms)
    while waiting:
        known = {group: _incoming(climb, group, settled) for group in waiting}
        # The next group in graph order that settled tensors feed; a group that nothing feeds keeps its order.
        group = next((g for g in waiting if known[g]), waiting[0])
        if known[group]:
            a = torch.cat([climb.units(climb.a[o.name], o, None) for o in known[group]], 1)
            b = torch.cat([climb.units(climb.b[o.name], o, perms) for o in known[group]], 1)
            perms[group] = assign(-distances(a, b, normalise=normalise, squared=squared).cpu().numpy())
        settled.add(group)
        waiting.remove(group)
    return best_of(finish(climb, perms, rng=rng, polish=polish) for _ in range(max(1, restarts) if polish else 1))


def _incoming(climb: Climb, group: str, settled: set[str]) -> list[Occurrence]:
    return [o for o in climb.settled_places(group, settled) if o.axis == 0]


def distances(a: Tensor, b: Tensor, *, normalise: bool, squared: bool) -> Tensor:
    """Euclidean distances of the rows of ``a`` from those of ``b``, (n, n)."""
    if normalise:
        a, b = (units / units.norm(dim=1, keepdim=True).clamp_min(1e-300) for units in (a, b))
    # The quick form through inner products cancels for units that are close, which are those that matter.
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.square() if squared else distances
