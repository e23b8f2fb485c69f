"""Weight matching (Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv:2209.04836, Alg. 1)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmerge._check import check_params
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Occurrence, Params, Perms, axis_index

_RTOL = 1e-12
_DAMPING = (0.25, 1.0, 4.0)


@dataclass(frozen=True)
class Alignment:
    """How to reorder the units of one network so that it resembles another.

    Attributes:
        perms: Group -> int64 permutation ``(n,)``; ``perms[g][i] = j``: unit i of the result is unit j of the source.
        objective: The objective J of :func:`weight_matching` at ``perms``, whatever method found them.
        history: The objective before the first sweep and after each; a method that does not climb has one entry.
        sweeps: Passes over the groups (or steps, or epochs: the method says).
        converged: Whether the method ended by itself and not at a bound. After a climb of weights: no single
            group can do better.
    """

    perms: dict[str, Tensor]
    objective: float
    history: tuple[float, ...]
    sweeps: int
    converged: bool


def weight_matching(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    start: str | Perms = "forward-greedy",
    restarts: int = 1,
    max_sweeps: int = 100,
) -> Alignment:
    r"""Reorder the hidden units of ``params`` so that its weights come close to ``to``.

    With A = ``to``, B = ``params`` and one permutation :math:`P_g` per group, climbs

    .. math:: J(P) = \sum_k \langle A_k, P B_k \rangle = c - \tfrac12 \sum_k \|A_k - P B_k\|^2

    over all parameters k (buffers do not vote). With all groups but one held, J is linear in that
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

    Returns:
        The alignment with the highest objective.

    Raises:
        ParamsError: State dicts that do not fit each other or hold non-finite values.

    Cost: per group and sweep one product of O(n^2 d) and one assignment of O(n^3), in float64, on the device
    of the tensors (the assignment on the CPU).
    """
    check_params([to, params], spec)
    climb = Climb(params, to, spec)
    best: Alignment | None = None
    for attempt in range(max(1, restarts)):
        perms = climb.begin(start if attempt == 0 else ("greedy-random", "random")[(attempt + 1) % 2], rng)
        found = climb.run(perms, rng, max_sweeps)
        if best is None or found.objective > best.objective + _RTOL * abs(best.objective):
            best = found
    assert best is not None
    return best


class Climb:
    """The two networks in float64, and the gain of every group."""

    def __init__(self, params: Params, to: Params, spec: PermSpec) -> None:
        self.spec = spec
        votes = [name for name in spec.axes if name in spec.parameters]
        self.a = {name: to[name].detach().double() for name in votes}
        self.b = {name: params[name].detach().double().to(to[name].device) for name in votes}
        self.sizes = spec.sizes(params)
        self.places = {g: [o for o in spec.occurrences(g) if o.name in spec.parameters] for g in spec.groups}
        self.groups_of: dict[str, set[str]] = {name: set() for name in votes}
        for g, places in self.places.items():
            for o in places:
                self.groups_of[o.name].add(g)
        self.tied = {
            g: {o.name for o in places if sum(p.name == o.name and p.axis != o.axis for p in places)}
            for g, places in self.places.items()
        }
        self.neighbours = {
            g: set().union(*(self.groups_of[o.name] for o in places)) - (set() if self.tied[g] else {g})
            for g, places in self.places.items()
        }
        self.constant = sum(float((self.a[name] * self.b[name]).sum()) for name in votes if not self.groups_of[name])

    def begin(self, start: str | Perms, rng: np.random.Generator) -> dict[str, Tensor]:
        """Permutations to climb from."""
        perms = {g: torch.arange(n) for g, n in self.sizes.items()}
        if isinstance(start, Mapping):
            return perms | {g: p.cpu().to(torch.int64) for g, p in start.items()}
        if start == "random":
            return {g: torch.from_numpy(rng.permutation(n)) for g, n in self.sizes.items()}
        if start == "identity":
            return perms
        if start not in ("forward-greedy", "greedy-random"):
            raise ValueError(f"start {start!r}: expected 'forward-greedy', 'identity' or permutations")
        groups = list(perms) if start == "forward-greedy" else list(rng.permutation(list(perms)))
        settled: set[str] = set()
        while groups:
            # The next group that sees most of its weight through settled tensors; graph order breaks ties.
            known = {g: self.settled_places(g, settled) for g in groups}
            group = next((g for g in groups if known[g]), groups[0])
            if known[group]:
                perms[group] = assign(self._gain(perms, known[group]))
            settled.add(group)
            groups.remove(group)
        return perms

    def settled_places(self, group: str, settled: set[str]) -> list[Occurrence]:
        others = settled | {group}
        return [o for o in self.places[group] if self.groups_of[o.name] <= others and o.name not in self.tied[group]]

    def run(self, perms: dict[str, Tensor], rng: np.random.Generator, max_sweeps: int) -> Alignment:
        """Alg. 1: sweep over the groups in random order until none changes."""
        history = [self.objective(perms)]
        waiting = set(perms)
        sweeps = 0
        while waiting and sweeps < max_sweeps:
            sweeps += 1
            for group in rng.permutation(sorted(waiting)):
                waiting.discard(group)
                if self._improve(perms, group):
                    waiting |= self.neighbours[group]
            history.append(self.objective(perms))
        return Alignment(dict(perms), history[-1], tuple(history), sweeps, not waiting)

    def _improve(self, perms: dict[str, Tensor], group: str) -> bool:
        """Solve one group with the others held; whether J rose."""
        gain = self._gain(perms, self.places[group])
        now = perms[group]
        at = np.arange(len(now))
        scale = _RTOL * float(np.abs(gain).max(initial=0.0)) * len(now)
        if not self.tied[group]:
            new = assign(gain)
            if (gain[at, new] - gain[at, now]).sum() <= scale:
                return False
            perms[group] = new
            return True
        # J is quadratic here: its linearisation, then the same with a pull towards the present solution.
        value = self._quadratic(perms, group, now)
        spread = float(gain.std()) * np.sqrt(len(now))
        for damping in (0.0, *_DAMPING):
            damped = gain.copy()
            damped[at, now] += damping * spread
            new = assign(damped)
            if self._quadratic(perms, group, new) > value + scale:
                perms[group] = new
                return True
        return False

    def _quadratic(self, perms: Perms, group: str, perm: Tensor) -> float:
        """The part of J that depends on ``group``, exactly."""
        trial = {**perms, group: perm}
        return sum(self._inner(trial, name) for name in {o.name for o in self.places[group]})

    def _gain(self, perms: Perms, places: Iterable[Occurrence]) -> np.ndarray:
        """gain[i, j] = what J gains when unit i of the result is unit j of ``params``, shape (n, n)."""
        total: Tensor | None = None
        for place in places:
            a = self.units(self.a[place.name], place, None)
            b = self.units(self.b[place.name], place, perms)
            product = a @ b.T
            total = product if total is None else total + product
        if total is None:
            return np.zeros((0, 0))
        return total.cpu().numpy()

    def units(self, tensor: Tensor, place: Occurrence, perms: Perms | None) -> Tensor:
        """``tensor`` as a matrix (n, rest) whose rows are the units at ``place``; other axes permuted."""
        axes = self.spec.axes[place.name]
        axis = axes[place.axis]
        if perms is not None:
            for i, other in enumerate(axes):
                if i != place.axis and other:
                    tensor = tensor.index_select(i, axis_index(other, perms, tensor.device))
        sizes = [int(np.prod([f.size for f in segment])) for segment in axis]
        if len(axis) > 1:
            tensor = tensor.narrow(place.axis, sum(sizes[: place.segment]), sizes[place.segment])
        segment = axis[place.segment]
        if len(segment) > 1:
            shape = (*tensor.shape[: place.axis], *(f.size for f in segment), *tensor.shape[place.axis + 1 :])
            tensor = tensor.reshape(shape)
            if perms is not None:
                for k, f in enumerate(segment):
                    if k != place.factor and f.group is not None:
                        tensor = tensor.index_select(place.axis + k, perms[f.group].to(tensor.device))
        return tensor.movedim(place.axis + place.factor, 0).flatten(1) if tensor.dim() > 1 else tensor[:, None]

    def _inner(self, perms: Perms, name: str) -> float:
        moved = self.b[name]
        for i, axis in enumerate(self.spec.axes[name]):
            if axis:
                moved = moved.index_select(i, axis_index(axis, perms, moved.device))
        return float((self.a[name] * moved).sum())

    def objective(self, perms: Perms) -> float:
        """J at ``perms``, over all parameters."""
        return self.constant + sum(self._inner(perms, name) for name, groups in self.groups_of.items() if groups)


def assign(gain: np.ndarray) -> Tensor:
    """The permutation of largest total gain (Jonker-Volgenant, through SciPy)."""
    return torch.from_numpy(linear_sum_assignment(gain, maximize=True)[1].astype(np.int64))
