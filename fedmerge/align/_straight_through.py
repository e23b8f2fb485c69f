"""Straight-through estimation (Ainsworth, Hayase, Srinivasa, "Git Re-Basin", ICLR 2023, arXiv:2209.04836, Sec. 3.3)."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._arguments import checked
from fedmerge._check import check_params
from fedmerge._forward import need_images
from fedmerge._loading import load
from fedmerge.align._finish import finish
from fedmerge.align.climb import Alignment, Climb
from fedmerge.data import Images
from fedmerge.data.losses import loss_of
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.progress import steps
from fedmerge.spec import PermSpec, permute
from fedmerge.types import Params

_MAX_SWEEPS = 100


@checked
def straight_through(
    params: Params,
    *,
    to: Params,
    spec: PermSpec,
    rng: np.random.Generator,
    model: nn.Module | None = None,
    data: Images | None = None,
    epochs: int = 10,
    batch_size: int = 100,
    lr: float = 3e-3,
    device: torch.device | str = "cpu",
    restarts: int = 1,
    polish: bool = False,
) -> Alignment:
    r"""Reorder the hidden units of ``params`` so that the network halfway to ``to`` has a low loss.

    With A = ``to``, B = ``params`` and the cross-entropy L on ``data``, learns by gradient a target
    :math:`\tilde B`, from :math:`\tilde B = A` on, in

    .. math:: \min_{\tilde B} L\big(\tfrac12 (A + \operatorname{proj} \tilde B)\big), \qquad
              \operatorname{proj} \tilde B = \operatorname*{argmax}_{\pi(B)} \langle \tilde B, \pi(B) \rangle .

    The projection is weight matching from the permutations of the step before. It has no useful gradient, so
    the gradient with respect to its result is passed straight through to :math:`\tilde B` (Adam). Of the
    permutations before the first and after each epoch, those with the lowest loss over all of ``data`` win; the
    first are those of weight matching, so the loss is never higher than theirs.

    BatchNorm layers normalise the midpoint by the statistics of each batch, because running statistics of
    the two networks do not describe the network between them; a batch of one image has none, and takes their mean.

    Args:
        params: The network that moves, a state dict.
        to: The reference.
        spec: The symmetries, from :func:`fedmerge.perm_spec`.
        rng: Order of the images and of the groups.
        model: The architecture; not modified.
        data: Labelled images of the public split, never of a client's partition.
        epochs: Passes over ``data``.
        batch_size: Images a step.
        lr: Learning rate of Adam on the target.
        device: Where the forward passes run.
        restarts: Number of trainings; the first begins forward-greedy, the others in a random order of groups.
            The lowest loss wins.
        polish: Climb on by weight matching; the objective rises, but the loss may too.

    Returns:
        The alignment; its objective is that of weight matching, so that methods compare. ``history`` holds the
        objective at the start and after each epoch, ``best`` says which of them was returned (0: weight matching's
        own permutations, so that learning has found nothing), ``sweeps`` counts epochs.

    Raises:
        ParamsError: ``model`` or ``data`` is missing, or state dicts do not fit.
        DataError: There are no images.
        ConfigError: A negative number of epochs, an empty batch or a learning rate that is not positive.

    Cost: a training of ``epochs`` epochs in which every step also solves a weight matching.
    """
    model, data = need_images("straight-through estimation", model, data, reads="labels")
    if epochs < 0 or batch_size < 1 or not 0 < lr < 1e30:
        raise ConfigError(
            f"epochs is {epochs}, batch_size {batch_size} and lr {lr}; expected at least 0, at least 1, and above 0 "
            "(below 1e30)"
        )
    check_params([to, params], spec)
    midpoint = Midpoint(load(model, to, device), to, params, spec, data, batch_size)
    climb = Climb(params, to, spec)
    tried: list[tuple[float, dict[str, Tensor], list[float], int]] = []
    for attempt in range(max(1, restarts)):
        begin = climb.begin("greedy-random" if attempt else "forward-greedy", rng)
        perms = climb.run(begin, rng, _MAX_SWEEPS).perms
        seen = [perms]
        # The steps of Adam vanish in half precision, or leave its range.
        target = {name: to[name].detach().to(device, copy=True) for name in climb.a}
        target = {name: t if t.dtype == torch.float64 else t.float() for name, t in target.items()}
        optimiser = torch.optim.Adam(target.values(), lr)
        for _ in steps("learning an order", range(epochs)):
            for rows in torch.split(torch.from_numpy(rng.permutation(len(data))), batch_size):
                for name, slope in midpoint.slope(perms, rows).items():
                    target[name].grad = slope.to(target[name].dtype)
                optimiser.step()
                perms = Climb(params, target, spec).run(dict(perms), rng, _MAX_SWEEPS).perms
            seen.append(perms)
        losses = [midpoint.loss(each) for each in seen]
        lowest = int(np.argmin(losses))
        tried.append((losses[lowest], seen[lowest], [climb.objective(each) for each in seen], lowest))
    _, perms, history, best = min(tried, key=lambda each: each[0])
    return finish(climb, perms, rng=rng, polish=polish, history=history, sweeps=epochs, converged=False, best=best)


@dataclass(frozen=True)
class Midpoint:
    """The network halfway between A and a reordered B, on images."""

    network: nn.Module
    a: Params
    b: Params
    spec: PermSpec
    data: Images
    batch_size: int

    def __post_init__(self) -> None:
        if next(self.network.parameters(), None) is None:
            raise ParamsError(f"{type(self.network).__name__} has no parameters; there is nothing to align")

    def loss(self, perms: Params) -> float:
        """Mean loss over all images; infinite where it is NaN, which compares as no loss does."""
        state, total = self._state(perms), 0.0
        with torch.no_grad():
            for rows in torch.split(torch.arange(len(self.data)), self.batch_size):
                total += float(self._loss(state, rows)) * len(rows)
        return math.inf if math.isnan(total) else total / len(self.data)

    def slope(self, perms: Params, rows: Tensor) -> dict[str, Tensor]:
        """Gradient of the loss on ``rows`` with respect to the reordered B."""
        state = self._state(perms)
        leaves = {name: state[name].requires_grad_() for name in state if name in self.spec.parameters}
        with torch.enable_grad():
            loss = self._loss(state, rows)
            slopes = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return {name: slope / 2 for name, slope in zip(leaves, slopes, strict=True)}

    def _state(self, perms: Params) -> dict[str, Tensor]:
        moved = permute(self.b, perms, spec=self.spec)
        device = next(self.network.parameters()).device
        return {
            name: (self.a[name] + b.to(self.a[name].device)).div(2).to(device)
            if b.is_floating_point()
            else self.a[name].to(device, copy=True)
            for name, b in moved.items()
        }

    def _loss(self, state: dict[str, Tensor], rows: Tensor) -> Tensor:
        device = next(self.network.parameters()).device
        images = self.data.normalise(self.data.images[rows.to(self.data.images.device)].to(device))
        labels = self.data.labels[rows.to(self.data.labels.device)].to(device)
        for layer in self.network.modules():
            if isinstance(layer, _BatchNorm):
                layer.train(len(rows) > 1)  # one image has no statistics
        own = self.network.state_dict()  # parameters may have another precision than the network
        state = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
        # A tensor of several names comes once by each: its slope is shared out among them, and the sum is right.
        return loss_of(self.data, functional_call(self.network, state, (images,), tie_weights=False), labels)
