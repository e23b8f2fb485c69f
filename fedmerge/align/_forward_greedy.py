"""Forward-greedy matching: each group is assigned once, in graph order."""

import numpy as np

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge.align._finish import best_of, finish
from fedmerge.align.climb import Alignment, Climb
from fedmerge.align.turns import turns
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
def forward_greedy(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    restarts: int = 1,
    polish: bool = False,
) -> Alignment:
    """Reorder the hidden units of ``params`` group by group, from the input on, never going back.

    A group's assignment counts only the tensors whose other groups are settled, so a unit is recognised by
    what feeds it. This is the start of weight matching without its sweeps: one assignment a group, and the
    yardstick of what sweeping adds. With ``polish`` it is weight matching. Groups that share an axis and wait for each
    other, heads of attention and the units within them, are assigned as products: heads by the best order of their
    units. A group that no settled tensor describes keeps its order and is named as ``left``.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: The order of the groups in restarts after the first.
        restarts: The first goes in graph order, the others in random orders; the best objective wins.
        polish: Climb on by weight matching.

    Raises:
        ParamsError: State dicts that do not fit each other or hold non-finite values.

    Cost: per restart and group of n units on d weights each, O(n^2 d + n^3).
    """
    check_params([to, params], spec)
    climb = Climb(params, to, spec)
    orders = ["forward-greedy", *["greedy-random"] * (max(1, restarts) - 1)]
    left = [t.group for t in turns(spec, incoming=False) if not t.places and climb.sizes[t.group] > 1]
    return best_of(
        finish(climb, climb.begin(order, rng), rng=rng, polish=polish, approximate=climb.approximate, left=left)
        for order in orders
    )
