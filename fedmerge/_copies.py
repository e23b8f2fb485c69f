"""Copies of a network: as modules of its own, in which nothing reaches back to the original.

``copy.deepcopy`` alone does less than that. It refuses tensors that autograd made (the weight under the older weight
norm and under pruning, activations that were kept), parts two parameters that are one memory, and leaves functions
as they are, which may hold the network that they were made in: a copy whose ``forward`` or hook is such a function
would compute with the weights of the original.
"""

import copy
import functools
import types
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from fedmerge._tree import tensors
from fedmerge.errors import ParamsError

Memo = dict[int, Any]
"""The ``id`` of a part of a network -> what stands in its place in a copy."""

_PLAIN = (bool, int, float, str, type(None))


def duplicate(model: nn.Module) -> nn.Module:
    """``model`` on numbers of its own, in the mode in which it is. Parameters that share their numbers become one.

    Raises:
        ParamsError: It is compiled by TorchScript, has no weights yet, or holds what cannot be copied.
    """
    name = type(model).__name__
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise ParamsError(
            f"{name} is compiled by TorchScript, which hides what its layers do; give the network as it was before "
            "torch.jit.script or torch.jit.trace"
        )
    lazy = next((key for key, parameter in model.named_parameters() if is_lazy(parameter)), None)
    if lazy is not None:
        raise ParamsError(f"{name} has no weights yet: {lazy!r} is not initialised; run it on an input first")
    memory: dict[object, Tensor] = {}
    one: dict[object, Tensor] = {}
    memo: Memo = {}
    every = every_tensor(model)
    for tensor in every:
        memory.setdefault(same_numbers(tensor), tensor)
    shared = {same_numbers(tensor) for tensor in every if memory[same_numbers(tensor)] is not tensor}
    for tensor in every:
        numbers, kind = same_numbers(tensor), isinstance(tensor, nn.Parameter)
        if numbers in shared:
            if memory[numbers] is tensor:
                memory[numbers] = tensor.detach().clone()
            if (numbers, kind) not in one:
                one[numbers, kind] = instead(tensor, memory[numbers])
            memo[id(tensor)] = one[numbers, kind]
        elif not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        return clone(model, memo)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ParamsError(f"{name} cannot be copied: {reason}; give it without what copy.deepcopy refuses") from error


def clone(model: nn.Module, memo: Memo) -> nn.Module:
    """``model`` as modules of its own, with what stands in ``memo`` instead of its parts; ``memo`` is filled."""
    copied: nn.Module = copy.deepcopy(model, memo)
    made = set(map(id, memo.values()))
    for module in copied.modules():
        for name, value in list(vars(module).items()):
            if not _empty(value):
                new = _rebound(value, memo, made)
                if new is not value:
                    vars(module)[name] = new
    return copied


def _empty(value: object) -> bool:
    """Whether ``value`` holds nothing: a number, or one of the many dicts of hooks that a module has."""
    return type(value) in _PLAIN or (isinstance(value, dict) and not value)


def every_tensor(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers, and tensors that are mere attributes of a module."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for value in vars(module).values():
            if not (_empty(value) or value is module._modules):
                found.update((id(tensor), tensor) for tensor in tensors(value))
    return list(found.values())


def has_numbers(tensor: Tensor) -> bool:
    """Whether ``tensor`` has numbers."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def instead(tensor: Tensor, numbers: Tensor) -> Tensor:
    """``numbers`` as what ``tensor`` is: a parameter or none."""
    return nn.Parameter(numbers, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else numbers


def same_numbers(tensor: Tensor) -> object:
    """Equal for tensors that are one view of the same memory."""
    plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)
    if not plain or not has_numbers(tensor) or not tensor.numel():
        return id(tensor)
    return (tensor.device, tensor.dtype, tensor.data_ptr(), tensor.shape, tensor.stride())


def _rebound(value: Any, memo: Memo, made: set[int]) -> Any:
    """``value``, of a copy, with the copy's parts in place of those of the original that its functions hold.

    ``made`` are the ids of what the copy has of its own; each is looked into once.
    """
    if isinstance(value, types.FunctionType | functools.partial | tuple):
        return _moved(value, memo)
    if id(value) in made and not isinstance(value, nn.Module | Tensor):
        made.discard(id(value))
        inside = value if isinstance(value, dict | list | deque) else getattr(value, "__dict__", {})
        for key, entry in list(inside.items() if isinstance(inside, dict) else enumerate(inside)):
            new = entry if type(entry) in _PLAIN else _rebound(entry, memo, made)
            if new is not entry:
                inside[key] = new
    return value


def _moved(value: Any, memo: Memo) -> Any:
    """``value`` as the copy has it: a part of the network, or what holds some; itself if it holds none."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.FunctionType):
        compiled = getattr(value, "_torchdynamo_orig_callable", value)
        inner = _function(value, memo) if compiled is value else _moved(compiled, memo)
        return value if inner is compiled else inner
    if isinstance(value, types.MethodType):
        owner = _moved(value.__self__, memo)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        (function, *args), named = _all((value.func, *value.args), memo), _all(value.keywords, memo)
        return functools.partial(function, *args, **named)
    return _all(value, memo) if isinstance(value, tuple) or type(value) in (list, dict) else value


def _all(entries: Any, memo: Memo) -> Any:
    """A list, tuple or dict of what :func:`_moved` makes of its entries; itself if that is nothing new."""
    old = list(entries.values()) if isinstance(entries, dict) else list(entries)
    new = [_moved(entry, memo) for entry in old]
    if all(a is b for a, b in zip(new, old, strict=True)):
        return entries
    if isinstance(entries, dict):
        return dict(zip(entries, new, strict=True))
    return type(entries)(*new) if hasattr(entries, "_fields") else type(entries)(new)


def _function(function: types.FunctionType, memo: Memo) -> Callable[..., Any]:
    """``function`` closed over the parts of the copy; itself if it is closed over none of the original."""
    memo[id(function)] = function  # one that calls itself is closed over itself
    cells = function.__closure__ or ()
    held = tuple(cell.cell_contents for cell in cells if _full(cell))
    given = (held, function.__defaults__, function.__kwdefaults__)
    moved: list[Any] = [value and _all(value, memo) for value in given]
    if all(a is b for a, b in zip(moved, given, strict=True)):
        return function
    contents = iter(moved[0])
    closure = tuple(types.CellType(next(contents)) if _full(cell) else cell for cell in cells)
    new = types.FunctionType(function.__code__, function.__globals__, function.__name__, moved[1], closure)
    for cell in closure:
        if _full(cell) and cell.cell_contents is function:
            cell.cell_contents = new
    new.__kwdefaults__ = moved[2]
    new.__dict__.update(function.__dict__)
    memo[id(function)] = new
    return new


def _full(cell: types.CellType) -> bool:
    """Whether the name that ``cell`` stands for has a value."""
    try:
        return cell.cell_contents is cell.cell_contents
    except ValueError:
        return False
