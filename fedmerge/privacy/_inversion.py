"""What did the images look like? Gradient inversion of what a client sends, and model inversion of a network.

Both begin at noise and lower an objective over pixels: how far the update of the pixels is from the one that was sent,
or how far a network is from seeing a class in them. A prior says what images are like: neighbouring pixels differ
little (total variation), and a network with BatchNorm remembers the mean and variance of every unit.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_params
from fedmerge._forward import scores
from fedmerge._loading import load
from fedmerge.data import Images
from fedmerge.errors import ConfigError, DataError, ParamsError, UnknownNameError
from fedmerge.models import Recipe
from fedmerge.privacy._labels import check_update, recover_labels, sgd_steps
from fedmerge.progress import counted

OBJECTIVES = ("cosine", "l2")


@dataclass(frozen=True, eq=False)
class Reconstruction:
    """What an inversion gives; what it is worth says :func:`quality`.

    Attributes:
        images: Float32 ``(n, C, H, W)``, pixels in [0, 1], on the CPU.
        labels: Int64 ``(n,)``, the class of each.
        objective: What was lowered, at its end.

    Example:
        >>> found = fm.privacy.Reconstruction(torch.zeros(1, 3, 8, 8), torch.tensor([4]), objective=0.01)
        >>> found.images.shape, found.labels.tolist()
        (torch.Size([1, 3, 8, 8]), [4])
    """

    images: Tensor
    labels: Tensor
    objective: float


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
    labels: Tensor | None = None,
    objective: str = "cosine",
    total_variation: float = 1e-3,
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

    ``after`` may be the mean of several clients' networks that began at ``before``, which is what a masked sum shows.
    After one step each on equally many images it is exactly the network of one client with all images.

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
        labels: Int64 ``(count,)``; found by :func:`recover_labels` if None.
        objective: ``"cosine"`` or ``"l2"``.
        total_variation: Weight of the prior.
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
        >>> images = fm.data.load("digits").train.select([3])
        >>> model = fm.models.build("mlp", classes=10, in_shape=images.shape, seed=0, width=32)
        >>> before, recipe = model.state_dict(), fm.models.Recipe(momentum=0.0)
        >>> after = fm.train(model, before, images, recipe=recipe, epochs=1, generator=torch.Generator()).params
        >>> found = fm.privacy.invert_update(
        ...     model, before, after, images, recipe=recipe, iterations=200, generator=torch.Generator().manual_seed(0)
        ... )
        >>> found.labels.tolist() == images.labels.tolist()
        True
        >>> bool(fm.privacy.quality(found.images, images).psnr[0] > 20)
        True
    """
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    sgd_steps(recipe, count, epochs)
    check_update(model, before, after)
    canvas = _Canvas(model, before, data, device)
    weights = {name: w for name, w in canvas.network.named_parameters() if w.requires_grad}
    if not weights:
        raise ParamsError(
            f"no parameter of {type(model).__name__} has a gradient (requires_grad is false everywhere), so an update "
            "tells nothing; give the network as it is trained"
        )
    sent = [(before[name].double() - after[name].double()).to(device, torch.float32) for name in weights]
    norm = _inner(sent, sent).sqrt()
    if not norm > 0:
        raise ParamsError("before and after are equal in every trained parameter; give the network as it was sent back")
    if labels is None:
        labels = recover_labels(model, before, after, recipe=recipe, count=count, epochs=epochs)
    labels = canvas.labels(labels, count)

    def distance(x: Tensor) -> Tensor:
        made = _trained(canvas.network, weights, x, labels, recipe, epochs)
        if objective == "l2":
            apart = [a - b for a, b in zip(made, sent, strict=True)]
            return _inner(apart, apart) / norm**2
        return 1 - _inner(made, sent) / (norm * _inner(made, made).clamp(min=_LEAST).sqrt())

    return canvas.drawn(
        distance, labels, total_variation=total_variation, iterations=iterations, rate=rate, restarts=restarts,
        generator=generator,
    )  # fmt: skip


@checked
def invert_model(
    model: nn.Module,
    params: Mapping[str, Tensor],
    data: Images,
    *,
    labels: Tensor,
    total_variation: float = 0.1,
    norms: float = 0.1,
    iterations: int = 500,
    rate: float = 0.1,
    restarts: int = 1,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Reconstruction:
    r"""Images in which a trained network sees the classes ``labels``: what it knows of them without any update.

    Lowers over x in the box of valid pixels

    .. math:: \mathrm{CE}(y, p(x)) + \tau \, \mathrm{TV}(x)
              + \nu \sum_l \|\mu_l(x) - \bar\mu_l\| + \|\sigma^2_l(x) - \bar\sigma^2_l\|,

    where the last term is over the BatchNorms of the network, if it has any: mean and variance of each unit over the
    batch x against those that the network keeps of its training images. As in :func:`invert_update` for the rest.

    Fredrikson, Jha, Ristenpart, "Model Inversion Attacks that Exploit Confidence Information and Basic
    Countermeasures", CCS 2015, with the priors of Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via
    DeepInversion", CVPR 2020, arXiv:1912.08795, equations 2 to 4, without its shifts of the image, its L2 norm and its
    student. Networks that differ by a permutation of units, as aligned ones do, give the same images.

    Args:
        model: The network; its own weights do not matter.
        params: Its state dict: a client's, or a merged one.
        data: As in :func:`invert_update`.
        labels: Int64 ``(n,)``: the class of each image that is wanted.
        total_variation: Weight of that prior.
        norms: Weight of the statistics of BatchNorm.
        iterations: Steps of the attack.
        rate: Of these, at first.
        restarts: Beginnings.
        generator: A CPU generator.
        device: Where to compute.

    Raises:
        ConfigError: A number outside its range.
        DataError: ``data`` are no images, the network does not take them, no label, or one that names no class.
        ParamsError: A state dict of another network.

    Cost: ``restarts * iterations`` forward and backward passes of n images.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(300))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0, width=32)
        >>> recipe, stream = fm.models.recipe("mlp"), torch.Generator().manual_seed(0)
        >>> params = fm.train(model, model.state_dict(), digits, recipe=recipe, epochs=10, generator=stream).params
        >>> found = fm.privacy.invert_model(
        ...     model, params, digits, labels=torch.arange(10), iterations=100, generator=stream
        ... )
        >>> pixels = (found.images * 255).round().to(torch.uint8)
        >>> drawn = dataclasses.replace(digits, images=pixels, labels=found.labels)
        >>> fm.predict(model, params, drawn).argmax(1).tolist()
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    check_number("norms", norms, 0)
    check_params([params])
    canvas = _Canvas(model, params, data, device)
    labels = canvas.labels(labels, len(labels))
    seen: list[Tensor] = []
    for layer in canvas.network.modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.register_forward_pre_hook(lambda norm, given: seen.append(_beside(norm, given[0])))

    def unlike(x: Tensor) -> Tensor:
        seen.clear()
        cost = F.cross_entropy(canvas.network(x), labels)
        return cost + norms * torch.stack(seen).sum() if seen else cost

    return canvas.drawn(
        unlike, labels, total_variation=total_variation, iterations=iterations, rate=rate, restarts=restarts,
        generator=generator,
    )  # fmt: skip


_LEAST = 1e-30
"""Of a squared norm: of pixels that give no gradient, so that its root has one."""


class _Canvas:
    """Images that are being drawn for a network.

    Attributes:
        network: A copy that holds the parameters, in eval mode and float32.
    """

    def __init__(
        self, model: nn.Module, params: Mapping[str, Tensor], data: Images, device: torch.device | str
    ) -> None:
        if type(data) is not Images or data.loss is not None:
            raise DataError(f"{data.name} holds no labelled images of uint8 pixels; give fm.data.Images")
        self.data, self.device = data, torch.device(device)
        self.network = load(model, params, device).float()
        blank = torch.zeros(1, *data.shape, dtype=torch.uint8, device=self.device)
        with torch.no_grad():
            scores(self.network, data, blank, labelled=True)
        self.low, self.high = (
            data.normalise(torch.full_like(blank, value)).expand(1, *data.shape) for value in (0, 255)
        )

    def labels(self, given: Tensor, count: int) -> Tensor:
        """``given`` on the device, refused where they are not ``count`` classes."""
        if given.dtype != torch.int64 or given.shape != (count,) or not count:
            raise DataError(
                f"labels are {given.dtype} {tuple(given.shape)}; expected int64 ({count or 'n'},), a class an image"
            )
        wrong = (given < 0) | (given >= len(self.data.classes))
        if bool(wrong.any()):
            raise DataError(
                f"label {int(given[wrong][0])} names none of the {len(self.data.classes)} classes of {self.data.name}"
            )
        return given.to(self.device)

    def drawn(
        self, objective: Callable[[Tensor], Tensor], labels: Tensor, *, total_variation: float, iterations: int,
        rate: float, restarts: int, generator: torch.Generator,
    ) -> Reconstruction:  # fmt: skip
        """The images that make ``objective`` of normalised pixels low, and the prior."""
        for what, given, least in (
            ("iterations", iterations, 1), ("rate", rate, 0), ("total_variation", total_variation, 0),
        ):  # fmt: skip
            check_number(what, given, least)
        best, lowest = None, torch.inf
        with counted("inverting", restarts * iterations) as advance:
            for _ in range(restarts):
                x = torch.randn(len(labels), *self.data.shape, generator=generator).to(self.device).requires_grad_()
                optimizer = torch.optim.Adam([x], lr=rate)
                falls = [int(share * iterations) for share in (3 / 8, 5 / 8, 7 / 8)]
                schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, falls)
                for _ in range(iterations):
                    value = objective(x) + total_variation * _variation(x)
                    x.grad = _gradient(value, [x], again=False)[0].sign()
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        x.copy_(torch.maximum(torch.minimum(x, self.high), self.low))
                    advance(1)
                if float(value.detach()) < lowest:
                    best, lowest = x.detach(), float(value.detach())
        if best is None:
            raise ConfigError(
                "the objective of the inversion is not a finite number; give a recipe by which this network learns, "
                "or parameters that training left finite"
            )
        shares = (best - self.low) / (self.high - self.low)
        return Reconstruction(shares.clamp(0, 1).cpu(), labels.cpu(), lowest)


def _trained(
    network: nn.Module, weights: Mapping[str, Tensor], x: Tensor, labels: Tensor, recipe: Recipe, epochs: int
) -> list[Tensor]:
    """What training takes off ``weights``, as a function of ``x`` that can be differentiated."""
    norms = [layer for layer in network.modules() if isinstance(layer, _BatchNorm)]
    now, velocity = dict(weights), [torch.zeros_like(w) for w in weights.values()]
    buffers = dict(network.named_buffers())
    batches = -(-len(x) // recipe.batch_size)
    steps = [rows for _ in range(epochs) for rows in torch.arange(len(x), device=x.device).tensor_split(batches)]
    for step, rows in enumerate(steps):
        for norm in norms:  # a single image has no variance, and training then takes the running one
            norm.train(len(rows) > 1)
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        logits = functional_call(network, {**now, **buffers}, (x[rows],))
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=recipe.label_smoothing)
        gradient = _gradient(loss, now.values(), again=True)
        gradient = [g + recipe.weight_decay * w for g, w in zip(gradient, now.values(), strict=True)]
        velocity = [recipe.momentum * v + g for v, g in zip(velocity, gradient, strict=True)]
        if recipe.nesterov:
            gradient = [g + recipe.momentum * v for v, g in zip(velocity, gradient, strict=True)]
        rate = recipe.rate((step + 0.5) / len(steps))
        moves = gradient if recipe.nesterov else velocity
        now = {name: w - rate * move for (name, w), move in zip(now.items(), moves, strict=True)}
    return [w - now[name] for name, w in weights.items()]


def _gradient(value: Tensor, of: Iterable[Tensor], *, again: bool) -> list[Tensor]:
    """The gradient of ``value``; ``again`` if it is itself to be differentiated."""
    try:
        return list(torch.autograd.grad(value, list(of), create_graph=again, materialize_grads=True))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise ParamsError(
            f"this network has no {'gradient' if again else 'second derivative'}, which inversion needs: "
            f"{' '.join(str(error).split())}"
        ) from error


def _inner(a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def _variation(x: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels; of one pixel, 0."""
    across, down = (x[..., 1:] - x[..., :-1]).abs(), (x[..., 1:, :] - x[..., :-1, :]).abs()
    return (across.sum() + down.sum()) / max(1, across.numel() + down.numel())


def _beside(norm: _BatchNorm, given: Tensor) -> Tensor:
    """How far mean and variance of what a BatchNorm is given are from those that it keeps."""
    others = [axis for axis in range(given.dim()) if axis != 1]
    variance, mean = torch.var_mean(given, others, correction=0)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    apart: Tensor = (mean - norm.running_mean).norm() + (variance - norm.running_var).norm()
    return apart
