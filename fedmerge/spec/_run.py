"""One run of a network on given numbers, repeatable in everything that it draws, and what it gives as numbers."""

import contextlib
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge._copies import Memo, every_tensor, instead
from fedmerge._tree import leaves
from fedmerge.spec.lifted import Lifted, wide
from fedmerge.spec.network import Example, evaluated, release


class Outputs(NamedTuple):
    """What a network gives.

    Attributes:
        values: Every tensor and number of it, in float64.
        discrete: Whether all of them are whole numbers.
    """

    values: list[Tensor]
    discrete: bool


def run(
    network: nn.Module, state: Mapping[str, Tensor], given: Example, inputs: Sequence[Tensor], lifted: bool
) -> Outputs:
    """What ``network`` gives on ``inputs`` when its tensors are ``state``, which stays as it is.

    A copy runs, so that nothing that the network does to itself reaches the next run, and random numbers begin anew.

    Args:
        network: A frozen copy; it is not run itself.
        state: Its parameters and buffers by name.
        given: Where the inputs stand among its arguments.
        inputs: Its tensors.
        lifted: Run in float64 throughout; otherwise in the precision of ``network`` and ``given``.
    """
    names = {id(tensor): name for name, tensor in (*network.named_parameters(), *network.named_buffers())}
    memo: Memo = {}
    for tensor in every_tensor(network):
        new = state[names[id(tensor)]] if id(tensor) in names else wide(tensor)
        new = new if lifted else new.to(tensor.dtype)
        memo[id(tensor)] = instead(tensor, new if isinstance(tensor, nn.Parameter) else new.clone())
    copied = evaluated(network, memo)
    numbers = [(wide(x) if lifted else x.to(own.dtype)).clone() for x, own in zip(inputs, given.tensors, strict=True)]
    args, kwargs = given.arguments(numbers)
    torch.default_generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (a network may draw from it)
    try:
        with (
            torch.no_grad(),
            torch.compiler.set_stance("force_eager"),
            Lifted() if lifted else contextlib.nullcontext(),  # type: ignore[no-untyped-call]
        ):
            result = copied(*args, **kwargs)
        found = [leaf for leaf in leaves(result) if isinstance(leaf, (Tensor, np.ndarray, int, float, complex))]
        return Outputs([_numbers(leaf) for leaf in found], all(map(_discrete, found)))
    finally:
        release(copied)


def _numbers(leaf: Any) -> Tensor:
    """``leaf`` as float64 numbers of its own."""
    tensor = torch.as_tensor(leaf).detach()
    if tensor.is_nested:
        tensor = tensor.to_padded_tensor(0.0)
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float64, copy=True)


def _discrete(leaf: Any) -> bool:
    tensor = torch.as_tensor(leaf)
    return not (tensor.is_floating_point() or tensor.is_complex())


def changes(before: Outputs, after: Outputs) -> list[float]:
    """Relative distance of every output from what it was; infinite where its shape, or what is finite, changed."""
    if [a.shape for a in before.values] != [b.shape for b in after.values]:
        return [float("inf")] * max(1, len(before.values))
    return [_distance(a, b) for a, b in zip(before.values, after.values, strict=True)]


def _distance(a: Tensor, b: Tensor) -> float:
    finite = a.isfinite()
    if not finite.all():
        same = torch.equal(
            a[~finite].nan_to_num(nan=0.25, posinf=2, neginf=-2), b[~finite].nan_to_num(nan=0.25, posinf=2, neginf=-2)
        )
        if not same or not b[finite].isfinite().all():
            return float("inf")
        a, b = a[finite], b[finite]
    scale = max(float(a.abs().max()), 1e-300) if a.numel() else 1.0  # its square may leave the range
    norm = torch.linalg.vector_norm
    distance = float(norm((a - b) / scale) / norm(a / scale).clamp_min(1e-300))
    return distance if distance == distance else float("inf")
