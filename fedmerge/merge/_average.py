"""The weighted mean of networks, tensor by tensor."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge._check import check_params, check_weights
from fedmerge._loading import with_versions
from fedmerge.memory import give_back
from fedmerge.types import Params

_LARGE = 2**20
"""Numbers of a tensor from which on the memory of its sums is given back, which costs some milliseconds."""


@checked
def average(models: Sequence[Params], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    r"""The weighted mean :math:`\sum_i w_i \theta_i` of state dicts, accumulated in float64.

    Buffers are averaged like parameters; integers (``num_batches_tracked``) take their largest value and stay
    integers. With equal units this is the aggregation step of FedAvg (McMahan et al., AISTATS 2017,
    arXiv:1602.05629).

    Args:
        models: State dicts of the same names and shapes.
        weights: One non-negative number a model, for example its number of examples; equal if None.

    Raises:
        ParamsError: Models or weights that do not fit.

    Example:
        >>> fm.average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[1, 3])["w"]
        tensor([0.7500, 0.7500])
    """
    check_params(models)
    shares = check_weights(weights, len(models)).tolist()
    merged: dict[str, Tensor] = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            merged[name] = torch.stack([m[name].to(first.device) for m in models]).amax(0).to(first.dtype)
            continue
        total = torch.zeros_like(first, dtype=torch.float64)
        for share, model in zip(shares, models, strict=True):
            total.add_(model[name].detach().to(total.device, torch.float64), alpha=share)
        merged[name] = total.to(first.dtype)
        if total.numel() >= _LARGE:
            del total
            give_back()
    return with_versions(merged, models[0])
