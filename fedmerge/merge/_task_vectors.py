"""Mergers of what models learned beyond a common base: task arithmetic, and TIES."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_params, check_weights
from fedmerge._ties import check_ties, first_names
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
def task_arithmetic(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    base: Params | None = None,
    scale: float = 1.0,
    **_: Any,
) -> Merge:
    r"""Add the weighted mean of the models' steps from a common base to that base, times a factor.

    .. math:: \theta = \theta_0 + \lambda \sum_i w_i (\theta_i - \theta_0)

    (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, arXiv:2212.04089, who add the steps; here
    ``weights`` sum to 1, so their sum is ``scale`` = number of models). With ``scale=1`` this is the mean. Models
    that began at one base need no alignment. Buffers are averaged.

    Args:
        models: State dicts of one architecture, trained from ``base``.
        spec: The symmetries, which say what is a parameter.
        weights: One non-negative number a model; equal if None.
        rng: Not used.
        base: Where all models began, in a federation the round's global network.
        scale: Lambda above.

    Raises:
        ParamsError: No base, or models that do not fit.
    """
    base = need_base("task-arithmetic", base, models, spec)
    merged, shares = average(models, weights), check_weights(weights, len(models)).tolist()
    for name in spec.parameters:
        origin = base[name].double()
        steps = (
            share * (model[name].detach().to(origin) - origin) for share, model in zip(shares, models, strict=True)
        )
        merged[name] = (origin + scale * sum(steps, torch.zeros_like(origin))).to(merged[name].dtype)
    return unmoved(merged, models, spec)


@checked
def ties(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    base: Params | None = None,
    model: nn.Module | None = None,
    density: float = 0.2,
    scale: float = 1.0,
    **_: Any,
) -> Merge:
    r"""Trim the models' steps from a common base, elect a sign for each parameter, and average those that agree.

    With :math:`\tau_i = \theta_i - \theta_0` (Yadav et al., "TIES-Merging", NeurIPS 2023, arXiv:2306.01708, Alg. 1):
    (1) of each :math:`\tau_i` the share ``density`` of largest magnitude is kept, over all parameters together, and
    the rest set to 0; (2) :math:`\gamma = \mathrm{sign} \sum_i w_i \tau_i`; (3) each parameter moves by the weighted
    mean of those non-zero :math:`\tau_i` whose sign is :math:`\gamma`; :math:`\theta = \theta_0 + \lambda\, \tau`.
    Weights are ours; equal ones are the paper's. Buffers are averaged.

    Args:
        models: State dicts of one architecture, trained from ``base``.
        spec: The symmetries, which say what is a parameter.
        weights: One non-negative number a model; equal if None.
        rng: Not used.
        base: Where all models began, in a federation the round's global network.
        model: The network, which says what names are one tensor; it counts once then, and not once a name.
        density: Share of the parameters that each model keeps, in (0, 1].
        scale: Lambda above.

    Raises:
        ParamsError: No base, models that do not fit, or that give one tensor of ``model`` two values.
        ConfigError: ``density`` outside (0, 1].
    """
    base = need_base("ties", base, models, spec)
    if not 0 < density <= 1:
        raise ConfigError(f"density of ties is {density:g}; expected a share in (0, 1]")
    way = steps_from(base, models, spec, model)
    trimmed = []
    for step in way.steps:
        kept = max(1, round(density * len(step)))
        threshold = step.abs().kthvalue(len(step) - kept + 1).values
        trimmed.append(torch.where(step.abs() >= threshold, step, 0.0))
    return way.merged(scale * agreed(trimmed, check_weights(weights, len(models)).tolist()), weights)


def agreed(steps: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Of each number the weighted mean of the non-zero ``steps`` whose sign is that of the weighted sum."""
    elected = torch.sign(sum((w * step for w, step in zip(shares, steps, strict=True)), torch.zeros_like(steps[0])))
    above, below = torch.zeros_like(elected), torch.zeros_like(elected)
    for share, step in zip(shares, steps, strict=True):
        agrees = (torch.sign(step) == elected) & (step != 0)
        above += share * torch.where(agrees, step, 0.0)
        below += share * agrees
    return torch.where(below > 0, above / below.clamp_min(1e-300), 0.0)


@dataclass(frozen=True)
class Steps:
    """The models' ways from a base.

    Attributes:
        models: The state dicts.
        base: Where they began.
        spec: The symmetries.
        first: Name of a parameter -> the first name of the same tensor.
        steps: Model -> its step, all parameters in one vector, float64; a tensor of several names is in it once.
    """

    models: Sequence[Params]
    base: Params
    spec: PermSpec
    first: Mapping[str, str]
    steps: list[Tensor]

    def merged(self, step: Tensor, weights: Sequence[float] | None) -> Merge:
        """The base after ``step``; buffers are averaged."""
        names = sorted({*self.first.values()})
        parts = torch.split(step, [self.base[name].numel() for name in names])
        moves = dict(zip(names, parts, strict=True))
        merged = average(self.models, weights)
        for name, one in self.first.items():
            origin = self.base[one].double()
            merged[name] = (origin + moves[one].reshape(origin.shape)).to(merged[name].dtype)
        return unmoved(merged, self.models, self.spec)


def steps_from(base: Params, models: Sequence[Params], spec: PermSpec, model: nn.Module | None) -> Steps:
    """The steps of ``models`` from ``base``; ``model`` says what names are one tensor.

    Raises:
        ParamsError: Models that give one tensor of ``model`` two values, or have no parameters.
    """
    first = {name: name for name in spec.parameters}
    if model is not None:
        for params in (base, *models):
            check_ties(model, params)
        first |= {name: one for name, one in first_names(model).items() if name in first}
    names = sorted({*first.values()})
    if not names:
        raise ParamsError("the models have no parameters, so no step leads from the base to them")
    origin = torch.cat([base[name].double().flatten() for name in names])
    steps = [torch.cat([params[name].double().flatten() for name in names]) - origin for params in models]
    return Steps(models, base, spec, first, steps)


def need_base(method: str, base: Params | None, models: Sequence[Params], spec: PermSpec) -> Params:
    """``base``, which ``method`` cannot do without.

    Raises:
        ParamsError: There is none, or models that do not fit.
    """
    if base is None:
        raise ParamsError(
            f"{method} needs the network that all models were trained from; pass it as base= (in a federation, the "
            "round's global network), or use 'merge-many', which needs none"
        )
    check_params(models, spec, besides={"the base": base})
    return base


def unmoved(merged: dict[str, Tensor], models: Sequence[Params], spec: PermSpec) -> Merge:
    """The merge of models whose units stay where they are."""
    return Merge(merged, tuple(spec.identity(m) for m in models), 0.0, (), 0, True)
