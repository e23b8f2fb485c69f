"""Maps of units that are not permutations: each unit of the result is a mixture of units of the source."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedmerge.spec.axes import Axis, Segment

Maps = Mapping[str, Tensor]
"""Group -> matrix, float64 ``(n_out, n_in)``: unit i of the result is ``sum_j X[i, j]`` times unit j of the source."""


def degree(segment: Segment) -> int:
    """Number of groups that a segment is a product of."""
    return sum(factor.group is not None for factor in segment)


def mix(tensor: Tensor, axes: tuple[Axis, ...], x: Maps, sizes: Mapping[str, int] | None = None) -> Tensor:
    """``tensor`` with the matrices applied to all its axes: what `permute` does, for mixtures.

    Groups without a matrix stay as they are; they, and so ``sizes``, are then the tensor's own numbers of units.
    """
    sizes = sizes or {}
    for dim, axis in enumerate(axes):
        if not any(factor.group in x for segment in axis for factor in segment):
            continue
        lengths = [
            [f.size if f.group is None else x[f.group].shape[1] if f.group in x else sizes[f.group] for f in segment]
            for segment in axis
        ]
        parts = torch.split(tensor, [math.prod(factors) for factors in lengths], dim)
        mixed = []
        for part, segment, factors in zip(parts, axis, lengths, strict=True):
            part = part.reshape(*tensor.shape[:dim], *factors, *tensor.shape[dim + 1 :])
            for k, factor in enumerate(segment):
                if factor.group is not None and factor.group in x:
                    part = torch.tensordot(x[factor.group], part, ([1], [dim + k])).movedim(0, dim + k)
            mixed.append(part.flatten(dim, dim + len(segment) - 1))
        tensor = torch.cat(mixed, dim)
    return tensor
