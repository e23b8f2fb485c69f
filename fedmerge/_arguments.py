"""Arguments of public functions, checked against their annotations before anything is computed."""

import copy
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from fedmerge._called import called
from fedmerge._loading import beside_tensors, laid_aside, with_versions
from fedmerge.errors import ConfigError, DataError, FedmergeError, ParamsError, SpecError, UnknownNameError

P = ParamSpec("P")
T = TypeVar("T")

_LEAST = {
    "batch_size": 1, "max_steps": 0, "max_sweeps": 0, "restarts": 1, "tolerance": 0, "wide": 1, "workers": 0,
}  # fmt: skip
"""What these options are at least, in every function that has them."""

_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a name",
    nn.Module: "a network (an nn.Module, not its state dict)",
    np.random.Generator: "a generator, as np.random.default_rng(seed) makes it",
    torch.Generator: "a generator, as torch.Generator().manual_seed(seed) makes it",
    type(None): "None",
}
_ERRORS: dict[str, type[FedmergeError]] = {
    "PermSpec": SpecError, "Images": DataError, "Module": ParamsError, "Tensor": ParamsError, "Merge": ParamsError,
}  # fmt: skip
_READ: dict[str, Callable[..., object]] = {}
"""What makes of data as people have them what functions are annotated with, by that name; see :func:`reader`."""
_DATA = (Tensor, tuple, list, dict, Dataset, DataLoader)
_ELSEWHERE = {"models", "strengths", "weights"}
"""Arguments that `_check` looks at, tensor by tensor and number by number."""


def reader(kind: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """The decorated function of data, network and a name makes a ``kind``, wherever :func:`checked` ones take one."""

    def kept(function: Callable[P, T]) -> Callable[P, T]:
        _READ[kind] = function
        return function

    return kept


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Refuse arguments of ``function`` that it does not have, or whose type is not the annotated one.

    Numbers must be finite and of 64 bits, and devices must be there. Errors name the argument, what was given and what
    was expected. What modules store beside tensors (``get_extra_state``) is laid aside, and put back into the state
    dicts that come out: that of the first state dict.

    Raises:
        UnknownNameError: An argument by a name that the function does not know.
        ConfigError: One too few or too many; a number, name or option of another type.
        ParamsError: Something else than a state dict, or a network.
        SpecError: Something else than a spec.
        DataError: Something else than images.
    """
    signature = inspect.signature(function)
    named = function.__name__.strip("_").replace("_", "-")
    kinds = {p.kind for p in signature.parameters.values()}
    open_ended = inspect.Parameter.VAR_KEYWORD in kinds

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not open_ended:
            for name in kwargs:
                if name not in signature.parameters:
                    raise UnknownNameError(f"option of {named}", name, signature.parameters)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise ConfigError(f"{named}: {error}; it takes {', '.join(signature.parameters)}") from error
        hints = _hints(function)
        _as_images(bound.arguments, hints)
        check_arguments(function, bound.arguments)
        beside = _Beside({}, set())
        for name, value in bound.arguments.items():
            bound.arguments[name] = float(value) if hints.get(name) is float else _detached(value, beside)
        result = function(*bound.args, **bound.kwargs)
        return beside.put_back(result) if beside.states else result

    return call


def _as_images(arguments: dict[str, Any], hints: Mapping[str, Any]) -> None:
    """Put in place of tensors, data sets and loaders what the library reads, where images are expected.

    The network becomes one that is called as those say.
    """
    model = arguments.get("model")
    for name in [name for name in arguments if "Images" in str(hints.get(name))]:
        if isinstance(arguments[name], _DATA) and isinstance(model, nn.Module):
            arguments[name] = _READ["Images"](arguments[name], model, name)
        forward = getattr(arguments[name], "forward", None)
        if isinstance(model, nn.Module):
            arguments["model"] = called(model, forward)
        elif isinstance(model, list | tuple):
            arguments["model"] = [called(one, forward) for one in model]


@dataclasses.dataclass(frozen=True)
class _Beside:
    """What the modules of a network store beside tensors, and the names of the tensors."""

    states: dict[str, Any]
    names: set[str]

    def put_back(self, result: Any) -> Any:
        """``result`` whose state dicts have it."""
        if isinstance(result, dict) and self.names and result.keys() >= self.names:
            return with_versions({**result, **copy.deepcopy(self.states)}, result)
        if isinstance(result, list | tuple) and any(isinstance(one, dict) for one in result):
            return type(result)([self.put_back(one) for one in result])
        if dataclasses.is_dataclass(result) and not isinstance(result, type):
            fields = {field.name: getattr(result, field.name) for field in dataclasses.fields(result) if field.init}
            new = {name: self.put_back(value) for name, value in fields.items() if isinstance(value, dict | tuple)}
            return dataclasses.replace(result, **{k: value for k, value in new.items() if value is not fields[k]})
        return result


def _detached(value: object, beside: _Beside) -> object:
    """State dicts outside of autograd: not as ``state_dict(keep_vars=True)`` has them, nor made in inference mode.

    What is no tensor in the first one is kept in ``beside``.
    """
    if isinstance(value, list | tuple) and any(isinstance(one, dict) for one in value):
        found = [_detached(one, beside) for one in value]
        return tuple(found) if isinstance(value, tuple) else found
    if isinstance(value, dict) and (own := beside_tensors(value)):
        if not beside.states:
            beside.states.update(own)
            beside.names.update(value.keys() - own.keys())
        value = laid_aside(value, own)
    if isinstance(value, dict) and any(map(_attached, value.values())):
        return with_versions({k: _plain(t) if _attached(t) else t for k, t in value.items()}, value)
    return value


def _attached(value: object) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value) and (value.requires_grad or value.is_inference())


def _plain(tensor: Any) -> Tensor:
    found: Tensor = tensor.detach()
    return found.clone() if found.is_inference() else found


def check_arguments(function: Callable[..., object], given: Mapping[str, object]) -> None:
    """Refuse those of the arguments ``given`` whose type is not what ``function`` is annotated with.

    Raises:
        FedmergeError: As :func:`checked`.
    """
    while isinstance(function, functools.partial):
        function = function.func
    expected = _hints(inspect.unwrap(function))
    for name, value in given.items():
        if name not in expected or name in _ELSEWHERE:
            continue
        hint = expected[name]
        if name == "device":
            check_device(value)
        elif not _fits(value, hint):
            error = next((_ERRORS[word] for word in _ERRORS if word in str(hint)), ConfigError)
            raise error(f"{name} is {shown(value)}; expected {_said(hint)}")
        elif name in _LEAST and value < _LEAST[name]:  # type: ignore[operator]
            raise ConfigError(f"{name} is {value!r}; expected {_said(hint)} of at least {_LEAST[name]}")


def check_device(given: object) -> None:
    """Refuse what is no device, or a device that this machine lacks.

    Raises:
        ConfigError: Names the device.
    """
    try:
        device = torch.device(given)  # type: ignore[call-overload]
        fits = isinstance(given, str | torch.device) and device.type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device is {shown(given)}; expected 'cpu' or a device of this machine: {reason}") from error
    if not fits:
        raise ConfigError(f"device is {shown(given)}; expected 'cpu' or a device that computes, such as 'cuda'")


@functools.cache
def _hints(function: Callable[..., object]) -> dict[str, Any]:
    keywords = {p.name for p in inspect.signature(function).parameters.values() if p.kind is p.VAR_KEYWORD}
    return {name: hint for name, hint in typing.get_type_hints(function).items() if name not in {*keywords, "return"}}


def _fits(value: object, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if hint is bool:
        return isinstance(value, bool | np.bool_)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and _finite(value)
    if origin is tuple and ... not in args and args:
        return isinstance(value, tuple | list) and len(value) == len(args) and all(map(_fits, value, args))
    if origin is Sequence or origin is tuple:
        return isinstance(value, Sequence) and not isinstance(value, str) and all(_fits(v, args[0]) for v in value)
    if origin is Mapping:  # tensors are looked at one by one where they are used: they may lie on a disk
        return isinstance(value, Mapping)
    if origin is not None and isinstance(origin, type):
        return isinstance(value, origin)
    return isinstance(value, hint) if isinstance(hint, type) else True


def _finite(value: numbers.Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _said(hint: Any) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_said(one) for one in args)
    if origin is Mapping:
        return "a state dict (name -> tensor)" if Tensor in args else "a dict"
    if origin is tuple and ... not in args:
        return "(" + ", ".join(_said(one) for one in args) + ")"
    if origin in (Sequence, tuple):
        return f"a list, each {_said(args[0])}"
    if origin is Callable:
        return "a function"
    known: str | None = _WORDS.get(hint)
    return known or f"a {getattr(hint, '__name__', hint)}"


def shown(value: object) -> str:
    """``value`` in a message: numbers and names as they are written, all else by its kind."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, str | numbers.Number | None):
        return repr(value)
    return f"a {type(value).__name__}"
