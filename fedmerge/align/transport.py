"""Transport plans between the units of two networks: costs, masses, solvers (Singh, Jaggi, arXiv:1910.05653)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.align._activations import Activations
from fedmerge.align.climb import assign
from fedmerge.align.turns import Compared, Key
from fedmerge.data import Images
from fedmerge.errors import ConfigError, ParamsError, UnknownNameError
from fedmerge.memory import check_room
from fedmerge.spec import PermSpec

GROUNDS = ("weights", "activations")
_NAMES = {
    "solver": ("exact", "sinkhorn", "unbalanced"),
    "mass": ("uniform", "norm", "norm-l1"),
    "metric": ("euclidean", "cosine"),
    "cost_scale": ("max", "mean", "median", "log", "none"),
}
_TINY = 1e-12
_LEAST = 1e-9
"""What a unit without weights weighs before masses are made to add to 1, as in the code of the paper."""
_ITERATIONS = 10_000

Array = np.ndarray


def check_ground(ground: str) -> None:
    """Refuse a ground that is none of :data:`GROUNDS`."""
    if ground not in GROUNDS:
        raise UnknownNameError("ground of optimal transport", ground, GROUNDS)


@dataclass(frozen=True)
class Transport:
    r"""What moving a unit costs, how much each unit weighs, and how the plan is found.

    With the costs :math:`D_{ij}` between the supports of unit i of one network and unit j of the other, and masses
    :math:`\mu, \nu` that add to 1,

    .. math:: \min_{T \ge 0} \langle D, T \rangle + \epsilon\, \Omega(T)
              \quad \text{s.t.} \quad T 1 = \mu,\; T^\top 1 = \nu .

    Attributes:
        solver: ``"exact"`` (no :math:`\Omega`); ``"sinkhorn"`` (:math:`\Omega` is the negative entropy); or
            ``"unbalanced"``: marginals need not be kept, their Kullback-Leibler divergence is a penalty.
        regularisation: :math:`\epsilon`, in the units of the scaled cost; not used by ``"exact"``.
        marginal_relaxation: Weight of the marginals in ``"unbalanced"``; the higher, the better they are kept.
        mass: ``"uniform"``, or in proportion to the norm of a unit's incoming weights: ``"norm"``, the Euclidean, or
            ``"norm-l1"``, the sum of their magnitudes. Units that no weight makes weigh alike.
        metric: ``"euclidean"`` distance, or ``"cosine"``: 1 less the cosine (``normalise``, ``squared`` then say
            nothing).
        normalise: Divide each support by its norm first, so that the distance is of direction.
        squared: Take the squared Euclidean distance (the 2-Wasserstein cost).
        centre: Subtract from the activations of a unit their mean; with ``normalise`` they are standardised. Supports
            of weights stay as they are.
        cost_scale: What the costs of a group are divided by: their ``"max"``, ``"mean"`` or ``"median"``, or
            ``"none"``, which changes no exact plan; or ``"log"``: :math:`\log(1 + D)` instead, which does.
        clip: Bounds (low, high) that scaled costs are clipped to, in units of ``regularisation``.

    Raises:
        UnknownNameError: No such solver, mass, metric or scale.
        ConfigError: A regularisation or relaxation that is not positive, or bounds that are not ordered.
    """

    solver: str = "exact"
    regularisation: float = 0.01
    marginal_relaxation: float = 1.0
    mass: str = "uniform"
    metric: str = "euclidean"
    normalise: bool = False
    squared: bool = False
    centre: bool = False
    cost_scale: str = "max"
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for option, known in _NAMES.items():
            if getattr(self, option) not in known:
                raise UnknownNameError(f"{option} of optimal transport", getattr(self, option), known)
        if not (self.regularisation > 0 and self.marginal_relaxation > 0):
            raise ConfigError(
                f"regularisation is {self.regularisation:g} and marginal_relaxation {self.marginal_relaxation}; both "
                "must be above 0 (for no regularisation choose solver='exact')"
            )
        if self.clip is not None and not 0 <= self.clip[0] < self.clip[1]:
            raise ConfigError(f"clip is {self.clip}; expected (low, high) with 0 <= low < high")

    def distances(self, a: Tensor, b: Tensor) -> Tensor:
        """Costs (n, m) between the rows of ``a`` (n, d) and ``b`` (m, d)."""
        if self.normalise or self.metric == "cosine":
            a, b = (units / units.norm(dim=1, keepdim=True).clamp_min(1e-300) for units in (a, b))
        if self.metric == "cosine":
            return (1 - a @ b.T).clamp_min(0)
        # The quick form through inner products cancels for units that are close, which are those that matter.
        distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return distances.square() if self.squared else distances

    def masses(self, weights: Tensor) -> Array:
        """What each unit weighs, by its incoming weights (n, d)."""
        if self.mass == "uniform":
            sizes = torch.ones(len(weights), dtype=torch.float64)
        else:
            sizes = weights.norm(p=2 if self.mass == "norm" else 1, dim=1).cpu() + _LEAST
        return np.asarray((sizes / sizes.sum()).numpy())

    def plan(self, distances: Tensor, mu: Array, nu: Array) -> Tensor:
        """The plan, float64 (n, m) on the CPU, for the costs (n, m) and masses (n,), (m,).

        Exact plans between as many units of uniform mass are permutations divided by n (Birkhoff), and found by the
        assignment solver.
        """
        cost = self._scaled(distances.cpu().numpy())
        n, m = cost.shape
        if self.solver == "exact" and self.mass == "uniform" and n == m:
            plan = torch.zeros(n, n, dtype=torch.float64)
            plan[torch.arange(n), assign(-cost)] = 1 / n
            return plan
        import ot

        if self.solver == "exact":
            found = ot.emd(mu, nu, cost, numItermax=10_000_000)
        elif self.solver == "sinkhorn":
            found = ot.sinkhorn(
                mu, nu, cost, self.regularisation, method="sinkhorn_log", numItermax=_ITERATIONS, warn=False
            )
        else:
            found = ot.unbalanced.sinkhorn_unbalanced(
                mu,
                nu,
                cost,
                self.regularisation,
                self.marginal_relaxation,
                method="sinkhorn_translation_invariant",
                numItermax=_ITERATIONS,
            )
        return torch.from_numpy(np.asarray(found, dtype=np.float64))

    def _scaled(self, cost: Array) -> Array:
        if self.cost_scale == "log":
            cost = np.log1p(cost)
        elif self.cost_scale != "none" and (self.solver != "exact" or self.clip is not None):
            scale = getattr(np, self.cost_scale)(cost)
            cost = cost / max(float(scale), _TINY)
        if self.clip is not None:
            cost = np.clip(cost, self.regularisation * self.clip[0], self.regularisation * self.clip[1])
        return cost


def activation_distances(
    networks: tuple[nn.Module, nn.Module],
    transport: Transport,
    spec: PermSpec,
    sizes: tuple[Mapping[str, int], Mapping[str, int]],
    data: Images,
    *,
    batch_size: int,
    device: torch.device | str,
    model: nn.Module | None = None,
) -> Compared:
    """Costs between units whose supports are their responses to all samples of ``data``.

    Responses are those before the activation function (see :func:`fedmerge.align._views.find_views`); the networks
    may be of other widths, or both copies of ``model``. Cost: a forward pass of each network, and O(n m) a sample and
    group.

    Raises:
        ParamsError: Activations that are not finite.
        SpecError: A network that cannot be traced on these images.
    """
    products: dict[Key, _Products] = {}

    def add(key: Key, a: Tensor, b: Tensor) -> None:
        if key not in products:
            if len(key) > 1:
                check_room({" x ".join(key): max(len(a), len(b))}, 2, "optimal transport on activations", device)
            products[key] = _Products(len(a), len(b), device)
        products[key].add(a, b)

    Activations(networks, spec, data, batch_size=batch_size, device=device, sizes=sizes, model=model).stream(add)
    for key, found in products.items():
        if not all(bool(t.isfinite().all()) for t in (found.inner, *found.squares)):
            raise ParamsError(
                f"activations of group {' x '.join(map(repr, key))} on {data.name} are not finite; leave that model out"
            )
    return Compared({key: found.distances(transport) for key, found in products.items()}, sizes)


class _Products:
    """Sums, squared norms and inner products of the responses of n units with those of m, added up by batches."""

    def __init__(self, n: int, m: int, device: torch.device | str) -> None:
        self.count = 0
        self.inner = torch.zeros(n, m, dtype=torch.float64, device=device)
        self.sums, self.squares = (
            [torch.zeros(k, dtype=torch.float64, device=device) for k in (n, m)] for _ in range(2)
        )

    def add(self, a: Tensor, b: Tensor) -> None:
        """Add samples (n, s) and (m, s)."""
        self.count += a.shape[1]
        self.inner += a @ b.T
        for i, units in enumerate((a, b)):
            self.sums[i] += units.sum(1)
            self.squares[i] += units.square().sum(1)

    def distances(self, transport: Transport) -> Tensor:
        """What :meth:`Transport.distances` gives for the responses as rows."""
        inner, (left, right) = self.inner, self.squares
        if transport.centre:
            inner = inner - torch.outer(*self.sums) / self.count
            left, right = (
                (q - s.square() / self.count).clamp_min(0) for q, s in zip(self.squares, self.sums, strict=True)
            )
        if transport.normalise or transport.metric == "cosine":
            inner = inner / torch.outer(left.sqrt(), right.sqrt()).clamp_min(1e-300)
            left, right = ((squares > 0).double() for squares in (left, right))
        if transport.metric == "cosine":
            return (1 - inner).clamp_min(0)
        squared = (left[:, None] + right[None, :] - 2 * inner).clamp_min(0)
        return squared if transport.squared else squared.sqrt()
