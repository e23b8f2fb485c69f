"""Parameters into a copy of a network; versions of modules, which a state dict carries beside its tensors."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge._copies import duplicate
from fedmerge._ties import check_ties
from fedmerge.errors import ParamsError


def versions(params: Mapping[str, Tensor]) -> Mapping[str, Any] | None:
    """The version of each module that wrote ``params`` (torch's ``_metadata``); None where it does not say."""
    found: Mapping[str, Any] | None = getattr(params, "_metadata", None)
    return found


def with_versions(params: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``params`` as a state dict that says of itself what ``source`` does: its modules' versions.

    Some modules (torchvision's MNASNet) refuse a state dict without. Tensors are not copied.
    """
    found = dict(params) if versions(source) is None else OrderedDict(params)
    if versions(source) is not None:
        found._metadata = copy.deepcopy(versions(source))  # type: ignore[attr-defined]
    return found


def load(model: nn.Module, params: Mapping[str, Tensor], device: torch.device | str) -> nn.Module:
    """A copy of ``model`` on ``device``, in eval mode, that holds ``params``.

    Tensors that come without versions (from a file, or over a network) are taken as written by ``model`` itself, but
    where only counters of batches are missing, which torch then begins at 0.

    Raises:
        ParamsError: ``params`` is not a state dict of ``model``, or gives one tensor of it two values; or ``model``
            cannot be copied.
    """
    for name, tensor in _items(params):
        if not isinstance(tensor, Tensor):
            raise ParamsError(
                f"{name!r} is a {type(tensor).__name__}; expected a tensor, as in a network's state_dict()"
            )
    network = duplicate(model)
    check_ties(model, params)
    own = network.state_dict()
    for name in own.keys() & params.keys():
        if params[name].is_complex() and not own[name].is_complex():  # torch would drop the imaginary part
            raise ParamsError(f"tensor {name!r} is {params[name].dtype}, expected {own[name].dtype}")
        if own[name].is_meta:
            raise ParamsError(
                f"{name!r} of this {type(model).__name__} is on the meta device, which holds no values; build the "
                "network on 'cpu'"
            )
    lacking = own.keys() - params.keys()
    old = bool(lacking) and all(name.endswith("num_batches_tracked") for name in lacking)  # from before torch 0.4.1
    source = own if versions(params) is None and not old else params
    try:
        network.load_state_dict(with_versions(params, source))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(f"these parameters are not a state dict of {type(model).__name__}: {reason}") from error
    return network.to(device).eval()


def check_state(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Refuse what is no state dict of ``model``, by names and shapes.

    Raises:
        ParamsError: Names the tensor.
    """
    own = model.state_dict()
    given = dict(_items(params))
    for name in own.keys() ^ given.keys():
        what = "lack" if name in own else "have an extra"
        raise ParamsError(f"these parameters {what} tensor {name!r}; give a state dict of {type(model).__name__}")
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ParamsError(
                f"{name!r} is a {type(tensor).__name__}; expected a tensor, as in a network's state_dict()"
            )
        if tensor.shape != own[name].shape:
            raise ParamsError(f"tensor {name!r} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}")


def _items(params: Mapping[str, Tensor]) -> Iterable[tuple[str, object]]:
    if not isinstance(params, Mapping):
        raise ParamsError(f"the parameters are a {type(params).__name__}; expected a state dict (name -> tensor)")
    return params.items()
