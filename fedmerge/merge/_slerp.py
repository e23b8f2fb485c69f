"""Spherical interpolation (Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge._arguments import checked
from fedmerge._check import check_weights
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order, ordered
from fedmerge.spec import PermSpec
from fedmerge.types import Params

_STEPS, _TOLERANCE = 100, 1e-12
_OPPOSITE = -0.9995
"""Cosine from which on two directions have no middle, as in mergekit."""


@checked
def slerp(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    order: str = "merge-many",
    **options: Any,
) -> Merge:
    r"""The models in a common order, each tensor on the arc between them in place of the chord.

    Of two models with weights 1 - t and t, for each tensor, with :math:`\Omega` the angle between its values
    :math:`v_0, v_1` as vectors,

    .. math:: v = \frac{\sin (1 - t) \Omega}{\sin \Omega} v_0 + \frac{\sin t \Omega}{\sin \Omega} v_1 ,

    which keeps the norm that averaging shrinks. Of more models, the combination :math:`\sum_i c_i v_i` whose
    coefficients make of their directions :math:`u_i = v_i / \|v_i\|` the weighted mean on the sphere (Buss and
    Fillmore, "Spherical Averages and Applications to Spherical Splines and Interpolation", ACM TOG 20(2), 2001,
    Alg. A1): the point m with :math:`\sum_i w_i \log_m u_i = 0`. Of two models that is the formula above. A tensor
    that is zero in one model, or opposite in two, is averaged; models of weight 0 are none. Buffers and integers are
    averaged.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model; equal if None.
        rng: Randomness of the alignment.
        order: The merger that brings the models into one order; ``"average"`` leaves them as they are.
        options: Of the alignment.

    Raises:
        ParamsError: Models that do not fit.

    Cost: O(n^2 d) for n models of d parameters.
    """
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
    shares = check_weights(weights, len(models))
    moved = [params for params, share in zip(ordered(models, start, spec=spec), shares, strict=True) if share > 0]
    shares = shares[shares > 0]
    merged = dict(start.params)
    for name in spec.parameters:
        values = torch.stack([params[name].double().flatten() for params in moved])
        merged[name] = (
            (_coefficients(values, shares.to(values.device)) @ values)
            .reshape(merged[name].shape)
            .to(merged[name].dtype)
        )
    return replace(start, params=merged)


def _coefficients(values: Tensor, shares: Tensor) -> Tensor:
    """How much of each row of ``values`` (n, d) is in their mean on the sphere; ``shares`` where there is none.

    The mean is a combination of the rows' directions, so all that is needed of them are the cosines between them.
    """
    norms = values.norm(dim=1)
    if not bool((norms > 0).all()):
        return shares
    directions = values / norms[:, None]
    cosines = directions @ directions.T
    if float(cosines.min()) < _OPPOSITE:
        return shares
    mean, length = shares.clone(), float((shares @ cosines @ shares).clamp_min(0).sqrt())
    if length < 1e-6:  # directions that balance each other
        mean, length = torch.zeros_like(shares).index_fill(0, shares.argmax(), 1.0), 1.0
    mean = mean / length
    for _ in range(_STEPS):
        to = (cosines @ mean).clamp(-1, 1)
        angles = to.acos()
        pull = shares * torch.where(angles > 1e-7, angles / angles.sin().clamp_min(1e-300), 1.0)
        step = pull - (pull @ to) * mean  # along the sphere: the logarithms of all directions, weighed
        length = float((step @ cosines @ step).clamp_min(0).sqrt())
        if length < _TOLERANCE:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean = mean / (mean @ cosines @ mean).sqrt()
    return mean
