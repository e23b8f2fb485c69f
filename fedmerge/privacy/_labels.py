"""Which classes were they? The labels behind an update, read off the last layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedmerge._arguments import checked
from fedmerge._check import check_number, check_params
from fedmerge._loading import check_state
from fedmerge._optimizer import reach
from fedmerge.errors import ConfigError, ParamsError
from fedmerge.models import Recipe


@checked
def recover_labels(
    model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, recipe: Recipe,
    count: int = 1, epochs: int = 1, clients: int = 1,
) -> Tensor:  # fmt: skip
    r"""The labels of the ``count`` images with which a network went from ``before`` to ``after``.

    The cross-entropy's gradient by the last bias, over images i with probabilities p and labels y, is

    .. math:: g_c = \tfrac1n \sum_i p_{ic} - \tfrac{n_c}{n},

    where :math:`n_c` counts the images of class c. Of one image exactly one entry is negative, that of its label. Of
    several, labels are handed out one by one, each to the class that lacks most if the network finds all classes alike
    likely, :math:`n_c = n (1 / C - g_c)`, as a fresh one does; where labels are smoothed by s, by
    :math:`g_c / (1 - s)`. Over several steps g is the mean of their gradients. A
    last layer without bias has the sums of its rows instead, which have the signs of g where features are positive, as
    after a ReLU; their scale is that of the negative ones.

    One image: Zhao, Mopuri, Bilen, "iDLG: Improved Deep Leakage from Gradients", 2020, arXiv:2001.02610. Several: as
    Wainakh et al., "User-Level Label Leakage from Gradients in Federated Learning", PoPETs 2022, arXiv:2105.09369, who
    first hand out by sign and estimate the scale, which is known here. Of 20 batches each of 4, 8 and 32 images all
    labels of CIFAR-10 were found with a fresh network (``mlp``, ``cnn``, ``lenet5``), and 87 to 100 % with one trained
    before; of MNIST, of which a trained network is sure, 97 to 100 % and 61 to 81 %.

    Args:
        model: The network; the last linear layer in it is taken for the last layer.
        before: The state dict that the client got.
        after: The state dict that it sent, or the mean of several.
        recipe: How the client trains; by SGD.
        count: How many images it holds.
        epochs: Its passes over them.
        clients: Of how many ``after`` is the mean; they hold equally many of the ``count`` images.

    Returns:
        Int64 ``(count,)``, ascending.

    Raises:
        ConfigError: A number below 1, or a recipe with Adam.
        ParamsError: A state dict of another network, no linear layer, or one that did not move or
            has no bias and fell for every class.

    Example:
        >>> from fedmerge.privacy import recover_labels
        >>> images = fm.data.load("digits").train.select([3, 5, 7])
        >>> model = fm.models.build("mlp", classes=10, in_shape=images.shape, seed=0, width=32)
        >>> before, recipe = model.state_dict(), fm.models.Recipe(momentum=0.0)
        >>> after = fm.train(model, before, images, recipe=recipe, epochs=1, generator=torch.Generator()).params
        >>> found = recover_labels(model, before, after, recipe=recipe, count=3)
        >>> found.tolist() == sorted(images.labels.tolist())
        True
    """
    steps = sgd_steps(recipe, count, epochs, clients)
    check_update(model, before, after)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ParamsError(f"{type(model).__name__} has no linear layer to read labels off; give labels=")
    weight, bias = (f"{layers[-1]}.{what}".lstrip(".") for what in ("weight", "bias"))
    name = bias if bias in before else weight
    moved = (before[name].cpu().double() - after[name].cpu().double()).flatten(1 if name == weight else 0)
    moved = moved.sum(1) if name == weight else moved
    there = moved < 0
    if not bool(there.any()):
        raise ParamsError(f"{name!r} did not move, so it tells no labels; give labels=, or the network as it was sent")
    if name == weight and bool(there.all()):
        raise ParamsError(f"{name!r} fell for every class, which no labels do; give labels=")
    # What is smoothed is spread evenly over the classes, as a fresh network's answers are.
    smoothed = reach(recipe, steps) * (1 - recipe.label_smoothing)
    whole = smoothed if name == bias else -float(moved[there].sum()) / float(1 - there.double().mean())
    wanted = count * (1 / len(moved) - moved / whole)
    counts = torch.zeros_like(wanted, dtype=torch.int64)
    for _ in range(count):
        counts[(wanted - counts).argmax()] += 1
    return torch.arange(len(moved)).repeat_interleave(counts)


def check_update(model: nn.Module, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    """Refuse what a network cannot have been before and after a training.

    Raises:
        ParamsError: Says which of both it is.
    """
    for which, params in (("before", before), ("after", after)):
        try:
            check_state(model, params)
        except ParamsError as error:
            raise ParamsError(f"{which}: {error}") from error
    check_params([before, after])


def sgd_steps(recipe: Recipe, count: int, epochs: int, clients: int) -> int:
    """The steps of ``epochs`` passes over ``count`` images, of which each of the clients holds as many.

    Raises:
        ConfigError: A number below 1, or a recipe with Adam.
    """
    check_number("count", count, 1)
    check_number("epochs", epochs, 1)
    check_number("clients", clients, 1)
    if recipe.optimizer != "sgd":
        raise ConfigError(
            f"the recipe trains by {recipe.optimizer}; the attack retraces steps of SGD: give such a recipe"
        )
    return epochs * -(-count // (recipe.batch_size * clients))
