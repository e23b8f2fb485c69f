"""Numbers as integers modulo 2^64, whose sums are exact and tell nothing once a random integer is added."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge.errors import ParamsError
from fedmerge.types import Params

Words = NDArray[np.uint64]
"""Integers modulo 2^64, shape ``(n,)``."""

_FRACTION = 28  # bits behind the point: a float32 weight near 1/16 keeps all of its 24


def encode(params: Params, weight: int, parties: int) -> Words:
    """The numbers of ``params`` times ``weight``, and ``weight`` itself as the last of them.

    Each number is rounded to a multiple of 2^-28 before it is multiplied, so the sum of several parties' words is the
    sum of those multiples exactly, whatever its order.

    Args:
        params: Tensors of any real dtype, read in float64.
        weight: A positive integer, for example the number of images.
        parties: How many may be added up: there is room for so many numbers of this size.

    Raises:
        ParamsError: A number that is not finite, or for whose sum there is no room; a weight that is none.
    """
    check_counts([weight], 1)
    if weight * parties >= 2**62:
        raise ParamsError(f"weight {weight} of {parties} parties leaves no room for numbers; give a smaller one")
    most = 2**63 / (weight * parties)
    words = []
    for name, tensor in params.items():
        scaled = np.rint(tensor.detach().cpu().to(torch.float64).numpy().ravel() * 2.0**_FRACTION)
        if not (np.abs(scaled) < most).all():  # NaN is not, either
            largest = float(np.abs(scaled).max()) / 2**_FRACTION
            raise ParamsError(
                f"tensor {name!r} holds {largest:.3g}; a masked sum of {parties} networks of weight {weight} has room "
                f"for numbers below {most / 2**_FRACTION:.3g}"
            )
        words.append(scaled.astype(np.int64) * weight)
    return np.concatenate([*words, np.array([weight], dtype=np.int64)]).view(np.uint64)


def check_counts(weights: Sequence[int], n: int) -> None:
    """Refuse weights of ``n`` terms that are no positive whole numbers.

    Raises:
        ParamsError: Says what was given.
    """
    if len(weights) != n or not all(isinstance(weight, Integral) and weight > 0 for weight in weights):
        raise ParamsError(
            f"weights {list(weights)} of {n} terms of a masked sum; give whole numbers from 1, such as numbers of "
            "images"
        )


@dataclass(frozen=True)
class Total:
    """What a sum of encoded networks says.

    Attributes:
        mean: The weighted mean; integers are rounded.
        weight: The sum of the weights.
    """

    mean: dict[str, Tensor]
    weight: int


def decode(words: Words, like: Params) -> Total:
    """The weighted mean that a sum of :func:`encode` stands for, with the shapes and dtypes of ``like``.

    Raises:
        ParamsError: The words are not as many as such a sum has, or their weight is not positive.
    """
    numbers = words.view(np.int64)
    count, weight = sum(tensor.numel() for tensor in like.values()), int(numbers[-1]) if len(numbers) else 0
    if len(numbers) != count + 1 or weight < 1:
        raise ParamsError(f"a sum of {len(numbers)} words and weight {weight}; expected {count + 1} and at least 1")
    means = torch.from_numpy(numbers[:-1] / (weight * 2.0**_FRACTION))
    mean, at = {}, 0
    for name, tensor in like.items():
        part = means[at : at + tensor.numel()].reshape(tensor.shape)
        mean[name] = (part if tensor.is_floating_point() else part.round()).to(tensor.dtype)
        at += tensor.numel()
    return Total(mean, weight)


def size(like: Mapping[str, Tensor]) -> int:
    """How many words :func:`encode` makes of such tensors."""
    return sum(tensor.numel() for tensor in like.values()) + 1
