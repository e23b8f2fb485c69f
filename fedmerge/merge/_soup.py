"""Greedy soup (Wortsman et al., "Model soups", ICML 2022, arXiv:2203.05482, Recipe 1)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from fedmerge._arguments import checked
from fedmerge._check import check_weights
from fedmerge._forward import need_images
from fedmerge.data import Images
from fedmerge.merge._average import average
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order, ordered
from fedmerge.normalisation import repair
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.training import evaluate
from fedmerge.types import Params


@checked
def greedy_soup(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    order: str = "merge-many",
    model: nn.Module | None = None,
    data: Images | None = None,
    statistics: str = "recompute",
    device: str = "cpu",
    **options: Any,
) -> Merge:
    r"""Average those of the models, in a common order, that together are more accurate than without the last.

    The models are tried from the most to the least accurate on ``data``; each joins the mean if the mean's accuracy
    does not fall. The result is never less accurate on ``data`` than the best model, so ``data`` must be held-out
    images on which nothing is reported. Where no answer is right or wrong, minus the loss stands for the accuracy. The
    uniform soup is the merger named by ``order`` itself.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: Of the mean, one non-negative number a model; equal if None.
        rng: Randomness of the alignment.
        order: The merger that brings the models into one order; ``"average"`` leaves them as they are.
        model: The network.
        data: Held-out images with labels.
        statistics: How a mean's statistics are corrected on ``data`` before it is judged: ``"recompute"`` (BatchNorm
            recomputation) or ``"none"``. A single model keeps its own.
        device: Where to compute.
        options: Further options of the alignment.

    Returns:
        The mean, with corrected statistics where more than one model is in it; the permutations are of all models.

    Raises:
        ParamsError: Models that do not fit, or ``model`` or ``data`` were not given.
        DataError: There are no images.

    Cost: two evaluations a model.
    """
    model, data = need_images("greedy-soup", model, data, reads="labels")
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
    shares = check_weights(weights, len(models)).tolist()
    moved = ordered(models, start, spec=spec)
    scores = [evaluate(model, p, data, device=device).merit for p in steps("evaluating models", moved)]
    ranked = sorted((i for i in range(len(models)) if shares[i] > 0), key=lambda i: (-scores[i], i))
    chosen, best, soup = ranked[:1], scores[ranked[0]], moved[ranked[0]]
    for i in steps("tasting models", ranked[1:]):
        trial = average([moved[j] for j in [*chosen, i]], [shares[j] for j in [*chosen, i]])
        trial = repair(model, trial, data=data, method=statistics, device=device)
        merit = evaluate(model, trial, data, device=device).merit
        if merit >= best:
            chosen, best, soup = [*chosen, i], merit, trial
    params = {name: tensor.to(models[0][name].dtype, copy=True) for name, tensor in soup.items()}
    return replace(start, params=params)
