"""Tied tensors: which names of a network's parameters and buffers are one tensor."""

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from fedmerge._copies import same_numbers
from fedmerge.errors import ParamsError


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor.

    Names are one tensor if they hold one object, or the same view of the same memory.

    Raises:
        ParamsError: Two names share a part of their memory only, or see it transposed. A state dict holds both
            as if they were apart, and copying the network parts them, so no result could be right for both.
    """
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    seen: dict[object, str] = {}
    first = {name: seen.setdefault(same_numbers(tensor), name) for name, tensor in tensors.items()}
    memory: dict[int, list[str]] = {}
    for name in seen.values():
        if same_numbers(tensors[name]) != id(tensors[name]):
            memory.setdefault(tensors[name].untyped_storage().data_ptr(), []).append(name)
    for names in memory.values():
        for a, b in combinations(names, 2):
            if _overlap(tensors[a], tensors[b]):
                raise ParamsError(
                    f"{a!r} and {b!r} of {type(model).__name__} are different views of the same memory; keep one "
                    "parameter, and slice or transpose it where the network uses it"
                )
    return first


def check_ties(model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Refuse a state dict that gives one tensor of ``model`` two values: loading it would keep only the last.

    Raises:
        ParamsError: Names the tensor.
    """
    for name, first in first_names(model).items():
        if name != first and name in params and first in params and not torch.equal(params[name], params[first]):
            raise ParamsError(
                f"{first!r} and {name!r} are one tensor in {type(model).__name__}, but their values differ in these "
                "parameters; give both names the same values, or a network whose layers share nothing"
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two views of one memory have an element in common."""
    (low, end), (other_low, other_end) = (_span(a), _span(b))
    if end <= other_low or other_end <= low:
        return False
    taken = torch.zeros(max(end, other_end), dtype=torch.bool)
    taken.as_strided(a.shape, a.stride(), a.storage_offset()).fill_(True)
    return bool(taken.as_strided(b.shape, b.stride(), b.storage_offset()).any())


def _span(tensor: Tensor) -> tuple[int, int]:
    """First element of the memory that a view takes, and one past its last."""
    start = int(tensor.storage_offset())
    return start, start + 1 + sum(
        (int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
