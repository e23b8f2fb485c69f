"""Maps of units that are not permutations: each unit of the result is a mixture of units of the source."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedmerge.spec._spec import Axis, Segment

Maps = Mapping[str, Tensor]
"""Group -> matrix, float64 ``(n_out, n_in)``: unit i of the result is ``sum_j X[i, j]`` times unit j of the source."""


def degree(segment: Segment) -> int:
    """Number of groups that a segment is a product of."""
    return sum(factor.group is not None for factor in segment)


def mix(tensor: Tensor, axes: tuple[Axis, ...], x: Maps) -> Tensor:
    """``tensor`` with the matrices applied to all its axes: what `permute` does, for mixtures."""
    for dim, axis in enumerate(axes):
        if not any(map(degree, axis)):
            continue
        sizes = [[f.size if f.group is None else x[f.group].shape[1] for f in segment] for segment in axis]
        parts = torch.split(tensor, [math.prod(size) for size in sizes], dim)
        mixed = []
        for part, segment, size in zip(parts, axis, sizes, strict=True):
            part = part.reshape(*tensor.shape[:dim], *size, *tensor.shape[dim + 1 :])
            for k, factor in enumerate(segment):
                if factor.group is not None:
                    part = torch.tensordot(x[factor.group], part, ([1], [dim + k])).movedim(0, dim + k)
            mixed.append(part.flatten(dim, dim + len(segment) - 1))
        tensor = torch.cat(mixed, dim)
    return tensor
