"""Parameters into a copy of a network; versions of modules, which a state dict carries beside its tensors."""

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
    """A copy of ``model`` on ``device`` that holds ``params``.

    Tensors that come without versions (from a file, or over a network) are taken as written by ``model`` itself, but
    where only counters of batches are missing, which torch then begins at 0.

    Raises:
        ParamsError: ``params`` is not a state dict of ``model``, or gives one tensor of it two values.
    """
    check_ties(model, params)
    network = copy.deepcopy(model)
    own = network.state_dict()
    lacking = own.keys() - params.keys()
    old = bool(lacking) and all(name.endswith("num_batches_tracked") for name in lacking)  # from before torch 0.4.1
    source = own if versions(params) is None and not old else params
    try:
        network.load_state_dict(with_versions(params, source))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(f"these parameters are not a state dict of {type(model).__name__}: {reason}") from error
    return network.to(device)
