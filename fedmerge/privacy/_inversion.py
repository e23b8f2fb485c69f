"""What did a client's images look like? Gradient inversion of what it sends.

An attack begins at noise and lowers an objective over pixels: how far the update that they would make is from the one
that was sent. A prior says what images are like: neighbouring pixels differ little (total variation).
"""

from collections.abc import Iterable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._arguments import checked
from fedmerge._check import check_number
from fedmerge.data import Images
from fedmerge.errors import ParamsError, UnknownNameError
from fedmerge.models import Recipe
from fedmerge.privacy._drawing import Canvas, Reconstruction, gradient
from fedmerge.privacy._labels import check_update, recover_labels, sgd_steps

OBJECTIVES = ("cosine", "l2")


@checked
def invert_update(
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    data: Images,
    *,
    recipe: Recipe,
    count: int = 1,
    epochs: int = 1,
    clients: int = 1,
    labels: Tensor | None = None,
    objective: str = "cosine",
    total_variation: float = 1e-3,
    norms: float = 0.0,
    iterations: int = 500,
    rate: float = 0.1,
    restarts: int = 1,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Reconstruction:
    r"""The images with which a network, trained by ``recipe``, goes from ``before`` to ``after``.

    With d = ``before`` - ``after`` and d(x) what the same training on images x and labels y takes off, lowers

    .. math:: 1 - \frac{\langle d(x), d \rangle}{\|d(x)\| \|d\|} + \tau \, \mathrm{TV}(x)
              \quad\text{or}\quad \frac{\|d(x) - d\|^2}{\|d\|^2} + \tau \, \mathrm{TV}(x)

    over x in the box of valid pixels. TV is the mean absolute difference of neighbouring pixels and
    :math:`\tau` is ``total_variation``. Only the sign of the gradient in x is used, by Adam, whose rate falls to a
    tenth after 3/8, 5/8 and 7/8 of the iterations. One step of SGD makes d the gradient times the learning rate. After
    several steps the attack simulates them, and differentiates through all.

    A client with BatchNorm also sends the running statistics that its steps left. With ``norms`` = :math:`\nu` > 0

    .. math:: \nu \, \mathrm{mean}_s \, \frac{\|s(x) - s\|}{\|s_0 - s\|}

    is added, over the means and variances s that it sent, of which it got :math:`s_0` and training on x leaves s(x):
    the prior of Yin et al. 2020 (see :func:`invert_model`), with the batch's own statistics in place of a data set's.

    ``after`` may be the mean of several clients' networks that began at ``before``, which is what a masked sum shows.
    After one step each on equally many images it is exactly the network of one client with all images in one batch,
    and that client is what the attack simulates; say how many ``clients`` there were.

    Geiping, Bauermeister, Dröge, Moeller, "Inverting Gradients: How easy is it to break privacy in federated
    learning?", NeurIPS 2020, arXiv:2003.14053, equation 4 and section 6. ``"l2"`` is the objective of Zhu, Liu, Han,
    "Deep Leakage from Gradients", NeurIPS 2019, arXiv:1906.08935, relative to the update and with this optimiser in
    place of L-BFGS.

    Args:
        model: The network; its own weights do not matter. Dropout is off, and BatchNorm normalises by the batch as it
            does in training.
        before: The state dict that the client got.
        after: The state dict that it sent.
        data: Says how large the images are, how they are normalised and what classes there are. None of its images is
            read, so there need be none.
        recipe: How the client trains; by SGD. It is not augmented.
        count: How many images it holds.
        epochs: Its passes over them. The attacker does not know their order and takes the same in each pass.
        clients: Of how many ``after`` is the mean.
        labels: Int64 ``(count,)``; found by :func:`recover_labels` if None.
        objective: ``"cosine"`` or ``"l2"``.
        total_variation: Weight of the prior.
        norms: Weight of the statistics of BatchNorm, where the network has any with a momentum; 0 does not read them.
        iterations: Steps of the attack.
        rate: Of these, at first, in units of normalised pixels.
        restarts: Beginnings, of which the one with the lowest objective is returned.
        generator: A CPU generator; it draws the noise.
        device: Where to compute.

    Returns:
        The images, in the order of the labels.

    Raises:
        ConfigError: A number outside its range, an unknown objective, a recipe with Adam, or a simulated training whose
            loss is not finite.
        DataError: ``data`` are no images, the network does not take them, or a label names no class.
        ParamsError: A state dict of another network, an update of zeros, or a network that has no gradient.

    Cost: ``restarts * iterations`` times a training of the client and its derivative, some four times the training.

    Example:
        >>> from fedmerge.privacy import invert_update, quality
        >>> images = fm.data.load("digits").train.select([3])
        >>> model = fm.models.build("mlp", classes=10, in_shape=images.shape, seed=0, width=32)
        >>> before, recipe = model.state_dict(), fm.models.Recipe(momentum=0.0)
        >>> after = fm.train(model, before, images, recipe=recipe, epochs=1, generator=torch.Generator()).params
        >>> found = invert_update(
        ...     model, before, after, images, recipe=recipe, iterations=200, generator=torch.Generator().manual_seed(0)
        ... )
        >>> found.labels.tolist() == images.labels.tolist()
        True
        >>> bool(quality(found.images, images).psnr[0] > 20)
        True
    """
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    batches = sgd_steps(recipe, count, epochs, clients) // epochs
    check_update(model, before, after)
    check_number("norms", norms, 0)
    canvas = Canvas(model, before, data, device)
    weights = {name: w for name, w in canvas.network.named_parameters() if w.requires_grad}
    if not weights:
        raise ParamsError(
            f"no parameter of {type(model).__name__} has a gradient (requires_grad is false everywhere), so an update "
            "tells nothing; give the network as it is trained"
        )
    sent = [(before[n].cpu().double() - after[n].cpu().double()).to(device, torch.float32) for n in weights]
    norm = _inner(sent, sent).sqrt()
    if not norm > 0:
        raise ParamsError("before and after are equal in every trained parameter; give the network as it was sent back")
    if labels is None:
        labels = recover_labels(model, before, after, recipe=recipe, count=count, epochs=epochs, clients=clients)
    labels = canvas.labels(labels, count)

    kept = _Kept(canvas.network, after) if norms else None

    def distance(x: Tensor) -> Tensor:
        if kept is not None:
            kept.begin()
        made = _trained(canvas.network, weights, x, labels, recipe, epochs, batches)
        if objective == "l2":
            apart = [a - b for a, b in zip(made, sent, strict=True)]
            cost = _inner(apart, apart) / norm**2
        else:
            cost = 1 - _inner(made, sent) / (norm * _inner(made, made).clamp(min=_LEAST).sqrt())
        return cost if kept is None else cost + norms * kept.apart()

    return canvas.drawn(
        distance, labels, total_variation=total_variation, iterations=iterations, rate=rate, restarts=restarts,
        generator=generator,
    )  # fmt: skip


class _Kept:
    """The running statistics of BatchNorm after training, as a function of the images that can be differentiated."""

    def __init__(self, network: nn.Module, after: Mapping[str, Tensor]) -> None:
        self._before: dict[str, Tensor] = {}
        for name, layer in network.named_modules():
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None and layer.momentum is not None:
                for what in ("running_mean", "running_var"):
                    key = f"{name}.{what}" if name else what
                    self._before[key] = getattr(layer, what).clone()
                layer.register_forward_pre_hook(partial(self._see, name))
        self._sent = {key: after[key].to(value) for key, value in self._before.items()}
        self._now = dict(self._before)

    def begin(self) -> None:
        """As they were sent to the client."""
        self._now = dict(self._before)

    def _see(self, name: str, layer: _BatchNorm, given: tuple[Tensor, ...]) -> None:
        if not layer.training or layer.momentum is None:
            return
        others = [axis for axis in range(given[0].dim()) if axis != 1]
        variance, mean = torch.var_mean(given[0], others, correction=1)
        for what, value in (("running_mean", mean), ("running_var", variance)):
            key = f"{name}.{what}" if name else what
            self._now[key] = torch.lerp(self._now[key], value, layer.momentum)

    def apart(self) -> Tensor:
        """The mean over them of their distance from those that the client sent, relative to what it changed."""
        found = [
            (self._now[key] - sent).norm() / (self._before[key] - sent).norm().clamp(min=_LEAST)
            for key, sent in self._sent.items()
        ]
        return torch.stack(found).mean() if found else torch.zeros(())


_LEAST = 1e-30
"""Of a squared norm: of pixels that give no gradient, so that its root has one."""


def _trained(
    network: nn.Module, weights: Mapping[str, Tensor], x: Tensor, labels: Tensor, recipe: Recipe, epochs: int,
    batches: int,
) -> list[Tensor]:  # fmt: skip
    """What training takes off ``weights``, as a function of ``x`` that can be differentiated."""
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    now, velocity = dict(weights), [torch.zeros_like(w) for w in weights.values()]
    buffers = dict(network.named_buffers())
    steps = [rows for _ in range(epochs) for rows in torch.arange(len(x), device=x.device).tensor_split(batches)]
    for step, rows in enumerate(steps):
        for norm in norms:  # a single image has no variance, and training then takes the running one
            norm.train(len(rows) > 1)
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        logits = functional_call(network, {**now, **buffers}, (x[rows],))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=recipe.label_smoothing)
        slopes = gradient(loss, now.values(), again=True)
        slopes = [g + recipe.weight_decay * w for g, w in zip(slopes, now.values(), strict=True)]
        velocity = [recipe.momentum * v + g for v, g in zip(velocity, slopes, strict=True)]
        if recipe.nesterov:
            slopes = [g + recipe.momentum * v for v, g in zip(velocity, slopes, strict=True)]
        rate = recipe.rate((step + 0.5) / len(steps))
        moves = slopes if recipe.nesterov else velocity
        now = {name: w - rate * move for (name, w), move in zip(now.items(), moves, strict=True)}
    return [w - now[name] for name, w in weights.items()]


def _inner(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
