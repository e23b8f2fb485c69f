"""What all aligners share: how an answer becomes an `Alignment`, and what those that look at images need."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from fedmerge import _loading as loading
from fedmerge._forward import scores
from fedmerge.align._weight_matching import Alignment, Climb
from fedmerge.data import Images
from fedmerge.errors import DataError, ParamsError
from fedmerge.spec._spec import Params, Perms

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


def need_images(method: str, model: nn.Module | None, data: Images | None) -> tuple[nn.Module, Images]:
    """``model`` and ``data``, which ``method`` cannot do without.

    Raises:
        ParamsError: One of them was not given.
        DataError: There are no images, or the network does not take them.
    """
    if model is None or data is None:
        missing = " and ".join(name for name, given in (("model=", model), ("data=", data)) if given is None)
        raise ParamsError(
            f"{method} runs the networks on public images, but {missing} was not given; pass the network as model= "
            "and the images as data=, or choose a method that needs weights only, such as 'weight-matching'"
        )
    if not len(data):
        raise DataError(f"{data.name} holds no images; {method} needs at least one")
    where = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    with torch.no_grad():
        scores(copy.deepcopy(model).eval(), data, data.images[:1].to(where))
    return model, data


def load(model: nn.Module, params: Params, device: torch.device | str) -> nn.Module:
    """A copy of ``model`` on ``device``, in eval mode, that holds ``params``.

    Raises:
        ParamsError: ``params`` is not a state dict of ``model``, or gives one tensor of it two values.
    """
    return loading.load(model, params, device).eval()
