"""Checks of state dicts before anything is computed from them."""

import math
import numbers
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedmerge.errors import ConfigError, ParamsError
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Params


def check_params(models: Sequence[Params], spec: PermSpec | None = None) -> None:
    """Refuse models that cannot be combined: other tensors, shapes, kinds, or values that are not finite.

    The first model (or ``spec``) says what is expected. Models are named by their position, from 0.

    Raises:
        ParamsError: Names the model, the tensor, what was given and what was expected.
    """
    _check_dicts(models)
    names = list(spec.axes) if spec is not None else list(models[0])
    for i, params in enumerate(models):
        for name in names:
            if name not in params:
                raise ParamsError(f"model {i} lacks tensor {name!r}; all models must have the same tensors")
            if not isinstance(params[name], Tensor):
                raise ParamsError(f"{name!r} of model {i} is a {type(params[name]).__name__}; expected a tensor")
        for name in params:
            if name not in models[0] or (spec is not None and name not in spec.axes):
                raise ParamsError(f"model {i} has an extra tensor {name!r}; all models must have the same tensors")
        for name in names:
            tensor, first = params[name], models[0][name]
            if tensor.shape != first.shape:
                raise ParamsError(
                    f"tensor {name!r} of model {i} has shape {tuple(tensor.shape)}, expected {tuple(first.shape)} "
                    "as in model 0; give models of one architecture and width"
                )
            if tensor.is_floating_point() != first.is_floating_point():
                raise ParamsError(f"tensor {name!r} of model {i} is {tensor.dtype}, expected {first.dtype}")
            if tensor.is_complex():
                raise ParamsError(f"tensor {name!r} of model {i} is {tensor.dtype}; complex numbers are not merged")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                count = int((~torch.isfinite(tensor)).sum())
                raise ParamsError(
                    f"tensor {name!r} of model {i} holds {count} values that are NaN or infinite; leave that model out"
                )
            if spec is not None and name in spec.parameters and not tensor.is_floating_point():
                raise ParamsError(
                    f"parameter {name!r} of model {i} is {tensor.dtype}; alignment needs floating-point weights, "
                    "convert it before merging"
                )


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


def _check_dicts(models: Sequence[Params]) -> None:
    if isinstance(models, Mapping) or not isinstance(models, Sequence):
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
        given = np.asarray(weights, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ParamsError(f"weights {weights!r} are not numbers; give {n}, one a model") from error
    if given.shape != (n,) or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise ParamsError(
            f"weights {given.tolist()} do not fit {n} models; give {n} finite non-negative numbers with a positive sum"
        )
    return torch.from_numpy(given / given.sum())
