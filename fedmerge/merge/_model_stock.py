"""Model Stock (Jang et al., "Model Stock: All we need ...", ECCV 2024, arXiv:2403.19522)."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch

from fedmerge._arguments import checked
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._task_vectors import need_base, unmoved
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
def model_stock(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    base: Params | None = None,
    **_: Any,
) -> Merge:
    r"""Between a common base and the mean of the models, tensor by tensor the point nearest to their centre.

    Fine-tuned models lie on a thin shell around a centre. With :math:`\theta` the angle between two models' steps
    from the base, N models, and :math:`\bar w` their mean, the point of the line from the base :math:`w_0` to
    :math:`\bar w` that is nearest to that centre is (eq. 7 of the paper)

    .. math:: w = t \bar w + (1 - t) w_0, \qquad t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}

    The cosine is the mean over all pairs, which the paper leaves open. Where it is negative (the paper has none
    such), t is 0. A tensor that did not move in one of two models has cosine 0 to the other's step. With a single
    model t is 1. Weights are ours and weigh the mean alone. Buffers are averaged.

    Args:
        models: State dicts of one architecture, trained from ``base``.
        spec: The symmetries, which say what is a parameter.
        weights: One non-negative number a model; equal if None.
        rng: Not used.
        base: Where all models began: the pretrained network, in a federation the round's global network.

    Raises:
        ParamsError: No base, or models that do not fit.

    Cost: O(n^2 d) for n models of d parameters.
    """
    base = need_base("model-stock", base, models, spec)
    merged = average(models, weights)
    for name in spec.parameters:
        origin = base[name].double()
        steps = [params[name].double() - origin for params in models]
        cosines = [_cosine(one, two) for one, two in combinations(steps, 2)]
        mean = max(0.0, sum(cosines) / len(cosines)) if cosines else 1.0
        t = len(models) * mean / (1 + (len(models) - 1) * mean)
        merged[name] = (origin + t * (merged[name].double() - origin)).to(merged[name].dtype)
    return unmoved(merged, models, spec)


def _cosine(one: torch.Tensor, two: torch.Tensor) -> float:
    norms = float(one.norm()) * float(two.norm())
    return float((one * two).sum()) / norms if norms > 0 else 0.0
