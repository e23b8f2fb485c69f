"""Checks of state dicts before anything is computed from them."""

import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmerge.errors import ConfigError, ParamsError
from fedmerge.spec import PermSpec
from fedmerge.types import Params

_KINDS = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
}  # fmt: skip


def check_params(
    models: Sequence[Params], spec: PermSpec | None = None, *, besides: Mapping[str, Params] | None = None
) -> None:
    """Refuse models that cannot be combined: other tensors, shapes, kinds, or values that are not finite.

    The first model (or ``spec``) says what is expected. Models are named by their position, from 0; those that are
    there ``besides`` by what they are called.

    Raises:
        ParamsError: Names the model, the tensor, what was given and what was expected.
    """
    check_dicts(models)
    named = {f"model {i}": params for i, params in enumerate(models)} | dict(besides or {})
    names = list(spec.axes) if spec is not None else list(models[0])
    for who, params in named.items():
        for name in names:
            if name not in params:
                raise ParamsError(f"{who} lacks tensor {name!r}; all models must have the same tensors")
            check_tensor(params[name], f"{name!r} of {who}")
        for name in params:
            if name not in models[0] or (spec is not None and name not in spec.axes):
                raise ParamsError(f"{who} has an extra tensor {name!r}; all models must have the same tensors")
        for name in names:
            tensor, first = params[name], models[0][name]
            if tensor.shape != first.shape:
                raise ParamsError(
                    f"tensor {name!r} of {who} has shape {tuple(tensor.shape)}, expected {tuple(first.shape)} "
                    "as in model 0; give models of one architecture and width"
                )
            if tensor.is_floating_point() != first.is_floating_point():
                raise ParamsError(f"tensor {name!r} of {who} is {tensor.dtype}, expected {first.dtype}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise ParamsError(
                    f"tensor {name!r} of {who} holds {count} values that are NaN or infinite; leave that model out"
                )
            if spec is not None and name in spec.parameters and not tensor.is_floating_point():
                raise ParamsError(
                    f"parameter {name!r} of {who} is {tensor.dtype}; alignment needs floating-point weights, "
                    "convert it before merging"
                )


def check_tensor(given: object, what: str) -> None:
    """Refuse what holds no numbers that can be averaged: no dense tensor, complex, quantised, or without values.

    Raises:
        ParamsError: Names ``what``.
    """
    if not isinstance(given, Tensor):
        raise ParamsError(
            f"{what} is a {type(given).__name__}; expected a tensor: give the network's state_dict(), and make arrays "
            "tensors by torch.as_tensor"
        )
    kind = (
        f"{given.dtype}, and complex numbers are not merged; split it into real and imaginary part"
        if given.is_complex()
        else f"sparse ({given.layout}); give tensor.to_dense()"
        if given.layout is not torch.strided or given.is_nested
        else f"quantised ({given.dtype}); give tensor.dequantize()"
        if given.is_quantized
        else "not initialised; run the network on an input first"
        if torch.nn.parameter.is_lazy(given)
        else "without values (on the device 'meta'); load its weights first"
        if given.device.type == "meta"
        else f"{given.dtype}, in which nothing can be averaged; convert it to float32"
        if given.dtype not in _KINDS
        else None
    )
    if kind is not None:
        raise ParamsError(f"{what} is {kind}")


def position(reference: int, n: int) -> int:
    """The position from 0 of model ``reference`` among ``n``; negative ones count from the end.

    Raises:
        ParamsError: There is none.
    """
    if not -n <= reference < n:
        raise ParamsError(f"reference is {reference}; there are {n} models, from 0")
    return reference % n


def check_number(what: str, given: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Refuse what is no finite number in [low, high].

    Raises:
        ConfigError: Names ``what``.
    """
    if isinstance(given, bool) or not isinstance(given, numbers.Real) or not math.isfinite(given):
        raise ConfigError(f"{what} is {given!r}; expected a finite number")
    if not low <= float(given) <= high:
        allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"of {low:g} or above"
        raise ConfigError(f"{what} is {given!r}; expected a number {allowed}")


def check_dicts(models: Sequence[Params]) -> None:
    """Refuse what is no list of state dicts, with one at least.

    Raises:
        ParamsError: Says what it is.
    """
    if isinstance(models, Mapping | str) or not isinstance(models, Sequence):
        raise ParamsError(f"models is a {type(models).__name__}; give a list of state dicts")
    if not models:
        raise ParamsError("no model was given; give at least one state dict")
    for i, params in enumerate(models):
        if not isinstance(params, Mapping):
            raise ParamsError(f"model {i} is a {type(params).__name__}; give its state dict")


def check_weights(weights: Sequence[float] | None, n: int) -> Tensor:
    """Averaging weights of ``n`` models, float64, summing to 1; None means equal.

    Raises:
        ParamsError: A wrong number of weights, a negative or non-finite one, or a sum of zero.
    """
    if weights is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    try:
        whole = weights.detach().cpu().tolist() if isinstance(weights, Tensor) else weights
        if np.asarray(whole).dtype.kind not in "iufO":
            raise TypeError("no real numbers")
        given = np.asarray(whole, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        try:
            shown = repr(weights)
        except ValueError:  # a whole number of thousands of digits, which Python does not write
            shown = f"in a {type(weights).__name__}"
        raise ParamsError(f"weights {shown} are not numbers; give {n}, one a model") from error
    if given.shape != (n,) or not np.isfinite(given).all() or (given < 0).any() or not (given > 0).any():
        raise ParamsError(
            f"weights {given.tolist()} do not fit {n} models; give {n} finite non-negative numbers with a positive sum"
        )
    with np.errstate(over="ignore"):
        if not np.isfinite(given.sum()):
            given = given / given.max()
    return torch.from_numpy(given / given.sum())
