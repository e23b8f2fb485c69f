"""Checks of state dicts before anything is computed from them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedmerge.errors import ParamsError
from fedmerge.spec import PermSpec
from fedmerge.spec._spec import Params


def check_params(models: Sequence[Params], spec: PermSpec | None = None) -> None:
    """Refuse models that cannot be combined: other tensors, shapes, kinds, or values that are not finite.

    The first model (or ``spec``) says what is expected. Models are named by their position, from 0.

    Raises:
        ParamsError: Names the model, the tensor, what was given and what was expected.
    """
    if not models:
        raise ParamsError("no model was given; give at least one state dict")
    names = list(spec.axes) if spec is not None else list(models[0])
    for i, params in enumerate(models):
        for name in names:
            if name not in params:
                raise ParamsError(f"model {i} lacks tensor {name!r}; all models must have the same tensors")
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


def check_weights(weights: Sequence[float] | None, n: int) -> Tensor:
    """Averaging weights of ``n`` models, float64, summing to 1; None means equal.

    Raises:
        ParamsError: A wrong number of weights, a negative or non-finite one, or a sum of zero.
    """
    if weights is None:
        return torch.full((n,), 1.0 / n, dtype=torch.float64)
    given = np.asarray(weights, dtype=np.float64)
    if given.shape != (n,) or not np.isfinite(given).all() or (given < 0).any() or given.sum() <= 0:
        raise ParamsError(
            f"weights {given.tolist()} do not fit {n} models; give {n} finite non-negative numbers with a positive sum"
        )
    return torch.from_numpy(given / given.sum())
