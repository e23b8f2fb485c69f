"""What a step of training lowers, on labels, on a teacher, or on both."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fedmerge.data import Images
from fedmerge.data.losses import loss_of


def step_loss(
    data: Images,
    logits: Tensor,
    labels: Tensor,
    target: Tensor | None,
    *,
    labels_weight: float,
    temperature: float,
    smoothing: float,
    partly: bool,
    apart: bool = False,
) -> Tensor:
    """The first two terms of the formula in :func:`fedmerge.training.train`.

    ``partly`` says that some images of the set have no label (-1); where all have one, not a bit depends on it.
    ``apart`` asks that what an image adds depends on no other one; see :func:`fedmerge.data.losses.loss_of`.
    """
    if partly and labels_weight and target is not None:
        student = F.log_softmax(logits / temperature, dim=1)
        divergences = temperature**2 * F.kl_div(student, target, reduction="none").sum(1)
        known = labels != -1
        shares = torch.where(known, 1 - labels_weight, 1.0)
        if data.loss is not None:
            taught = (shares * divergences).mean()
            if not known.any():
                return taught
            given = loss_of(data, logits[known], labels[known], apart=apart)
            return labels_weight * known.float().mean() * given + taught
        given = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=-1, reduction="none")
        return (labels_weight * given + shares * divergences).mean()
    loss = logits.new_zeros(())
    if labels_weight:  # without, labels may be anything
        loss = labels_weight * loss_of(data, logits, labels, smoothing=smoothing, apart=apart)
    if target is not None:
        loss = loss + (1 - labels_weight) * temperature**2 * divergence(logits / temperature, target)
    return loss


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over images, and positions where there are some, of KL(``target`` || softmax(``logits``))."""
    return F.kl_div(F.log_softmax(logits.flatten(0, -2), dim=1), target.flatten(0, -2), reduction="batchmean")
