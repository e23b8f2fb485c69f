"""Parameters into a copy of a network; versions of modules, which a state dict carries beside its tensors."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
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
    """``params`` as a state dict that says of itself what ``source`` does: its modules' versions, what is laid aside.

    Some modules (torchvision's MNASNet) refuse a state dict without. Tensors are not copied.
    """
    beside = getattr(source, "_beside", None)
    found = dict(params) if versions(source) is None and not beside else OrderedDict(params)
    if versions(source) is not None:
        found._metadata = copy.deepcopy(versions(source))  # type: ignore[attr-defined]
    if beside:
        found._beside = beside  # type: ignore[attr-defined]
    return found


def on_one_device(models: Sequence[Any]) -> list[Any]:
    """``models`` on the device of the first tensor; what lies there already is not copied.

    What is no state dict of numbers is left as it is, for a check to refuse.
    """
    every = [t for m in models if isinstance(m, Mapping) for t in m.values() if isinstance(t, Tensor)]
    if len({t.device for t in every}) < 2 or any(t.is_meta for t in every):
        return list(models)
    device = every[0].device
    return [
        with_versions({n: t.to(device) if isinstance(t, Tensor) else t for n, t in m.items()}, m)
        if isinstance(m, Mapping)
        else m
        for m in models
    ]


def laid_aside(params: Mapping[str, Any], beside: dict[str, Any]) -> dict[str, Tensor]:
    """``params`` without the entries ``beside``, which travel as the versions do."""
    found = OrderedDict(with_versions({name: t for name, t in params.items() if name not in beside}, params))
    if versions(params) is not None:
        found._metadata = copy.deepcopy(versions(params))  # type: ignore[attr-defined]
    found._beside = beside  # type: ignore[attr-defined]
    return found


def extra_states(params: Mapping[str, Any]) -> dict[str, Any]:
    """As :func:`beside_tensors`; also what is laid aside."""
    return {**getattr(params, "_beside", {}), **beside_tensors(params)}


def beside_tensors(params: Mapping[str, Any]) -> dict[str, Any]:
    """What modules store in ``params`` beside tensors (``get_extra_state``), by name."""
    if not isinstance(params, Mapping):
        return {}
    named = [name for name in params if str(name).split(".")[-1] == "_extra_state"]  # torch's name for it
    return {name: params[name] for name in named if not isinstance(params[name], Tensor)}


def load(model: nn.Module, params: Mapping[str, Tensor], device: torch.device | str) -> nn.Module:
    """A copy of ``model`` on ``device``, in eval mode, that holds ``params``.

    Tensors that come without versions (from a file, or over a network) are taken as written by ``model`` itself, but
    where only counters of batches are missing, which torch then begins at 0. What modules store beside tensors, and
    ``params`` does not have, stays that of ``model``.

    Raises:
        ParamsError: ``params`` is not a state dict of ``model``, or gives one tensor of it two values; or ``model``
            cannot be copied.
    """
    beside = extra_states(params)
    for name, tensor in _items(params):
        if name in beside:
            continue
        if not isinstance(tensor, Tensor):
            raise ParamsError(
                f"{name!r} is a {type(tensor).__name__}; expected a tensor, as in a network's state_dict()"
            )
    network = duplicate(model)
    check_ties(model, params)
    own = network.state_dict()
    beside = {**extra_states(own), **beside}
    for name in (own.keys() & params.keys()) - beside.keys():
        if params[name].is_complex() and not own[name].is_complex():  # torch would drop the imaginary part
            raise ParamsError(f"tensor {name!r} is {params[name].dtype}, expected {own[name].dtype}")
        if own[name].is_meta:
            raise ParamsError(
                f"{name!r} of this {type(model).__name__} is on the meta device, which holds no values; build the "
                "network on 'cpu'"
            )
    lacking = own.keys() - params.keys() - beside.keys()
    old = bool(lacking) and all(name.endswith("num_batches_tracked") for name in lacking)  # from before torch 0.4.1
    source = own if versions(params) is None and not old else params
    try:
        network.load_state_dict(with_versions({**params, **beside}, source))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ParamsError(f"these parameters are not a state dict of {type(model).__name__}: {reason}") from error
    return network.to(device).eval()


def check_names(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Refuse a network whose state dict calls its parameters otherwise than the network does, by a hook.

    Raises:
        ParamsError: Names the parameter.
    """
    own = model.state_dict()
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in params and name not in own:
            raise ParamsError(
                f"parameter {name!r} of {type(model).__name__} has another name in its state dict, which a hook gives "
                "it; take that hook off"
            )


def check_state(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Refuse what is no state dict of ``model``, by names and shapes.

    Raises:
        ParamsError: Names the tensor.
    """
    own = model.state_dict()
    given = dict(_items(params))
    for name in (own.keys() ^ given.keys()) - extra_states(own).keys():
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
