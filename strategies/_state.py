"""What a strategy carries from round to round: as arrays for a checkpoint, and what of it changed."""

import hashlib
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor, nn

from fedmerge.errors import RoundError

_GROUPS = (list, tuple, set, frozenset, deque)


def named(cls: type, what: str) -> list[str]:
    """The names in the attribute ``what`` of the class and all that it is built of."""
    return sorted({name for base in cls.__mro__ for name in vars(base).get(what, ())})


def arrays(strategy: object, attributes: list[str]) -> dict[str, np.ndarray]:
    """The arrays in these attributes, by ``attribute:key`` of a dict and ``attribute[number]`` of a list.

    Raises:
        RoundError: An attribute that is neither, or that holds something else than arrays of numbers.
    """
    found: dict[str, np.ndarray] = {}
    for attribute in attributes:
        value = getattr(strategy, attribute, None)
        if isinstance(value, ArrayRecord):
            value = {key: array.numpy() for key, array in value.items()}
        if isinstance(value, list | tuple):
            items = {f"{attribute}[{number}]": one for number, one in enumerate(value)}
        elif isinstance(value, Mapping | None) and all(isinstance(key, str) for key in value or ()):
            items = {f"{attribute}:{key}": one for key, one in (value or {}).items()}
        else:
            items = {attribute: None}
        for name, one in items.items():
            array = one.detach().cpu().numpy() if isinstance(one, Tensor) else np.asarray(one)
            if array.dtype.kind not in "biuf":
                what = type(value if one is None else one).__name__
                raise RoundError(
                    f"strategy {type(strategy).__name__} keeps {name!r}, a {what}; a checkpoint holds dicts (by str) "
                    "and lists of arrays of numbers: make it one"
                )
            found[name] = array
    return found


def restore(strategy: object, state: Mapping[str, np.ndarray]) -> None:
    """Set the attributes of which :func:`arrays` gave ``state``."""
    grouped: dict[str, dict[str, np.ndarray]] = {}
    lists: dict[str, dict[int, np.ndarray]] = {}
    for flat, array in state.items():
        attribute, colon, key = flat.partition(":")
        if colon:
            grouped.setdefault(attribute, {})[key] = array
        else:
            attribute, _, number = flat.removesuffix("]").rpartition("[")
            lists.setdefault(attribute, {})[int(number)] = array
    for attribute, items in grouped.items():
        if attribute == "current_arrays":  # FedAvgM keeps its own, unrounded global network
            setattr(strategy, attribute, ArrayRecord({key: Array(array) for key, array in items.items()}))
        else:
            setattr(strategy, attribute, items)
    for attribute, numbered in lists.items():
        setattr(strategy, attribute, [numbered[number] for number in sorted(numbered)])


def marks(strategy: object, but: list[str]) -> dict[str, Any]:
    """Attribute -> what tells its contents from others, but those named; mutable ones of its class too."""
    found = {}
    for base in reversed(type(strategy).__mro__):
        found.update({k: v for k, v in vars(base).items() if isinstance(v, list | dict | set | np.ndarray)})
    return {name: _mark(value) for name, value in {**found, **vars(strategy)}.items() if name not in but}


def _mark(value: Any, within: frozenset[int] = frozenset()) -> Any:
    """Equal for what holds the same numbers, wherever they are held."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        return repr(value)  # NaN is what it was
    if id(value) in within or (callable(value) and not isinstance(value, nn.Module)):
        return id(value)
    within |= {id(value)}
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).digest()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping):
        return [(repr(key), _mark(one, within)) for key, one in value.items()]
    if isinstance(value, _GROUPS):
        return [_mark(one, within) for one in value]
    params = getattr(type(value), "__dataclass_params__", None)
    frozen = params is not None and params.frozen
    return id(value) if frozen or not hasattr(value, "__dict__") else _mark(vars(value), within)
