"""The optimiser of a recipe, and what it remembers by the names of parameters."""

from collections.abc import Mapping

import torch
from torch import nn

from fedmerge.errors import ParamsError
from fedmerge.models import Recipe


def optimizer_of(recipe: Recipe, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that trains ``weights``.

    Raises:
        ParamsError: There are none.
    """
    if not weights:
        raise ParamsError(
            "the network has no parameter that is trained: it holds none, or requires_grad is off in all of them; "
            "switch it on with model.requires_grad_()"
        )
    if recipe.optimizer == "adam":
        return torch.optim.Adam(weights, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=recipe.nesterov
    )


def remembered(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """The state of an optimiser of the parameters called ``names``, by name and slot."""
    return {
        f"{names[i]}/{slot}": value.detach().to("cpu", copy=True).contiguous()
        for i, slots in optimizer.state_dict()["state"].items()
        for slot, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def remind(optimizer: torch.optim.Optimizer, names: list[str], state: Mapping[str, torch.Tensor]) -> None:
    """Give an optimiser a state of :func:`remembered`."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        if name not in names:
            raise ParamsError(f"the optimiser's state has {key!r}; expected PARAMETER/SLOT of a trained parameter")
        found.setdefault(names.index(name), {})[slot] = value.clone()
    optimizer.load_state_dict({"state": found, "param_groups": optimizer.state_dict()["param_groups"]})


def reach(recipe: Recipe, steps: int) -> float:
    """How far ``steps`` steps of ``recipe`` move a network, see :class:`fedmerge.Training`."""
    velocity, gone = 0.0, 0.0  # what the optimiser would hold, and have gone, had every gradient been 1
    for step in range(steps if recipe.optimizer == "sgd" else 0):
        velocity = 1 + recipe.momentum * velocity
        rate = recipe.rate((step + 0.5) / steps)
        gone += rate * (1 + recipe.momentum * velocity if recipe.nesterov else velocity)
    return gone
