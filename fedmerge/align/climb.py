"""The climb of weight matching, from which all aligners take their objective and their assignments."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array, issparse
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from fedmerge.align._swaps import bound, cubic, joint
from fedmerge.align._tensors import SLICE, Doubles, Product, ordered
from fedmerge.align.turns import Turn, between, next_turn, supports
from fedmerge.errors import ParamsError, UnknownNameError
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.spec.axes import Occurrence, axis_index, check_perms, permute_tensor
from fedmerge.types import Params, Perms

_RTOL = 1e-12
_DAMPING = (0.25, 1.0, 4.0)
WIDE = 4096
CANDIDATES = 64
"""Of a wide group, the largest gains that count in each row and in each column."""
BLOCK = 1024
"""Rows of a wide group's gain that exist at one time."""


@dataclass(frozen=True)
class Alignment:
    """How to reorder the units of one network so that it resembles another.

    Attributes:
        perms: Group -> int64 permutation ``(n,)``; ``perms[g][i] = j``: unit i of the result is unit j of the source.
        objective: The objective J of :func:`weight_matching` at ``perms``, whatever method found them.
        history: The objective before the first sweep and after each; a method that does not climb has one entry.
        sweeps: Passes over the groups (or steps, or epochs: the method says).
        converged: Whether the method ended by its own rule and not at a bound on its steps. What it then knows of
            J depends on the method. After weight matching, and after a ``polish`` by it, J is a local optimum, up to
            round-off: no single group reassigned as a whole raises it; of a group that indexes several axes of one
            tensor, so that J is not linear in its permutation, no swap of two units and no reassignment by the
            linearised J. Groups in ``approximate`` are excepted. Methods that learn for a number of steps have no
            rule of their own, so they never converge without a polish.
        approximate: Groups too wide for an exact assignment: of their pairs of units only the most promising were
            considered, so J still never falls, but a group may do better than was found.
        left: Groups that the method had nothing to compare by, so that they keep their order.
        best: Which entry of ``history`` a method returned that keeps the best of its steps; 0 is where it began.
            None for methods that return what they end at.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> spec = fm.perm_spec(model, torch.zeros(1, 4))
        >>> found = fm.align(model.state_dict(), to=model.state_dict(), spec=spec)
        >>> found.converged, found.perms["0"].tolist()
        (True, [0, 1, 2, 3, 4, 5, 6, 7])
    """

    perms: dict[str, Tensor]
    objective: float
    history: tuple[float, ...]
    sweeps: int
    converged: bool
    approximate: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    best: int | None = None


class Climb:
    """The two networks, and the gain of every group, of which only what moved is computed again.

    Attributes:
        a: The reference's voting tensors, float64 as they are read; nothing is copied before.
        b: Those of the network that moves, likewise, on the reference's devices.
        wide: Groups of at least so many units are solved among candidates only.
    """

    def __init__(self, params: Params, to: Params, spec: PermSpec, *, wide: int = WIDE) -> None:
        self.spec, self.wide = spec, wide
        votes = [name for name in spec.axes if name in spec.parameters]
        self.a, self.b = Doubles(to, to, votes), Doubles(params, to, votes)
        self.sizes = spec.sizes(params)
        self.places = {g: [o for o in spec.occurrences(g) if o.name in spec.parameters] for g in spec.groups}
        self.groups_of: dict[str, set[str]] = {name: set() for name in votes}
        for g, places in self.places.items():
            for o in places:
                self.groups_of[o.name].add(g)
        self.tied = {
            g: {o.name for o in places if any(bound(o, p) for p in places)} for g, places in self.places.items()
        }
        self.neighbours = {
            g: set().union(*(self.groups_of[o.name] for o in places)) - (set() if self.tied[g] else {g})
            for g, places in self.places.items()
        }
        self.constant = sum(float((self.a[name] * self.b[name]).sum()) for name in votes if not self.groups_of[name])
        self._held: dict[Occurrence, Product] = {}

    @property
    def approximate(self) -> tuple[str, ...]:
        """Groups that are solved among candidates only."""
        return tuple(g for g, n in self.sizes.items() if n >= self.wide)

    def begin(self, start: str | Perms, rng: np.random.Generator) -> dict[str, Tensor]:
        """Permutations to climb from."""
        perms = {g: torch.arange(n) for g, n in self.sizes.items()}
        if isinstance(start, Mapping):
            check_perms(start, self.sizes)
            return perms | {g: p.cpu().to(torch.int64) for g, p in start.items()}
        if start == "random":
            return {g: torch.from_numpy(rng.permutation(n)) for g, n in self.sizes.items()}
        if start == "identity":
            return perms
        if start not in ("forward-greedy", "greedy-random"):
            raise UnknownNameError("start of weight matching", start, ("forward-greedy", "identity"))
        groups = list(perms) if start == "forward-greedy" else list(rng.permutation(list(perms)))
        settled: set[str] = set()
        while groups:
            turn = next_turn(self.spec, groups, settled, incoming=False)
            group = turn.group
            if any(turn.open(self.spec, place) for place in turn.places):  # heads of attention and the units within
                perms[group] = assign(-self.costs(turn, perms, lambda a, b: -(a @ b.T)).numpy())
            elif turn.places:
                perms[group] = assign(self._gain(perms, group, turn.places))
            settled.add(group)
            groups.remove(group)
        return perms

    def costs(self, turn: Turn, perms: Perms, of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Costs (n, n) between the units of a group at its turn, what is settled of B in the order of ``perms``."""
        moved = [permute_tensor(self.b[o.name], self.spec.axes[o.name], perms) for o in turn.places]
        a = supports([self.a[o.name] for o in turn.places], turn, self.spec, self.sizes)
        return between(a, supports(moved, turn, self.spec, self.sizes), of)

    def run(self, perms: dict[str, Tensor], rng: np.random.Generator, max_sweeps: int) -> Alignment:
        """Alg. 1: sweep over the groups in random order until none changes."""
        perms, history = dict(perms), [self.objective(perms)]
        waiting = set(perms)
        sweeps = 0
        while waiting and sweeps < max_sweeps:
            sweeps += 1
            rise = 0.0
            for group in steps(f"climbing, sweep {sweeps}", rng.permutation(sorted(waiting)).tolist()):
                waiting.discard(group)
                gained = self._improve(perms, group)
                if gained:
                    waiting |= self.neighbours[group]
                    rise += gained
            history.append(history[-1] + rise)
        if history[-1] != history[0]:
            history[-1] = self.objective(perms)  # anew: the sum of the rises has gathered round-off
        return Alignment(perms, history[-1], tuple(history), sweeps, not waiting, self.approximate)

    def _improve(self, perms: dict[str, Tensor], group: str) -> float:
        """Solve one group with the others held; by how much J rose."""
        gain = self._gain(perms, group, self.places[group])
        now = np.array(perms[group].numpy())
        at = np.arange(len(now))
        scale = _RTOL * float(abs(gain).max() if len(now) else 0.0) * len(now)
        if not self.tied[group]:
            new = assign(gain)
            rise = float(gain[at, np.array(new.numpy())].sum() - gain[at, now].sum())
            if rise <= scale:
                return 0.0
            perms[group] = new
            return rise
        # J is quadratic here: its linearisation, then the same with a pull towards the present solution.
        value = self._quadratic(perms, group, perms[group])
        spread = float((gain.data if issparse(gain) else gain).std()) * np.sqrt(len(now))
        for damping in (0.0, *_DAMPING):
            damped = gain.copy()
            damped[at, now] += damping * spread
            new = assign(damped)
            rise = self._quadratic(perms, group, new) - value
            if rise > scale:
                perms[group] = new
                return rise
        return self._swap(perms, group, scale) if not issparse(gain) or len(now) <= CANDIDATES else 0.0

    def _swap(self, perms: dict[str, Tensor], group: str, least: float) -> float:
        """Swap those two units by which J rises most, while that is more than ``least``; by how much it rose."""
        everyone, places = torch.arange(self.sizes[group]), self.places[group]
        beyond, far = self.beyond(perms, group, everyone), cubic(places)
        moving = [o for o in places if o.name in self.tied[group]]
        still = self._gain(perms, group, [o for o in places if o not in moving])
        rise = 0.0
        while True:
            gain = still + self._gain(perms, group, moving)
            gain = (gain.toarray() if issparse(gain) else gain)[:, perms[group].numpy()]
            own = gain.diagonal()
            rises = gain + gain.T - own[:, None] - own + beyond
            pair = [int(k) for k in np.unravel_index(rises.argmax(), rises.shape)]
            if rises[*pair] <= least:
                return rise
            rise += float(rises[*pair])
            perms[group] = perms[group].clone()
            perms[group][pair] = perms[group][pair[::-1]]
            if far:
                beyond = self.beyond(perms, group, everyone)
            else:  # the other pairs stand as they stood
                beyond[pair] = self.beyond(perms, group, torch.tensor(pair))
                beyond[:, pair] = beyond[pair].T

    def beyond(self, perms: Perms, group: str, rows: Tensor) -> Any:
        """[i, k] = what J gains by the swap of units ``rows[i]`` and k beyond the gains at its places, float64."""
        total = np.zeros((len(rows), self.sizes[group]))
        for name in sorted(self.tied[group]):
            axes = self.spec.axes[name]
            order = {i: axis_index(axis, perms) for i, axis in enumerate(axes) if axis}
            pair = self.a.given(name), ordered(self.b.given(name), order)
            places = [o for o in self.places[group] if o.name == name]
            total += joint(*pair, axes, places, self.sizes, rows).cpu().numpy()
        return total

    def _quadratic(self, perms: Perms, group: str, perm: Tensor) -> float:
        """The part of J that depends on ``group``, exactly."""
        trial = {**perms, group: perm}
        return sum(self._inner(trial, name) for name in {o.name for o in self.places[group]})

    def _gain(self, perms: Perms, group: str, places: Sequence[Occurrence]) -> Any:
        """gain[i, j] = what J gains when unit i of the result is unit j of ``params``, (n, n); sparse if n is wide."""
        n = self.sizes[group]
        if n >= self.wide:
            return self._candidates(perms, group, places)
        if not places:
            return np.zeros((n, n))
        return sum(self._product(perms, place) for place in places).cpu().numpy()  # type: ignore[union-attr]

    def _product(self, perms: Perms, place: Occurrence) -> Tensor:
        """Inner products (n, n) of the units at ``place``, the other axes of B in the order of ``perms``.

        Kept between calls: where another axis moved at few positions, only these are taken out and put in again.
        """
        axes = self.spec.axes[place.name]
        order = {i: axis_index(axis, perms) for i, axis in enumerate(axes) if axis and i != place.axis}
        segment = axes[place.axis][place.segment]
        inner = tuple(perms[f.group] for k, f in enumerate(segment) if k != place.factor and f.group is not None)
        held = self._held.get(place)
        if held is None or not all(map(torch.equal, held.inner, inner)):
            return self._anew(place, perms, order, inner)
        moved = {i: (index != held.order[i]).nonzero().flatten() for i, index in order.items()}
        if any(2 * len(positions) > len(order[i]) for i, positions in moved.items()):
            return self._anew(place, perms, order, inner)
        for i, positions in moved.items():
            for some in torch.split(positions, self._block(place.name, i)):
                here = {j: index for j, index in held.order.items() if j != i}
                self._add(held.total, place, perms, {i: some}, here | {i: order[i][some]})
                self._add(held.total, place, perms, {i: some}, here | {i: held.order[i][some]}, sign=-1)
            held.order[i] = order[i]
        return held.total

    def _anew(self, place: Occurrence, perms: Perms, order: dict[int, Tensor], inner: tuple[Tensor, ...]) -> Tensor:
        """The product from nothing, a slice of another axis at a time: the whole in float64 may be much memory."""
        group = self.spec.axes[place.name][place.axis][place.segment][place.factor].group
        n, a = self.sizes[str(group)], self.a.given(place.name)
        total = torch.zeros(n, n, dtype=torch.float64, device=a.device)
        others = [i for i in range(a.dim()) if i != place.axis]
        if not others:  # a vector: its outer product is quick, and n x n for each would be much to keep
            self._add(total, place, perms, {}, {})
        else:
            i = max(others, key=lambda axis: a.shape[axis])
            for some in torch.split(torch.arange(a.shape[i]), self._block(place.name, i)):
                self._add(total, place, perms, {i: some}, order | {i: order[i][some] if i in order else some})
            self._held[place] = Product(total, order, inner)
        return total

    def _add(
        self, total: Tensor, place: Occurrence, perms: Perms, a: dict[int, Tensor], b: dict[int, Tensor], sign: int = 1
    ) -> None:
        """Add to ``total`` the inner products of the units at ``place``, of the given positions of the other axes."""
        left = self._matrix(ordered(self.a.given(place.name), a), place, None).double()
        right = self._matrix(ordered(self.b.given(place.name), b), place, perms).double()
        total.addmm_(left, right.T, alpha=sign)

    def _block(self, name: str, axis: int) -> int:
        """Positions of ``axis`` of a tensor that are looked at together."""
        tensor = self.a.given(name)
        return max(1, SLICE * tensor.shape[axis] // max(1, tensor.numel()))

    def _candidates(self, perms: Perms, group: str, places: Sequence[Occurrence]) -> csr_array:
        """The gain where it is among the largest of its row or column, and at the present permutation."""
        n, now = self.sizes[group], perms[group]
        keep = min(CANDIDATES, n)
        sides = [(self.units(self.a[o.name], o, None), self.units(self.b[o.name], o, perms)) for o in places] or [
            (torch.zeros(n, 1), torch.zeros(n, 1))
        ]
        device = sides[0][0].device
        best = torch.full((0, n), 0.0, dtype=torch.float64, device=device)
        rows_of = torch.zeros((0, n), dtype=torch.int64, device=device)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for rows in torch.split(torch.arange(n, device=device), BLOCK):
            block = sum((a[rows] @ b.T for a, b in sides), torch.zeros((), device=device)).double()
            values, columns = block.topk(keep, 1)
            present = now[rows.cpu()].to(device)[:, None]
            found.append((rows[:, None].expand_as(columns), columns, values))
            found.append((rows[:, None], present, block.gather(1, present)))
            best, which = torch.cat([best, block]).topk(min(keep, len(best) + len(block)), 0)
            rows_of = torch.cat([rows_of, rows[:, None].expand_as(block)]).gather(0, which)
        found.append((rows_of, torch.arange(n, device=device).expand_as(rows_of), best))
        row, column, value = (torch.cat([part[k].flatten() for part in found]).cpu().numpy() for k in range(3))
        _, first = np.unique(row * n + column, return_index=True)
        return csr_array((value[first], (row[first], column[first])), shape=(n, n))

    def units(self, tensor: Tensor, place: Occurrence, perms: Perms | None) -> Tensor:
        """``tensor`` as a matrix (n, rest) whose rows are the units at ``place``; other axes permuted."""
        if perms is not None:
            axes = self.spec.axes[place.name]
            tensor = ordered(
                tensor, {i: axis_index(axis, perms) for i, axis in enumerate(axes) if axis and i != place.axis}
            )
        return self._matrix(tensor, place, perms)

    def _matrix(self, tensor: Tensor, place: Occurrence, perms: Perms | None) -> Tensor:
        """As :meth:`units`, with only the axis of ``place`` looked at: its other factors are permuted."""
        axis = self.spec.axes[place.name][place.axis]
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
        a, b = self.a.given(name), self.b.given(name)
        order = {i: axis_index(axis, perms) for i, axis in enumerate(self.spec.axes[name]) if axis}
        first = order.get(0, torch.arange(a.shape[0]))
        total = 0.0
        for some in torch.split(torch.arange(len(first)), self._block(name, 0)):
            left = a.narrow(0, int(some[0]), len(some)).double()
            total += float(left.flatten() @ ordered(b, order | {0: first[some]}).double().flatten())
        return total

    def objective(self, perms: Perms) -> float:
        """J at ``perms``, over all parameters."""
        return self.constant + sum(self._inner(perms, name) for name, groups in self.groups_of.items() if groups)


def assign(gain: Any) -> Tensor:
    """The permutation of largest total gain: Jonker-Volgenant, through SciPy; over its entries if it is sparse.

    Raises:
        ParamsError: A gain that is NaN or infinite.
    """
    if not np.isfinite(gain.data if issparse(gain) else gain).all():
        raise ParamsError(
            "what units are compared by is NaN or infinite: weights or activations are too large, or a learning rate, "
            "a regularisation or a temperature is far from its default; leave that model out, or mend the option"
        )
    if issparse(gain):  # explicit zeros would be dropped, and a constant changes no optimum
        # SciPy before 1.15 takes no other indices than these
        places = (gain.indices.astype(np.int32), gain.indptr.astype(np.int32))
        shifted = csr_array((gain.data - gain.data.min() + 1.0, *places), shape=gain.shape)
        columns = min_weight_full_bipartite_matching(shifted, maximize=True)[1]
    else:
        columns = linear_sum_assignment(gain, maximize=True)[1]
    return torch.from_numpy(columns.astype(np.int64))
