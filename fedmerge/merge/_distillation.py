"""Ensembles of networks: their joint prediction, and its distillation into one network (FedDF)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._fit import check_training
from fedmerge._forward import need_images
from fedmerge.data import Images
from fedmerge.errors import DataError, ParamsError
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order
from fedmerge.models import Recipe
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.training import predict, train
from fedmerge.types import Params


@checked
def ensemble(model: nn.Module, members: Sequence[Params], images: Images, *, device: str = "cpu") -> Tensor:
    """Mean of the members' predicted probabilities, float32 ``(N, classes)``, or ``(N, T, classes)`` of positions.

    Raises:
        DataError: Answers that are no classes.
    """
    if not images.classes:
        raise DataError(f"answers to {images.name} are no classes, and an ensemble averages probabilities of classes")
    if not members:
        raise ParamsError("no network was given; an ensemble needs at least one")
    told = steps("asking the ensemble", members)
    total = [predict(model, params, images, device=device).double().softmax(-1).cpu() for params in told]
    return (sum(total[1:], total[0]) / len(members)).float()


ROUND_OFF = 1e-6
"""By so much a loss in nats must be lower to be so: less is round-off of float32."""


def target_of(
    model: nn.Module, members: Sequence[Params], images: Images, target: Tensor | None, device: str
) -> Tensor:
    """``target``, or what the ensemble predicts if None; refused as a teacher of :func:`fedmerge.train` is."""
    taught = ensemble(model, members, images, device=device) if target is None else target
    check_training(images, 0, taught, 0.0, 1.0, 0.0)
    return taught


@checked
def ensemble_distillation(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    order: str = "merge-many",
    model: nn.Module | None = None,
    data: Images | None = None,
    recipe: Recipe | None = None,
    epochs: int = 5,
    device: str = "cpu",
    **options: Any,
) -> Merge:
    r"""Merge, then train the merged network to predict what the ensemble of the models predicts on public images.

    From the mean of the models in a common order, lowers over the images x of ``data``

    .. math:: \mathrm{KL}\Big( \tfrac1n \sum_i p(x; \theta_i) \,\Big\|\, p(x; \theta) \Big)

    (Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020,
    arXiv:2006.07242, who start from the plain mean, which is ``order="average"``, and average logits, not
    probabilities). No label is read.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: Of the start, one non-negative number a model; the ensemble's members count alike.
        rng: Randomness of the start, and of the order of the images.
        order: The merger that makes the start.
        model: The network.
        data: Public images.
        recipe: How to train; by default ``Recipe()``.
        epochs: Passes over ``data``.
        device: Where to compute.
        options: Further options of the start.

    Raises:
        ParamsError: Models that do not fit, or ``model`` or ``data`` were not given.
        DataError: There are no images.
    """
    model, data = need_images("ensemble-distillation", model, data, reads="answers")
    rng = rng if rng is not None else np.random.default_rng(0)
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
    result = train(
        model,
        start.params,
        replace(data, labels=torch.zeros_like(data.labels)),
        recipe=recipe or Recipe(),
        epochs=epochs,
        generator=torch.Generator().manual_seed(int(rng.integers(2**62))),
        teacher=ensemble(model, models, data, device=device),
        labels_weight=0.0,
        device=device,
    )
    return replace(start, params=result.params)
