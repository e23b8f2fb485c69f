"""Retraining on the public split: on its labels, on the clients' ensemble, or on both."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedmerge._registry import Registry
from fedmerge.data import Images
from fedmerge.merge import ensemble
from fedmerge.models import Recipe
from fedmerge.training import Training, train

_LABELS_WEIGHT: Registry[float | None] = Registry("retrain")
_LABELS_WEIGHT.add("none", None, "no retraining")
_LABELS_WEIGHT.add("labels", 1.0, "on the labels of the public split")
_LABELS_WEIGHT.add("distill", 0.0, "towards the prediction of the clients' ensemble on the public images (FedDF)")
_LABELS_WEIGHT.add("both", 0.5, "on labels and ensemble, half each")


def retrainings() -> dict[str, str]:
    """Name -> one-line summary of every way to retrain."""
    return _LABELS_WEIGHT.summaries()


def retrain(
    model: nn.Module,
    params: dict[str, Tensor],
    public: Images,
    *,
    how: str,
    teachers: Sequence[dict[str, Tensor]],
    recipe: Recipe,
    epochs: int,
    generator: torch.Generator,
    device: str = "cpu",
) -> Training:
    """Train ``params`` further on the public split.

    ``how="distill"`` follows ensemble distillation (Lin et al., "Ensemble Distillation for Robust Model Fusion
    in Federated Learning", NeurIPS 2020, arXiv:2006.07242), here from the merged network.

    Args:
        model: The architecture; not modified.
        params: Where the training begins.
        public: The public split.
        how: A name from :func:`retrainings`, but not ``"none"``.
        teachers: The clients' networks, whose mean prediction is the target of distillation.
        recipe: How to train.
        epochs: Passes over ``public``; the schedule is cut to them.
        generator: Order of the images, and augmentation.
        device: Where to train.
    """
    weight = _LABELS_WEIGHT[how]
    if weight is None:
        raise ValueError("retrain was called with how='none'")
    teacher = None if weight == 1.0 else ensemble(model, teachers, public, device=device)
    return train(
        model, params, public, recipe=recipe, epochs=epochs, generator=generator,
        teacher=teacher, labels_weight=weight, device=device,
    )  # fmt: skip
