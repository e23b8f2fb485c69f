"""Copies of a network on other numbers, its example input, and a process left as it was found."""

import contextlib
import inspect
import random
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fedmerge._copies import Memo, clone, every_tensor, has_numbers, instead, same_numbers
from fedmerge._tree import leaves, replace, tensors
from fedmerge.errors import SpecError

_ALONE = threading.RLock()


class Example(NamedTuple):
    """The arguments of one call of a network.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        tensors: The tensors in them, in order, on the CPU.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tensors: tuple[Tensor, ...]

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments that hold ``tensors`` in the places of the example's own."""
        given = iter(tensors)
        args, kwargs = replace((self.args, self.kwargs), Tensor, lambda _: next(given))
        return args, kwargs


def example(model: nn.Module, given: Any) -> Example:
    """``given`` as the arguments of ``model``.

    A tuple holds positional arguments. A dict holds arguments by name if ``forward`` takes its keys as names, and a
    list positional ones if ``forward`` needs more than one; otherwise they are, as anything else, the one argument.

    Raises:
        SpecError: There is a NumPy array in it.
    """
    args: tuple[Any, ...] = (given,)
    kwargs: dict[str, Any] = {}
    if isinstance(given, tuple) and not hasattr(given, "_fields"):
        args = given
    elif isinstance(given, Mapping) and given and _takes(model, (), given):
        args, kwargs = (), dict(given)
    elif isinstance(given, list) and not _takes(model, (given,), {}) and _takes(model, given, {}):
        args = tuple(given)
    arrays = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, np.ndarray)]
    if arrays:
        raise SpecError(
            f"the example input holds a NumPy array of shape {arrays[0].shape}, expected tensors: "
            "give torch.from_numpy(it)"
        )
    return Example(args, kwargs, tuple(on_cpu(tensor) for tensor in tensors((args, kwargs))))


def _takes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[Any, Any]) -> bool:
    """Whether ``forward`` of ``model`` can be called with these arguments."""
    try:
        inspect.signature(_core(model).forward).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def _core(model: nn.Module) -> nn.Module:
    name = wrapped(model)
    return model if name is None else _core(getattr(model, name))


class Shell(nn.Module):
    """A wrapper (``torch.compile``, ``DataParallel``) in name only: it calls what it wraps."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the wrapped module returns."""
        (inner,) = self.children()
        return inner(*args, **kwargs)


def wrapped(module: nn.Module) -> str | None:
    """The name under which ``module``, a mere wrapper, holds the network; None for what computes itself."""
    if isinstance(getattr(module, "_orig_mod", None), nn.Module):
        return "_orig_mod"
    return "module" if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)) else None


def frozen_copy(model: nn.Module, *, where_it_is: bool = False) -> nn.Module:
    """``model`` in eval mode, on the CPU or where it is, as modules of its own on the same numbers.

    Parameters that share their numbers become one, wrappers shells, and what is on the meta device is drawn.

    Raises:
        SpecError: It has no weights yet, or cannot be copied.
    """
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise SpecError(
                f"{type(model).__name__} has no weights yet: {name!r} is not initialised; run it on an input first"
            )
    one: dict[Any, Tensor] = {}
    memo: Memo = {}
    for tensor in every_tensor(model):
        numbers = (isinstance(tensor, nn.Parameter), same_numbers(tensor))
        if numbers not in one:
            one[numbers] = instead(tensor, tensor.detach() if where_it_is else on_cpu(tensor))
        memo[id(tensor)] = one[numbers]
    try:
        return evaluated(model, memo)
    except Exception as error:
        raise SpecError(
            f"{type(model).__name__} cannot be copied: {first_line(error)}; give it without what copy.deepcopy refuses"
        ) from error


def evaluated(model: nn.Module, memo: Memo) -> nn.Module:
    """``model`` in eval mode, as modules of its own, with what stands in ``memo`` instead of its tensors."""
    memo = dict(memo)
    for module in reversed(list(model.modules())):
        name = wrapped(module)
        if name is not None:
            memo[id(module)] = Shell(name, clone(getattr(module, name), memo))
    copied = clone(model, memo)
    for module in copied.modules():
        module.training = False  # not by ``eval``, which may be overridden to change weights
    return copied


def release(model: nn.Module) -> None:
    """Let go of the numbers of a copy that lives on as cyclic garbage until Python next collects it."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)


def on_cpu(tensor: Tensor) -> Tensor:
    """``tensor`` on the CPU, outside of autograd; one that has no numbers gets some."""
    if not has_numbers(tensor):
        return drawn(tensor)
    tensor = tensor.detach()
    return (tensor.clone() if tensor.is_inference() else tensor).cpu()


def drawn(tensor: Tensor) -> Tensor:
    """Numbers for ``tensor`` as of a fresh network: weights on the scale of their inputs, vectors near 1."""
    generator = torch.Generator().manual_seed(tensor.numel())
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    found = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
    inputs = tensor.numel() // max(1, tensor.shape[0]) if tensor.dim() else 1
    found = found + 0.5 if tensor.dim() < 2 else (2 * found - 1) * (3 / max(1, inputs)) ** 0.5
    return found.to(tensor.dtype)


def first_line(error: BaseException) -> str:
    """What kind of error it is and the first line of what it says."""
    said = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


@contextlib.contextmanager
def untouched() -> Iterator[None]:
    """Whatever a network does to the state of the process is undone, and whatever the caller set does not matter.

    One thread at a time: that state is everyone's, and so is what ``torch.export`` notes of a network.
    """
    with _ALONE:
        yield from _untouched()


def _untouched() -> Iterator[None]:
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (a network may draw from it)
    dtype, threads, fast = torch.get_default_dtype(), torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.is_autocast_enabled("cpu"):
            stack.enter_context(torch.autocast("cpu", enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.backends.mha.set_fastpath_enabled(False)  # one fused operator, of which no axis is understood
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.set_default_dtype(dtype)
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            random.setstate(python)
            np.random.set_state(legacy)  # noqa: NPY002
