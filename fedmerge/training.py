"""The only loops over batches: training, evaluation and prediction of a state dict."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge._arguments import checked
from fedmerge._fit import check_labels, check_training, frozen_of, shifts_of
from fedmerge._forward import scores
from fedmerge._loading import load, with_versions
from fedmerge._loss import step_loss
from fedmerge._optimizer import optimizer_of, reach, remembered, remind
from fedmerge.adversarial import PGD
from fedmerge.clipping import quiet
from fedmerge.data import Images, augment
from fedmerge.data.losses import IGNORED, loss_of, right
from fedmerge.dp_sgd import DPSGD, poisson
from fedmerge.errors import ConfigError, DataError, FedmergeError
from fedmerge.models import Recipe
from fedmerge.progress import counted, steps
from fedmerge.streams import dropout_stream
from fedmerge.threads import helpful_threads


class DivergedError(FedmergeError):
    """Training whose loss is no longer a finite number."""


@dataclass(frozen=True)
class Training:
    r"""What training gives.

    Attributes:
        params: The trained state dict, on the CPU; the input's keys, shapes and dtypes.
        losses: Mean loss over the images of each epoch, as they were seen, without the proximal term.
        accuracies: Share of the images of each epoch that were classified as labelled, as they were seen; NaN where no
            answer is right or wrong.
        steps: Optimiser steps taken.
        seconds: Wall time.
        reach: Sum of the weights h_j with which the gradients of the steps moved the parameters, in
            :math:`w = w_0 - \sum_j h_j g_j`: steps times learning rate for plain SGD, and with momentum about
            1 / (1 - momentum) times that. 0 for Adam, whose steps are no such sum.
        optimizer_state: What the optimiser remembers, on the CPU, if it was asked for: ``"PARAMETER/SLOT"`` -> tensor.
    """

    params: dict[str, torch.Tensor]
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    steps: int
    seconds: float
    reach: float = 0.0
    optimizer_state: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class Answers:
    """What a network says of each image.

    Attributes:
        predicted: The class of the largest probability, int64 ``(N,)``.
        confidence: That probability, float64 ``(N,)``.
    """

    predicted: torch.Tensor
    confidence: torch.Tensor


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and share of right answers over ``examples`` images; ``answers`` one by one if asked for.

    The loss is the cross-entropy, over positions where labels have some, or the data's own. The accuracy is NaN where
    no answer is right or wrong.
    """

    loss: float
    accuracy: float
    examples: int
    answers: Answers | None = field(default=None, compare=False, repr=False)

    @property
    def merit(self) -> float:
        """What to choose by: the accuracy, or where there is none, the loss negated."""
        return -self.loss if math.isnan(self.accuracy) else self.accuracy


@checked
@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: nn.Module,
    params: Mapping[str, torch.Tensor],
    data: Images,
    *,
    recipe: Recipe,
    epochs: int,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
    teacher: torch.Tensor | None = None,
    labels_weight: float = 1.0,
    temperature: float = 1.0,
    proximal_mu: float = 0.0,
    correction: Mapping[str, torch.Tensor] | None = None,
    frozen: Mapping[str, torch.Tensor] | None = None,
    private: DPSGD | None = None,
    attack: PGD | None = None,
    optimizer_state: Mapping[str, torch.Tensor] | None = None,
    on_epoch: Callable[[int, float, float], None] | None = None,
) -> Training:
    r"""Train the network ``model`` from the state dict ``params``; neither is modified.

    Each step lowers, over a batch of images with labels y and, if given, teacher probabilities q,

    .. math:: \lambda \, \mathrm{CE}(y, p_1) + (1 - \lambda) \, T^2 \, \mathrm{KL}(q \,\|\, p_T)
              + \tfrac{\mu}{2} \|w - w_0\|^2 + \langle c, w \rangle,

    where :math:`p_T` is the softmax of the logits divided by T, :math:`\lambda` is ``labels_weight``, T is
    ``temperature`` (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531),
    :math:`\mu` is ``proximal_mu`` and :math:`w_0` are the parameters given (FedProx: Li et al., "Federated
    Optimization in Heterogeneous Networks", MLSys 2020, arXiv:1812.06127, eq. 2). c is ``correction``: a constant on
    every gradient, as SCAFFOLD's control variates are.

    An image without a label (-1) learns from the teacher alone: of the first two terms it has the second, and
    :math:`\lambda` is 0.

    An epoch is cut into ceil(n / batch_size) batches of equal size, give or take one image, so there is no
    small last batch. The schedule runs over the steps of this call. A batch of one image uses BatchNorm's
    running statistics and leaves them alone, for it has none of its own. Parameters that the template freezes
    (``requires_grad`` false) stay as they are.

    Args:
        model: The template; its own weights do not matter.
        params: The state dict to start from.
        data: The images and labels to learn from; with a teacher, labels may be missing (-1).
        recipe: Optimiser, batch size, schedule, augmentation.
        epochs: Passes over ``data``; 0 returns ``params``.
        generator: A CPU generator; it drives the order of the images, augmentation and dropout.
        device: Where to compute.
        teacher: Float ``(n, classes)``, a probability of each class for each image of ``data``, at the same
            temperature: softmax(teacher logits / temperature).
        labels_weight: 1 learns from labels only, 0 from the teacher only.
        temperature: T above.
        proximal_mu: Pull towards ``params``; 0 for none.
        correction: Parameter name -> what is added to its gradient in every step; names left out are 0.
        frozen: Parameter name -> bool, of its shape: where it is true, the weight stays as it is given, whatever
            momentum, decay or a correction would make of it; see :func:`fedmerge.freezing.frozen_weights`.
        private: Gradients of single images are clipped, added up and blurred (DP-SGD), and a step takes each image with
            probability 1 / ceil(n / batch_size) instead of a fixed part of them; ``losses`` and ``accuracies`` are not
            blurred, so they are not to be given away. :meth:`fedmerge.DPSGD.epsilon` says what that spends. Of labels
            by position each row has its own mean, and a loss of the data's own is asked row by row.
        attack: Every batch is attacked before its step (adversarial training), and ``losses`` and ``accuracies`` are
            those of the attacked images; see :class:`fedmerge.PGD`. Not with ``private``.
        optimizer_state: What the optimiser remembers of a training that this one goes on with, see :class:`Training`;
            ``{}`` to begin one that another shall go on with. Its state is then returned.
        on_epoch: Called with (epoch from 1, mean loss, accuracy) after each epoch.

    Returns:
        The trained state dict and how it went.

    Raises:
        DivergedError: A loss was not finite; names the step.
        ConfigError: A number outside its range, or a teacher that does not fit.
        DataError: There are no images, or a label that is learned from names no class.
        ParamsError: ``params`` is not a state dict of ``model``, ``correction`` or ``frozen`` does not fit its
            parameters, or the network mixes the images of a batch (BatchNorm) and cannot be trained in private.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(500))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> done = fm.train(
        ...     model, model.state_dict(), digits, recipe=fm.models.recipe("mlp"), epochs=5,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> done.losses[-1] < done.losses[0], done.accuracies[-1] > 0.8
        (True, True)
    """
    check_training(data, epochs, teacher, labels_weight, temperature, proximal_mu)
    if attack is not None:
        attack.check(data, private=private is not None)
    known = data.labelled if teacher is not None else data
    partly = len(known) < len(data)
    if labels_weight:
        check_labels(known if len(known) else data)
    started = time.perf_counter()
    device = torch.device(device)
    data = data.to(device)
    module = load(model, params, device).train()
    if recipe.channels_last:
        module.to(memory_format=torch.channels_last)
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    anchors = [weight.detach().clone() for weight in weights] if proximal_mu else []
    shifts = shifts_of(module, correction or {}, device)
    kept = [(weight, where, weight.detach().clone()) for weight, where in frozen_of(module, frozen or {}, device)]
    optimizer = optimizer_of(recipe, weights)
    names = [name for name, weight in module.named_parameters() if weight.requires_grad]
    if optimizer_state:
        remind(optimizer, names, optimizer_state)
    targets = None if teacher is None else teacher.to(device, torch.float32)
    batches = math.ceil(len(data) / recipe.batch_size)
    last, step = batches * epochs, 0
    losses, accuracies = [], []
    network, blurred = module, None
    if private is not None:
        blurred = private.attach(
            module, optimizer, expected=len(data) / batches, generator=generator,
            once=lambda network, rows: scores(network, data, data.images[[i % len(data) for i in rows]]),
        )  # fmt: skip
        network = blurred.network
    unheard = quiet() if private else nullcontext()
    few = helpful_threads(module, device)
    with dropout_stream(generator, device), unheard, few as batch, counted("training", last) as advance:
        for epoch in range(1, epochs + 1):
            sums, hits, seen = [], [], 0
            if private is not None:
                drawn: Iterable[torch.Tensor] = poisson(len(data), batches, generator)
            else:
                drawn = torch.randperm(len(data), generator=generator).to(device).tensor_split(batches)
            for rows in (each.to(device) for each in drawn):
                images, labels = data.images[rows], data.labels[rows]
                if recipe.augment and len(rows):
                    images = augment(images, generator)
                if recipe.channels_last and images.dim() == 4:
                    images = images.contiguous(memory_format=torch.channels_last)
                with _single_image(module, len(rows)):
                    if attack is not None:
                        images = attack.moved(network, data, images, labels, generator)
                    with batch(len(rows)):
                        logits = scores(network, data, images, labelled=bool(labels_weight))
                loss = step_loss(
                    data, logits, labels, None if targets is None else targets[rows], labels_weight=labels_weight,
                    temperature=temperature, smoothing=recipe.label_smoothing, partly=partly,
                    apart=private is not None,
                )  # fmt: skip
                if blurred is not None:
                    blurred.backward(loss, logits)
                else:
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                for weight, anchor in zip(weights, anchors, strict=False):  # no anchors, no pull
                    if weight.grad is not None:
                        weight.grad.add_(weight.detach() - anchor, alpha=proximal_mu)
                for weight, shift in shifts:
                    if weight.grad is not None:
                        weight.grad.add_(shift)
                # The rate of the middle of the step: neither the first nor the last step is wasted at 0.
                rate = recipe.rate((step + 0.5) / last)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                optimizer.step()
                for weight, where, value in kept:
                    weight.data.copy_(torch.where(where, value, weight.data))
                step += 1
                advance(1)
                seen += len(rows)
                mean = loss.detach().double()
                sums.append(mean * len(rows) if len(rows) else torch.zeros_like(mean))  # the mean of none is NaN
                hits.append(right(data, logits.detach(), labels, partly=partly))
            total = torch.stack(sums)  # read once an epoch: reading every step would stall a GPU
            if not total.isfinite().all():
                first = step - batches + 1 + int(total.isfinite().logical_not().nonzero()[0])
                raise DivergedError(
                    f"the loss is not finite at step {first} of {last} (epoch {epoch}) on {data.name}; "
                    f"lower the learning rate (peak {recipe.lr:g}) or check the initial weights"
                )
            losses.append(float(total.sum()) / max(seen, 1))
            accuracies.append(_share(hits))
            if on_epoch is not None:
                on_epoch(epoch, losses[-1], accuracies[-1])
    state = module.state_dict()
    trained = with_versions(
        {
            name: value.detach().to("cpu", params.get(name, value).dtype, copy=True).contiguous()
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        },
        state,
    )
    state_after = {} if optimizer_state is None else remembered(optimizer, names)
    seconds = time.perf_counter() - started
    return Training(trained, tuple(losses), tuple(accuracies), last, seconds, reach(recipe, last), state_after)


@checked
def evaluate(
    model: nn.Module,
    params: Mapping[str, torch.Tensor],
    data: Images,
    *,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
    answers: bool = False,
) -> Evaluation:
    """Mean loss and accuracy of the state dict ``params`` on ``data``, in eval mode, added up in float64.

    A loss of the data's own is asked batch by batch.

    With ``answers`` the same pass also says what the network answers to each image, and how sure it is.

    Raises:
        DataError: There are no images, or a label names no class.
        ParamsError: ``params`` is not a state dict of ``model``.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(500))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> found = fm.evaluate(model, model.state_dict(), digits)
        >>> found.examples, 2 < found.loss < 3  # untrained: about log(10)
        (500, True)
    """
    check_labels(data)
    if answers:
        data.check_labels()
    loss, hits = 0.0, []
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for logits, labels in _batches(model, params, data, batch_size, device, labelled=True):
        exact = logits if data.loss is not None else logits.double()
        loss += float(loss_of(data, exact, labels, reduction="sum"))
        hits.append(right(data, logits, labels))
        if answers:
            parts.append((logits.argmax(1).cpu(), exact.softmax(1).amax(1).cpu()))
    each = Answers(*map(torch.cat, zip(*parts, strict=True))) if answers else None
    count = int((data.labels != IGNORED).sum()) if data.loss is None else len(data)
    return Evaluation(loss / max(1, count), _share(hits), len(data), each)


@checked
def predict(
    model: nn.Module,
    params: Mapping[str, torch.Tensor],
    data: Images,
    *,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Logits, float32 ``(N, classes)`` on the CPU, of the state dict ``params`` on ``data``, in eval mode.

    For labels by position ``(N, T, classes)``; for data with a loss of their own whatever the network answers.

    Raises:
        DataError: There are no images.
        ParamsError: ``params`` is not a state dict of ``model``.

    Example:
        >>> digits = fm.data.load("digits").train.select(range(500))
        >>> model = fm.models.build("mlp", classes=10, in_shape=digits.shape, seed=0)
        >>> fm.predict(model, model.state_dict(), digits).shape
        torch.Size([500, 10])
    """
    parts = [logits.float().cpu() for logits, _ in _batches(model, params, data, batch_size, device)]
    return torch.cat(parts)


def _batches(
    model: nn.Module,
    params: Mapping[str, torch.Tensor],
    data: Images,
    batch_size: int,
    device: torch.device | str,
    *,
    labelled: bool = False,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(logits, labels) of each batch in order, on ``device``."""
    if not len(data):
        raise DataError(f"{data.name} holds no images; nothing to evaluate")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; at least 1 is needed")
    data = data.to(device)
    module = load(model, params, device)
    with torch.inference_mode(), helpful_threads(module, torch.device(device)) as batch:
        pairs = zip(torch.split(data.images, batch_size), torch.split(data.labels, batch_size), strict=True)
        for images, labels in steps("evaluating", pairs, -(-len(data) // batch_size)):
            with batch(len(images)):
                found = scores(module, data, images, labelled=labelled)
            yield found, labels


@contextmanager
def _single_image(module: nn.Module, count: int) -> Iterator[None]:
    """For a batch of one image, let BatchNorm use its running statistics."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)] if count == 1 else []
    for norm in norms:
        norm.eval()
    yield
    for norm in norms:
        norm.train()


def _share(hits: Sequence[tuple[torch.Tensor, int] | None]) -> float:
    """Right answers of all batches over all that were asked for; NaN where no answer is right or wrong."""
    known = [hit for hit in hits if hit is not None]
    return (
        int(torch.stack([count for count, _ in known]).sum()) / max(1, sum(n for _, n in known)) if known else math.nan
    )
