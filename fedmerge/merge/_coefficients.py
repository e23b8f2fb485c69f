"""Merging coefficients of each model and tensor, learned on the ensemble.

After layer-wise AdaMerging (Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024,
arXiv:2310.02575).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_weights
from fedmerge._forward import need_images
from fedmerge._loading import load
from fedmerge._loss import divergence
from fedmerge._ties import first_names
from fedmerge.data import Images
from fedmerge.merge._distillation import ROUND_OFF, target_of
from fedmerge.merge._merge_many import Merge
from fedmerge.merge._ordered import in_common_order, ordered
from fedmerge.progress import steps
from fedmerge.spec import PermSpec
from fedmerge.types import Params


@checked
def learned_coefficients(
    models: Sequence[Params],
    *,
    spec: PermSpec,
    weights: Sequence[float] | None = None,
    rng: np.random.Generator | None = None,
    order: str = "merge-many",
    model: nn.Module | None = None,
    data: Images | None = None,
    target: Tensor | None = None,
    max_steps: int = 50,
    lr: float = 0.03,
    batch_size: int = 500,
    device: str = "cpu",
    **options: Any,
) -> Merge:
    r"""Mix the models, in a common order, by coefficients that bring the mixture's answers near to the ensemble's.

    With the models in a common order, every trained tensor k has a coefficient for each model i,

    .. math:: \theta_k(c) = \sum_i c_{ik} \, \theta_{ik},

    which begins at the model's weight. On the images x of ``data`` and what the ensemble q says of them, Adam lowers

    .. math:: L(c) = \frac1N \sum_x \mathrm{KL}\big( q(x) \,\big\|\, p(x; \theta(c)) \big).

    Nothing holds the coefficients to a sum of 1, so that tensors are scaled, too. Each step reads all images, and the
    coefficients of the lowest L are taken: L is never above that of the plain merge, which is the result of no step
    and where no step helps. No label is read. A BatchNorm has the statistics of the batch, as those that
    :func:`fedmerge.repair` measures; its stored ones, all other buffers and frozen parameters stay those of the plain
    merge. A tensor of several names is one.

    Where this is not AdaMerging: there is no base from which tasks are steps, the models are aligned first, and the
    loss is the divergence from the ensemble in place of the mixture's entropy, for all models answer one question.

    Args:
        models: State dicts of one architecture.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        weights: One non-negative number a model, where its coefficients begin; equal if None.
        rng: Randomness of the alignment.
        order: The merger that brings the models into one order; ``"average"`` leaves them as they are.
        model: The network.
        data: Public images.
        target: q, float ``(N, classes)``; the mean of the models' predictions, all counting alike, if None.
        max_steps: Steps of Adam.
        lr: Its learning rate.
        batch_size: Images of a forward pass; it changes memory and the statistics of BatchNorm.
        device: Where to compute.
        options: Further options of the alignment.

    Raises:
        ParamsError: Models that do not fit, or ``model`` or ``data`` were not given.
        DataError: There are no images, or their answers are no classes.
        ConfigError: A number out of its range, or a target that does not fit.

    Cost: a forward and a backward pass over ``data`` a step. Memory: the models once more.
    """
    model, data = need_images("learned-coefficients", model, data, reads="answers")
    check_number("lr of learned-coefficients", lr, 0)
    start = in_common_order(models, order=order, spec=spec, weights=weights, rng=rng, **options)
    taught = target_of(model, models, data, target, device)
    mixture = _Mixture(model, start.params, ordered(models, start, spec=spec), device)
    if not mixture.sources:  # all parameters are frozen
        return start
    shares = check_weights(weights, len(models)).to(device, torch.float32)
    coefficients = shares[:, None].repeat(1, len(mixture.sources)).requires_grad_()
    optimizer = torch.optim.Adam([coefficients], lr)
    lowest, best = math.inf, None
    for step in steps("learning coefficients", range(max_steps + 1)):
        loss, coefficients.grad = mixture.loss(coefficients.detach(), data, taught, batch_size)
        if step == 0:
            lowest = loss
        elif loss < lowest - ROUND_OFF:
            lowest, best = loss, coefficients.detach().clone()
        if step < max_steps and math.isfinite(loss):
            optimizer.step()
    return start if best is None else replace(start, params=mixture.params(best))


class _Mixture:
    """A network whose trained tensors are mixed.

    Attributes:
        sources: First name of a trained tensor -> that of each model, ``(models, ...)``.
    """

    def __init__(self, model: nn.Module, plain: Params, moved: Sequence[Params], device: str) -> None:
        self.plain, self.network = plain, load(model, plain, device)
        trained = {n: p.dtype for n, p in self.network.named_parameters(remove_duplicate=False) if p.requires_grad}
        self.first = {name: first for name, first in first_names(model).items() if first in trained and name in plain}
        self.sources = {
            name: torch.stack([params[name].to(device, trained[name]) for params in moved])
            for name in dict.fromkeys(self.first.values())
        }

    def mixed(self, coefficients: Tensor) -> dict[str, Tensor]:
        """First name -> tensor."""
        pairs = zip(self.sources.items(), coefficients.T, strict=True)
        return {name: torch.tensordot(own.to(source.dtype), source, 1) for (name, source), own in pairs}

    def params(self, coefficients: Tensor) -> dict[str, Tensor]:
        """The state dict."""
        mixed = self.mixed(coefficients)
        return {**self.plain, **{name: mixed[first].to(self.plain[name]) for name, first in self.first.items()}}

    def loss(self, coefficients: Tensor, data: Images, target: Tensor, batch_size: int) -> tuple[float, Tensor]:
        """L of ``coefficients``, and its gradient in them."""
        leaves = {name: tensor.requires_grad_() for name, tensor in self.mixed(coefficients).items()}
        every = {name: leaves[first] for name, first in self.first.items()}
        batches = torch.arange(len(data)).tensor_split(math.ceil(len(data) / batch_size))
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.train(min(map(len, batches)) > 1)  # one image has no statistics

        total, device = 0.0, coefficients.device
        for rows in batches:
            images = data.normalise(data.images[rows].to(device))
            # A copy, for torch writes into it what a module of two names held before.
            logits = functional_call(self.network, dict(every), (images,), tie_weights=False)
            loss = divergence(logits, target[rows].to(logits)) * (len(rows) / len(data))
            torch.autograd.backward(loss)
            total += float(loss.detach())
        slopes = [
            torch.zeros_like(coefficients[:, 0]) if (slope := leaves[name].grad) is None
            else (source * slope).flatten(1).sum(1).to(coefficients)
            for name, source in self.sources.items()
        ]  # fmt: skip
        return total, torch.stack(slopes, 1)
