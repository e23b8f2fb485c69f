"""What all aligners share: how an answer becomes an `Alignment`."""

from collections.abc import Iterable

import numpy as np

from fedmerge.align.climb import Alignment, Climb
from fedmerge.types import Perms

_RTOL = 1e-12
_MAX_SWEEPS = 100


def finish(
    climb: Climb,
    perms: Perms,
    *,
    rng: np.random.Generator,
    polish: bool,
    history: Iterable[float] = (),
    sweeps: int = 0,
    converged: bool = True,
    approximate: Iterable[str] = (),
    left: Iterable[str] = (),
    best: int | None = None,
) -> Alignment:
    """The alignment of ``perms``, with the objective J of weight matching, whatever method found them.

    Args:
        climb: The two networks.
        perms: What the method found.
        rng: Order of the groups in the polish.
        polish: Climb on from ``perms`` by weight matching (which never lowers J).
        history: What the method recorded before; J is appended.
        sweeps: Passes of the method; those of the polish are added.
        converged: Whether the method ended by its own rule; a polish that follows has one of its own.
        approximate: Groups that the method solved among candidates only; after a polish, the polish's.
        left: Groups that the method had nothing to compare by; the polish compares all.
        best: Which entry of ``history`` the method returns, if it keeps the best of its steps.
    """
    perms = {group: perm.cpu() for group, perm in perms.items()}
    if not polish:
        value = climb.objective(perms)
        return Alignment(
            perms, value, (*history, value), sweeps, converged, tuple(approximate), left=tuple(left), best=best
        )
    found = climb.run(perms, rng, _MAX_SWEEPS)
    return Alignment(
        found.perms,
        found.objective,
        (*history, *found.history),
        sweeps + found.sweeps,
        found.converged,
        found.approximate,
        best=best,
    )


def best_of(found: Iterable[Alignment]) -> Alignment:
    """The alignment of the highest objective; of equals, up to round-off, the first."""
    best, *others = found
    for other in others:
        if other.objective > best.objective + _RTOL * abs(best.objective):
            best = other
    return best
