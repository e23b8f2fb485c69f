"""Weight matching (Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv:2209.04836, Alg. 1)."""

import numpy as np

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge.align.climb import WIDE, Alignment, Climb
from fedmerge.spec import PermSpec
from fedmerge.types import Params, Perms

_RTOL = 1e-12


@checked
def weight_matching(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    start: str | Perms = "forward-greedy",
    restarts: int = 1,
    max_sweeps: int = 100,
    wide: int = WIDE,
) -> Alignment:
    r"""Reorder the hidden units of ``params`` so that its weights come close to ``to``.

    With A = ``to``, B = ``params`` and one permutation :math:`P_g` per group, climbs

    .. math:: J(P) = \sum_k \langle A_k, P B_k \rangle = c - \tfrac12 \sum_k \|A_k - P B_k\|^2

    over all parameters k (buffers do not vote; a tensor of several names counts once a name). With all groups but one
    held, J is linear in that
    :math:`P_g`, so its best value solves a linear assignment. One-dimensional parameters enter as outer
    products. J never falls; the climb ends at a local optimum that depends on the order drawn from ``rng``.

    Beyond the paper: the climb starts forward-greedy (each group first sees only tensors whose other groups
    are settled, because next-layer terms are noise before the next layer is aligned); a group is solved again
    only after a neighbour moved; and where one group indexes two axes of a tensor (a convolution from a
    residual stream to itself) J is quadratic in it, so the assignment of its linearisation, damped if need be,
    is taken only if J rises.

    Args:
        params: The network that moves, a state dict.
        to: The reference, a state dict of the same shapes.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: Draws the order of the groups and the further starts.
        start: ``"forward-greedy"``, ``"identity"``, or permutations to begin from.
        restarts: Number of climbs; the best objective wins. The first begins at ``start``; of the others
            every second one begins forward-greedy in a random order, the rest at random permutations.
        max_sweeps: Bound on the passes over the groups.
        wide: A group of at least so many units is solved among the present pairs of units and the
            64 best of every row and column of its gain, in memory of O(n), and above 64 units without swaps; the
            alignment names it as ``approximate``.

    Returns:
        The alignment with the highest objective.

    Raises:
        ParamsError: State dicts that do not fit each other or hold non-finite values, or a start that is none.
        UnknownNameError: No such start.

    Cost: per group one product of O(n^2 d), of which a later sweep repeats the share of the neighbours' units
    that moved, and per sweep one assignment of O(n^3); a swap takes O(n^2 d). In float64, on the device of the tensors
    (assignments on the CPU). Memory: the products, two of n x n a layer, in float64; the models stay where they are.
    """
    check_params([to, params], spec)
    climb = Climb(params, to, spec, wide=wide)
    best: Alignment | None = None
    for attempt in range(max(1, restarts)):
        perms = climb.begin(start if attempt == 0 else ("greedy-random", "random")[(attempt + 1) % 2], rng)
        found = climb.run(perms, rng, max_sweeps)
        if best is None or found.objective > best.objective + _RTOL * abs(best.objective):
            best = found
    assert best is not None
    return best
