"""Frank-Wolfe matching (Crisostomi et al., "C2M3", NeurIPS 2024, arXiv:2405.17897, Alg. 1), for two networks."""

import math

import numpy as np
import torch
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge.align._finish import best_of, finish
from fedmerge.align.climb import Alignment, Climb, assign
from fedmerge.align.maps import Maps, degree, mix
from fedmerge.errors import UnknownNameError
from fedmerge.memory import check_room
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.types import Params

_STARTS = ("forward-greedy", "identity", "barycentre")


@checked
def frank_wolfe(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    start: str = "barycentre",
    restarts: int = 1,
    max_steps: int = 100,
    tolerance: float = 1e-6,
    polish: bool = False,
) -> Alignment:
    r"""Reorder the hidden units of ``params``, all groups at once, through mixtures of permutations.

    With A = ``to`` and B = ``params``, climbs the objective of weight matching over doubly stochastic matrices,

    .. math:: \max_X J(X) = \sum_k \langle A_k, X B_k \rangle
              \quad \text{s.t.} \quad X_g \ge 0,\; X_g 1 = 1,\; X_g^\top 1 = 1,

    where X acts on every axis that a group indexes. Each step moves from X towards the permutations S that
    maximise :math:`\langle \nabla J(X), S \rangle` (one assignment a group) as far as pays: J along that line is a
    polynomial in the step, of the degree of the tensor with most permuted axes, and is maximised exactly. So J
    never falls, and a group that indexes two axes of one tensor, for which coordinate descent has only a
    linearisation, is treated exactly. At the end each X is projected to the nearest permutation, by an
    assignment; this may lower J, which ``polish`` makes good.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: The further starts, and the order of the polish.
        start: ``"barycentre"`` (every unit alike), ``"identity"`` or ``"forward-greedy"``.
        restarts: The first begins at ``start``, the others a random share of the way from the barycentre to random
            permutations; the best objective wins.
        max_steps: Bound on the steps.
        tolerance: Ends when the gap, which bounds what is left of the linearised objective, falls below
            ``tolerance`` times the product of the networks' norms.
        polish: Climb on by weight matching.

    Returns:
        The alignment. Its ``history`` holds J of the mixtures, then J of the projection, then the polish's;
        ``sweeps`` counts the steps.

    Raises:
        ParamsError: State dicts that do not fit each other or hold non-finite values.
        UnknownNameError: No such start.
        ResourceError: Groups too wide for this machine's memory.

    Cost: per step about four products of each tensor with each of its groups' matrices, and an O(n^3) assignment
    a group.
    """
    if start not in _STARTS:
        raise UnknownNameError("start of Frank-Wolfe", start, _STARTS)
    check_params([to, params], spec)
    check_room(spec.sizes(params), 6, "frank-wolfe", next(iter(to.values())).device)
    climb = Climb(params, to, spec)
    relaxed = _Relaxed(climb)
    found = []
    for attempt in range(max(1, restarts)):
        begin = relaxed.begin(start if attempt == 0 else "random", rng)
        maps, history, converged = relaxed.climb(begin, max_steps, tolerance)
        perms = {group: assign(x.cpu().numpy()) for group, x in maps.items()}
        steps = len(history) - 1
        found.append(finish(climb, perms, rng=rng, polish=polish, history=history, sweeps=steps, converged=converged))
    return best_of(found)


class _Relaxed:
    """J over doubly stochastic matrices."""

    def __init__(self, climb: Climb) -> None:
        self.direct, self.a, self.b = climb, dict(climb.a), dict(climb.b)
        self.names = [name for name, groups in climb.groups_of.items() if groups]
        self.axes = climb.spec.axes
        self.device = next(iter(self.a.values())).device if self.a else torch.device("cpu")
        degrees = [sum(max(map(degree, axis), default=0) for axis in self.axes[name]) for name in self.names]
        self.degree = max(degrees, default=1)
        self.scale = math.sqrt(
            sum(float(self.a[name].square().sum()) for name in self.names)
            * sum(float(self.b[name].square().sum()) for name in self.names)
        )

    def begin(self, start: str, rng: np.random.Generator) -> dict[str, Tensor]:
        """A point of the polytope."""
        sizes = self.direct.sizes
        centre = {g: torch.full((n, n), 1 / n, dtype=torch.float64, device=self.device) for g, n in sizes.items()}
        if start == "barycentre":
            return centre
        corner = {g: self._matrix(perm) for g, perm in self.direct.begin(start, rng).items()}
        if start == "random":
            share = float(rng.uniform())
            return {g: (1 - share) * centre[g] + share * corner[g] for g in centre}
        return corner

    def climb(self, x: Maps, max_steps: int, tolerance: float) -> tuple[Maps, list[float], bool]:
        """Alg. 1: step to the best point between X and the permutations its gradient points at."""
        value, gradient = self._slope(x)
        history = [value]
        for _ in steps("Frank-Wolfe", range(max_steps)):
            towards = {g: self._matrix(assign(slope.cpu().numpy())) - x[g] for g, slope in gradient.items()}
            gap = sum(float((gradient[g] * towards[g]).sum()) for g in towards)
            if gap <= tolerance * self.scale:
                return x, history, True
            step = self._best_step(x, towards, value, gap)
            x = {g: x[g] + step * towards[g] for g in x}
            value, gradient = self._slope(x)
            history.append(value)
        return x, history, False

    def _best_step(self, x: Maps, towards: Maps, value: float, gap: float) -> float:
        """Where J is highest on the segment from X (step 0) along ``towards`` (step 1)."""
        # Value and slope at 0 are known; the higher coefficients follow from degree - 1 more values.
        steps = np.arange(1, self.degree) / max(1, self.degree - 1)
        values = np.array([self._value({g: x[g] + t * towards[g] for g in x}) for t in steps])
        powers = steps[:, None] ** np.arange(2, self.degree + 1)
        higher = np.linalg.solve(powers, values - value - gap * steps) if len(steps) else np.zeros(0)
        along = np.polynomial.Polynomial([value, gap, *higher])
        roots = np.asarray(along.deriv().roots(), dtype=np.complex128)
        inside = roots.real[(abs(roots.imag) < 1e-9) & (roots.real > 0) & (roots.real < 1)]
        candidates = np.append(inside, 1.0)
        return float(candidates[np.argmax(along(candidates))])

    def _slope(self, x: Maps) -> tuple[float, dict[str, Tensor]]:
        """J and its gradient at X."""
        if not x:
            return self.direct.constant, {}
        with torch.enable_grad():
            leaves = {g: matrix.detach().requires_grad_() for g, matrix in x.items()}
            total = self._total(leaves)
            slopes = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        return float(total.detach()), dict(zip(leaves, slopes, strict=True))

    def _value(self, x: Maps) -> float:
        with torch.no_grad():
            return float(self._total(x))

    def _total(self, x: Maps) -> Tensor:
        total = torch.tensor(self.direct.constant, dtype=torch.float64, device=self.device)
        for name in self.names:
            total = total + (self.a[name] * mix(self.b[name], self.axes[name], x)).sum()
        return total

    def _matrix(self, perm: Tensor) -> Tensor:
        return torch.eye(len(perm), dtype=torch.float64, device=self.device)[perm.to(self.device)]
