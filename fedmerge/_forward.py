"""A batch of images through a network that may not take it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fedmerge._called import lies
from fedmerge._copies import duplicate
from fedmerge.data import Images
from fedmerge.errors import DataError, ParamsError

_UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


def answer(network: nn.Module, data: Images, images: Tensor) -> Any:
    """What ``network`` answers to ``images``, rows of ``data.images``, whatever that is.

    Raises:
        DataError: The network does not take these images.
    """
    return of_batch(network, data, data.normalise(images))


def of_batch(network: nn.Module, data: Images, batch: Any) -> Any:
    """As :func:`answer`, to a batch that is normalised."""
    try:
        return network(batch)
    except torch.OutOfMemoryError:
        raise
    except _UNFIT as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        given = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)]
        each = ", ".join(str(tuple(t.shape[1:])) for t in given)
        kinds = " and ".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in given))
        own = {t.dtype for t in network.parameters() if t.is_floating_point()} - {torch.float32}
        hint = f"; its weights are {', '.join(sorted(map(str, own)))}: give model.float()" if own else ""
        raise DataError(
            f"{_name(network)} does not take the images of {data.name}, {each} each, as {kinds}: {reason}{hint}"
        ) from error


def scores(
    network: nn.Module, data: Images, images: Tensor, *, labelled: bool = False, batch: Tensor | None = None
) -> Tensor:
    """As :func:`answer`, of a network that answers with a number a class: ``(B, classes)``, or ``(B, T, classes)``.

    Where the data have a loss of their own, with any numbers ``(B, ...)``.

    Args:
        network: Run as it is.
        data: How the images are normalised, and their classes.
        images: The batch, on the device of the network.
        labelled: Whether labels are compared with the answers, which takes a number for each class.
        batch: What the network gets; ``images`` normalised if None.

    Raises:
        DataError: The network does not take these images.
        ParamsError: It answers with something else than a row of numbers an image.
    """
    found: Tensor = answer(network, data, images) if batch is None else of_batch(network, data, batch)
    axes = found.dim() if data.loss is not None and isinstance(found, Tensor) else 1 + data.labels.dim()
    if (
        not isinstance(found, Tensor)
        or not 0 < found.dim() == axes
        or len(found) != len(images)
        or not found.is_floating_point()
    ):
        shown = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        each = "".join(f"{n}, " for n in (len(images), *data.labels.shape[1:]))
        raise ParamsError(
            f"{_name(network)} answers {len(images)} images of {data.name} with {shown}; expected a float "
            f"tensor ({each}classes): wrap the network so that it returns its logits"
        )
    if labelled and data.loss is None and found.shape[-1] < len(data.classes):
        raise ParamsError(
            f"{_name(network)} answers with {found.shape[-1]} numbers an image, but {data.name} has "
            f"{len(data.classes)} classes; give a network of as many outputs"
        )
    return found


def need_images(
    method: str, model: nn.Module | None, data: Images | None, *, reads: str = "units"
) -> tuple[nn.Module, Images]:
    """``model`` and ``data``, which ``method`` cannot do without.

    Args:
        method: What it is called in errors.
        model: The network.
        data: The images.
        reads: What the method reads of the network: its ``"units"``, also its ``"answers"``, which must be a row of
            numbers an image then, or also ``"labels"``, for each of which there must be such a number.

    Raises:
        ParamsError: One of them was not given, or the network answers in another form.
        DataError: There are no images, or the network does not take them.
    """
    if model is None or data is None:
        missing = " and ".join(name for name, given in (("model=", model), ("data=", data)) if given is None)
        raise ParamsError(
            f"{method} runs the networks on public images, but {missing} was not given; pass the network as model= "
            "and the images as data=, or choose a method that needs weights only"
        )
    if not len(data):
        raise DataError(f"{data.name} holds no images; {method} needs at least one")
    with torch.no_grad():
        network, first = duplicate(model).eval(), data.images[:1].to(lies(model))
        if reads == "units":
            answer(network, data, first)
        else:
            scores(network, data, first, labelled=reads == "labels")
    return model, data


def _name(network: nn.Module) -> str:
    """What messages call it: a network around another may have a ``goes_by``."""
    return str(getattr(network, "goes_by", type(network).__name__))
