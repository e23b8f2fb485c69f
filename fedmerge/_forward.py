"""A batch of images through a network that may not take it."""

import torch
from torch import Tensor, nn

from fedmerge.data import Images
from fedmerge.errors import DataError, ParamsError

_UNFIT = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


def scores(network: nn.Module, data: Images, images: Tensor, *, labelled: bool = False) -> Tensor:
    """What ``network`` answers to ``images`` of ``data``, uint8 ``(B, C, H, W)``: a number a class, ``(B, classes)``.

    Args:
        network: Run as it is.
        data: How the images are normalised, and their classes.
        images: The batch, on the device of the network.
        labelled: Whether labels are compared with the answers, which takes a number for each class.

    Raises:
        DataError: The network does not take these images.
        ParamsError: It answers with something else than a row of numbers an image.
    """
    batch = data.normalise(images)
    try:
        found: Tensor = network(batch)
    except torch.OutOfMemoryError:
        raise
    except _UNFIT as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{type(network).__name__} does not take the images of {data.name}, {tuple(images.shape[1:])} "
            f"each, as float32: {reason}"
        ) from error
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(images) or not found.is_floating_point():
        shown = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ParamsError(
            f"{type(network).__name__} answers {len(images)} images of {data.name} with {shown}; expected a float "
            f"tensor ({len(images)}, classes): wrap the network so that it returns its logits"
        )
    if labelled and found.shape[1] < len(data.classes):
        raise ParamsError(
            f"{type(network).__name__} answers with {found.shape[1]} numbers an image, but {data.name} has "
            f"{len(data.classes)} classes; give a network of as many outputs"
        )
    return found
