"""Retraining on the public split: on its labels, on the clients' ensemble, or on both."""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.data import Images
from fedmerge.models import Recipe
from fedmerge.registry import Entry, Registry, returned
from fedmerge.teachers import teach
from fedmerge.training import Training, train


@dataclass(frozen=True)
class Retraining(Entry):
    """A retraining: ``make(model, params, public, *, teachers, recipe, epochs, generator, device) -> Training``.

    One that needs ``teachers`` runs the clients' networks; the others get them too. One that needs ``target`` gets
    what their teacher says of each public image, float32 ``(N, classes)``.

    Attributes:
        labelled: Whether it reads the labels of the public split.
    """

    make: Callable[..., Training]
    _: KW_ONLY
    labelled: bool = False

    can_need = frozenset({"teachers", "target"})
    called = ("model params public", "teachers recipe epochs generator device")


def _none(model: nn.Module, params: dict[str, Tensor], public: Images, **_: object) -> Training:
    return Training(dict(params), (), (), steps=0, seconds=0.0)


def _trained(
    model: nn.Module,
    params: dict[str, Tensor],
    public: Images,
    *,
    labels_weight: float,
    teachers: Sequence[dict[str, Tensor]],
    target: Tensor | None = None,
    **how: Any,
) -> Training:
    if labels_weight == 1:
        public = public.labelled
    return train(model, params, public, teacher=target, labels_weight=labels_weight, **how)


RETRAININGS: Registry[Retraining] = Registry("retrain", Retraining, "retrainings")
"""The ways to retrain."""

RETRAININGS.add(
    Retraining("none", _none, "no retraining"),
    Retraining("labels", partial(_trained, labels_weight=1.0), "on the labels of the public split", labelled=True),
    Retraining(
        "distill",
        partial(_trained, labels_weight=0.0),
        "towards the prediction of the clients' ensemble on the public images (FedDF)",
        needs=frozenset({"teachers", "target"}),
    ),
    Retraining(
        "both",
        partial(_trained, labels_weight=0.5),
        "on labels and ensemble, half each",
        needs=frozenset({"teachers", "target"}),
        labelled=True,
    ),
)


def retrainings() -> dict[str, str]:
    """Name -> one-line summary of every way to retrain."""
    return RETRAININGS.summaries()


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
    target: Tensor | None = None,
) -> Training:
    """Train ``params`` further on the public split.

    ``how="distill"`` follows ensemble distillation (Lin et al., "Ensemble Distillation for Robust Model Fusion
    in Federated Learning", NeurIPS 2020, arXiv:2006.07242), here from the merged network.

    Args:
        model: The architecture; not modified.
        params: Where the training begins.
        public: The public split. Images without a label (-1) have what the teacher says of them for one.
        how: A name from :func:`retrainings`.
        teachers: The clients' networks.
        recipe: How to train.
        epochs: Passes over ``public``; the schedule is cut to them.
        generator: Order of the images, and augmentation.
        device: Where to train.
        target: What distillation aims at: ``on_public`` of a :func:`fedmerge.teachers.teach`; the mean prediction of
            ``teachers`` if none is given.
    """
    entry, given = RETRAININGS[how], {}
    if "target" in entry.needs:
        given["target"] = teach("mean", model, teachers, public, device=device).on_public if target is None else target
    found = entry.make(
        model, params, public, teachers=teachers, recipe=recipe, epochs=epochs, generator=generator, device=device,
        **given,
    )  # fmt: skip
    return returned(f"retrain {how!r}", found, Training)
