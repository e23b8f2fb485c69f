"""What is no state dict of a network, or no argument: the tables of the tests of bad input."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.errors import FedmergeError

Params = dict[str, Tensor]


def _first(change: Callable[[Tensor], object]) -> Callable[[Params], object]:
    """The state dict with its first weight changed."""

    def broken(params: Params) -> object:
        name = next(n for n, t in params.items() if t.dim() > 1)
        return {**params, name: change(params[name].detach().clone())}

    return broken


def _sparse(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return weight.to_sparse()


def _quantised(weight: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


NO_STATE_DICTS: dict[str, Callable[[Params], object]] = {
    "nothing": lambda p: None,
    "a number": lambda p: 3,
    "a name": lambda p: "model.pt",
    "a list of tensors": lambda p: list(p.values()),
    "a tensor": lambda p: next(iter(p.values())),
    "a network": lambda p: nn.Linear(2, 2),
    "an empty dict": lambda p: {},
    "arrays": lambda p: {k: v.numpy() for k, v in p.items()},
    "lists": lambda p: {k: v.tolist() for k, v in p.items()},
    "a checkpoint around it": lambda p: {"state_dict": p, "epoch": 3},
    "names with a prefix": lambda p: {f"module.{k}": v for k, v in p.items()},
    "no names": lambda p: dict(enumerate(p.values())),
    "one tensor less": lambda p: dict(list(p.items())[1:]),
    "one tensor more": lambda p: {**p, "more": torch.zeros(2)},
    "a wider tensor": _first(lambda w: torch.cat([w, w])),
    "a narrower tensor": _first(lambda w: w[:, 1:]),
    "an empty tensor": _first(lambda w: w[:0]),
    "a tensor of one axis more": _first(lambda w: w[None]),
    "a flat tensor": _first(lambda w: w.flatten()),
    "a scalar": _first(lambda w: w.sum()),
    "an array": _first(lambda w: w.numpy()),
    "none for a tensor": _first(lambda w: None),
    "a number for a tensor": _first(lambda w: 1.0),
    "whole numbers": _first(lambda w: w.long()),
    "truth values": _first(lambda w: w > 0),
    "complex numbers": _first(lambda w: w.to(torch.complex64)),
    "a NaN": _first(lambda w: w.index_fill(0, torch.tensor([0]), torch.nan)),
    "an infinity": _first(lambda w: w.index_fill(0, torch.tensor([0]), -torch.inf)),
    "a sparse tensor": _first(_sparse),
    "a tensor without values": _first(lambda w: w.to("meta")),
    "a quantised tensor": _first(_quantised),
    "eight bits": _first(lambda w: w.to(torch.float8_e4m3fn)),
}

AS_GIVEN: dict[str, Callable[[Params], Params]] = {
    "half": lambda p: {k: v.half() if v.is_floating_point() else v for k, v in p.items()},
    "bfloat16": lambda p: {k: v.bfloat16() if v.is_floating_point() else v for k, v in p.items()},
    "double": lambda p: {k: v.double() if v.is_floating_point() else v for k, v in p.items()},
    "parameters": lambda p: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in p.items()},
    "strided": lambda p: {k: torch.stack([v, v], -1)[..., 0] for k, v in p.items()},
}
"""State dicts that are unusual, but fit."""

ODD: tuple[Any, ...] = (
    None, "nosuch", "", -1, 0, 2.5, float("nan"), float("-inf"), 1j, True, b"x", [], ["x"], (1, 2, 3), {}, {"x": 1},
    object(), np.zeros(3), torch.zeros(2), nn.Linear(2, 2), int,
)  # fmt: skip
"""Values to be given for anything."""

EXTREME: tuple[Any, ...] = (
    float("inf"), 5e-324, 1e308, 2**62, 10**30, -(10**30), 10**5000, np.float64("nan"), np.int64(-3), np.float32(2), False,
    torch.tensor(torch.nan), torch.tensor(2), (0.0, 0.0), (torch.nan, 1.0), "cuda:99", "identity",
)  # fmt: skip
"""Numbers at the ends of their types, and what could pass for a number."""


def ends_well(call: Callable[[], object]) -> str | None:
    """Call; what was wrong if it ended in an exception that is not one of ours, or without a word."""
    try:
        call()
    except FedmergeError as error:
        return None if len(str(error)) > 15 else f"says only {error!s:.30}"
    except Exception as error:
        return f"{type(error).__name__}: {error!s:.150}"
    return None
