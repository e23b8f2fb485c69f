"""Optimal transport (Singh, Jaggi, "Model Fusion via Optimal Transport", NeurIPS 2020, arXiv:1910.05653, Alg. 1)."""

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._forward import need_images
from fedmerge._loading import load
from fedmerge.align._finish import best_of, finish
from fedmerge.align.climb import Alignment, Climb, assign
from fedmerge.align.transport import Transport, activation_distances, check_ground
from fedmerge.align.turns import Compared, supports, turns
from fedmerge.data import Images
from fedmerge.memory import check_room
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
def optimal_transport(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    ground: str = "weights",
    model: nn.Module | None = None,
    data: Images | None = None,
    solver: str = "exact",
    regularisation: float = 0.01,
    marginal_relaxation: float = 1.0,
    mass: str = "uniform",
    metric: str = "euclidean",
    normalise: bool = False,
    squared: bool = False,
    centre: bool = False,
    cost_scale: str = "max",
    clip: tuple[float, float] | None = None,
    batch_size: int = 100,
    device: torch.device | str = "cpu",
    restarts: int = 1,
    polish: bool = False,
) -> Alignment:
    r"""Reorder the hidden units of ``params`` by transporting each layer's units to those of ``to``.

    With :math:`D_{ij}` the distance of the supports of unit i of ``to`` and unit j of ``params``, solves for each group

    .. math:: \min_{T \ge 0} \langle D, T \rangle \quad \text{s.t.} \quad T 1 = \mu,\; T^\top 1 = \nu .

    The support of a unit is, by ``ground``,

    * ``"weights"``: its incoming weights, bias included, group by group in graph order, after the maps of the layers
      before have been applied;
    * ``"activations"``: its responses to ``data`` before the activation function, which need no map of other layers.

    With equal widths and mass 1/n a unit a vertex of this polytope is a permutation divided by n (Birkhoff), so
    the exact transport is solved as an assignment, and the paper's correction by the marginals, which multiplies by
    n, makes the map that permutation. Plans of other masses or solvers are soft: each is hardened to the permutation
    that carries most of its mass, by an assignment. Networks of different widths, whose maps are not permutations,
    are refused; ``ot-fusion`` merges them.

    Incoming are, as torch stores linear maps and convolutions, the tensors that a group indexes on axis 0. On a
    residual stream, which several layers feed, those count whose own inputs are settled; a group that no such tensor
    makes, the stream of a network that begins with an embedding, say, is known by the others. Heads of attention and
    the units within them wait for each other: the distance of two heads is the transport cost between their units.
    Unlike forward-greedy matching, which maximises inner products, the distance weighs the norms of units, and
    outgoing weights have no say.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: Order of the groups in the polish.
        ground: See above.
        model: The architecture, run in eval mode; not modified. Only for activations.
        data: Images of the public split, never of a client's partition; labels are not used. Only for activations.
        solver: ``"exact"``, ``"sinkhorn"`` or ``"unbalanced"``; this and all down to ``clip`` are described in
            :class:`fedmerge.align.transport.Transport`.
        regularisation: Of the entropy, in units of the scaled cost.
        marginal_relaxation: Weight of the marginals in ``"unbalanced"``.
        mass: ``"uniform"``, ``"norm"`` or ``"norm-l1"``.
        metric: ``"euclidean"`` or ``"cosine"``.
        normalise: Divide each support by its norm, so that the distance is of direction.
        squared: Take the squared distance (the 2-Wasserstein cost).
        centre: Subtract from the activations of a unit their mean.
        cost_scale: ``"max"``, ``"mean"``, ``"median"``, ``"log"`` or ``"none"``.
        clip: Bounds of the scaled cost, in units of ``regularisation``.
        batch_size: Images a batch.
        device: Where the forward passes run.
        restarts: Number of polishes, each in its own order; the best objective wins.
        polish: Climb on by weight matching.

    Returns:
        The alignment; its objective is that of weight matching, so that methods compare. Groups that no weight, or
        no activation, describes are named as ``left``.

    Raises:
        ParamsError: State dicts that do not fit each other (also in width) or hold non-finite values, activations
            without ``model`` or ``data``, or activations that are not finite.
        DataError: There are no images.
        SpecError: Activations of a network that cannot be traced on these images.
        UnknownNameError: No such ground, solver, mass, metric or scale.
        ConfigError: A regularisation, relaxation or clip out of range.
        ResourceError: Groups too wide for this machine's memory.

    Cost: per group of n units of d incoming weights (or d samples) O(n^2 d + n^3), in float64; activations take one
    forward pass of each network, and tracing it once or twice.
    """
    check_ground(ground)
    transport = Transport(
        solver, regularisation, marginal_relaxation, mass, metric, normalise, squared, centre, cost_scale, clip
    )
    images = need_images("optimal transport on activations", model, data) if ground == "activations" else None
    check_params([to, params], spec)
    check_room(spec.sizes(params), 3, "optimal-transport")
    climb = Climb(params, to, spec)
    perms = {group: torch.arange(n) for group, n in climb.sizes.items()}
    order = turns(spec, incoming=True)
    seen: Compared | None = None
    if images is not None:
        networks = load(images[0], to, device), load(images[0], params, device)
        seen = activation_distances(
            networks, transport, spec, (climb.sizes, climb.sizes), images[1],
            batch_size=batch_size, device=device, model=images[0],
        )  # fmt: skip
        at = {turn.group: turn for turn in order}
        order = [at[group] for group in seen.order(list(perms))]
    plans: dict[str, Tensor] = {}
    for turn in order:
        if seen is None and not turn.places:
            continue
        costs = climb.costs(turn, perms, transport.distances) if seen is None else seen.of(turn.group, plans)
        n = climb.sizes[turn.group]
        masses = (
            transport.masses(supports([m[o.name] for o in turn.places], turn, spec, climb.sizes).own(n))
            for m in (climb.a, climb.b)
        )
        plan = transport.plan(costs, *masses)
        perms[turn.group] = assign(plan.numpy())
        plans[turn.group] = torch.eye(n, dtype=torch.float64)[perms[turn.group]]
    left = [group for group, n in climb.sizes.items() if group not in plans and n > 1]
    return best_of(
        finish(climb, perms, rng=rng, polish=polish, left=left) for _ in range(max(1, restarts) if polish else 1)
    )
