"""Cycle-consistent merging (Crisostomi et al., "C2M3", NeurIPS 2024, arXiv:2405.17897, Alg. 1)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge._check import check_params, check_weights, position
from fedmerge.align.climb import assign
from fedmerge.align.maps import Maps, degree, mix
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge, merge_many
from fedmerge.progress import steps
from fedmerge.spec import PermSpec, permute
from fedmerge.types import Params

_RTOL = 1e-12


@checked
def cycle_consistent(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    reference: int = 0,
    max_steps: int = 50,
    tolerance: float = 1e-4,
    polish: bool = True,
    **_: Any,
) -> Merge:
    r"""Map the units of all models into one universe at once, and average there.

    With one mixture of permutations :math:`X_i` and one weight :math:`w_i` a model, climbs

    .. math:: \max_X J(X) = \sum_{i < j} w_i w_j \sum_k \langle X_i \theta_{ik},\, X_j \theta_{jk} \rangle
              \quad \text{s.t.} \quad X_i \ge 0,\; X_i 1 = 1,\; X_i^\top 1 = 1

    by Frank-Wolfe: each step moves all maps towards the permutations that maximise the linearised J (one assignment
    a model and group) as far as pays; J along that line is a polynomial, maximised exactly, so it never falls. At
    the end each map is projected to the nearest permutation. The map from model i to model j is
    :math:`X_j^\top X_i`, so going around any cycle of models ends where it began, by construction.

    The universe is the order of model ``reference``: its map is held at the identity, the others begin at the
    barycentre. The paper holds none; but then all units are alike at the barycentre, where we begin.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model; equal if None.
        rng: Order of the polish.
        reference: Position of the model whose order is the universe's.
        max_steps: Bound on the steps.
        tolerance: Ends when a step raises J by less than this share of what it has risen in all.
        polish: Climb on by the sweeps of MergeMany, which never lowers J.

    Returns:
        The merge; ``history`` holds J of the mixtures, then :func:`merge_many`'s objective if polished.

    Raises:
        ParamsError: Models, weights or reference that do not fit.

    Cost: per step and model a few products of each tensor with its groups' matrices, and an O(n^3) assignment a
    group. Memory: float64 copies of all models, and their gradients.
    """
    check_params(models, spec)
    shares = check_weights(weights, len(models)).tolist()
    rng = rng if rng is not None else np.random.default_rng(0)
    reference = position(reference, len(models))
    sizes = spec.sizes(models[0])
    universe = _Universe(models, shares, spec)
    maps = [
        {g: torch.eye(n) if i == reference else torch.full((n, n), 1.0 / n) for g, n in sizes.items()}
        for i in range(len(models))
    ]
    maps = [{g: x.double().to(universe.device) for g, x in m.items()} for m in maps]
    moving = [i for i in range(len(models)) if i != reference and sizes]
    history: list[float] = []
    converged = not moving
    for _step in steps("Frank-Wolfe", range(max_steps + 1 if moving else 0)):
        value, slopes = universe.slope(maps, moving)
        history.append(value)
        risen = history[-1] - history[0]
        if len(history) > 2 and history[-1] - history[-2] <= tolerance * risen + _RTOL * abs(value):
            converged = True
            break
        goal = [
            {g: _matrix(assign(slopes[i][g].cpu().numpy()), x) for g, x in maps[i].items()} if i in moving else maps[i]
            for i in range(len(models))
        ]
        step = universe.best_step(maps, goal, value)
        maps = [{g: x + step * (to[g] - x) for g, x in m.items()} for m, to in zip(maps, goal, strict=True)]
    perms = [
        {g: assign(x.cpu().numpy()) if i in moving else torch.arange(sizes[g]) for g, x in m.items()}
        for i, m in enumerate(maps)
    ]
    taken = max(0, len(history) - 1)
    moved = [permute(m, p, spec=spec) for m, p in zip(models, perms, strict=True)]
    if not polish:
        value = sum(float(t.double().square().sum()) for n, t in average(moved, shares).items() if n in spec.parameters)
        return Merge(average(moved, shares), tuple(perms), value, (*history, value), taken, converged)
    found = merge_many(moved, spec=spec, weights=weights, rng=rng, start="paper")
    composed = tuple(
        {g: perm[after[g]] for g, perm in before.items()} for before, after in zip(perms, found.perms, strict=True)
    )
    back = {g: perm.argsort() for g, perm in composed[reference].items()}  # the polish moves the reference, too
    composed = tuple({g: perm[back[g]] for g, perm in one.items()} for one in composed)
    return Merge(
        permute(found.params, back, spec=spec), composed, found.objective, (*history, *found.history),
        taken + found.sweeps, converged and found.converged, approximate=found.approximate,
    )  # fmt: skip


class _Universe:
    """J of all models' maps."""

    def __init__(self, models: Sequence[Params], shares: Sequence[float], spec: PermSpec) -> None:
        self.names = [n for n in spec.axes if n in spec.parameters and any(spec.axes[n])]
        self.axes = spec.axes
        self.models = [
            {n: share * m[n].detach().double() for n in self.names} for share, m in zip(shares, models, strict=True)
        ]
        self.device = self.models[0][self.names[0]].device if self.names else torch.device("cpu")
        degrees = [sum(max(map(degree, axis), default=0) for axis in self.axes[n]) for n in self.names]
        self.degree = 2 * max(degrees, default=1)

    def value(self, maps: Sequence[Maps]) -> Tensor:
        """J: half of what the squared norm of the sum has beyond the squared norms."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for name in self.names:
            moved = [mix(m[name], self.axes[name], x) for m, x in zip(self.models, maps, strict=True)]
            total = total + (sum(moved, torch.zeros_like(moved[0])).square() - sum(t.square() for t in moved)).sum() / 2
        return total

    def slope(self, maps: Sequence[Maps], moving: Sequence[int]) -> tuple[float, dict[int, dict[str, Tensor]]]:
        """J, and its gradient for the maps that move."""
        with torch.enable_grad():
            leaves = [{g: x.detach().requires_grad_(i in moving) for g, x in m.items()} for i, m in enumerate(maps)]
            total = self.value(leaves)
            flat = [leaves[i][g] for i in moving for g in leaves[i]]
            found = iter(torch.autograd.grad(total, flat, materialize_grads=True))
        return float(total.detach()), {i: {g: next(found) for g in leaves[i]} for i in moving}

    def best_step(self, maps: Sequence[Maps], goal: Sequence[Maps], value: float) -> float:
        """The step in [0, 1] of largest J on the line: the polynomial through enough of its values, exactly."""
        points = (1 - np.cos(np.pi * np.arange(self.degree + 1) / self.degree)) / 2
        values = [value]
        with torch.no_grad():
            for point in points[1:]:
                there = [{g: x + point * (to[g] - x) for g, x in m.items()} for m, to in zip(maps, goal, strict=True)]
                values.append(float(self.value(there)))
        along = np.polynomial.Polynomial.fit(points, values, self.degree, domain=[0, 1])
        roots = np.asarray(along.deriv().roots(), dtype=np.complex128)
        inside = roots.real[(abs(roots.imag) < 1e-9) & (roots.real > 0) & (roots.real < 1)]
        candidates = np.concatenate([[0.0], inside, [1.0]])
        return float(candidates[np.argmax(along(candidates))])


def _matrix(perm: Tensor, like: Tensor) -> Tensor:
    return torch.eye(len(perm), dtype=like.dtype, device=like.device)[perm.to(like.device)]
